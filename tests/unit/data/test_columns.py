"""Which columns reach the model, which collator makes the batch, and which labels are refused."""

import datetime
import logging
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast, default_data_collator
from transformers.trainer_utils import RemoveColumnsCollator

from hfbridge.data.columns import (
    TensorColumnsCollator,
    check_labels,
    default_collator,
    keep_columns,
    keep_tensor_columns,
)
from hfbridge.errors import DataError
from hfbridge.models.signature import accepted_columns, label_names_of
from tests.tiny import PadRows, make_model, make_rows


class Wrapped(nn.Module):
    """Stands where a PEFT model stands: its own forward takes anything."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def get_base_model(self):
        return self.base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


class Plain(nn.Module):
    def forward(self, x, labels=None):
        return {"loss": x.sum()}


def rows_with(kind, **extra):
    rows = [{**row, **extra} for row in make_rows(kind, 3)]
    return datasets.Dataset.from_list(rows)


def kept(dataset, model, collator=None):
    names = label_names_of(model)
    return keep_columns(dataset, collator or PadRows(), model=model, label_names=names, split="train")


def test_label_names_are_those_of_the_forward():
    assert label_names_of(make_model("distilbert")) == ["labels"]
    assert label_names_of(make_model("bert-qa")) == ["start_positions", "end_positions"]


def test_accepted_are_the_parameters_of_forward_and_every_spelling_of_label():
    model = make_model("distilbert")
    accepted = accepted_columns(model, ["labels"])
    assert {"input_ids", "attention_mask", "labels", "label", "label_ids"} <= set(accepted)
    assert len(accepted) == len(set(accepted))


def test_label_names_of_the_user_are_accepted():
    assert "span" in accepted_columns(make_model("bert-qa"), ["span"])


def test_a_wrapped_model_is_asked_for_its_base():
    model = make_model("distilbert")
    assert accepted_columns(Wrapped(model), ["labels"]) == accepted_columns(model, ["labels"])
    assert "kwargs" not in accepted_columns(Wrapped(Plain()), [])


def test_other_columns_are_dropped_and_named_in_the_log(caplog):
    with caplog.at_level(logging.INFO, logger="hfbridge.data.columns"):
        dataset, collator = kept(rows_with("distilbert", text="a", idx=1), make_model("distilbert"))
    assert dataset.column_names == ["input_ids", "attention_mask", "label"]
    assert "does not take text, idx" in caplog.text
    assert isinstance(collator, PadRows)


def test_the_users_dataset_keeps_its_columns():
    given = rows_with("distilbert", text="a")
    kept(given, make_model("distilbert"))
    assert "text" in given.column_names


def test_nothing_is_logged_when_nothing_is_dropped(caplog):
    with caplog.at_level(logging.INFO, logger="hfbridge.data.columns"):
        kept(rows_with("distilbert"), make_model("distilbert"))
    assert not caplog.records


def test_no_column_that_the_model_takes_is_an_error_naming_both_sides():
    with pytest.raises(DataError) as caught:
        kept(datasets.Dataset.from_dict({"text": ["a"], "stars": [1]}), make_model("distilbert"))
    message = str(caught.value)
    for part in ("text, stars", "DistilBertForSequenceClassification", "input_ids", "map_function", "train"):
        assert part in message


def test_rows_that_are_no_dataset_lose_columns_while_collating():
    model = make_model("distilbert")
    rows = [{**row, "text": "a"} for row in make_rows("distilbert", 3)]
    same, collator = kept(rows, model)
    assert same is rows
    assert isinstance(collator, RemoveColumnsCollator)
    assert set(collator(rows)) == {"input_ids", "attention_mask", "labels"}
    assert "text" in rows[0]


def test_the_default_collator_is_the_native_one(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0}, "[PAD]")))
    assert default_collator(None) is default_data_collator
    assert default_collator(object()) is default_data_collator
    assert isinstance(default_collator(tokenizer), DataCollatorWithPadding)


# Labels.


def check(column, values, model, **features):
    dataset = datasets.Dataset.from_dict({column: values}, **features)
    check_labels(dataset, model=model, split="eval")


@pytest.mark.parametrize("column", ["label", "labels", "label_ids"])
def test_a_label_the_model_does_not_have_is_named(column):
    with pytest.raises(DataError) as caught:
        check(column, [0, 1, 2, 7, -1], make_model("distilbert"))
    for part in (f"'{column}'", "-1, 2, 7", "num_labels=2", "0 to 1", "eval"):
        assert part in str(caught.value)


def test_right_labels_and_the_ignored_one_pass():
    check("label", [0, 1, -100], make_model("distilbert"))
    check("labels", [[0, 4, -100], [], [3]], make_model("bert-token"))


def test_nested_labels_are_checked():
    with pytest.raises(DataError, match=r"holds 5\. With num_labels=5 they must be 0 to 4"):
        check("labels", [[0, 4], [5, -100]], make_model("bert-token"))


def test_missing_labels_are_not_counted_as_wrong():
    check("label", [0, None, 1], make_model("distilbert"))


@pytest.mark.parametrize("view", ["filter", "select", "select_columns", "shard"])
def test_rows_that_were_filtered_out_are_not_reported(view):
    dataset = datasets.Dataset.from_dict({"label": [0, 9, 1, 9], "input_ids": [[1]] * 4})
    if view == "filter":
        dataset = dataset.filter(lambda row: row["label"] < 2)
    elif view == "select":
        dataset = dataset.select([2, 0])
    elif view == "shard":
        dataset = dataset.shard(2, 0, contiguous=False)
    else:
        dataset = dataset.select([0, 2]).select_columns(["label"])
    check_labels(dataset, model=make_model("distilbert"), split="train")


def test_nested_rows_that_were_filtered_out_are_not_reported():
    dataset = datasets.Dataset.from_dict({"labels": [[0, 1], [9, 9], [4]]})
    model = make_model("bert-token")
    check_labels(dataset.select([2, 0]), model=model, split="train")
    check_labels(dataset.select(range(1)), model=model, split="train")
    with pytest.raises(DataError, match="holds 9"):
        check_labels(dataset.select([1]), model=model, split="train")


def test_rows_selected_from_the_middle_are_checked_alone():
    # A contiguous select is a slice: the flat values of the whole list column still lie behind it.
    dataset = datasets.Dataset.from_dict({"labels": [[9], [0, 1], [9, 9]]})
    check_labels(dataset.select(range(1, 2)), model=make_model("bert-token"), split="train")


def test_a_dataset_with_a_torch_format_is_checked():
    dataset = datasets.Dataset.from_dict({"label": [0, 5]}).with_format("torch")
    with pytest.raises(DataError, match="holds 5"):
        check_labels(dataset, model=make_model("distilbert"), split="train")


def test_class_labels_are_checked():
    features = datasets.Features({"label": datasets.ClassLabel(names=["a", "b", "c"])})
    with pytest.raises(DataError, match="holds 2"):
        check("label", [0, 2], make_model("distilbert"), features=features)


def test_regression_is_not_checked():
    check("label", [7, -3], make_model("bert-regression"))
    check("label", [0.5, 9.5], make_model("distilbert"))
    multi = make_model("distilbert")
    multi.config.problem_type = "multi_label_classification"
    check("label", [[5, 1]], multi)


def test_a_language_models_labels_are_not_checked():
    check("labels", [[400, 3]], make_model("llama"))


def test_rows_that_are_no_dataset_are_not_checked():
    check_labels([{"label": 9}], model=make_model("distilbert"), split="train")


def test_a_model_without_config_is_not_checked():
    check("label", [9], Plain())
    check("label", [9], SimpleNamespace())


def labels_of_many(rows, wrong_row):
    labels = np.zeros(rows, dtype=np.int64)
    labels[wrong_row] = 9
    return datasets.Dataset(pa.table({"label": labels}))


@pytest.mark.parametrize("row", [0, -1])
def test_first_and_last_labels_of_many_rows_are_looked_at(row):
    with pytest.raises(DataError, match="holds 9"):
        check_labels(labels_of_many(1_234_567, row), model=make_model("distilbert"), split="train")


@pytest.mark.parametrize("row", [123_456, 999_990])
def test_of_a_million_rows_all_labels_are_looked_at(row):
    with pytest.raises(DataError, match="holds 9"):
        check_labels(labels_of_many(1_000_000, row), model=make_model("distilbert"), split="train")


def test_looking_at_labels_does_not_take_longer_the_more_rows_there_are():
    def calls(rows):
        count = 0

        def note(frame, event, argument):
            nonlocal count
            count += event == "call"

        dataset, model = labels_of_many(rows, 0).select(range(1, rows)), make_model("distilbert")
        sys.setprofile(note)
        try:
            check_labels(dataset, model=model, split="train")
        finally:
            sys.setprofile(None)
        return count

    assert calls(5_000_001) == calls(2_000_001)


# For a LightningModule of the user's.


def of_all_kinds(rows=4):
    features = datasets.Features(
        {
            "ids": datasets.Sequence(datasets.Value("int64")),
            "weight": datasets.Value("float32"),
            "flag": datasets.Value("bool"),
            "kind": datasets.ClassLabel(names=["a", "b"]),
            "grid": datasets.Array2D((2, 2), "int32"),
            "text": datasets.Value("string"),
            "words": datasets.Sequence(datasets.Value("string")),
            "span": {"start": datasets.Value("int64")},
            "when": datasets.Value("timestamp[s]"),
        }
    )
    row = {
        "ids": [1, 2],
        "weight": 0.5,
        "flag": True,
        "kind": 1,
        "grid": [[1, 2], [3, 4]],
        "text": "a",
        "words": ["a"],
        "span": {"start": 1},
        "when": datetime.datetime(2020, 1, 1),
    }
    return datasets.Dataset.from_list([row] * rows, features=features)


HELD = ["ids", "weight", "flag", "kind", "grid"]


def test_all_columns_that_tensors_can_hold_are_kept(caplog):
    given = of_all_kinds()
    with caplog.at_level(logging.INFO, logger="hfbridge.data.columns"):
        kept, collator = keep_tensor_columns(given, default_collator(None), split="train")
    assert kept.column_names == HELD
    assert len(given.column_names) == 9
    assert "text, words, span, when; dropped" in caplog.text
    batch = collator([kept[i] for i in range(3)])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "ids": (3, 2),
        "weight": (3,),
        "flag": (3,),
        "kind": (3,),
        "grid": (3, 2, 2),
    }


@pytest.mark.parametrize("form", ["list", "stream", "transform"])
def test_rows_without_column_types_lose_what_no_tensor_holds_while_collating(form):
    given = of_all_kinds()
    given = given.with_transform(dict) if form == "transform" else given
    given = list(given) if form == "list" else given
    given = given.to_iterable_dataset() if form == "stream" else given
    kept, collator = keep_tensor_columns(given, dict_of_lists, split="train")
    assert kept is given
    assert isinstance(collator, TensorColumnsCollator)
    assert list(collator(list(given)[:2])) == HELD


def dict_of_lists(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_a_column_that_is_missing_somewhere_is_left_out():
    collator = TensorColumnsCollator(dict_of_lists, "train")
    assert collator([{"x": 1, "y": 2}, {"x": 1, "y": None}]) == {"x": [1, 1]}
    assert collator([{"x": 1, "y": 2}, {"x": 1}]) == {"x": [1, 1]}
    assert collator([(1, 2)] and [{"x": []}]) == {"x": [[]]}


def test_rows_that_are_no_mappings_are_left_alone():
    assert TensorColumnsCollator(len, "train")([(1, "a"), (2, "b")]) == 2


@pytest.mark.parametrize("form", ["dataset", "list"])
def test_no_column_that_a_tensor_holds_is_an_error(form):
    given = datasets.Dataset.from_dict({"text": ["a"], "name": ["b"]})
    given = list(given) if form == "list" else given
    with pytest.raises(DataError, match=r"eval dataset has no column that a tensor can hold.*text, name"):
        keep_tensor_columns(given, default_collator(None), split="eval")[1]([given[0]])

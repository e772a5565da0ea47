"""What a loss counts, for every shape of labels."""

import dataclasses

import pytest
import torch
from torch import nn

from hfbridge.losses.item_counts import LossTraits, count_items, native_items, read_traits, true_items
from tests.tiny import make_model

CPU = torch.device("cpu")
TRAITS = LossTraits(
    takes_items=True,
    counts_natively=True,
    native_shift=False,
    shift=False,
    rows_only=False,
    ignore_index=-100,
    returns_loss_alone=False,
)
SHIFTED = dataclasses.replace(TRAITS, native_shift=True, shift=True)
IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("labels", "traits", "count"),
    [
        pytest.param([0, 1, 1], TRAITS, 3, id="one id a row"),
        pytest.param([0, -100, 1], TRAITS, 2, id="one id a row, one ignored"),
        pytest.param([[1, -100, 2], [-100, -100, 3]], TRAITS, 3, id="ids of tokens"),
        pytest.param([[1, -100, 2], [-100, -100, 3]], SHIFTED, 2, id="next tokens"),
        pytest.param([[-100] * 3] * 2, SHIFTED, 0, id="all ignored"),
        pytest.param([[1], [2]], SHIFTED, 0, id="rows too short to predict anything"),
        pytest.param([0.5, 1.5], TRAITS, 2, id="floats"),
        pytest.param([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], TRAITS, 2, id="several labels a row"),
        pytest.param(
            [3, -100], dataclasses.replace(TRAITS, rows_only=True), 2, id="integer regression targets"
        ),
        pytest.param(
            [[[255, 1], [255, 2]]] * 2,
            dataclasses.replace(TRAITS, ignore_index=255),
            4,
            id="semantic segmentation",
        ),
    ],
)
def test_items_by_shape_of_labels(labels, traits, count):
    labels = torch.tensor(labels)
    inputs = {"input_ids": torch.ones(len(labels), 3, dtype=torch.long), "labels": labels}
    assert count_items(inputs, traits) == count


@pytest.mark.parametrize("traits", [TRAITS, SHIFTED])
@pytest.mark.parametrize("length", [20, 40])
def test_many_labels_are_counted_as_few(traits, length):
    """Few are counted as a list, many as an array, which also may be a slice of one."""
    labels = torch.arange(2 * length).view(2, length) % 7
    labels[labels == 3] = -100
    kept = labels[:, 1:] if traits.shift else labels
    expected = int((kept != -100).sum())
    assert count_items({"input_ids": labels, "labels": labels}, traits) == expected
    assert native_items([{"labels": labels}], traits, CPU).per_micro_batch == (expected,)


def test_without_labels_rows_are_counted():
    assert count_items({"input_ids": IDS, "start_positions": torch.tensor([0, 1])}, TRAITS) == 2


def test_labels_shifted_by_the_collator_are_counted_as_they_are():
    inputs = {"input_ids": IDS, "shift_labels": torch.tensor([[1, 2, -100], [4, -100, -100]])}
    assert count_items(inputs, SHIFTED) == 3


def test_labels_that_are_dicts_count_rows():
    inputs = {"pixel_values": torch.zeros(2, 3, 4, 4), "labels": [{"boxes": 1}, {"boxes": 2}]}
    assert count_items(inputs, TRAITS) == 2
    assert native_items([inputs], TRAITS, CPU).total is None


def test_a_window_is_counted_micro_batch_by_micro_batch():
    window = [{"labels": torch.tensor([0, 1])}, {"labels": torch.tensor([-100, 1])}]
    counted = true_items(window, TRAITS, CPU)
    assert counted.per_micro_batch == (2, 1)
    assert counted.total.dtype == torch.float32
    assert counted.total.item() == 3


# What native counts.


def test_native_does_not_count_for_a_class_that_takes_no_number():
    traits = dataclasses.replace(TRAITS, takes_items=False, counts_natively=False)
    assert native_items([{"labels": torch.tensor([1])}], traits, CPU).total is None


@pytest.mark.parametrize("window", [[], [{"input_ids": IDS}]])
def test_native_does_not_count_without_labels(window):
    assert native_items(window, TRAITS, CPU).total is None


def test_native_counts_every_label_that_is_not_minus_100():
    window = [{"labels": torch.tensor([[255, 1, -100]])}]
    assert native_items(window, dataclasses.replace(TRAITS, ignore_index=255), CPU).total.item() == 2
    floats = [{"labels": torch.tensor([[0.0, 1.0], [1.0, 1.0]])}]
    assert native_items(floats, TRAITS, CPU).total.item() == 4


def test_native_shifts_where_the_loss_is_the_causal_one():
    labels = torch.tensor([[1, 2, 3]])
    assert native_items([{"labels": labels}], SHIFTED, CPU).total.item() == 2
    assert native_items([{"labels": labels, "shift_labels": labels}], SHIFTED, CPU).total.item() == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-token", "distilbert", "bert-regression", "bert-qa"])
def test_native_items_are_the_native_trainers(kind, tmp_path):
    from transformers import Trainer, TrainingArguments

    from tests.tiny import PadRows, make_rows

    model = make_model(kind)
    theirs = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    collate = PadRows()
    window = [collate(make_rows(kind, 3, seed=seed)) for seed in (1, 2)]
    _, number = theirs.get_batch_samples(iter(window), 2, CPU)
    ours = native_items(window, read_traits(model), CPU).total
    assert (number is None) == (ours is None)
    assert number is None or float(number) == float(ours)
    assert theirs.model_accepts_loss_kwargs == read_traits(model).takes_items


# What a class says.


class Own(nn.Module):
    def forward(self, x, labels=None, return_loss=True):
        return {"loss": x.sum()}


class Keywords(nn.Module):
    def forward(self, x, **kwargs):
        return {"loss": x.sum()}


class Refusing(Keywords):
    accepts_loss_kwargs = False


@pytest.mark.parametrize(("model", "takes"), [(Own(), False), (Keywords(), True), (Refusing(), False)])
def test_a_class_takes_the_number_by_its_signature_or_by_its_word(model, takes):
    traits = read_traits(model)
    assert traits.takes_items is takes
    assert traits.ignore_index == -100


def test_a_class_may_give_a_loss_without_labels():
    assert read_traits(Own()).returns_loss_alone
    assert not read_traits(Keywords()).returns_loss_alone


@pytest.mark.parametrize(
    ("kind", "shift", "native_shift", "rows_only"),
    [
        ("llama", True, True, False),
        (
            "gpt2",
            True,
            False,
            False,
        ),  # no loss_type: native counts the first label, which the loss never sees
        ("bert-token", False, False, False),
        ("bert-regression", False, False, True),
    ],
)
def test_traits_of_models(kind, shift, native_shift, rows_only):
    traits = read_traits(make_model(kind))
    assert (traits.shift, traits.native_shift, traits.rows_only) == (shift, native_shift, rows_only)


def test_the_ignore_index_of_segmentation_is_read_off_the_config():
    model = make_model("distilbert")
    model.config.semantic_loss_ignore_index = 255
    assert read_traits(model).ignore_index == 255

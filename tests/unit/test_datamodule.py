"""HFDataModule: which split is used for what, mapping, and the batches it makes."""

import pickle
from types import SimpleNamespace
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from transformers import default_data_collator

from hfbridge import DataError, HFDataModule, Settings, SettingsError
from hfbridge.callbacks.evaluation import Evaluator
from tests.tiny import PadRows, make_dataset, make_model, make_tokenizer

SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
}


def rows(count: int = 10) -> datasets.Dataset:
    return make_dataset("distilbert", count)


def attached(data: HFDataModule, settings: Any = None, **module: Any) -> HFDataModule:
    """Attach a data module to a Trainer as Lightning does."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        max_epochs=-1,
    )
    known = {
        "model": make_model("distilbert"),
        "label_names": ["labels"],
        "processing_class": None,
        "automatic_optimization": True,
        "loss_normalization": "native",
        "evaluator": Evaluator(),
        "info_once": print,
        "begin_run": lambda **_: None,
    }
    given = Settings(**{**SETTINGS, **(settings or {})})
    module = {**known, "given_settings": given, "args": given.as_training_arguments(), **module}
    trainer.strategy._lightning_module = SimpleNamespace(**{"resumption": None, **module})  # type: ignore[assignment]
    trainer.datamodule = data  # type: ignore[attr-defined]
    data.trainer = trainer
    return data


def set_up(data: HFDataModule, settings: Any = None, *, stage: str = "fit", **module: Any) -> HFDataModule:
    attached(data, settings, **module).setup(stage)
    return data


# Which set is which.


@pytest.mark.parametrize("name", ["validation", "eval", "dev"])
def test_the_splits_of_a_dataset_dict(name: str) -> None:
    splits = {"train": rows(4), name: rows(3), "test": rows(2), "unlabelled": rows(5)}
    data = HFDataModule(datasets.DatasetDict(splits))
    assert {split: len(found) for split, found in data._raw.items()} == {
        "train": 4,
        "eval": 3,
        "test": 2,
        "predict": 2,
    }


def test_several_validation_splits_are_several_sets() -> None:
    splits = {"train": rows(4), "validation_matched": rows(3), "validation_other": rows(2)}
    data = HFDataModule(datasets.DatasetDict(splits))
    assert data.eval_splits == ("eval_validation_matched", "eval_validation_other")


def test_one_validation_split_leaves_others_out() -> None:
    data = HFDataModule({"train": rows(4), "validation": rows(3), "validation_other": rows(2)})
    assert data.eval_splits == ("eval",)


def test_a_dict_of_evaluation_sets() -> None:
    given = {"a": rows(3), "b": rows(2)}
    data = set_up(HFDataModule(rows(4), eval_dataset=given, data_collator=PadRows()))
    assert data.eval_splits == ("eval_a", "eval_b")
    loaders = data.val_dataloader()
    assert [(loader.prefix, loader.samples) for loader in loaders] == [("eval_a", 3), ("eval_b", 2)]
    assert set(given) == {"a", "b"}


def test_a_set_without_a_whole_batch_is_refused() -> None:
    data = HFDataModule(rows(40), eval_dataset={"a": rows(40), "b": rows(2)})
    with pytest.raises(DataError, match=r"The eval_b set has 2 rows.*per_device_eval_batch_size"):
        set_up(data, {"dataloader_drop_last": True, "eval_strategy": "epoch"})


def test_one_dataset_is_trained_on() -> None:
    data = HFDataModule(rows(4))
    assert set(data._raw) == {"train"}
    assert not data.eval_splits


def test_what_is_given_by_name_wins_over_a_split() -> None:
    data = HFDataModule(
        {"train": rows(4), "validation": rows(3)}, eval_dataset=rows(2), train_dataset=rows(5)
    )
    assert {split: len(found) for split, found in data._raw.items()} == {"train": 5, "eval": 2}


def test_rows_in_a_list_are_a_dataset() -> None:
    assert HFDataModule(train_dataset=[{"x": 1}])._raw["train"] == [{"x": 1}]


def test_a_tensor_dataset_has_no_columns() -> None:
    with pytest.raises(DataError):
        HFDataModule(train_dataset=torch.ones(4, 2))


# Mapping.


def test_the_map_function_makes_columns_and_runs_once() -> None:
    calls: list[int] = []

    def double(batch: dict[str, Any]) -> dict[str, Any]:
        calls.append(len(batch["input_ids"]))
        return {"position_ids": [list(range(len(ids))) for ids in batch["input_ids"]]}

    data = HFDataModule(train_dataset=rows(10), map_function=double)
    set_up(data)
    assert "position_ids" in data._mapped["train"].column_names
    assert calls == [2, 10]  # two rows to see what it returns
    data.setup("fit")
    assert calls == [2, 10]


def test_map_arguments_are_passed_on() -> None:
    data = HFDataModule(
        train_dataset=rows(3),
        map_function=lambda row: {"long": len(row["input_ids"]) > 2},
        map_kwargs={"batched": False, "remove_columns": ["label"]},
    )
    set_up(data)
    assert set(data._mapped["train"].column_names) == {"input_ids", "attention_mask", "long"}


def test_a_map_function_with_more_arguments_is_not_tried() -> None:
    data = HFDataModule(
        train_dataset=rows(3),
        map_function=lambda batch, indices: {"idx": indices},
        map_kwargs={"with_indices": True},
    )
    assert set_up(data)._mapped["train"]["idx"][:] == [0, 1, 2]


def test_only_the_splits_of_a_stage_are_mapped() -> None:
    data = HFDataModule(train_dataset=rows(4), predict_dataset=rows(2), map_function=lambda batch: batch)
    assert set(set_up(data, stage="predict")._mapped) == {"predict"}


def test_rows_in_a_list_are_not_mapped() -> None:
    with pytest.raises(DataError, match=r"map_function needs a datasets\.Dataset.*from_list"):
        set_up(HFDataModule(train_dataset=[{"x": 1}], map_function=dict))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_map_function_that_drops_every_row_is_told(split: str) -> None:
    emptied = {"train": rows(4), "eval": rows(4)}

    def drop(batch: dict[str, Any]) -> dict[str, Any]:
        return {name: [] for name in batch}

    kept = "eval" if split == "train" else "train"
    data = HFDataModule(train_dataset=emptied["train"], eval_dataset=emptied["eval"], map_function=drop)
    data._mapped[kept] = emptied[kept]
    with pytest.raises(DataError) as caught:
        set_up(data, {"eval_strategy": "epoch"})
    assert f"{split} set" in str(caught.value)
    assert "map_function" in str(caught.value)
    assert "drop_last" not in str(caught.value)


# The run.


def test_the_schedule_is_counted_from_the_rows() -> None:
    schedule = set_up(HFDataModule(rows(10)), {"max_steps": -1, "num_train_epochs": 2}).schedule
    assert (schedule.steps_per_epoch, schedule.max_steps) == (3, 6)
    dropped = set_up(
        HFDataModule(rows(10)), {"max_steps": -1, "num_train_epochs": 2, "dataloader_drop_last": True}
    )
    assert dropped.schedule.max_steps == 4


@pytest.mark.parametrize(
    "settings",
    [{"eval_strategy": "epoch"}, {"eval_strategy": "steps", "eval_steps": 1}, {"eval_on_start": True}],
    ids=str,
)
def test_evaluation_needs_a_set(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(settings))):
        set_up(HFDataModule(rows()), settings)


def test_an_evaluation_set_without_evaluation_is_no_error() -> None:
    assert set_up(HFDataModule(train_dataset=rows(), eval_dataset=rows())).eval_splits


def test_outside_of_a_run_it_says_so() -> None:
    with pytest.raises(DataError, match="not attached to a Trainer yet"):
        HFDataModule(rows()).setup("fit")


def test_micro_batches_hold_what_the_collator_made() -> None:
    data = set_up(HFDataModule(rows(10), data_collator=PadRows()), {"gradient_accumulation_steps": 2})
    batches = list(data.train_dataloader())
    assert [len(batch.step) for batch in batches] == [2, 2, 1]
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    assert set(batches[0]) == {"input_ids", "attention_mask", "labels"}


def test_unused_columns_stay_if_they_shall() -> None:
    named = rows(4).add_column("idx", list(range(4)))
    kept = set_up(HFDataModule(named, data_collator=PadRows()), {"remove_unused_columns": False})
    assert "idx" in next(iter(kept.train_dataloader()))
    dropped = set_up(HFDataModule(named, data_collator=PadRows()))
    assert "idx" not in next(iter(dropped.train_dataloader()))


def test_evaluation_is_in_the_datasets_order() -> None:
    given = rows(7)
    data = set_up(HFDataModule(train_dataset=rows(4), eval_dataset=given, data_collator=PadRows()))
    loader = data.val_dataloader()
    assert len(loader) == 3
    assert torch.cat([batch["labels"] for batch in loader]).tolist() == given["label"][:]  # type: ignore[union-attr]


def test_the_first_evaluation_batch_draws_nothing() -> None:
    data = set_up(HFDataModule(train_dataset=rows(4), eval_dataset=rows(7), data_collator=PadRows()))
    before = torch.get_rng_state()
    assert len(data.first_eval_batch("eval")["labels"]) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_without_an_evaluation_set_lightning_finds_no_loader() -> None:
    assert not is_overridden("val_dataloader", set_up(HFDataModule(rows())))
    assert is_overridden("val_dataloader", set_up(HFDataModule(rows(), eval_dataset=rows())))


def test_validating_without_an_evaluation_set_is_told() -> None:
    with pytest.raises(DataError, match="nothing to evaluate"):
        set_up(HFDataModule(rows()), stage="validate")


def test_predicting_without_a_set_is_told() -> None:
    with pytest.raises(DataError, match="nothing to predict"):
        set_up(HFDataModule(rows()), stage="predict").predict_dataloader()


@pytest.mark.parametrize("owner", ["data", "module"])
def test_a_tokenizer_on_either_side_chooses_the_padding_collator(owner: str) -> None:
    tokenizer = make_tokenizer()
    data = HFDataModule(rows(6), processing_class=tokenizer if owner == "data" else None)
    set_up(data, processing_class=tokenizer if owner == "module" else None)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == batch["attention_mask"].shape


def test_without_a_tokenizer_rows_are_stacked() -> None:
    data = set_up(HFDataModule(rows(6)))
    assert data.train_dataloader().batches.collate_fn is default_data_collator


def test_loader_arguments_come_from_the_settings() -> None:
    data = set_up(HFDataModule(rows(9)), {"dataloader_drop_last": True, "dataloader_in_order": False})
    loader = data.train_dataloader().batches
    assert (loader.drop_last, loader.batch_size, loader.in_order, loader.pin_memory) == (
        True,
        4,
        False,
        False,
    )


def test_it_can_be_pickled_before_a_run() -> None:
    assert set(pickle.loads(pickle.dumps(HFDataModule(rows(3), data_collator=PadRows())))._raw) == {"train"}


# Test set and batch size.


def test_a_test_split_serves_test_and_predict_and_is_mapped_once() -> None:
    calls: list[int] = []

    def count(batch: dict[str, Any]) -> dict[str, Any]:
        calls.append(len(batch["input_ids"]))
        return {"position_ids": [list(range(len(ids))) for ids in batch["input_ids"]]}

    data = HFDataModule({"train": rows(4), "test": rows(6)}, map_function=count, data_collator=PadRows())
    set_up(data, stage="test")
    before = len(calls)
    loader = data.test_dataloader()
    assert (loader.prefix, loader.samples) == ("test", 6)  # type: ignore[union-attr]
    data.setup("predict")
    assert len(calls) == before
    assert data.predict_dataloader().samples == 6  # type: ignore[union-attr]


def test_each_set_is_that_of_its_name() -> None:
    data = HFDataModule({"train": rows(4), "test": rows(6)}, test_dataset=rows(5))
    assert {split: len(found) for split, found in data._raw.items()} == {"train": 4, "test": 5, "predict": 6}


def test_testing_without_a_test_set_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to test: pass test_dataset="):
        set_up(HFDataModule(rows(), eval_dataset=rows()), stage="test")


def test_batch_size_is_that_of_the_settings_once_it_is_set_up() -> None:
    data = HFDataModule(rows(10), data_collator=PadRows())
    assert data.batch_size is None
    assert set_up(data).batch_size == 4


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "per_device_eval_batch_size"])
def test_a_batch_size_beside_another_of_the_settings_is_a_conflict(name: str) -> None:
    data = HFDataModule(rows(10), batch_size=5)
    other = {"per_device_train_batch_size": 5, "per_device_eval_batch_size": 5, name: 3}
    with pytest.raises(SettingsError, match=f"`batch_size=5` of HFDataModule conflicts with `{name}=3`"):
        set_up(data, other)


def test_a_batch_size_that_is_set_in_a_run_makes_other_loaders_and_another_schedule() -> None:
    data = HFDataModule(train_dataset=rows(10), eval_dataset=rows(7), data_collator=PadRows())
    set_up(data, {"max_steps": -1, "num_train_epochs": 2})
    assert data.schedule.max_steps == 6
    data.batch_size = 2
    assert [len(batch["labels"]) for batch in data.train_dataloader()] == [2] * 5
    assert [len(batch["labels"]) for batch in data.val_dataloader()] == [2, 2, 2, 1]
    assert data.schedule.max_steps == data.trainer.max_steps == 10  # type: ignore[union-attr]
    assert data.batch_size == 2


@pytest.mark.parametrize("batch_size", [0, -1, True, 2.5, "4"])
def test_a_batch_size_is_a_number(batch_size: Any) -> None:
    with pytest.raises(DataError, match="batch_size="):
        HFDataModule(rows(), batch_size=batch_size)

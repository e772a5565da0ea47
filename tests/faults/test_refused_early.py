"""What is wrong is told before the model is loaded where it can be, and always before the first step."""

from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

import hfbridge
from hfbridge import DataError, MetricsError, ModelError, SettingsError
from tests.tiny import PadRows, make_dataset, make_model

BASE: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "save_strategy": "no",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "disable_tqdm": True,
}
HEAD = "AutoModelForSequenceClassification"


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path) -> Any:
    yield
    assert list(tmp_path.iterdir()) == []


class Steps(TrainerCallback):
    """Counts the steps that were begun."""

    def __init__(self) -> None:
        self.begun = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun += 1


def data(**more: Any) -> hfbridge.HFDataModule:
    return hfbridge.HFDataModule(
        **{"train_dataset": make_dataset("distilbert", 12), "data_collator": PadRows(), **more}
    )


def fit(module: Any, settings: Any = None, *, steps: Steps | None = None, **given: Any) -> None:
    trainer = hfbridge.Trainer(
        {**BASE, **(settings or {})},
        callbacks=[] if steps is None else [steps],
        logger=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data(**given))


def plain(**arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    limits = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_checkpointing": False}
    return pl.Trainer(**{**quiet, **limits, **arguments})


# Before the model.


def drop_rows(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: [] for name in batch}


def forget(batch: dict[str, Any]) -> None:
    batch["labels"] = batch["label"]


@pytest.mark.parametrize(
    ("settings", "given", "error"),
    [
        ({"eval_strategy": "epoch"}, {}, SettingsError),
        ({"dataloader_drop_last": True}, {"train_dataset": make_dataset("distilbert", 3)}, DataError),
        ({}, {"map_function": forget}, DataError),
        ({}, {"map_function": drop_rows}, DataError),
        ({}, {"train_dataset": None, "eval_dataset": make_dataset("distilbert", 3)}, DataError),
    ],
)
def test_no_model_is_loaded_for_data_or_settings_that_do_not_fit(
    no_model: str, settings: Any, given: Any, error: Any
) -> None:
    with pytest.raises(error):
        fit(hfbridge.HFModule(no_model, HEAD), settings, **given)


@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.5},
        {"max_epochs": 2},
        {"max_steps": 5},
    ],
    ids=str,
)
def test_no_model_is_loaded_under_a_plain_trainer_that_conflicts(no_model: str, arguments: Any) -> None:
    settings = {**BASE, "gradient_accumulation_steps": 2, "max_grad_norm": 2.0}
    settings |= {"max_steps": 9} if "max_steps" in arguments else {}
    module = hfbridge.HFModule(no_model, HEAD, settings=settings)
    with pytest.raises(SettingsError, match=rf"(?s)Nothing was started.*{next(iter(arguments))}"):
        plain(**arguments).fit(module, datamodule=data())


def test_one_conflict_is_one_argument() -> None:
    module = hfbridge.HFModule(make_model("distilbert"), settings=BASE)
    with pytest.raises(SettingsError, match=r"^1 argument of lightning\.Trainer cannot be used"):
        plain(max_epochs=2).fit(module, datamodule=data())


def test_no_model_is_loaded_for_settings_that_differ(no_model: str) -> None:
    trainer = hfbridge.Trainer(BASE, logger=False)
    with pytest.raises(SettingsError, match="they differ"):
        trainer.fit(hfbridge.HFModule(no_model, HEAD), data(settings={**BASE, "seed": 1}))


@pytest.mark.parametrize(
    ("setting", "value", "cure"),
    [
        ("fp16", True, "bf16=True"),
        ("optim", "lomo", "adamw_torch"),
        ("debug", "tpu_metrics_debug", "underflow_overflow"),
        ("accelerator_config", {"gradient_accumulation_kwargs": {"num_steps": 2}}, "leave the key out"),
        ("push_to_hub", True, "push_to_hub"),
    ],
)
def test_settings_that_are_not_carried_say_what_to_do(setting: str, value: Any, cure: str) -> None:
    with pytest.raises(SettingsError) as caught:
        hfbridge.Trainer({**BASE, setting: value})
    (problem,) = caught.value.problems
    assert problem.subject.startswith(f"{setting} = ")
    assert "not supported by hfbridge" in problem.text
    assert cure in problem.text


def test_arguments_and_settings_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        hfbridge.Trainer({**BASE, "max_grad_norm": 2.0}, gradient_clip_val=1.0, strategy="dpp", colour="red")
    subjects = [problem.subject for problem in caught.value.problems]
    assert subjects == ["Trainer(gradient_clip_val=1.0)", "Trainer(colour=...)", 'Trainer(strategy="dpp")']


# Before the first step.


def wrong_label() -> datasets.Dataset:
    rows = make_dataset("distilbert", 8).to_list()
    rows[3]["label"] = 7
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("eval_dataset", "says"),
    [
        (wrong_label(), r"eval dataset has labels.*holds 7"),
        (datasets.Dataset.from_dict({"text": ["a"]}), "eval dataset has no column"),
    ],
    ids=["labels", "columns"],
)
def test_an_evaluation_set_that_does_not_fit_is_told_before_the_first_step(
    eval_dataset: Any, says: str
) -> None:
    steps = Steps()
    with pytest.raises(DataError, match=says):
        fit(
            hfbridge.HFModule(make_model("distilbert")),
            {"eval_strategy": "epoch"},
            steps=steps,
            eval_dataset=eval_dataset,
        )
    assert steps.begun == 0


class OnlyLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 2)

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        return SequenceClassifierOutput(logits=self.linear(input_ids[:, :1].float()))


@pytest.mark.parametrize("normalization", ["exact", "native"])
def test_a_model_of_ones_own_without_a_loss(normalization: Any) -> None:
    model = OnlyLogits()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ModelError, match="OnlyLogits returned no loss, only logits") as caught:
        fit(hfbridge.HFModule(model, loss_normalization=normalization))
    assert "given input_ids, attention_mask, labels" in str(caught.value)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("settings", [{"eval_strategy": "epoch"}, {"eval_on_start": True}], ids=str)
def test_metrics_that_are_no_dict_are_told_before_the_first_step(settings: Any) -> None:
    steps = Steps()

    def accuracy(result: Any) -> float:
        return 0.5

    with pytest.raises(MetricsError, match=r"accuracy\) returned 0\.5"):
        fit(
            hfbridge.HFModule(make_model("distilbert"), compute_metrics=accuracy),
            settings,
            steps=steps,
            eval_dataset=make_dataset("distilbert", 8),
        )
    assert steps.begun == 0


def test_metrics_that_fail_on_the_whole_set_raise_their_own_error() -> None:
    def failing(result: Any) -> dict[str, float]:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fit(
            hfbridge.HFModule(make_model("distilbert"), compute_metrics=failing),
            {"eval_strategy": "epoch"},
            eval_dataset=make_dataset("distilbert", 8),
        )


# What is right is not refused.


def test_an_argument_of_lightning_leaves_evaluations_out() -> None:
    arguments = {"limit_val_batches": 0, "logger": False, "enable_model_summary": False}
    trainer = hfbridge.Trainer({**BASE, "eval_strategy": "epoch", "logging_steps": 1}, **arguments)
    trainer.fit(hfbridge.HFModule(make_model("distilbert")), data(eval_dataset=make_dataset("distilbert", 8)))
    assert trainer.log_history
    assert not any("eval_loss" in entry for entry in trainer.log_history)


def test_ignored_labels_are_no_wrong_labels() -> None:
    rows = make_dataset("distilbert", 12).to_list()
    rows[0]["label"] = -100
    fit(hfbridge.HFModule(make_model("distilbert")), train_dataset=datasets.Dataset.from_list(rows))


def test_regression_takes_any_integer() -> None:
    rows = [{**row, "label": 7.0} for row in make_dataset("bert-regression", 12).to_list()]
    fit(hfbridge.HFModule(make_model("bert-regression")), train_dataset=datasets.Dataset.from_list(rows))


def test_a_selected_part_of_a_dataset_is_checked_alone() -> None:
    rows = wrong_label()
    fit(hfbridge.HFModule(make_model("distilbert")), train_dataset=rows.select([0, 1, 2, 4, 5]))

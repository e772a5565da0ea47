"""Bad input: a clear error with what is possible and what to do; nothing is written or trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, TrainerCallback

import hfbridge
from hfbridge import DataError, MetricsError, ModelError, SettingsError
from tests.tiny import PadRows, make_dataset, make_model

BASE: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "save_strategy": "no",
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "disable_tqdm": True,
}


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path) -> Any:
    before = sorted(tmp_path.rglob("*"))
    yield
    assert sorted(tmp_path.rglob("*")) == before


class Untouched:
    """A model that must come out of a refused run with the weights it went in with."""

    def __init__(self, kind: str = "distilbert") -> None:
        self.model = make_model(kind)
        self.weights = {name: value.clone() for name, value in self.model.state_dict().items()}

    def check(self) -> None:
        assert all(torch.equal(v, self.weights[k]) for k, v in self.model.state_dict().items())


@pytest.fixture
def untouched() -> Any:
    made = Untouched()
    yield made
    made.check()


def forbidden_model() -> nn.Module:
    raise AssertionError("the model was built")


def fit(model: Any, *, settings: Any = None, **data: Any) -> None:
    trainer = hfbridge.Trainer({**BASE, **(settings or {})}, logger=False, enable_model_summary=False)
    module = model if isinstance(model, pl.LightningModule) else hfbridge.HFModule(model)
    given = {"train_dataset": make_dataset("distilbert", 12), "data_collator": PadRows(), **data}
    trainer.fit(module, hfbridge.HFDataModule(**given))


# Settings.


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        hfbridge.Trainer(
            {**BASE, "gradient_acumulation_steps": 4, "max_steps": 0, "optim": "lomo", "color": 1}
        )
    text = str(caught.value)
    assert "did you mean gradient_accumulation_steps?" in text
    for name in ("max_steps", "optim", "color"):
        assert name in text
    assert "nothing was started" in text


def test_max_steps_zero() -> None:
    with pytest.raises(SettingsError, match="max_steps"):
        hfbridge.Settings(max_steps=0)


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"max_steps": 10}, {"max_steps": 5}),
        ({"max_steps": -1, "num_train_epochs": 4}, {"max_epochs": 2}),
        ({"gradient_accumulation_steps": 4}, {"accumulate_grad_batches": 2}),
        ({"max_grad_norm": 2.0}, {"gradient_clip_val": 0.5}),
        ({"bf16": True}, {"precision": "32-true"}),
        ({"logging_steps": 10}, {"log_every_n_steps": 5}),
        ({"disable_tqdm": True}, {"enable_progress_bar": True}),
        ({"output_dir": "out"}, {"default_root_dir": "elsewhere"}),
        ({"use_cpu": True}, {"accelerator": "gpu"}),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, {"strategy": "ddp"}),
        ({"eval_strategy": "steps", "eval_steps": 2}, {"val_check_interval": 0.5}),
        ({"eval_strategy": "epoch"}, {"check_val_every_n_epoch": 2}),
        ({}, {"learning_rate": 1e-3}),
    ],
    ids=str,
)
def test_a_trainer_argument_that_contradicts_the_settings(settings: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        hfbridge.Trainer({**BASE, **settings}, **arguments)
    assert next(iter(arguments)) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"accumulate_grad_batches": 3}, "gradient_accumulation_steps"),
        ({"gradient_clip_val": 0.5}, "max_grad_norm"),
        ({"max_steps": 7}, "max_steps"),
    ],
    ids=str,
)
def test_a_plain_trainer_that_contradicts_the_settings(untouched: Any, arguments: Any, field: str) -> None:
    settings = {**BASE, "gradient_accumulation_steps": 2, "max_grad_norm": 2.0}
    if field != "max_steps":
        settings |= {"max_steps": -1, "num_train_epochs": 1}
    trainer = _plain(**arguments)
    with pytest.raises(SettingsError, match=field):
        trainer.fit(hfbridge.HFModule(untouched.model, settings=settings), _data(settings=settings))


def test_settings_that_differ_between_trainer_and_module(untouched: Any) -> None:
    trainer = hfbridge.Trainer(BASE, logger=False)
    with pytest.raises(SettingsError, match="they differ"):
        trainer.fit(hfbridge.HFModule(untouched.model, settings={**BASE, "seed": 1}), _data())


def test_settings_that_differ_between_module_and_data(untouched: Any) -> None:
    with pytest.raises(SettingsError, match="both HFModule and HFDataModule, and they differ"):
        _plain().fit(hfbridge.HFModule(untouched.model, settings=BASE), _data(settings={**BASE, "seed": 1}))


def test_evaluation_without_a_set() -> None:
    with pytest.raises(SettingsError, match="needs an evaluation set"):
        fit(forbidden_model, settings={"eval_strategy": "epoch"})


# Models.


@pytest.mark.parametrize(
    ("model", "auto_class", "says"),
    [
        ("./nowhere", "AutoModelForCausalLM", "does not exist"),
        ("~/nowhere-at-all", "AutoModelForCausalLM", "does not exist"),
        (Path("nowhere"), "AutoModelForCausalLM", "does not exist"),
        ("name", None, "needs one, such as"),
        ("name", "AutoModelForSequenceClasification", "did you mean AutoModelForSequenceClassification"),
        (None, None, "model= is None"),
        (nn.Linear(1, 1), "AutoModelForCausalLM", "Leave auto_class out"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_model_that_cannot_be_had(model: Any, auto_class: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        hfbridge.HFModule(model, auto_class)


def test_a_model_without_a_head() -> None:
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    with pytest.raises(ModelError, match="has no loss"):
        hfbridge.HFModule(BertModel(config))


def test_a_model_that_returns_no_loss(untouched: Any) -> None:
    rows = make_dataset("distilbert", 12).remove_columns("label")
    with pytest.raises(ModelError, match=r"returned no loss, only logits.*'labels' column"):
        fit(untouched.model, train_dataset=rows)


def test_a_factory_that_returns_no_model() -> None:
    with pytest.raises(ModelError, match=r"must return a torch\.nn\.Module"):
        fit(lambda: None)


def test_an_unknown_normalization() -> None:
    with pytest.raises(ModelError, match=r"loss_normalization='exakt'; it may be 'exact' or 'native'"):
        hfbridge.HFModule(make_model("distilbert"), loss_normalization="exakt")  # type: ignore[arg-type]


def test_a_model_that_is_not_wrapped(untouched: Any) -> None:
    with pytest.raises(ModelError, match=r"got `DistilBert\w+`\. Wrap the model: `?HFModule\(model\)"):
        hfbridge.Trainer(BASE, logger=False).fit(untouched.model, _data())


# Data.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict, "was given no dataset"),
        (lambda: {"train_dataset": datasets.Dataset.from_list([])}, "has no rows"),
        (lambda: {"train_dataset": make_dataset("distilbert", 4).filter(lambda row: False)}, "has no rows"),
        (lambda: {"train_dataset": "reviews.csv"}, "must be a datasets.Dataset"),
        (
            lambda: {"dataset": datasets.DatasetDict(training=make_dataset("distilbert", 4))},
            "looks for train",
        ),
        (lambda: {"train_dataset": {"a": [{}]}}, "only eval_dataset may be a dict"),
        (lambda: {"train_dataset": [{}], "eval_dataset": {}}, "eval_dataset is an empty dict"),
        (
            lambda: {"train_dataset": [{}], "eval_dataset": {1: [{}]}},
            "the key 1, a int; keys must be strings",
        ),
        (lambda: {"train_dataset": [{}], "eval_dataset": {"a": None}}, "The eval_a set is None"),
    ],
)
def test_a_dataset_that_cannot_be_used(arguments: Callable[[], dict[str, Any]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        hfbridge.HFDataModule(**arguments())


def test_a_missing_file_is_told_by_datasets(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        datasets.load_dataset("csv", data_files=str(tmp_path / "nowhere.csv"))


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        fit(forbidden_model, train_dataset=None, eval_dataset=make_dataset("distilbert", 4))


def test_fewer_rows_than_a_batch_that_is_dropped() -> None:
    with pytest.raises(DataError, match="not one batch of 4"):
        fit(
            forbidden_model,
            settings={"dataloader_drop_last": True},
            train_dataset=make_dataset("distilbert", 3),
        )


def test_columns_the_model_does_not_take(untouched: Any) -> None:
    rows = datasets.Dataset.from_list([{"sentence": "good", "id": 1}] * 8)
    with pytest.raises(DataError, match=r"no column that DistilBert.*sentence, id.*map_function"):
        fit(untouched.model, train_dataset=rows)


@pytest.mark.parametrize("label", [2, -1, 7])
def test_labels_out_of_range(untouched: Any, label: int) -> None:
    rows = make_dataset("distilbert", 12).to_list()
    rows[5]["label"] = label
    with pytest.raises(DataError, match=rf"'label' holds {label}.*num_labels=2 they must be 0 to 1"):
        fit(untouched.model, train_dataset=datasets.Dataset.from_list(rows))


def test_labels_of_tokens_out_of_range() -> None:
    rows = make_dataset("bert-token", 12).to_list()
    rows[3]["labels"][1] = 9
    with pytest.raises(DataError, match="holds 9"):
        fit(make_model("bert-token"), train_dataset=datasets.Dataset.from_list(rows))


def test_a_label_that_was_filtered_out_is_not_reported() -> None:
    rows = make_dataset("distilbert", 12).to_list()
    rows[5]["label"] = 7
    fit(
        make_model("distilbert"),
        train_dataset=datasets.Dataset.from_list(rows).filter(lambda row: row["label"] < 2),
    )


def test_an_unfinished_map_function() -> None:
    def tokenize(rows: Any) -> Any:
        rows["input_ids"]

    with pytest.raises(DataError, match=r"tokenize\) returned None.*return statement missing"):
        fit(forbidden_model, map_function=tokenize)


# Lightning advises on the loader, and on how many batches a log entry takes.
@pytest.mark.filterwarnings("ignore:You defined a .validation_step")
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("side", ["hfbridge", "lightning"])
@pytest.mark.parametrize(
    ("loader", "kind"), [(DataLoader([1, 2]), "Tensor"), ("data", "str")], ids=["DataLoader", "str"]
)
def test_a_loader_whose_batches_have_no_columns(untouched: Any, side: str, loader: Any, kind: str) -> None:
    ours = side == "hfbridge"
    trainer = hfbridge.Trainer(BASE, logger=False) if ours else _plain()
    module = hfbridge.HFModule(untouched.model, settings=None if ours else BASE)
    with pytest.raises(DataError, match=f"must be a dict of columns, got {kind}"):
        trainer.fit(module, loader)


@pytest.mark.filterwarnings("ignore:You defined a .validation_step")
def test_no_data_at_all(untouched: Any) -> None:
    with pytest.raises(MisconfigurationException, match="train_dataloader"):
        hfbridge.Trainer(BASE, logger=False).fit(hfbridge.HFModule(untouched.model), None)


# Metrics.


@pytest.mark.parametrize("returned", [0.5, None, {1: 0.5}], ids=str)
def test_metrics_that_are_no_dict_are_told_before_the_first_step(untouched: Any, returned: Any) -> None:
    class NoStep(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("a step was begun")

    trainer = hfbridge.Trainer(
        {**BASE, "eval_strategy": "steps", "eval_steps": 2},
        callbacks=[NoStep],
        logger=False,
        enable_model_summary=False,
    )
    module = hfbridge.HFModule(untouched.model, compute_metrics=lambda result: returned)
    with pytest.raises(MetricsError, match="must return a dict"):
        trainer.fit(module, _data(eval_dataset=make_dataset("distilbert", 8)))


def test_metrics_that_need_more_than_a_few_rows_are_left_alone() -> None:
    def picky(result: Any) -> dict[str, float]:
        if len(result.label_ids) < 20:
            raise ValueError("too few")
        return {"rows": len(result.label_ids)}

    trainer = hfbridge.Trainer({**BASE, "eval_strategy": "epoch"}, logger=False, enable_model_summary=False)
    module = hfbridge.HFModule(make_model("distilbert"), compute_metrics=picky)
    trainer.fit(module, _data(eval_dataset=make_dataset("distilbert", 20)))
    assert module.eval_metrics["eval_rows"] == 20


def test_metrics_that_are_no_function() -> None:
    with pytest.raises(ModelError, match="must be a function"):
        hfbridge.HFModule(make_model("distilbert"), compute_metrics="accuracy")  # type: ignore[arg-type]


def _data(**more: Any) -> hfbridge.HFDataModule:
    return hfbridge.HFDataModule(
        **{"train_dataset": make_dataset("distilbert", 12), "data_collator": PadRows(), **more}
    )


def _plain(**arguments: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    limits = {} if "max_steps" in arguments else {"max_epochs": 1}
    return pl.Trainer(accelerator="cpu", devices=1, **{**quiet, **limits, **arguments})

"""What is stored of HFModule's arguments, by which constructor they came, and what loggers get."""

import enum
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification, TrainingArguments

from hfbridge import HFModule, ModelError, Settings
from hfbridge.models.hyperparameters import check_stored, left_out, logged_hyperparameters, make_plain
from tests.tiny import make_model

NAMED = "AutoModelForSequenceClassification"
ARGUMENTS = set(inspect.signature(HFModule.__init__).parameters) - {"self"}


class Color(enum.Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("model", Path("a/b"), "a/b"),
        ("model", "name", "name"),
        ("auto_class", AutoModelForSequenceClassification, NAMED),
        ("dtype", torch.bfloat16, "bfloat16"),
        ("model_kwargs", {"num_labels": 3, "torch_dtype": torch.float16, "kind": Color.RED}, None),
        ("model_kwargs", {"layers": (1, 2), "names": {"b", "a"}}, {"layers": [1, 2], "names": ["a", "b"]}),
        ("settings", Settings(learning_rate=0.1), {"learning_rate": 0.1}),
        ("settings", {"learning_rate": 0.1}, {"learning_rate": 0.1}),
        ("chunked_loss", False, False),
    ],
    ids=["path", "name", "class", "dtype", "kwargs", "containers", "settings", "mapping", "number"],
)
def test_what_is_stored(name: str, value: Any, stored: Any) -> None:
    if stored is None:
        stored = {"num_labels": 3, "torch_dtype": "float16", "kind": "red"}
    assert make_plain({name: value}, ARGUMENTS) == {name: stored}


def test_numbers_of_numpy_are_stored_as_pythons() -> None:
    numpy = pytest.importorskip("numpy")
    found = make_plain({"model_kwargs": {"dropout": numpy.float64(0.5)}}, ARGUMENTS)
    assert type(found["model_kwargs"]["dropout"]) is float


@pytest.mark.parametrize("name", ["model", "model_kwargs", "peft_config"])
def test_what_builds_a_model_and_cannot_be_stored_is_named(name: str) -> None:
    found = make_plain({name: [object()]}, ARGUMENTS)
    with pytest.raises(ModelError, match=rf"load_from_checkpoint\(path, {name}=\.\.\.\)"):
        check_stored(**found)


def test_objects_that_build_no_model_are_not_stored() -> None:
    given = {"compute_metrics": print, "metrics": MulticlassAccuracy(3), "mine": print}
    assert make_plain(given, ARGUMENTS) == {"mine": print}


def test_none_and_optimizers_are_not_stored() -> None:
    assert make_plain({"processing_class": None, "optimizers": (None, None)}, ARGUMENTS) == {}


def test_an_adapter_is_stored_by_the_fields_that_differ() -> None:
    peft = pytest.importorskip("peft", reason="needs the peft extra")
    config = peft.LoraConfig(r=2, target_modules=["q_lin"], task_type="SEQ_CLS")
    found = make_plain({"peft_config": config}, ARGUMENTS)["peft_config"]
    assert found.items() >= {"peft_type": "LORA", "r": 2, "task_type": "SEQ_CLS"}.items()
    assert found["target_modules"] == ["q_lin"]
    assert "lora_alpha" not in found
    module = HFModule("some/name", NAMED, peft_config=found)
    assert module.hparams["peft_config"] == found


def test_an_adapter_whose_class_needs_arguments() -> None:
    peft = pytest.importorskip("peft", reason="needs the peft extra")
    config = peft.AdaLoraConfig(total_step=10, task_type="SEQ_CLS")
    assert make_plain({"peft_config": config}, ARGUMENTS)["peft_config"]["total_step"] == 10


# Which constructor the arguments are of.


def test_arguments_of_hfmodule() -> None:
    module = HFModule(Path("some/name").name, NAMED, dtype=torch.float16, loss_normalization="native")
    assert dict(module.hparams) == {
        "model": "name",
        "auto_class": NAMED,
        "dtype": "float16",
        "loss_normalization": "native",
        "chunked_loss": False,
    }
    assert dict(module.hparams_initial) == dict(module.hparams)
    assert module._log_hyperparams


class Mine(HFModule):
    """A subclass with a name of its own for the model."""

    def __init__(self, name: str, rate: float = 0.1, **more: Any) -> None:
        super().__init__(name, NAMED, **more)
        self.save_hyperparameters()


def test_arguments_of_a_subclass_are_those_it_was_called_with() -> None:
    module = Mine("some/name", dtype="float16")
    assert dict(module.hparams) == {"name": "some/name", "rate": 0.1, "dtype": "float16"}
    again = Mine(**module.hparams)
    assert again.hparams == module.hparams


def test_a_model_is_stored_by_the_name_of_its_class_only() -> None:
    module = HFModule(make_model("distilbert"))
    assert module.hparams["model"] == {"not_stored": "DistilBertForSequenceClassification"}
    with pytest.raises(ModelError, match="DistilBertForSequenceClassification"):
        HFModule(**module.hparams)


def test_metrics_with_their_own_equality_are_no_argument_names() -> None:
    module = HFModule("some/name", NAMED, metrics=MulticlassAccuracy(3))
    assert "metrics" not in module.hparams
    assert left_out(module) == {"metrics": "RunningMetrics"}


# For loggers.


def test_loggers_get_the_settings_of_the_run() -> None:
    settings = Settings.of(TrainingArguments(output_dir="out", learning_rate=0.25, use_cpu=True))
    found = logged_hyperparameters({"model": "name"}, settings, {})
    assert found["settings"]["learning_rate"] == 0.25


def test_names_that_the_data_module_has_with_other_values() -> None:
    own = {"processing_class": "a", "same": 1, "settings": {"seed": 1}}
    of_data = {"processing_class": "b", "same": 1, "settings": {"seed": 2}}
    found = logged_hyperparameters(own, Settings(seed=1), of_data)
    assert found == {"module_processing_class": "a", "same": 1}


def test_lightnings_private_names() -> None:
    module = pl.LightningModule()
    assert {"_log_hyperparams"} <= vars(module).keys()
    assert callable(module._set_hparams)
    module._hparams_initial = SimpleNamespace(mine=1)  # type: ignore[assignment]
    assert module.hparams_initial.mine == 1

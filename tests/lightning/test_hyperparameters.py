"""Hyperparameters of HFModule, load_from_checkpoint by the path alone, and a named model before a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import hfbridge
from tests.lightning.plain_data import (
    SETTINGS,
    PlainModule,
    assert_same_weights,
    fit,
    for_both,
    is_same,
    make_loader,
    make_module,
    make_trainer,
    weights,
)
from tests.tiny import make_model

# Lightning's advice: a validation_step without a loader.
pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


# Hyperparameters, and loading by the path alone.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    make_model("distilbert", dropout=0.0).save_pretrained(path)
    return path


NAMED = "AutoModelForSequenceClassification"


def adapter() -> Any:
    peft = pytest.importorskip("peft", reason="needs the peft extra")
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_lin"], modules_to_save=["classifier"])


def train_named(side: str, folder: Path, path: str, *, make_class: Any = None, **given: Any) -> Any:
    """Train a named model, and write a Lightning checkpoint."""
    if side == "lightning":
        given["settings"] = {"num_train_epochs": 1, **SETTINGS}
    module = (make_class or hfbridge.HFModule)(folder, NAMED, **given)
    trainer = make_trainer(side, epochs=1)
    trainer.fit(module, make_loader(16))
    trainer.save_checkpoint(path)
    return module


@for_both
@pytest.mark.parametrize("as_text", [True, False], ids=["str", "Path"])
def test_a_named_model_is_rebuilt_from_a_checkpoint_alone(side: str, folder: Path, as_text: bool) -> None:
    module = train_named(side, str(folder) if as_text else folder, "saved.ckpt")  # type: ignore[arg-type]
    loaded = hfbridge.HFModule.load_from_checkpoint("saved.ckpt")
    assert is_same(weights(loaded), weights(module))
    assert not is_same(weights(loaded), make_model("distilbert", dropout=0.0).state_dict())
    assert str(loaded.hparams["model"]) == str(folder)
    assert type(loaded.model) is type(module.model)


@for_both
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
@pytest.mark.parametrize("as_dict_of_fields", [False, True], ids=["LoraConfig", "dict"])
def test_an_adapter_is_rebuilt_from_a_checkpoint_alone(
    side: str, folder: Path, as_dict_of_fields: bool
) -> None:
    config: Any = adapter()
    if as_dict_of_fields:
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_lin"]}
        config["modules_to_save"] = []  # the head stays as it is
    module = train_named(side, folder, "saved.ckpt", peft_config=config)
    loaded = hfbridge.HFModule.load_from_checkpoint("saved.ckpt")
    assert is_same(weights(loaded), weights(module))
    assert loaded.model.peft_config["default"].r == 2
    trained = {name for name, value in loaded.model.named_parameters() if value.requires_grad}
    assert trained == {name for name, value in module.model.named_parameters() if value.requires_grad}
    batch = next(iter(make_loader(4)))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, module.eval()(**batch).logits)


@for_both
def test_arguments_are_rebuilt_from_a_checkpoint_alone(side: str, folder: Path) -> None:
    kwargs = {"attn_implementation": "eager"}
    given = {"model_kwargs": kwargs, "dtype": "float64", "loss_normalization": "native"}
    module = train_named(side, folder, "saved.ckpt", **given)
    loaded = hfbridge.HFModule.load_from_checkpoint("saved.ckpt")
    assert loaded.loss_normalization == "native"
    assert loaded.model.config._attn_implementation == "eager"
    assert next(loaded.model.parameters()).dtype is torch.float64
    assert is_same(weights(loaded), weights(module))


class WithHyperparameters(hfbridge.HFModule):
    """A subclass with an argument of its own, as Lightning's documentation writes it."""

    def __init__(self, model: Any, auto_class: Any = None, *, factor: float = 1.0, **more: Any) -> None:
        super().__init__(model, auto_class, **more)
        self.save_hyperparameters("factor")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * self.hparams.factor


@for_both
def test_hyperparameters_of_a_subclass(side: str, folder: Path) -> None:
    module = train_named(side, folder, "saved.ckpt", make_class=WithHyperparameters, factor=2.0)
    loaded = WithHyperparameters.load_from_checkpoint("saved.ckpt")
    assert loaded.hparams.factor == 2.0
    assert is_same(weights(loaded), weights(module))
    other = WithHyperparameters.load_from_checkpoint("saved.ckpt", factor=3.0)
    assert other.hparams.factor == 3.0


@for_both
def test_what_was_loaded_can_be_trained_and_predict(side: str, folder: Path) -> None:
    module = train_named(side, folder, "saved.ckpt")
    loaded = hfbridge.HFModule.load_from_checkpoint("saved.ckpt")
    ours = torch.cat(make_trainer(side).predict(loaded, make_loader(10, seed=5)))
    theirs = torch.cat(make_trainer(side).predict(module, make_loader(10, seed=5)))
    assert torch.equal(ours, theirs)


@for_both
def test_a_model_that_cannot_be_stored_is_named_with_its_argument(side: str) -> None:
    module, trainer = fit(side, make_loader(16), epochs=1)
    trainer.save_checkpoint("saved.ckpt")
    with pytest.raises(hfbridge.ModelError, match=r"model="):
        hfbridge.HFModule.load_from_checkpoint("saved.ckpt")
    other = make_model("distilbert", dropout=0.0, seed=8)
    loaded = hfbridge.HFModule.load_from_checkpoint("saved.ckpt", model=other)
    assert is_same(weights(loaded), weights(module))


@for_both
def test_a_function_that_cannot_be_stored_is_named_with_its_argument(side: str, folder: Path) -> None:
    train_named(side, folder, "saved.ckpt", compute_metrics=lambda found: {"one": 1.0})
    loaded = hfbridge.HFModule.load_from_checkpoint("saved.ckpt")
    assert any("compute_metrics=" in note for note in loaded.notes)

    def metrics(found: Any) -> dict[str, float]:
        return {"two": 2.0}

    again = hfbridge.HFModule.load_from_checkpoint("saved.ckpt", compute_metrics=metrics)
    assert not any("compute_metrics=" in note for note in again.notes)
    (found,) = make_trainer(side).validate(again, make_loader(10, seed=5))
    assert found["eval_two"] == 2.0


@for_both
def test_loggers_get_the_hyperparameters(side: str, folder: Path) -> None:
    given = {"settings": {"num_train_epochs": 1, **SETTINGS}} if side == "lightning" else {}
    module = hfbridge.HFModule(folder, NAMED, **given)
    make_trainer(side, epochs=1, logger=CSVLogger("logged")).fit(module, make_loader(16))
    (file,) = Path("logged").rglob("hparams.yaml")
    assert str(folder) in file.read_text()
    assert NAMED in file.read_text()


# A named model before a run: built, or refused in one sentence that says how.


def is_refused(act: Callable[[], Any]) -> bool:
    """Whether an act on a model that is not built is refused with the call that builds it."""
    try:
        act()
    except hfbridge.ModelError as error:
        return "configure_model()" in str(error)
    return False


def test_the_model_of_a_named_module(folder: Path) -> None:
    module = hfbridge.HFModule(folder, NAMED)
    if is_refused(lambda: module.model.config):
        module.configure_model()
    assert module.model.config.dim == 16
    assert is_same(weights(module), make_model("distilbert", dropout=0.0).state_dict())


@for_both
def test_a_named_module_is_frozen_before_a_run(side: str, folder: Path) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class OnlyHead(base):  # type: ignore[misc]
            def freeze_body(self) -> None:
                self.freeze()
                for parameter in self.model.classifier.parameters():
                    parameter.requires_grad = True

        return OnlyHead

    given = {"settings": {"num_train_epochs": 2, **SETTINGS}} if side == "lightning" else {}
    module = make_class(hfbridge.HFModule)(folder, NAMED, **given)
    if is_refused(module.freeze):
        module.configure_model()
    module.freeze_body()
    make_trainer(side).fit(module, make_loader(16))
    reference = make_class(PlainModule)()
    reference.freeze_body()
    make_trainer("reference").fit(reference, make_loader(16))
    assert_same_weights(module, reference)
    before = make_model("distilbert", dropout=0.0).state_dict()
    changed = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


@for_both
def test_weights_are_loaded_into_a_named_module_before_a_run(side: str, folder: Path) -> None:
    given = {"settings": {"num_train_epochs": 2, **SETTINGS}} if side == "lightning" else {}
    module = hfbridge.HFModule(folder, NAMED, **given)
    other = PlainModule(make_model("distilbert", dropout=0.0, seed=8))
    if is_refused(lambda: module.load_state_dict(other.state_dict())):
        module.configure_model()
    module.load_state_dict(other.state_dict())
    make_trainer(side).fit(module, make_loader(16))
    make_trainer("reference").fit(other, make_loader(16))
    assert_same_weights(module, other)  # the run has not built the model once more


@for_both
def test_what_is_changed_in_a_model_before_a_run_stays(side: str) -> None:
    module = make_module(side)
    module.freeze()
    assert not module.training
    module.unfreeze()
    make_trainer(side).fit(module, make_loader(16))
    theirs, _ = fit("reference", make_loader(16))
    assert_same_weights(module, theirs)


def test_the_module_is_a_lightning_module() -> None:
    assert issubclass(hfbridge.HFModule, pl.LightningModule)
    assert not hasattr(hfbridge.HFModule, "batch_size")  # Tuner would set it in place of the data module's

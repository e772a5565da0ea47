"""HFModule by itself: building, copying, predicting, cleaning up after a failure."""

import copy
import inspect
import pickle
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

import hfbridge
from hfbridge import HFDataModule, HFModule, ModelError
from tests.tiny import PadRows, make_dataset, make_model, make_rows

SETTINGS: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "save_strategy": "no",
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "disable_tqdm": True,
}


def data(count: int = 12, **more: Any) -> HFDataModule:
    return HFDataModule(
        **{"train_dataset": make_dataset("distilbert", count), "data_collator": PadRows(), **more}
    )


def trainer(settings: Any = None, **arguments: Any) -> hfbridge.Trainer:
    quiet = {"logger": False, "enable_model_summary": False}
    return hfbridge.Trainer({**SETTINGS, **(settings or {})}, **{**quiet, **arguments})


def fit(module: HFModule, settings: Any = None, **arguments: Any) -> HFModule:
    trainer(settings, **arguments).fit(module, data())
    return module


def weights(module: HFModule) -> list[torch.Tensor]:
    return [value.clone() for value in module.model.state_dict().values()]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model("distilbert").save_pretrained(path)
    return path


# The model.


def test_forward_is_the_models() -> None:
    model = make_model("distilbert").eval()
    batch = PadRows()(make_rows("distilbert", 2))
    assert torch.equal(HFModule(model)(**batch).logits, model(**batch).logits)


def test_forward_before_the_model_is_built_is_told() -> None:
    with pytest.raises(ModelError, match="not built yet"):
        HFModule("some/name", "AutoModelForCausalLM")(input_ids=torch.ones(1, 1))


def test_the_state_dict_is_the_models_under_one_prefix() -> None:
    model = make_model("distilbert")
    assert list(HFModule(model).state_dict()) == [f"model.{name}" for name in model.state_dict()]


def test_a_folder_is_built_when_the_run_begins_and_not_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = HFModule(folder, "AutoModelForSequenceClassification")
    assert not module.is_built
    fit(module)
    assert same(weights(module), weights(fit(HFModule(make_model("distilbert")))))


def test_a_factory_is_called_after_seeding_and_training_starts_from_its_random_state() -> None:
    drawn: list[float] = []

    def factory() -> nn.Module:
        drawn.append(random.random())
        return make_model("distilbert")

    for _ in range(2):
        random.seed(99)
        fit(HFModule(factory))
    assert drawn[0] == drawn[1]


def test_a_built_model_is_not_built_again(folder: Path) -> None:
    module = fit(HFModule(folder, "AutoModelForSequenceClassification"))
    model = module.model
    assert fit(module).model is model


@pytest.mark.parametrize("more", [{"model_kwargs": {"num_labels": 3}}, {"dtype": torch.bfloat16}], ids=str)
def test_what_a_model_object_cannot_heed_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(more))):
        HFModule(make_model("distilbert"), **more)


@pytest.mark.parametrize(
    "more", [{"auto_class": "AutoModelForCausalLM"}, {"model_kwargs": {"num_labels": 3}}], ids=str
)
def test_what_a_factory_cannot_heed_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(more))):
        HFModule(lambda: make_model("distilbert"), **more)


def test_special_tokens_and_cache_are_set_as_natively() -> None:
    module = fit(HFModule(make_model("distilbert")), {"use_cache": True})
    assert module.model.config.use_cache is True


# Copies.


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_module_can_be_copied(trained: bool, make_copy: Any) -> None:
    module = HFModule(make_model("distilbert"), settings=SETTINGS)
    if trained:
        fit(module)
    other = make_copy(module)
    assert same(weights(other), weights(module))
    assert other.given_settings == module.given_settings
    before = weights(module)
    fit(other)
    assert same(weights(module), before)
    assert not same(weights(other), before)


def test_a_named_module_can_be_copied() -> None:
    assert not pickle.loads(pickle.dumps(HFModule("some/name", "AutoModelForCausalLM"))).is_built


def test_a_lightning_checkpoint_can_be_loaded(tmp_path: Path) -> None:
    kept = ModelCheckpoint(dirpath=tmp_path / "kept", filename="last", every_n_train_steps=2)
    module = fit(HFModule(make_model("distilbert")), callbacks=[kept])
    loaded = HFModule.load_from_checkpoint(
        tmp_path / "kept" / "last.ckpt", model=make_model("distilbert", seed=1), weights_only=False
    )
    assert same(weights(loaded), weights(module))


# A second run.


def test_two_runs_of_one_step_differ_from_one_of_two_only_by_optimizer_and_order() -> None:
    module = fit(HFModule(make_model("distilbert")), {"max_steps": 1})
    between = weights(module)
    history = list(module.log_history)
    fit(module, {"max_steps": 1})
    assert not same(weights(module), between)
    assert len(module.log_history) == len(history)  # a run's own


def test_a_trainer_that_has_trained_stops_at_once_as_in_lightning() -> None:
    used = trainer()
    used.fit(HFModule(make_model("distilbert")), data())
    steps, other = used.global_step, HFModule(make_model("distilbert"))
    before = [parameter.clone() for parameter in other.model.parameters()]
    used.fit(other, data())
    assert used.global_step == steps > 0
    assert all(map(torch.equal, other.model.parameters(), before))


# After a failure.


class Boom(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("boom")


def test_after_a_failure_the_model_has_its_own_forward() -> None:
    module = HFModule(make_model("distilbert"))
    with pytest.raises(RuntimeError, match="boom"):
        fit(module, {"bf16": True}, callbacks=[Boom()])
    assert "forward" not in vars(module.model)
    pickle.dumps(module.model)


def test_after_bf16_the_model_has_its_own_forward_and_fp32_weights() -> None:
    module = fit(HFModule(make_model("distilbert")), {"bf16": True})
    assert "forward" not in vars(module.model)
    assert {p.dtype for p in module.model.parameters()} == {torch.float32}


def test_a_forward_the_user_put_on_the_model_survives_a_run() -> None:
    model = make_model("distilbert")
    original, calls = model.forward, []

    def counted(**inputs: Any) -> Any:
        calls.append(1)
        return original(**inputs)

    counted.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    model.forward = counted
    fit(HFModule(model), {"bf16": True})
    assert model.forward is counted
    assert calls


# Predicting.


def test_predictions_are_the_models_logits() -> None:
    module = HFModule(make_model("distilbert"))
    rows = make_dataset("distilbert", 7)
    asked = HFDataModule(predict_dataset=rows, data_collator=PadRows())
    predicted = trainer({"per_device_eval_batch_size": 3}).predict(module, asked)
    assert [len(part) for part in predicted] == [3, 3, 1]
    module.model.eval()
    with torch.no_grad():
        first = module.model(**PadRows()([rows[i] for i in range(3)])).logits
    assert torch.equal(predicted[0], first)


def test_rows_without_labels_can_be_predicted() -> None:
    rows = make_dataset("distilbert", 4).remove_columns("label")
    (logits,) = trainer().predict(
        HFModule(make_model("distilbert")), HFDataModule(predict_dataset=rows, data_collator=PadRows())
    )
    assert logits.shape == (4, 2)


# What is given in another way.


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_loader_is_taken(verb: str) -> None:
    loader = DataLoader(make_rows("distilbert", 6), batch_size=4, collate_fn=PadRows())  # type: ignore[arg-type]
    found = getattr(trainer(), verb)(HFModule(make_model("distilbert")), loader)
    assert [len(logits) for logits in found] == [4, 2] if verb == "predict" else found[0]


@pytest.mark.parametrize("by_name", [True, False])
def test_the_data_module_by_place_or_name(by_name: bool) -> None:
    module = HFModule(make_model("distilbert"))
    if by_name:
        trainer().fit(model=module, datamodule=data())
    else:
        trainer().fit(module, data())
    assert module.host.state.global_step == 2


@pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)  # no val loader
def test_loaders_by_lightnings_names() -> None:
    loader = DataLoader(make_rows("distilbert", 8), batch_size=4, collate_fn=PadRows())  # type: ignore[arg-type]
    module = HFModule(make_model("distilbert"))
    trainer().fit(module, train_dataloaders=loader)
    assert module.host.state.global_step == 2


def test_settings_on_the_module_may_be_training_arguments() -> None:
    from transformers import TrainingArguments

    args = TrainingArguments(**SETTINGS)
    assert HFModule(make_model("distilbert"), settings=args).given_settings == hfbridge.Settings(**SETTINGS)


def test_a_subclass_is_an_hfmodule() -> None:
    class Mine(HFModule):
        def on_train_batch_end(self, *hook: Any) -> None:
            self.seen = getattr(self, "seen", 0) + 1

    module = Mine(make_model("distilbert"))
    fit(module)
    assert module.seen == 2
    assert isinstance(module, pl.LightningModule)

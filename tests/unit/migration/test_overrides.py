"""What a subclass, the object or a patch overrides is found, each with where; what is harmless is not."""

import contextlib
import functools
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

import hfbridge
from hfbridge.errors import SettingsError
from hfbridge.migration import overrides
from hfbridge.migration.overrides import find_overridden, find_overridden_settings
from tests.unit.migration.natives import make_arguments, make_native


def found(native: Any) -> list[str]:
    return [where for _, where in find_overridden(native)]


class Harmless(Trainer):
    """Adds to the HF Trainer."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.mine = 1

    def evaluate_twice(self) -> None: ...


@pytest.mark.parametrize("kind", [Trainer, Harmless])
def test_who_overrides_nothing_is_moved_to_an_hfmodule(kind: type[Trainer]) -> None:
    native = make_native(kind)
    assert found(native) == []
    assert [type(part) for part in hfbridge.from_trainer(native)] == [
        hfbridge.Trainer,
        hfbridge.HFModule,
        hfbridge.HFDataModule,
    ]


class Logging:
    """A mixin."""

    def log(self, *arguments: Any, **named: Any) -> None: ...


class Own(Logging, Trainer):
    """Overrides methods, private helpers and a switch, one through a mixin."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any: ...

    def _get_train_sampler(self, train_dataset: Any = None) -> Any: ...


def test_what_a_subclass_and_its_mixins_override() -> None:
    assert sorted(find_overridden(make_native(Own))) == [
        ("_get_train_sampler", "Own._get_train_sampler"),
        ("compute_loss", "Own.compute_loss"),
        ("log", "Logging.log"),
        ("loss_is_scaled_for_ga", "Own.loss_is_scaled_for_ga"),
    ]


def test_what_is_set_on_the_object() -> None:
    native = make_native()
    native.training_step = MethodType(lambda self, *arguments: None, native)
    native._maybe_log_save_evaluate = lambda *arguments: None
    assert found(native) == [
        "Trainer object: training_step = ...",
        "Trainer object: _maybe_log_save_evaluate = ...",
    ]


def test_what_is_set_in_transformers_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.Trainer, "compute_loss", lambda self, *arguments: None)
    assert found(make_native()) == ["transformers' Trainer.compute_loss = ..."]


class Called:
    """A callable object that is a method."""

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return functools.partial(self, owner)

    def __call__(self, native: Any, *arguments: Any) -> None: ...


def _loss(self: Any, *arguments: Any) -> None: ...


@pytest.mark.parametrize(
    "patch",
    [
        contextlib.contextmanager(_loss),
        torch.no_grad()(_loss),
        torch.no_grad()(transformers.Trainer.compute_loss),
        functools.partialmethod(_loss, 3),
        functools.wraps(transformers.Trainer.compute_loss)(lambda self, *arguments: None),
        Called(),
    ],
)
def test_whatever_is_set_in_transformers_class(monkeypatch: pytest.MonkeyPatch, patch: Any) -> None:
    monkeypatch.setattr(transformers.Trainer, "compute_loss", patch)
    assert found(make_native()) == ["transformers' Trainer.compute_loss = ..."]


@pytest.mark.parametrize("patch", [torch.no_grad()(_loss), functools.partialmethod(_loss, 3)])
def test_what_was_set_before_hfbridge_was_imported(monkeypatch: pytest.MonkeyPatch, patch: Any) -> None:
    monkeypatch.setattr(transformers.Trainer, "compute_loss", patch)
    monkeypatch.setitem(overrides._ORIGINALS, transformers.Trainer, dict(vars(transformers.Trainer)))
    assert found(make_native()) == ["transformers' Trainer.compute_loss = ..."]


def test_a_property_of_the_arguments_that_is_replaced_by_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "eval_batch_size", 3)
    where = "transformers' TrainingArguments.eval_batch_size = ..."
    assert list(find_overridden_settings(make_arguments(TrainingArguments))) == [where]


class Predicting(Seq2SeqTrainer):
    """Overrides what Seq2SeqTrainer alone has."""

    def _pad_tensors_to_max_len(self, tensor: Any, max_length: int) -> Any: ...


def test_methods_of_seq2seq_trainers_are_known() -> None:
    args = make_arguments(transformers.Seq2SeqTrainingArguments)
    assert found(make_native(Predicting, args)) == ["Predicting._pad_tensors_to_max_len"]
    assert found(make_native(Seq2SeqTrainer, args)) == []


class Warming(TrainingArguments):
    """Computes a setting."""

    def get_warmup_steps(self, num_training_steps: int) -> int:
        return 3


def test_what_the_arguments_compute_otherwise() -> None:
    assert list(find_overridden_settings(make_arguments(Warming))) == ["Warming.get_warmup_steps"]


@pytest.mark.parametrize("kind", [None, "a name", Trainer, object()])
def test_only_native_trainers_are_moved(kind: Any) -> None:
    with pytest.raises(SettingsError, match="object, and was given"):
        hfbridge.from_trainer(kind)

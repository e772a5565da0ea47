"""What was replaced in a native Trainer is named, with what to do instead; what is harmless is not."""

from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import transformers
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

import hfbridge
from hfbridge.errors import Problem, SettingsError
from hfbridge.migrate.methods import find_replaced
from hfbridge.replaced import CALLED_BY_USERS, INSTEAD
from tests.unit.migrate.natives import make_arguments, make_native


def subjects(problems: Iterator[Problem]) -> list[str]:
    return [problem.subject for problem in problems]


def test_a_plain_trainer_has_replaced_nothing() -> None:
    assert subjects(find_replaced(make_native())) == []


class Harmless(Trainer):
    """New methods, and those that only a user calls."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.mine = 1

    def evaluate_twice(self) -> None: ...

    def push_to_hub(self, *arguments: Any, **named: Any) -> Any: ...


def test_new_methods_and_those_that_users_call_are_harmless() -> None:
    native = make_native(Harmless)
    assert subjects(find_replaced(native)) == []
    assert len(hfbridge.from_trainer(native)) == 3


class Logging:
    """A mixin."""

    def log(self, *arguments: Any, **named: Any) -> None: ...


class Own(Logging, Trainer):
    """Replaces methods, private helpers and a switch, one through a mixin."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any: ...

    def get_train_dataloader(self) -> Any: ...

    def create_optimizer(self, model: Any = None) -> Any: ...

    def _get_train_sampler(self, train_dataset: Any = None) -> Any: ...


OWN = {
    "Own.loss_is_scaled_for_ga": "compute_loss_func",
    "Own.compute_loss": "compute_loss_func",
    "Own.get_train_dataloader": "data_collator=",
    "Own.create_optimizer": "optimizers=",
    "Own._get_train_sampler": "train_sampling_strategy",
    "Logging.log": "on_log",
}


def test_what_a_subclass_and_its_mixins_replace_is_named_in_one_error() -> None:
    with pytest.raises(SettingsError, match="6 parts of this Own cannot be carried") as caught:
        hfbridge.from_trainer(make_native(Own))
    found = {problem.subject: problem.text for problem in caught.value.problems}
    assert set(found) == set(OWN)
    for subject, cure in OWN.items():
        assert cure in found[subject], subject


def test_what_is_replaced_on_the_object_is_named() -> None:
    native = make_native()
    native.training_step = MethodType(lambda self, *arguments: None, native)
    native._maybe_log_save_evaluate = lambda *arguments: None
    assert subjects(find_replaced(native)) == [
        "Trainer object: training_step = ...",
        "Trainer object: _maybe_log_save_evaluate = ...",
    ]


def test_what_is_replaced_in_transformers_class_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.Trainer, "compute_loss", lambda self, *arguments: None)
    assert subjects(find_replaced(make_native())) == ["transformers' Trainer.compute_loss = ..."]


def test_what_the_caller_calls_itself_may_be_replaced() -> None:
    named = subjects(find_replaced(make_native(Own), called=["log", "compute_loss"]))
    assert "Own.compute_loss" not in named
    assert "Logging.log" not in named
    assert "Own.create_optimizer" in named


class Predicting(Seq2SeqTrainer):
    """Replaces what Seq2SeqTrainer alone has."""

    def _pad_tensors_to_max_len(self, tensor: Any, max_length: int) -> Any: ...


def test_methods_of_seq2seq_trainers_are_known() -> None:
    args = make_arguments(transformers.Seq2SeqTrainingArguments)
    assert subjects(find_replaced(make_native(Predicting, args))) == ["Predicting._pad_tensors_to_max_len"]
    assert subjects(find_replaced(make_native(Seq2SeqTrainer, args))) == []


class Warming(TrainingArguments):
    """Computes a setting."""

    def get_warmup_steps(self, num_training_steps: int) -> int:
        return 3


def test_what_the_arguments_compute_otherwise_is_named() -> None:
    native = make_native(args=make_arguments(Warming))
    assert subjects(find_replaced(native)) == ["Warming.get_warmup_steps"]


@pytest.mark.parametrize("kind", [None, "a name", Trainer, object()])
def test_only_native_trainers_are_moved(kind: Any) -> None:
    with pytest.raises(SettingsError, match="object, and was given"):
        hfbridge.from_trainer(kind)


def test_the_tables_name_methods_that_there_are() -> None:
    gone = [name for name in (*INSTEAD, *CALLED_BY_USERS) if not hasattr(Seq2SeqTrainer, name)]
    assert gone == []

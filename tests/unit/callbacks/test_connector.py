"""What a run's Trainer is asked, what it must not say, and what is switched off on it."""

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import ModelParallelStrategy

from hfbridge.callbacks.connector import contradictions, has_plain_backward, settings_of, take_over
from hfbridge.data.accumulation import Schedule
from hfbridge.errors import SettingsError
from hfbridge.settings import Settings
from hfbridge.settings.plan import NEVER

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}
SCHEDULE = Schedule(micro_batches_per_epoch=6, steps_per_epoch=3, max_steps=5, epochs=2, samples=36)


def plain(**arguments: Any) -> pl.Trainer:
    made = {name: value() if isinstance(value, type) else value for name, value in arguments.items()}
    return pl.Trainer(**{**QUIET, **made})


def run_with(*, trainer: Any = None, module: Any = None, data: Any = None, **limits: Any) -> Any:
    """A Trainer with settings in some of the three places."""
    found = SimpleNamespace(
        max_steps=limits.get("max_steps", -1),
        max_epochs=limits.get("max_epochs"),
        log_every_n_steps=limits.get("log_every_n_steps", 50),
        strategy=SimpleNamespace(),
        lightning_module=SimpleNamespace(given_settings=module),
        datamodule=SimpleNamespace(given_settings=data),
    )
    if trainer is not None:
        found.settings = trainer
    return found


def problems(settings: dict[str, Any], **arguments: Any) -> str:
    return "\n".join(
        f"{p.subject} {p.text}" for p in contradictions(plain(**arguments), Settings(**settings))
    )


# Where the settings are.


@pytest.mark.parametrize("place", ["trainer", "module", "data"])
def test_settings_are_found_where_they_are(place: str) -> None:
    given = Settings(seed=3, max_steps=2)
    assert settings_of(run_with(**{place: given})) == given


def test_the_same_settings_in_several_places_are_no_contradiction() -> None:
    one, other = Settings(seed=3, max_steps=2), Settings(seed=3, max_steps=2)
    assert settings_of(run_with(trainer=one, module=other, data=one)) == one


def test_no_settings_anywhere() -> None:
    with pytest.raises(SettingsError, match="This run has no settings"):
        settings_of(run_with())


def test_two_that_differ_are_both_shown() -> None:
    with pytest.raises(SettingsError) as caught:
        settings_of(run_with(trainer=Settings(seed=3), data=Settings(seed=4)))
    for part in ("hfbridge.Trainer and HFDataModule", "Settings(seed=3)", "Settings(seed=4)", "Choose one"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_steps": 7}, ("max_steps", 7)),
        ({"log_every_n_steps": 3}, ("logging_steps", 3)),
        ({"log_every_n_steps": 50}, ("logging_steps", 500)),
        ({"max_epochs": 2}, ("num_train_epochs", 2.0)),
        ({"max_epochs": 1000}, ("num_train_epochs", 3.0)),
        ({"max_epochs": -1}, ("num_train_epochs", 3.0)),
    ],
    ids=str,
)
def test_a_plain_trainers_limits_are_taken_where_settings_are_silent(limits: Any, expected: Any) -> None:
    name, value = expected
    assert getattr(settings_of(run_with(module=Settings(seed=1), **limits)), name) == value


def test_limits_are_not_taken_where_settings_speak() -> None:
    given = Settings(num_train_epochs=4, logging_steps=2)
    assert settings_of(run_with(module=given, max_epochs=2, log_every_n_steps=3)) is given


# What is switched off.


def test_lightnings_own_habits_are_switched_off() -> None:
    trainer = plain(max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=1.0)
    take_over(trainer, Settings(num_train_epochs=2, gradient_accumulation_steps=2), SCHEDULE)
    assert trainer.num_sanity_val_steps == 0
    assert trainer.log_every_n_steps == 500
    assert trainer.accumulate_grad_batches == 1
    assert trainer.gradient_clip_val is None
    assert (trainer.max_epochs, trainer.max_steps) == (2, 5)


@pytest.mark.parametrize(("eval_strategy", "every"), [("no", 1), ("epoch", NEVER), ("steps", NEVER)])
def test_lightning_never_validates_by_itself_and_its_callbacks_know_what_to_wait_for(
    eval_strategy: str, every: int
) -> None:
    trainer = plain(max_epochs=2)
    take_over(trainer, Settings(num_train_epochs=2, eval_strategy=eval_strategy), SCHEDULE)
    assert trainer.check_val_every_n_epoch == every
    trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True
    assert not trainer.fit_loop.epoch_loop._should_check_val_fx(None)  # type: ignore[arg-type]


def test_a_trainer_that_has_trained_is_refused() -> None:
    trainer = plain(max_epochs=2)
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 4
    with pytest.raises(SettingsError, match=r"trained for 4 steps.*new Trainer"):
        take_over(trainer, Settings(num_train_epochs=2), SCHEDULE)


# What contradicts.


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"gradient_accumulation_steps": 4, "num_train_epochs": 1}, {"accumulate_grad_batches": 4}),
        ({"gradient_accumulation_steps": 4, "num_train_epochs": 1}, {}),
        ({"max_grad_norm": 0.5, "num_train_epochs": 1}, {"gradient_clip_val": 0.5}),
        ({"num_train_epochs": 0.5}, {}),
        ({"max_steps": 5}, {"max_steps": 5, "max_epochs": -1}),
        ({"max_steps": 5}, {"max_epochs": 1}),
        ({"num_train_epochs": 1, "bf16": True}, {"precision": "32-true"}),
    ],
    ids=str,
)
def test_what_agrees_is_no_problem(settings: dict[str, Any], arguments: dict[str, Any]) -> None:
    assert problems(settings, **{"max_epochs": 1, **arguments}) == ""


@pytest.mark.parametrize(
    ("settings", "arguments", "says"),
    [
        ({}, {"accumulate_grad_batches": 3}, "accumulate_grad_batches=3 gradient_accumulation_steps=1"),
        ({}, {"gradient_clip_val": 0.5}, "gradient_clip_val=0.5 max_grad_norm=1.0"),
        ({"num_train_epochs": 1}, {"max_epochs": 2}, "max_epochs=2 num_train_epochs=1"),
        ({"max_steps": 4}, {"max_steps": 5}, "max_steps=5 max_steps=4"),
        ({}, {"precision": "bf16-mixed"}, "precision='bf16-mixed' bf16=False"),
        ({}, {"precision": "16-true"}, "precision='16-true' only fp32 and bf16"),
        ({"logging_steps": 5}, {"log_every_n_steps": 7}, "log_every_n_steps=7 logging_steps=5"),
        (
            {},
            {"strategy": ModelParallelStrategy},
            "strategy=ModelParallelStrategy refused: under Lightning's ModelParallelStrategy the numbers",
        ),
    ],
    ids=str,
)
def test_what_contradicts_is_named_on_both_sides(settings: Any, arguments: Any, says: str) -> None:
    assert says in problems({"num_train_epochs": 1, **settings}, **{"max_epochs": 1, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"limit_train_batches": 2},
        {"limit_val_batches": 0},
        {"check_val_every_n_epoch": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"overfit_batches": 2},
        {"gradient_clip_algorithm": "value"},
        {"val_check_interval": 0.5},
    ],
    ids=str,
)
def test_what_our_trainer_refuses_is_not_ignored_on_a_plain_one(arguments: dict[str, Any]) -> None:
    said = problems({"num_train_epochs": 1}, **{"max_epochs": 1, **arguments})
    assert next(iter(arguments)) in said


@pytest.mark.parametrize(
    "arguments", [{"fast_dev_run": True}, {"overfit_batches": 2}, {"barebones": True}], ids=str
)
def test_of_a_shortcut_only_itself_is_told_and_not_what_it_sets(arguments: dict[str, Any]) -> None:
    (problem,) = contradictions(plain(**arguments), Settings(num_train_epochs=1))
    assert problem.subject.startswith(next(iter(arguments)))


def test_a_callback_that_accumulates_windows_is_refused() -> None:
    said = problems({"num_train_epochs": 1}, max_epochs=1, callbacks=[GradientAccumulationScheduler({0: 2})])
    assert "GradientAccumulationScheduler" in said


def test_all_contradictions_are_told_at_once() -> None:
    trainer = plain(max_epochs=2, accumulate_grad_batches=3)
    with pytest.raises(SettingsError) as caught:
        take_over(trainer, Settings(num_train_epochs=1), SCHEDULE)
    assert len(caught.value.problems) == 2
    assert trainer.accumulate_grad_batches == 3


# The short way to a backward.


class Hooked(pl.Callback):
    def on_after_backward(self, *hook: Any) -> None:
        """See it."""


class OwnBackward(pl.LightningModule):
    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        """Do something else."""


@pytest.mark.parametrize(
    ("module", "callbacks", "is_plain"),
    [
        (pl.LightningModule(), [], True),
        (pl.LightningModule(), [pl.Callback()], True),
        (pl.LightningModule(), [Hooked()], False),
        (OwnBackward(), [], False),
    ],
)
def test_backward_is_plain_if_nobody_listens(module: Any, callbacks: Any, is_plain: bool) -> None:
    trainer = plain(max_epochs=1, callbacks=callbacks)
    trainer.strategy._lightning_module = module
    assert has_plain_backward(trainer) is is_plain


@pytest.mark.parametrize(
    ("arguments", "is_plain"),
    [
        ({"precision": "bf16-mixed"}, False),
        ({"strategy": ModelParallelStrategy}, False),
        ({"strategy": "ddp"}, True),
    ],
    ids=str,
)
def test_backward_is_lightnings_under_another_precision_or_strategy(arguments: Any, is_plain: bool) -> None:
    trainer = plain(max_epochs=1, **arguments)
    trainer.strategy._lightning_module = pl.LightningModule()
    assert has_plain_backward(trainer) is is_plain

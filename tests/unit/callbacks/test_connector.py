"""Settings and a plain Trainer's arguments together, and what is set on the Trainer of a run."""

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import ModelParallelStrategy

import hfbridge
from hfbridge.callbacks.connector import (
    configure_trainer,
    end_with,
    epoch_limit,
    has_plain_backward,
    lightning_validates,
    settings_of,
)
from hfbridge.data.accumulation import Schedule
from hfbridge.errors import SettingsError
from hfbridge.settings import Settings
from hfbridge.settings.plan import NEVER
from hfbridge.settings.to_lightning import ENDLESS_EPOCHS

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}
SCHEDULE = Schedule(micro_batches_per_epoch=6, steps_per_epoch=3, max_steps=5, epochs=2, samples=36)


class Module(pl.LightningModule):
    """A module with settings and a host, as HFModule has them."""

    host = SimpleNamespace(state=SimpleNamespace(global_step=0))

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        self.given_settings = settings


def plain(settings: Settings | None = None, **arguments: Any) -> pl.Trainer:
    """Make a plain Trainer whose module has settings."""
    made = {name: value() if isinstance(value, type) else value for name, value in arguments.items()}
    trainer = pl.Trainer(**{**QUIET, **made})
    trainer.strategy._lightning_module = Module(settings)
    return trainer


def ours(settings: dict[str, Any] | None = None, **arguments: Any) -> hfbridge.Trainer:
    """Make hfbridge's Trainer with a module."""
    quiet = {name: value for name, value in QUIET.items() if name != "devices"}
    made = {**quiet, **arguments}
    trainer = hfbridge.Trainer(**made) if settings is None else hfbridge.Trainer(settings, **made)
    trainer.strategy._lightning_module = Module()
    return trainer


def with_data(trainer: Any, settings: Settings) -> Any:
    """Attach a data module with settings."""
    trainer._data_connector._datahook_selector = None
    trainer.datamodule = SimpleNamespace(given_settings=settings)
    return trainer


# Where the settings are.


def test_settings_are_found_where_they_are() -> None:
    given = Settings(seed=3, max_steps=2)
    assert settings_of(plain(given)) == given
    assert settings_of(with_data(plain(), given)) == given
    assert settings_of(ours({"seed": 3})).seed == 3


def test_the_same_settings_in_several_places_are_no_contradiction() -> None:
    one, other = Settings(seed=3, max_steps=2), Settings(seed=3, max_steps=2)
    assert settings_of(with_data(plain(one), other)) == one


def test_two_that_differ_are_both_shown() -> None:
    with pytest.raises(SettingsError) as caught:
        settings_of(with_data(plain(Settings(seed=3)), Settings(seed=4)))
    for part in ("HFModule and HFDataModule", "Settings(seed=3)", "Settings(seed=4)", "Pass them to one"):
        assert part in str(caught.value)


def test_settings_of_the_module_are_not_those_of_our_trainer() -> None:
    trainer = ours()
    trainer.strategy._lightning_module = Module(Settings(seed=3))
    with pytest.raises(SettingsError, match=r"passed to HFModule.*hfbridge.Trainer\(settings\)"):
        settings_of(trainer)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"num_train_epochs": 1000, "logging_steps": 50, "max_grad_norm": 0, "max_steps": -1}),
        ({"max_epochs": 2}, {"num_train_epochs": 2}),
        ({"max_epochs": -1}, {"num_train_epochs": ENDLESS_EPOCHS}),
        ({"max_steps": 7}, {"max_steps": 7}),
        ({"gradient_clip_val": 0.5}, {"max_grad_norm": 0.5}),
        ({"accumulate_grad_batches": 4}, {"gradient_accumulation_steps": 4}),
        ({"log_every_n_steps": 3}, {"logging_steps": 3, "logging_strategy": "steps"}),
        ({"log_every_n_steps": 0}, {"logging_strategy": "no"}),
        ({"precision": "bf16-mixed"}, {"bf16": True}),
        ({"precision": "16-true"}, {"bf16": False}),
        ({"fast_dev_run": 3}, {"max_steps": 3, "save_strategy": "no", "eval_strategy": "no"}),
    ],
    ids=str,
)
def test_without_settings_the_loop_is_lightnings(arguments: Any, expected: Any) -> None:
    settings = settings_of(plain(**arguments))
    assert {name: getattr(settings, name) for name in expected} == expected
    assert (settings.save_strategy, settings.report_to) == ("no", "none")
    assert (settings.learning_rate, settings.optim) == (5e-5, "adamw_torch_fused")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_steps": 7}, {"max_steps": 7}),
        ({"log_every_n_steps": 3}, {"logging_steps": 3}),
        ({"log_every_n_steps": 50}, {"logging_steps": 500}),
        ({"log_every_n_steps": 0}, {"logging_strategy": "no"}),
        ({"max_epochs": 2}, {"num_train_epochs": 2.0}),
        ({"max_epochs": 1000}, {"num_train_epochs": 3.0}),
        ({"max_epochs": -1}, {"num_train_epochs": ENDLESS_EPOCHS}),
        ({"max_epochs": 0}, {"num_train_epochs": 3.0}),
        ({"accumulate_grad_batches": 3}, {"gradient_accumulation_steps": 3}),
        ({"gradient_clip_val": 0.5}, {"max_grad_norm": 0.5}),
        ({}, {"max_grad_norm": 1.0}),
        ({"precision": "bf16-mixed"}, {"bf16": True}),
    ],
    ids=str,
)
def test_a_plain_trainers_arguments_are_taken_where_settings_say_nothing(
    arguments: Any, expected: Any
) -> None:
    settings = settings_of(plain(Settings(seed=1), **arguments))
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("settings", "arguments", "expected"),
    [
        ({"max_grad_norm": 1.0}, {"gradient_clip_val": 0.5}, {"max_grad_norm": 0.5}),
        ({"max_steps": -1}, {"max_steps": 4}, {"max_steps": 4}),
        (
            {"gradient_accumulation_steps": 1},
            {"accumulate_grad_batches": 3},
            {"gradient_accumulation_steps": 3},
        ),
        ({"bf16": False}, {"precision": "bf16-mixed"}, {"bf16": True}),
        ({"num_train_epochs": 2}, {"max_epochs": -1}, {"num_train_epochs": 2}),
        ({"max_steps": 5}, {"max_epochs": -1}, {"max_steps": 5, "num_train_epochs": 3}),
        ({"max_steps": 9, "num_train_epochs": 2}, {"fast_dev_run": True}, {"max_steps": 1}),
    ],
    ids=str,
)
def test_a_default_value_says_nothing(settings: Any, arguments: Any, expected: Any) -> None:
    found = settings_of(plain(Settings(**settings), **arguments))
    assert {name: getattr(found, name) for name in expected} == expected


# What is set on the Trainer.


def test_the_settings_configure_the_loop() -> None:
    trainer = plain(max_epochs=2)
    configure_trainer(trainer, Settings(num_train_epochs=2, gradient_accumulation_steps=2))
    end_with(trainer, SCHEDULE)
    assert trainer.log_every_n_steps == 500
    assert trainer.accumulate_grad_batches == 2
    assert trainer.gradient_clip_val == 1.0
    assert (trainer.max_epochs, trainer.max_steps) == (2, 5)
    assert trainer.num_sanity_val_steps == 2  # without settings of a run Lightning checks
    trainer = plain(Settings(seed=1), max_epochs=2)
    configure_trainer(trainer, Settings(max_grad_norm=0))
    assert trainer.gradient_clip_val is None
    assert trainer.num_sanity_val_steps == 0


def test_a_callback_that_schedules_accumulation_does() -> None:
    trainer = plain(callbacks=[GradientAccumulationScheduler({0: 2})])
    before = trainer.accumulate_grad_batches
    configure_trainer(trainer, Settings(gradient_accumulation_steps=4))
    assert trainer.accumulate_grad_batches == before


@pytest.mark.parametrize("arguments", [{"max_epochs": 0}, {"max_steps": 0}], ids=str)
def test_a_limit_of_0_stays(arguments: dict[str, int]) -> None:
    trainer = plain(**arguments)
    end_with(trainer, SCHEDULE)
    ((name, value),) = arguments.items()
    assert getattr(trainer, name) == value


@pytest.mark.parametrize(("eval_strategy", "every"), [("no", 1), ("epoch", 1), ("steps", NEVER)])
def test_eval_strategy_decides_and_lightnings_callbacks_know_what_to_wait_for(
    eval_strategy: str, every: int
) -> None:
    settings = Settings(num_train_epochs=2, eval_strategy=eval_strategy)
    trainer = plain(settings, max_epochs=2)
    assert not lightning_validates(trainer)
    configure_trainer(trainer, settings)
    assert trainer.check_val_every_n_epoch == every
    trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True
    assert not trainer.fit_loop.epoch_loop._should_check_val_fx(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [
        {"val_check_interval": 0.5},
        {"val_check_interval": 3},
        {"val_check_interval": "00:01:00:00"},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": None, "val_check_interval": 5},
        {"fast_dev_run": True},
    ],
    ids=str,
)
def test_lightning_validates_when_its_arguments_say(arguments: dict[str, Any]) -> None:
    settings = Settings(num_train_epochs=2)
    trainer = plain(settings, **arguments)
    assert lightning_validates(trainer)
    every = trainer.check_val_every_n_epoch
    configure_trainer(trainer, settings)
    assert trainer.check_val_every_n_epoch == every
    assert lightning_validates(plain())
    assert not lightning_validates(plain(settings))


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [({}, None), ({"max_epochs": -1}, None), ({"max_epochs": 2}, 2), ({"fast_dev_run": 3}, 1)],
    ids=str,
)
def test_epochs_that_were_passed_limit_a_run_of_steps(arguments: Any, limit: int | None) -> None:
    assert epoch_limit(plain(**arguments)) == limit
    assert epoch_limit(ours({"max_steps": 5}, **arguments)) == limit


def has_trained(trainer: Any, steps: int) -> None:
    """Have a Trainer count the steps of a run that was ended."""
    end_with(trainer, SCHEDULE)
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = steps


def test_the_end_of_a_run_is_not_taken_for_an_argument() -> None:
    settings = Settings(num_train_epochs=2)
    trainer = plain(settings, max_epochs=2)
    has_trained(trainer, 4)
    assert settings_of(trainer) == settings


@pytest.mark.parametrize("make", [plain, ours])
def test_what_a_trainer_is_given_after_it_has_trained_wins(make: Any) -> None:
    trainer = make(Settings(num_train_epochs=2)) if make is plain else make({"num_train_epochs": 2})
    has_trained(trainer, 4)
    trainer.fit_loop.max_epochs = 7
    assert settings_of(trainer).num_train_epochs == 7
    trainer.fit_loop.epoch_loop.max_steps = 30
    assert settings_of(trainer).max_steps == 30


# What conflicts.


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"gradient_accumulation_steps": 4}, {"accumulate_grad_batches": 4}),
        ({"gradient_accumulation_steps": 4}, {}),
        ({"max_grad_norm": 0.5}, {"gradient_clip_val": 0.5}),
        ({"num_train_epochs": 0.5}, {"max_epochs": 1}),
        ({"max_steps": 5}, {"max_steps": 5, "max_epochs": -1}),
        ({"max_steps": 5}, {"max_epochs": 1}),
        ({"bf16": True}, {"precision": "32-true"}),
        ({"bf16": True}, {"precision": "bf16-mixed"}),
    ],
    ids=str,
)
def test_what_agrees_is_no_conflict(settings: dict[str, Any], arguments: dict[str, Any]) -> None:
    given = Settings(**settings)
    found = settings_of(plain(given, **arguments))
    assert {name: getattr(found, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("settings", "arguments", "text"),
    [
        (
            {"gradient_accumulation_steps": 2},
            {"accumulate_grad_batches": 3},
            "`accumulate_grad_batches=3` conflicts with `gradient_accumulation_steps=2`",
        ),
        (
            {"max_grad_norm": 0.0},
            {"gradient_clip_val": 0.5},
            "`gradient_clip_val=0.5` conflicts with `max_grad_norm=0.0`",
        ),
        ({"num_train_epochs": 1}, {"max_epochs": 2}, "`max_epochs=2` conflicts with `num_train_epochs=1`"),
        ({"max_steps": 4}, {"max_steps": 5}, "`max_steps=5` conflicts with `max_steps=4`"),
        ({"bf16": True}, {"precision": "16-true"}, "`precision='16-true'` conflicts with `bf16=True`"),
        (
            {"logging_steps": 5},
            {"log_every_n_steps": 7},
            "`log_every_n_steps=7` conflicts with `logging_steps=5`",
        ),
    ],
    ids=str,
)
def test_a_conflict_names_both_sides(settings: Any, arguments: Any, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings_of(plain(Settings(**settings), **{"max_epochs": 1000, **arguments}))
    assert f"{text} in the settings; set only one" in " ".join(str(caught.value).split())


def test_all_conflicts_come_in_one_error() -> None:
    settings = Settings(num_train_epochs=1, gradient_accumulation_steps=2)
    with pytest.raises(SettingsError) as caught:
        settings_of(plain(settings, max_epochs=2, accumulate_grad_batches=3))
    assert len(caught.value.problems) == 2


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

"""hfbridge.Trainer: which callbacks go where, what is added, what can be read."""

import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, TQDMProgressBar
from lightning.pytorch.profilers import SimpleProfiler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import hfbridge
from hfbridge.callbacks.progress import RunProgressBar
from hfbridge.loops.epoch_loop import NoProfiler
from hfbridge.trainer import _split_callbacks

SETTINGS: dict[str, Any] = {"output_dir": "out", "use_cpu": True, "save_strategy": "no", "max_steps": 3}


class Mine(TrainerCallback):
    """A native callback."""


class Plain(pl.LightningModule):
    """A module that trains."""

    def training_step(self, *step: Any) -> None:
        """Do nothing."""


class Theirs(pl.Callback):
    """A Lightning callback."""


def make(settings: Any = None, **arguments: Any) -> hfbridge.Trainer:
    return hfbridge.Trainer(SETTINGS if settings is None else settings, **{"logger": False, **arguments})


def test_callbacks_of_both_worlds_are_told_apart_and_keep_their_order() -> None:
    first, second, own = Mine(), Mine(), Theirs()
    assert _split_callbacks([first, own, PrinterCallback, second]) == (
        [own],
        [first, PrinterCallback, second],
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, (0, 0)), (Mine(), (0, 1)), (Mine, (0, 1)), (Theirs(), (1, 0)), ((), (0, 0))],
)
def test_one_callback_needs_no_list(given: Any, expected: tuple[int, int]) -> None:
    assert tuple(map(len, _split_callbacks(given))) == expected


def test_each_world_gets_its_callbacks() -> None:
    mine, theirs = Mine(), Theirs()
    given = [mine, theirs, PrinterCallback]
    trainer = make(callbacks=given)
    assert trainer.trainer_callbacks == (mine, PrinterCallback)
    assert theirs in trainer.callbacks
    assert mine not in trainer.callbacks
    assert given == [mine, theirs, PrinterCallback]


@pytest.mark.parametrize("given", [[3], ["x"], [EarlyStopping]], ids=["number", "text", "class"])
def test_what_is_no_callback_is_refused(given: Any) -> None:
    with pytest.raises(hfbridge.SettingsError, match="callbacks"):
        make(callbacks=given)


def test_a_callback_that_schedules_accumulation_is_lightnings() -> None:
    scheduler = GradientAccumulationScheduler({0: 2})
    assert scheduler in make(callbacks=[scheduler]).callbacks


def test_the_plan_and_the_settings_can_be_read() -> None:
    trainer = make()
    assert trainer.settings == hfbridge.Settings(**SETTINGS)
    assert trainer.plan.settings is trainer.settings
    assert "max_steps" in str(trainer.plan)
    assert "lightning.Trainer" in str(trainer.plan)


def test_training_arguments_are_taken_and_left_alone() -> None:
    args = TrainingArguments(output_dir="out", use_cpu=True, save_strategy="no", max_steps=3)
    before = args.to_dict()
    assert make(args).settings.max_steps == 3
    assert args.to_dict() == before


def test_arguments_the_settings_do_not_contradict_are_taken_over() -> None:
    trainer = make({**SETTINGS}, gradient_clip_val=0.5, accumulate_grad_batches=2)
    assert trainer.settings.max_grad_norm == 0.5
    assert trainer.settings.gradient_accumulation_steps == 2
    assert (trainer.gradient_clip_val, trainer.accumulate_grad_batches) == (0.5, 2)


def test_a_part_of_an_epoch_counts_as_far_as_it_goes() -> None:
    settings = {**SETTINGS, "max_steps": -1, "num_train_epochs": 1.5, "gradient_accumulation_steps": 2}
    trainer = make(settings)
    trainer.strategy.connect(Plain())
    trainer.fit_loop._data_source.instance = torch.utils.data.DataLoader(range(10))  # type: ignore[arg-type]
    assert trainer.estimated_stepping_batches == 8
    trainer.fit_loop.epoch_loop.max_steps = 3
    assert trainer.estimated_stepping_batches == 3


def test_what_was_taken_over_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make(gradient_clip_val=0.5)
    assert "max_grad_norm=0.5 was taken over from Trainer(...)" in caplog.text


def test_without_a_profiler_it_costs_nothing() -> None:
    trainer = make()
    assert isinstance(trainer.profiler, NoProfiler)
    assert trainer.profiler.profile("a") is trainer.profiler.profile("b")
    with trainer.profiler.profile("a"), trainer.profiler.profile("b"):
        pass


def test_a_profiler_of_the_user_is_kept() -> None:
    assert isinstance(make(profiler="simple").profiler, SimpleProfiler)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, RunProgressBar),
        ({"callbacks": [TQDMProgressBar()]}, TQDMProgressBar),
        ({"enable_progress_bar": False}, type(None)),
    ],
    ids=["nothing said", "a bar", "no bar"],
)
def test_our_bar_is_there_unless_the_user_brings_one_or_wants_none(arguments: Any, expected: type) -> None:
    assert type(make(**arguments).progress_bar_callback) is expected


def test_disable_tqdm_shows_no_bar() -> None:
    assert make({**SETTINGS, "disable_tqdm": True}).progress_bar_callback is None


def test_before_fit_the_history_is_empty() -> None:
    assert make().log_history == []


@pytest.mark.parametrize("settings", [3, TrainingArguments], ids=str)
def test_settings_of_another_type_are_refused(settings: Any) -> None:
    with pytest.raises(hfbridge.SettingsError, match="settings cannot be read from"):
        hfbridge.Trainer(settings)

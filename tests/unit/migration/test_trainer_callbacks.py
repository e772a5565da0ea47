"""The user's callbacks are told from those that the native Trainer adds itself."""

from typing import Any

import lightning.pytorch as pl
import pytest
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

import hfbridge
from hfbridge.callbacks.progress import RunProgressBar
from hfbridge.errors import SettingsError
from hfbridge.migration.trainer_callbacks import sort_callbacks
from tests.unit.migration.natives import make_with


class Mine(TrainerCallback):
    """A user's."""


@pytest.fixture(autouse=True)
def _reports_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", Wandb)


class Wandb(TrainerCallback):
    """Stands for a reporter whose package is not installed."""


def test_only_the_users_own_are_left_in_their_order() -> None:
    early = EarlyStoppingCallback(2)
    native = make_with(
        [Mine, early], disable_tqdm=False, report_to=["tensorboard", "wandb"], enable_jit_checkpoint=True
    )
    native.add_callback(Mine())
    found = sort_callbacks(native)
    assert [type(callback) for callback in found.users] == [Mine, EarlyStoppingCallback, Mine]
    assert found.users[1] is early
    assert (found.settings, found.print_logs, found.problems) == ({}, True, [])


def test_a_reporter_of_the_users_own_stays_beside_the_one_of_the_settings() -> None:
    mine = TensorBoardCallback()
    assert sort_callbacks(make_with([mine], report_to="tensorboard")).users == [mine]
    assert sort_callbacks(make_with([mine])).users == [mine]


@pytest.mark.parametrize("named", ["none", ["none"], [], None])
def test_reporters_that_were_named_after_the_settings_were_made(named: Any) -> None:
    native = make_with()
    native.args.report_to = named
    assert (sort_callbacks(native).settings, sort_callbacks(native).problems) == ({}, [])
    native.args.report_to = "wandb"
    assert sort_callbacks(native).settings == {"report_to": "none"}


def test_a_reporter_that_was_removed_is_taken_out_of_the_settings() -> None:
    native = make_with(report_to=["tensorboard", "wandb"], enable_jit_checkpoint=True)
    native.remove_callback(TensorBoardCallback)
    native.remove_callback(JITCheckpointCallback)
    found = sort_callbacks(native)
    assert found.settings == {"report_to": ["wandb"], "enable_jit_checkpoint": False}
    native.remove_callback(Wandb)
    assert sort_callbacks(native).settings["report_to"] == "none"
    trainer, _, _ = hfbridge.from_trainer(native)
    assert trainer.settings.report_to == "none"
    assert trainer.settings.enable_jit_checkpoint is False


@pytest.mark.parametrize(
    ("disable_tqdm", "shown"), [(True, PrinterCallback), (False, ProgressCallback)], ids=["rows", "bar"]
)
def test_what_shows_progress_is_hfbridges_own_and_stays_away_if_it_was_removed(
    disable_tqdm: bool, shown: type[TrainerCallback], capsys: pytest.CaptureFixture[str]
) -> None:
    native = make_with(disable_tqdm=disable_tqdm, logging_steps=1)
    trainer, _, _ = hfbridge.from_trainer(native)
    assert trainer.trainer_callbacks == ()
    assert any(isinstance(cb, RunProgressBar) for cb in trainer.callbacks) is not disable_tqdm
    native.remove_callback(shown)
    trainer, module, data = hfbridge.from_trainer(native, enable_model_summary=False)
    assert not any(isinstance(callback, RunProgressBar) for callback in trainer.callbacks)
    trainer.fit(module, data)
    assert "loss" not in capsys.readouterr().out


def test_another_flow_than_the_native_one_is_refused() -> None:
    native = make_with()
    native.remove_callback(DefaultFlowCallback)
    with pytest.raises(SettingsError, match="DefaultFlowCallback"):
        hfbridge.from_trainer(native)


def test_callbacks_of_both_kinds_are_added() -> None:
    mine, timer = Mine(), pl.callbacks.Timer()
    trainer, _, _ = hfbridge.from_trainer(make_with([mine]), callbacks=[timer, Mine])
    assert trainer.trainer_callbacks == (mine, Mine)
    assert timer in trainer.callbacks

"""What hfbridge.dropin's Trainers refuse, by name, and what not."""

import subprocess
import sys

import pytest

import hfbridge.dropin
from hfbridge.errors import SettingsError
from tests.dropin.overriding import CASES
from tests.dropin.sides import make


def test_settings_that_are_not_carried_are_named() -> None:
    trainer = make(hfbridge.dropin.Trainer, arguments={"torch_empty_cache_steps": None})
    trainer.args.push_to_hub = True
    with pytest.raises(SettingsError, match="push_to_hub"):
        trainer.train()


def test_strategies_come_from_class_environment_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(hfbridge.dropin.Trainer):
        strategy = "fsdp3"

    with pytest.raises(SettingsError, match=r"fsdp3.*did you mean fsdp"):
        make(Mine).train()
    monkeypatch.setenv("HFBRIDGE_STRATEGY", "dpd")
    with pytest.raises(SettingsError, match=r"dpd.*did you mean ddp"):
        make(hfbridge.dropin.Trainer).train()


def test_parts_of_a_checkpoint_of_a_shared_model_are_not_written_by_overrides() -> None:
    class Mine(CASES["_save"], hfbridge.dropin.Trainer):
        strategy = "fsdp2"

    with pytest.raises(SettingsError, match=r"(?s)Save\._save.*shares the model among the ranks"):
        make(Mine, arguments={"save_strategy": "epoch"}).train()


def test_exact_normalisation_is_an_attribute() -> None:
    class Exact(hfbridge.dropin.Trainer):
        loss_normalization = "exact"

    arguments = {"logging_steps": 1, "max_steps": 1}
    losses = []
    for kind in (hfbridge.dropin.Trainer, Exact):
        trainer = make(kind, arguments=arguments)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(2 * losses[1], rel=1e-6)


@pytest.mark.slow
def test_the_room_is_reached_by_its_name() -> None:
    program = "import hfbridge; print(hfbridge.dropin.Trainer.__mro__[1].__module__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["transformers.trainer"]

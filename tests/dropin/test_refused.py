"""What hfbridge.dropin's Trainers refuse, by name, and what not."""

import subprocess
import sys
from typing import Any

import pytest

import hfbridge.dropin
from hfbridge.errors import SettingsError
from tests.dropin.sides import make


class Doubled(hfbridge.dropin.Trainer):
    """Compute another loss, with a mask of the user's own."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        return super().create_scheduler(*args, **kwargs)

    def mask(self) -> None:
        """Do something that nobody else knows of."""


def test_replaced_methods_are_named_when_an_object_is_made() -> None:
    with pytest.raises(SettingsError) as caught:
        make(Doubled)
    text = str(caught.value)
    assert "Doubled cannot be trained on Lightning: 2 of its methods" in text
    assert "Doubled.compute_loss" in text
    assert "compute_loss_func=" in text
    assert "Doubled.create_scheduler" in text
    assert "mask" not in text


def test_a_method_replaced_on_an_object_is_named_before_anything_is_trained() -> None:
    trainer = make(hfbridge.dropin.Trainer, arguments={"max_steps": 1})
    trainer.training_step = lambda *args, **kwargs: None
    with pytest.raises(SettingsError, match=r"training_step = \.\.\."):
        trainer.train()
    assert trainer.state.global_step == 0
    del trainer.training_step
    assert trainer.train().global_step == 1


def test_searches_are_refused() -> None:
    trainer = make(hfbridge.dropin.Trainer)
    with pytest.raises(SettingsError, match=r"hyperparameter_search: .*not carried"):
        trainer.hyperparameter_search()
    with pytest.raises(SettingsError, match=r"trial=\{'learning_rate': 1\}: .*not carried"):
        trainer.train(trial={"learning_rate": 1})


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

"""What HFModule and HFDataModule ask of the Trainer that they are attached to; knows both worlds.

`hfbridge.Trainer` has been given its arguments by the settings. A plain `lightning.Trainer` has not: what it
does by default and must not do here is switched off, and what it was told is compared with the settings.

    lightning.Trainer                     becomes
    check_val_every_n_epoch               never: evaluation is called by CallbackHost
    num_sanity_val_steps                  0
    accumulate_grad_batches               1: a batch is a whole window; G must agree with the settings
    gradient_clip_val                     None: HFModule clips; it must agree with the settings
    max_epochs, max_steps                 those of the schedule; they must agree with the settings
    precision                             must be "32-true": bf16 is a setting
"""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from hfbridge.data.window import Schedule
from hfbridge.errors import Problem, SettingsError, raise_problems
from hfbridge.settings import Settings

NEVER = 2**62
_LIGHTNING_DEFAULT_EPOCHS = 1000


def settings_of(trainer: pl.Trainer) -> Settings:
    """Find the settings of a run, given once: to `hfbridge.Trainer`, or to HFModule or HFDataModule.

    Args:
        trainer: the Trainer that module and data module are attached to.

    Raises:
        SettingsError: there are none, or some that differ.
    """
    sources = {
        "hfbridge.Trainer": getattr(trainer, "settings", None),
        "HFModule": getattr(trainer.lightning_module, "given_settings", None),
        "HFDataModule": getattr(getattr(trainer, "datamodule", None), "given_settings", None),
    }
    given: dict[str, Settings] = {name: found for name, found in sources.items() if found is not None}
    if not given:
        raise SettingsError(
            "This run has no settings: none are given to the Trainer, to HFModule or to HFDataModule. Write "
            "hfbridge.Trainer(Settings(...)), or HFModule(..., settings=Settings(...)) under a plain "
            "lightning.Trainer."
        )
    first, *others = given
    for other in others:
        if given[other] != given[first]:
            raise SettingsError(
                f"settings are given to both {first} and {other}, and they differ: {given[first]} and "
                f"{given[other]}. Choose one."
            )
    return given[first] if first == "hfbridge.Trainer" else _with_limits_of(trainer, given[first])


def _with_limits_of(trainer: pl.Trainer, settings: Settings) -> Settings:
    """Take a plain Trainer's max_epochs and max_steps into settings that do not say how long to train."""
    if {"num_train_epochs", "max_steps"} & settings.given.keys():
        return settings
    if trainer.max_steps > 0:
        return settings.replace(max_steps=trainer.max_steps)
    if trainer.max_epochs is not None and 0 < trainer.max_epochs != _LIGHTNING_DEFAULT_EPOCHS:
        return settings.replace(num_train_epochs=float(trainer.max_epochs))
    return settings


def take_over(trainer: pl.Trainer, settings: Settings, schedule: Schedule) -> None:
    """Leave to Lightning what it should do in this run, and switch off the rest.

    Raises:
        SettingsError: the Trainer was told something that the settings contradict.
    """
    if not hasattr(trainer, "plan"):
        problems = contradictions(trainer, settings)
        if problems:
            headline = f"{len(problems)} arguments of lightning.Trainer contradict the settings."
            raise_problems(SettingsError, f"{headline} Nothing was started.", problems)
    trainer.check_val_every_n_epoch = NEVER
    trainer.num_sanity_val_steps = 0
    trainer.accumulate_grad_batches = 1
    trainer.gradient_clip_val = None
    trainer.fit_loop.epoch_loop.val_loop.inference_mode = False
    trainer.fit_loop.max_epochs = schedule.epochs
    trainer.fit_loop.epoch_loop.max_steps = schedule.max_steps


def contradictions(trainer: pl.Trainer, settings: Settings) -> list[Problem]:
    """Compare what a plain Trainer was told with the settings."""
    problems: list[Problem] = []

    def differ(argument: str, value: Any, field: str, cure: str = "set through both; choose one.") -> None:
        asked = f"{field}={getattr(settings, field)!r} in the settings"
        problems.append(Problem(f"{argument}={value!r}", f"{asked}: {cure}"))

    if trainer.accumulate_grad_batches not in (1, settings.gradient_accumulation_steps):
        differ("accumulate_grad_batches", trainer.accumulate_grad_batches, "gradient_accumulation_steps")
    if trainer.gradient_clip_val not in (None, settings.max_grad_norm):
        differ("gradient_clip_val", trainer.gradient_clip_val, "max_grad_norm")
    if trainer.max_steps > 0 and trainer.max_steps != settings.max_steps:
        differ("max_steps", trainer.max_steps, "max_steps")
    elif settings.max_steps <= 0 and trainer.max_epochs not in (
        None,
        -1,
        _LIGHTNING_DEFAULT_EPOCHS,
        math.ceil(settings.num_train_epochs),
    ):
        differ("max_epochs", trainer.max_epochs, "num_train_epochs")
    if type(trainer.precision_plugin) is not Precision:
        differ(
            "precision",
            trainer.precision,
            "bf16",
            "it would autocast the whole step, not only the model's forward; leave it out and set bf16=True.",
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        problems.append(
            Problem(
                f"strategy={type(trainer.strategy).__name__}",
                "several processes are not carried by this version; use devices=1 and leave strategy out.",
            )
        )
    return problems


def has_plain_backward(trainer: pl.Trainer) -> bool:
    """Tell whether Lightning's backward is `loss.backward()` and no more: nobody overrides a hook of it."""
    module = trainer.lightning_module
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    hooks = ("on_before_backward", "on_after_backward")
    return (
        type(trainer.precision_plugin) is Precision
        and isinstance(trainer.strategy, SingleDeviceStrategy)
        and not is_overridden("backward", module)
        and not any(is_overridden(hook, module) for hook in hooks)
        and not any(is_overridden(hook, cb) for hook in hooks for cb in callbacks)
    )

"""What HFModule and HFDataModule ask of the Trainer that they are attached to; knows both worlds.

`hfbridge.Trainer` has been given its arguments by the settings. A plain `lightning.Trainer` has not: what it
does by default and must not do here is switched off, and what it was told is compared with the settings.

    lightning.Trainer                     becomes
    check_val_every_n_epoch               never: evaluation is called by CallbackHost. Callbacks that look at
                                          it act after evaluations, or without any (eval_strategy="no") at
                                          the end of an epoch
    num_sanity_val_steps                  0
    accumulate_grad_batches               1: a batch is a whole window; G must agree with the settings
    gradient_clip_val                     None: HFModule clips; it must agree with the settings
    max_epochs, max_steps                 those of the schedule; they must agree with the settings
    log_every_n_steps                     logging_steps
    precision                             must be "32-true": bf16 is a setting
"""

import math
from collections.abc import Iterator
from enum import Enum
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from hfbridge.data.window import Schedule
from hfbridge.errors import Problem, SettingsError, raise_problems
from hfbridge.settings import Settings, require_environment, require_machine
from hfbridge.settings.plan import NEVER
from hfbridge.settings.strategies import reason_against_strategy
from hfbridge.settings.translate import reason_against

_LIGHTNING_DEFAULT_EPOCHS, _LIGHTNING_DEFAULT_LOG_EVERY = 1000, 50
# Arguments that a Trainer keeps under their names; a shortcut sets some of the others.
_SHORTCUTS = ("barebones", "fast_dev_run", "overfit_batches")
_KEPT = (
    "limit_train_batches",
    "limit_val_batches",
    "val_check_interval",
    "gradient_clip_algorithm",
    "reload_dataloaders_every_n_epochs",
    "callbacks",
)


def settings_of(trainer: pl.Trainer) -> Settings:
    """Find the settings of a run, given once: to `hfbridge.Trainer`, or to HFModule or HFDataModule.

    Args:
        trainer: the Trainer that module and data module are attached to.

    Raises:
        SettingsError: there are none, or some that differ.
        MissingDependencyError: a plain Trainer's run needs a package that is not installed.
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
    if first == "hfbridge.Trainer":
        return given[first]
    require_machine(given[first])
    require_environment(given[first], type(trainer.strategy).__name__)
    return _with_arguments_of(trainer, given[first])


def _with_arguments_of(trainer: pl.Trainer, settings: Settings) -> Settings:
    """Take from a plain Trainer how long to train and how often to log, where the settings do not say it."""
    said: dict[str, Any] = {}
    log_every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    is_told = log_every not in (0, _LIGHTNING_DEFAULT_LOG_EVERY)
    if is_told and not {"logging_steps", "logging_strategy"} & settings.given.keys():
        said["logging_steps"] = log_every
    if not {"num_train_epochs", "max_steps"} & settings.given.keys():
        if trainer.max_steps > 0:
            said["max_steps"] = trainer.max_steps
        elif trainer.max_epochs is not None and 0 < trainer.max_epochs != _LIGHTNING_DEFAULT_EPOCHS:
            said["num_train_epochs"] = float(trainer.max_epochs)
    return settings.replace(**said) if said else settings


def take_over(trainer: pl.Trainer, settings: Settings, schedule: Schedule) -> None:
    """Leave to Lightning what it should do in this run, and switch off the rest.

    Raises:
        SettingsError: the Trainer was told something that the settings contradict, or has trained before.
    """
    if trainer.global_step > 0:
        raise SettingsError(
            f"This Trainer has already trained for {trainer.global_step} steps, and Lightning would go on "
            "counting from there. Make a new Trainer for another run."
        )
    if not hasattr(trainer, "plan"):
        problems = contradictions(trainer, settings)
        if problems:
            told = "argument of lightning.Trainer contradicts"
            if len(problems) > 1:
                told = "arguments of lightning.Trainer contradict"
            headline = f"{len(problems)} {told} the settings. Nothing was started."
            raise_problems(SettingsError, headline, problems)
    _leave_evaluation_to_the_host(trainer, settings)
    if _logs_by_steps(settings):
        trainer.log_every_n_steps = int(settings.logging_steps)  # type: ignore[attr-defined]
    trainer.num_sanity_val_steps = 0
    trainer.accumulate_grad_batches = 1
    trainer.gradient_clip_val = None
    trainer.fit_loop.epoch_loop.val_loop.inference_mode = False
    end_with(trainer, schedule)


def end_with(trainer: pl.Trainer, schedule: Schedule) -> None:
    """Have a Trainer's loops end as a schedule says."""
    trainer.fit_loop.max_epochs = schedule.epochs
    trainer.fit_loop.epoch_loop.max_steps = schedule.max_steps


def begin_again(trainer: pl.Trainer) -> None:
    """Have a Trainer count from zero: loops like those it was made with take the place of those that ran.

    What they are made of is pinned by tests/unit/test_callbacks.py.
    """
    ran: Any = trainer.fit_loop
    trainer.fit_loop = type(ran)(trainer, min_epochs=ran.min_epochs, max_epochs=ran.max_epochs)
    trainer.fit_loop.epoch_loop = type(ran.epoch_loop)(
        trainer, min_steps=ran.min_steps, max_steps=ran.max_steps
    )


def run_validation(trainer: pl.Trainer) -> None:
    """Run Lightning's validation loop now, in the middle of training.

    The private names touched here are pinned by tests/unit/test_callbacks.py.
    """
    connector = trainer._logger_connector
    first_iteration = connector._first_loop_iter  # what Lightning itself saves around a validation
    trainer.validating = True
    try:
        trainer.fit_loop.epoch_loop.val_loop.run()
    finally:
        trainer.training = True
        connector._first_loop_iter = first_iteration


def end_epoch(trainer: pl.Trainer) -> None:
    """Let Lightning's epoch loop end after this batch, without fetching another."""
    trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True


def _leave_evaluation_to_the_host(trainer: pl.Trainer, settings: Settings) -> None:
    """Keep Lightning from validating by itself, and tell callbacks by its own argument what to wait for.

    ModelCheckpoint and EarlyStopping read `check_val_every_n_epoch`: at 1 they act at the end of an epoch,
    at anything else after an evaluation. The private name is pinned by tests/unit/test_callbacks.py.
    """
    if settings.eval_strategy != "no":
        trainer.check_val_every_n_epoch = NEVER
        return
    trainer.check_val_every_n_epoch = 1
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    epoch_loop._should_check_val_epoch = bool  # always False


def _logs_by_steps(settings: Settings) -> bool:
    return bool(settings.logging_strategy == "steps" and settings.logging_steps >= 1)


def contradictions(trainer: pl.Trainer, settings: Settings) -> list[Problem]:
    """Compare what a plain Trainer was told with the settings."""
    problems = _refused(trainer)
    if any(problem.subject.startswith(_SHORTCUTS) for problem in problems):
        return problems

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
    logs_as_told = (_LIGHTNING_DEFAULT_LOG_EVERY, settings.logging_steps)
    told_to_log: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if "logging_steps" in settings.given and _logs_by_steps(settings) and told_to_log not in logs_as_told:
        differ("log_every_n_steps", told_to_log, "logging_steps")
    if trainer.precision == "bf16-mixed":
        differ(
            "precision",
            trainer.precision,
            "bf16",
            "it would autocast the whole step, not only the model's forward; leave it out and set bf16=True.",
        )
    elif type(trainer.precision_plugin) is not Precision:
        cure = "only fp32 and bf16 are carried by this version; leave it out, or set bf16=True."
        problems.append(Problem(f"precision={trainer.precision!r}", cure))
    problems += _only_ours(settings)
    if reason := reason_against_strategy(trainer.strategy):
        problems.append(Problem(f"strategy={type(trainer.strategy).__name__}", reason))
    return problems


def _only_ours(settings: Settings) -> Iterator[Problem]:
    """Find settings that `hfbridge.Trainer` alone can honour."""
    if settings.auto_find_batch_size:
        cure = "begins a run again, which lightning.Trainer cannot; use hfbridge.Trainer, or leave it out."
        yield Problem("auto_find_batch_size=True in the settings", cure)
    if settings.resume_from_checkpoint:
        cure = "is read by hfbridge.Trainer only; write trainer.fit(..., ckpt_path=...)."
        yield Problem(f"resume_from_checkpoint={settings.resume_from_checkpoint!r} in the settings", cure)


def _refused(trainer: pl.Trainer) -> list[Problem]:
    """Collect what no setting can mean and hfbridge.Trainer does not take either."""
    problems: list[Problem] = []
    if trainer.check_val_every_n_epoch not in (1, NEVER):
        told = trainer.check_val_every_n_epoch
        reason = reason_against("check_val_every_n_epoch", told)
        problems.append(Problem(f"check_val_every_n_epoch={told!r}", reason))
    for name in (*_SHORTCUTS, *_KEPT):
        value = getattr(trainer, name, None)
        value = value.value if isinstance(value, Enum) else value
        if reason := reason_against(name, value):
            problems.append(Problem("callbacks" if name == "callbacks" else f"{name}={value!r}", reason))
            if name in _SHORTCUTS:
                return problems
    return problems


def has_plain_backward(trainer: pl.Trainer) -> bool:
    """Tell whether Lightning's backward is `loss.backward()` and no more: nobody overrides a hook of it."""
    module = trainer.lightning_module
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    hooks = ("on_before_backward", "on_after_backward")
    return (
        type(trainer.precision_plugin) is Precision
        and isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        and not is_overridden("backward", module)
        and not any(is_overridden(hook, module) for hook in hooks)
        and not any(is_overridden(hook, cb) for hook in hooks for cb in callbacks)
    )

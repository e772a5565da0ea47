"""What HFModule and HFDataModule read from, and set on, the Trainer that they are attached to.

`hfbridge.Trainer` gets its arguments from the settings. A plain `lightning.Trainer`'s arguments become
settings where none conflicts, and the settings configure its loop. `check_val_every_n_epoch` and
`val_check_interval` have Lightning validate where they were set; otherwise CallbackHost evaluates by
`eval_strategy`. `_arguments_of` has the other arguments.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden

from hfbridge.callbacks.evaluation import Evaluator
from hfbridge.data.accumulation import MicroBatch, Schedule
from hfbridge.errors import Problem, SettingsError, raise_problems
from hfbridge.settings import Settings, require_environment, require_machine
from hfbridge.settings.plan import NEVER
from hfbridge.settings.to_lightning import ENDLESS_EPOCHS, fast_dev_run_settings, is_unset

_LIGHTNING_DEFAULT_EPOCHS, _LIGHTNING_DEFAULT_LOG_EVERY = 1000, 50


def settings_of(trainer: pl.Trainer) -> Settings:
    """Find the settings of a run, passed once: to `hfbridge.Trainer`, or to HFModule or HFDataModule.

    The defaults are transformers' for the model and Lightning's for the loop, and the seed of
    `lightning.seed_everything`.

    Raises:
        SettingsError: several differ, or they conflict with the Trainer's arguments.
        MissingDependencyError: a plain Trainer's run needs a package that is not installed.
    """
    settings, seed = _since_last_fit(trainer, _find_settings(trainer)), _seed_of_everything()
    return settings if seed is None or "seed" in settings.given else settings.replace(seed=seed)


def note_of_seeds(settings: Settings) -> str:
    """Make the note of a run with two different seeds; empty where there is one."""
    seed = _seed_of_everything()
    if seed is None or settings.given.get("seed", seed) == seed:
        return ""
    return f"seed_everything({seed}) was called, but the run uses seed={settings.seed} of the settings."


def _seed_of_everything() -> int | None:
    """Read the seed that `lightning.seed_everything` was called with."""
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    return int(seed) if seed.isdecimal() else None


def _find_settings(trainer: pl.Trainer) -> Settings:
    plan = getattr(trainer, "plan", None)
    given = _given_settings(trainer)
    first = next(iter(given), None)
    for other in given:
        if given[other] != given[first]:  # type: ignore[index]
            raise SettingsError(
                f"settings are passed to both {first} and {other}, and they differ: {given[first]} and "  # type: ignore[index]
                f"{given[other]}. Pass them to one."
            )
    if plan is not None:
        if first not in (None, "hfbridge.Trainer"):
            raise SettingsError(
                f"settings are passed to {first}, and hfbridge.Trainer has none. Pass them to the Trainer: "
                "hfbridge.Trainer(settings)."
            )
        settings: Settings = plan.settings
        return settings
    if first is None:
        return _without_settings(trainer)
    require_machine(given[first])
    require_environment(given[first], type(trainer.strategy).__name__)
    return _with_arguments_of(trainer, given[first])


@dataclass(frozen=True)
class _End:
    """Where a Trainer's loops were set to end, in epochs and steps, and what the user had set."""

    epochs: int | None
    steps: int
    users_epochs: int | None
    users_steps: int


_ENDS: "WeakKeyDictionary[pl.Trainer, _End]" = WeakKeyDictionary()


def _limits_of(trainer: pl.Trainer) -> tuple[int | None, int]:
    """Return the user's limits of epochs and steps, which `end_with` may have replaced."""
    end = _ENDS.get(trainer)
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if end is None:
        return epochs, steps
    if trainer.global_step > 0:  # `_since_last_fit` has what was set since
        return end.users_epochs, end.users_steps
    return (
        end.users_epochs if epochs == end.epochs else epochs,
        end.users_steps if steps == end.steps else steps,
    )


def _since_last_fit(trainer: pl.Trainer, settings: Settings) -> Settings:
    """Use the epochs or steps that were set on a Trainer after it had trained, over the settings."""
    end = _ENDS.get(trainer)
    if end is None or trainer.global_step == 0:
        return settings
    changed: dict[str, Any] = {}
    if trainer.max_steps not in (end.steps, settings.max_steps):
        changed["max_steps"] = trainer.max_steps
    if (epochs := trainer.max_epochs) != end.epochs:
        changed["num_train_epochs"] = float(ENDLESS_EPOCHS if epochs is None or epochs == -1 else epochs)
    return settings.replace(**changed) if changed else settings


def done_by(trainer: pl.Trainer) -> tuple[int, int]:
    """Return the completed epochs and steps of a Trainer that continues; a checkpoint has its own."""
    is_trial = not trainer.callbacks  # type: ignore[attr-defined]  # Lightning's finders try runs without any
    continues = trainer in _ENDS and trainer.ckpt_path is None and not is_trial
    return (trainer.current_epoch, trainer.global_step) if continues else (0, 0)


def is_read(trainer: pl.Trainer, datamodule: Any) -> bool:
    """Whether a Trainer reads a data module in this call: one of an earlier call stays attached."""
    loops: dict[Any, Any] = {
        TrainerFn.FITTING: trainer.fit_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    loop = loops.get(trainer.state.fn)
    return loop is None or loop._data_source.instance is datamodule


def datamodule_of(trainer: pl.Trainer) -> Any:
    """Return the data module that a Trainer reads in this call, if it reads one."""
    found = getattr(trainer, "datamodule", None)
    return found if is_read(trainer, found) else None


def _given_settings(trainer: pl.Trainer) -> dict[str, Settings]:
    """Return the settings that the user passed, by where."""
    plan = getattr(trainer, "plan", None)
    sources = {
        "hfbridge.Trainer": None if plan is None or not plan.has_settings else trainer.settings,  # type: ignore[attr-defined]
        "HFModule": getattr(trainer.lightning_module, "given_settings", None),
        "HFDataModule": getattr(datamodule_of(trainer), "given_settings", None),
    }
    return {name: found for name, found in sources.items() if found is not None}


def is_hf_module(trainer: pl.Trainer) -> bool:
    """Whether an HFModule is run, and not another LightningModule."""
    return isinstance(getattr(trainer.lightning_module, "evaluator", None), Evaluator)


def has_own_loop(trainer: pl.Trainer) -> bool:
    """Whether hfbridge's epoch loop runs, which takes an optimizer step where the micro-batches say."""
    return hasattr(trainer, "plan")


def lightning_validates(trainer: pl.Trainer) -> bool:
    """Whether Lightning's loop decides when to validate, and not `eval_strategy`."""
    plan = getattr(trainer, "plan", None)
    if plan is not None:
        return bool(plan.validates)
    if not _given_settings(trainer) or getattr(trainer, "fast_dev_run", False):
        return True
    is_every_epoch = trainer.check_val_every_n_epoch in (1, NEVER)
    has_interval = (
        getattr(trainer, "_val_check_time_interval", None) is not None or trainer.val_check_interval != 1.0
    )
    return not is_every_epoch or has_interval


def _without_settings(trainer: pl.Trainer) -> Settings:
    """Return transformers' defaults, with a plain Trainer's arguments for the loop."""
    epochs, steps = _limits_of(trainer)
    if epochs is None or (epochs < 0 < steps):
        epochs = _LIGHTNING_DEFAULT_EPOCHS
    elif epochs < 0:
        epochs = ENDLESS_EPOCHS
    log_every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    settings = Settings().replace(
        save_strategy="no",
        report_to="none",
        logging_strategy="steps" if log_every else "no",
        logging_steps=log_every or _LIGHTNING_DEFAULT_LOG_EVERY,
        num_train_epochs=float(epochs or _LIGHTNING_DEFAULT_EPOCHS),
        max_grad_norm=trainer.gradient_clip_val or 0.0,
    )
    return _with_arguments_of(trainer, settings)


def _with_arguments_of(trainer: pl.Trainer, settings: Settings) -> Settings:
    """Take from a plain Trainer's arguments what the settings do not set."""
    found, problems = dict[str, Any](), list[Problem]()
    is_dev_run = bool(getattr(trainer, "fast_dev_run", False))
    for name, passed, value, field in _arguments_of(trainer):
        ours = getattr(settings, field)
        is_equal = (math.ceil(ours) if field == "num_train_epochs" else ours) == value
        is_limit = field in ("max_steps", "num_train_epochs")
        has_end = passed == -1 and (settings.max_steps > 0 or not is_unset(settings, field))
        if is_equal or (is_limit and (is_dev_run or has_end)):
            continue
        if is_unset(settings, field):
            found[field] = value
        else:
            text = f"`{name}={passed!r}` conflicts with `{field}={ours!r}` in the settings; set only one"
            problems.append(Problem(f"lightning.Trainer({name}={passed!r})", text))
    if trainer.state.fn not in (None, TrainerFn.FITTING):
        problems.clear()  # conflicts are about training
    problems += _only_ours(settings)
    if problems:
        noun = "argument" if len(problems) == 1 else "arguments"
        headline = f"{len(problems)} {noun} of lightning.Trainer cannot be used. Nothing was started."
        raise_problems(SettingsError, headline, problems)
    if is_dev_run:
        found |= fast_dev_run_settings(int(trainer.fast_dev_run))  # type: ignore[attr-defined]
    return settings.replace(**found) if found else settings


def _arguments_of(trainer: pl.Trainer) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield a plain Trainer's arguments that are settings: name, value, the setting's value and name."""
    log_every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if log_every == 0 and not trainer.barebones:
        yield "log_every_n_steps", 0, "no", "logging_strategy"
    elif log_every not in (0, _LIGHTNING_DEFAULT_LOG_EVERY):
        yield "log_every_n_steps", log_every, log_every, "logging_steps"
    epochs, steps = _limits_of(trainer)
    if steps > 0:
        yield "max_steps", steps, steps, "max_steps"
    elif epochs == -1:
        yield "max_epochs", -1, float(ENDLESS_EPOCHS), "num_train_epochs"
    elif epochs is not None and 0 < epochs != _LIGHTNING_DEFAULT_EPOCHS:
        yield "max_epochs", epochs, epochs, "num_train_epochs"
    accumulation = trainer.accumulate_grad_batches
    if accumulation != 1:
        yield "accumulate_grad_batches", accumulation, accumulation, "gradient_accumulation_steps"
    if trainer.gradient_clip_val is not None:
        yield "gradient_clip_val", trainer.gradient_clip_val, trainer.gradient_clip_val, "max_grad_norm"
    if trainer.precision != "32-true":
        yield "precision", trainer.precision, trainer.precision == "bf16-mixed", "bf16"


def _only_ours(settings: Settings) -> Iterator[Problem]:
    """Find settings that only `hfbridge.Trainer` supports."""
    if settings.auto_find_batch_size:
        hint = "begins a run again, which lightning.Trainer cannot; use hfbridge.Trainer, or leave it out."
        yield Problem("auto_find_batch_size=True in the settings", hint)
    if settings.resume_from_checkpoint:
        hint = "is read by hfbridge.Trainer only; write trainer.fit(..., ckpt_path=...)."
        yield Problem(f"resume_from_checkpoint={settings.resume_from_checkpoint!r} in the settings", hint)


def epoch_limit(trainer: pl.Trainer) -> int | None:
    """Return `max_epochs` where it was passed; beside `max_steps`, the first limit ends the run."""
    plan = getattr(trainer, "plan", None)
    if getattr(trainer, "fast_dev_run", False):
        return 1
    end = _ENDS.get(trainer)
    passed = _limits_of(trainer)[0] if plan is None else plan.passed.get("max_epochs")
    if end is not None and trainer.global_step > 0 and trainer.max_epochs != end.epochs:
        passed = trainer.max_epochs
    is_default = passed is None or passed < 0 or (plan is None and passed == _LIGHTNING_DEFAULT_EPOCHS)
    return None if is_default else passed


def configure_trainer(trainer: pl.Trainer, settings: Settings) -> None:
    """Configure Lightning's loops for a run of HFModule."""
    if not lightning_validates(trainer):
        _leave_evaluation_to_the_host(trainer, settings)
        if not hasattr(trainer, "plan"):
            trainer.num_sanity_val_steps = 0
    if settings.logging_strategy == "steps" and settings.logging_steps >= 1 and not trainer.barebones:
        trainer.log_every_n_steps = int(settings.logging_steps)  # type: ignore[attr-defined]
    if trainer.lightning_module.automatic_optimization:
        if not any(isinstance(cb, GradientAccumulationScheduler) for cb in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.accumulate_grad_batches = settings.gradient_accumulation_steps
        trainer.gradient_clip_val = settings.max_grad_norm or None


def end_with(trainer: pl.Trainer, schedule: Schedule) -> None:
    """Have a Trainer's loops end as a schedule does; one with a limit of 0 trains nothing."""
    if 0 in (trainer.max_epochs, trainer.max_steps):
        return
    _ENDS[trainer] = _End(schedule.epochs, schedule.max_steps, *_limits_of(trainer))
    trainer.fit_loop.max_epochs = schedule.epochs
    is_automatic = trainer.lightning_module.automatic_optimization
    # A module that optimizes manually may take any number of steps.
    is_limited = is_automatic or not has_whole_epochs(settings_of(trainer))
    trainer.fit_loop.epoch_loop.max_steps = schedule.max_steps if is_limited else -1


def has_whole_epochs(settings: Settings) -> bool:
    """Whether a run ends with an epoch, and not by a number of steps."""
    return bool(settings.max_steps <= 0 and settings.num_train_epochs % 1 == 0)


def reset_fit_loop(trainer: pl.Trainer) -> None:
    """Replace a Trainer's loops by new ones, which count from zero.

    What they are made of is pinned by tests/unit/callbacks/test_trainer_state.py.
    """
    ran: Any = trainer.fit_loop
    trainer.fit_loop = type(ran)(trainer, min_epochs=ran.min_epochs, max_epochs=ran.max_epochs)
    trainer.fit_loop.epoch_loop = type(ran.epoch_loop)(
        trainer, min_steps=ran.min_steps, max_steps=ran.max_steps
    )


def run_validation(trainer: pl.Trainer, *, ends_epoch: bool = False, clears: bool = True) -> None:
    """Run Lightning's validation loop now, in the middle of training.

    Its private names are pinned by tests/unit/callbacks/test_trainer_state.py.

    Args:
        trainer: of the run.
        ends_epoch: the epoch loop has counted its last step already; Lightning logs a validation with the
            number before.
        clears: clear gradients, as Lightning's loop does after an optimizer step.
    """
    connector = trainer._logger_connector
    first_iteration = connector._first_loop_iter  # what Lightning itself saves around a validation
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop._batches_that_stepped -= ends_epoch
    trainer.validating = True
    if clears:
        trainer.lightning_module.on_validation_model_zero_grad()
    try:
        epoch_loop.val_loop.run()
    finally:
        trainer.training = True
        epoch_loop._batches_that_stepped += ends_epoch
        connector._first_loop_iter = first_iteration


def end_epoch(trainer: pl.Trainer) -> None:
    """Let Lightning's epoch loop end after this batch, without fetching another."""
    trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True


def _leave_evaluation_to_the_host(trainer: pl.Trainer, settings: Settings) -> None:
    """Keep Lightning from validating by itself."""
    # ModelCheckpoint and EarlyStopping act at the end of an epoch, where the host has evaluated before them,
    # if this is 1, else after an evaluation.
    trainer.check_val_every_n_epoch = NEVER if settings.eval_strategy == "steps" else 1
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    epoch_loop._should_check_val_epoch = bool  # always False


def overrides_hook(name: str, callback: Any) -> bool:
    """Whether a callback has a hook of its own; one of the package `pytorch_lightning` has all of them."""
    return is_overridden(name, callback) if isinstance(callback, pl.Callback) else hasattr(callback, name)


_WITHIN_STEPS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)


def skip_empty_hooks(callback: pl.Callback) -> None:
    """Have Lightning skip the hooks within a step that a callback does not override: a dozen Python calls."""
    for name in _WITHIN_STEPS:
        if not is_overridden(name, callback):
            setattr(callback, name, None)


def has_plain_backward(trainer: pl.Trainer) -> bool:
    """Whether Lightning's backward is `loss.backward()` and no more: no hook of it is overridden."""
    module = trainer.lightning_module
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    hooks = ("on_before_backward", "on_after_backward")
    return (
        type(trainer.precision_plugin) is Precision
        and isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        and not is_overridden("backward", module)
        and not any(is_overridden(hook, module) for hook in hooks)
        and not any(overrides_hook(hook, cb) for hook in hooks for cb in callbacks)
    )


def current_micro_batch(trainer: pl.Trainer, batch: Any) -> MicroBatch | None:
    """Find the micro-batch, with its optimizer step, of a training batch that hooks may have rebuilt.

    Returns:
        The loader's micro-batch; `None` for a loader that does not know optimizer steps.
    """
    if isinstance(batch, MicroBatch) and batch.step is not None:
        return batch
    for source in (trainer.train_dataloader, trainer.fit_loop.epoch_loop):
        found = getattr(source, "current", None)
        if isinstance(found, MicroBatch):
            return found
    return None

"""Check, before the first step of a run, that what callbacks monitor can be logged."""

import types
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, LearningRateMonitor, ModelCheckpoint

from hfbridge.callbacks.connector import lightning_validates
from hfbridge.errors import SettingsError

_OF_TRAINING = ("loss", "grad_norm", "learning_rate")
_OF_LIGHTNING = ("epoch", "step")
_OF_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
_LOGS = frozenset(("log", "log_dict"))
_LOGS_NOTHING = ("hfbridge.", "lightning.", "torch.", "transformers.", "peft.", "builtins")


def check_monitors(trainer: pl.Trainer, module: Any) -> None:
    """Check that what callbacks monitor can be logged, unless a subclass or callback logs by itself.

    Raises:
        SettingsError: it cannot.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    # Where no validation runs, Lightning's ModelCheckpoint warns and saves nothing.
    saves = trainer.limit_val_batches != 0
    monitors = [(cb, cb.monitor) for cb in callbacks if _is_strict(cb, saves=saves)]
    if not monitors or any(_may_log(of) for of in (module, *callbacks)):
        return
    names, beginnings = _known_names(trainer, module)
    for callback, monitor in monitors:
        name = str(monitor).split("/dataloader_idx_")[0]
        is_known = name in (*names, *_OF_LIGHTNING, *trainer.callback_metrics)
        if is_known or name.startswith(tuple(beginnings)):
            continue
        raise SettingsError(
            f"{type(callback).__name__}(monitor={monitor!r}): nothing logs {monitor!r} in this run; it logs "
            f"{', '.join(sorted(names))}."
        )


def _is_strict(callback: Any, *, saves: bool) -> bool:
    """Whether a callback fails where what it monitors is not there; one that saves only if it `saves`."""
    if isinstance(callback, EarlyStopping):
        return callback.strict
    return saves and isinstance(callback, ModelCheckpoint) and callback.monitor is not None


def _known_names(trainer: pl.Trainer, module: Any) -> tuple[set[str], set[str]]:
    """Return the names that this run logs, and prefixes of those that only an evaluation shows."""
    args, names = module.args, set(_OF_TRAINING)
    if args.include_num_input_tokens_seen != "no":
        names.add("num_input_tokens_seen")
    evaluates = args.eval_strategy != "no" or args.eval_on_start or lightning_validates(trainer)
    monitors_rates = any(isinstance(cb, LearningRateMonitor) for cb in trainer.callbacks)  # type: ignore[attr-defined]
    beginnings = {"lr-"} if monitors_rates else set()
    if not evaluates or not trainer.limit_val_batches:
        return names, beginnings
    splits: tuple[str, ...] = module.data.eval_splits or ("eval",)
    for split in splits:
        names |= {f"{split}_loss", *(f"{split}_{name}" for name in _OF_SPEED)}
    names |= module.evaluator.known_metrics
    computes = module.compute_metrics is not None or module.running_metrics is not None
    return names, {*beginnings, *(f"{split}_" for split in splits if computes or not module.data.eval_splits)}


def _may_log(hooked: Any) -> bool:
    """Whether a module or callback, or an object that it holds, has code of its own that logs."""
    seen: set[types.CodeType] = set()
    functions = _own_members(hooked)
    held = [*functions, *vars(hooked).values(), *vars(hooked).get("_modules", {}).values()]
    functions += [member for found in held for member in _own_members(found)]
    if isinstance(hooked, LambdaCallback):
        functions += vars(hooked).values()
    return any(_reaches_log(function, seen) for function in functions)


def _own_members(found: Any) -> list[Any]:
    """List what the user's classes of an object define."""
    kinds = [kind for kind in type(found).__mro__ if not kind.__module__.startswith(_LOGS_NOTHING)]
    return [member for kind in kinds for member in vars(kind).values()]


def _reaches_log(member: Any, seen: set[types.CodeType]) -> bool:
    """Whether a function, or one that it calls by a global name, has the name of a method that logs."""
    function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
    if not isinstance(function, types.FunctionType):
        return False
    if function.__module__.startswith(_LOGS_NOTHING) or function.__code__ in seen:
        return False
    seen.add(function.__code__)
    names = set(_names_in(function.__code__))
    return bool(names & _LOGS) or any(
        _reaches_log(function.__globals__[name], seen) for name in names if name in function.__globals__
    )


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)

"""Whether values are of the right type, in range, and fit together.

Types are read from the annotations of the installed `TrainingArguments`. The conditions are those of
`TrainingArguments._validate_args`, those that torch and the schedules raise later, after a run has started,
and what none of them notices (`max_steps=0`, a bool for a number, NaN).
"""

import difflib
import inspect
import json
import math
import operator
import os
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from numbers import Integral, Real
from types import UnionType

from transformers import SchedulerType, Seq2SeqTrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig

from hfbridge.settings.fields import DEFAULTS

Value = Callable[[str], typing.Any]
"""The value of a setting by its name, given or default."""

Complaint = tuple[str, str]
"""The name of a setting, and what is wrong with its value."""

_TYPE_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a dictionary",
}
_IN_JSON = ("accelerator_config", "lr_scheduler_kwargs")
_SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")
_START_METHODS = ("fork", "spawn", "forkserver")


def _annotated_types() -> Mapping[str, tuple[type, ...]]:
    """The types that transformers' annotations allow, by setting."""
    allowed: dict[str, tuple[type, ...]] = {}
    for name, hint in typing.get_type_hints(Seq2SeqTrainingArguments).items():
        is_union = isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union
        members = typing.get_args(hint) if is_union else (hint,)
        allowed[name] = tuple(typing.get_origin(member) or member for member in members)
    return allowed


_TYPES = _annotated_types()


def choices(name: str) -> tuple[str, ...]:
    """The strings a setting may be, in the installed transformers; empty if any will do."""
    if name == "train_sampling_strategy":
        return _SAMPLING_STRATEGIES
    if name == "dataloader_multiprocessing_context":
        return _START_METHODS
    enums = [kind for kind in _TYPES[name] if isinstance(kind, type) and issubclass(kind, Enum)]
    return tuple(str(member.value) for kind in enums for member in kind)


def suggest(name: object, known: Collection[str]) -> str:
    """Text that names the most similar known name, or empty text."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def simplify(name: str, value: object) -> object:
    """Turn a value into the plain one it stands for: enums, paths and configuration objects.

    Args:
        name: the setting.
        value: what the user gave, of any type.

    Returns:
        The plain value, or the value itself if it stands for nothing plainer.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [simplify(name, item) for item in value]
    if isinstance(value, AcceleratorConfig):
        value = value.to_dict()
    if name == "accelerator_config" and isinstance(value, Mapping):
        defaults = AcceleratorConfig().to_dict()
        return {key: entry for key, entry in value.items() if key not in defaults or entry != defaults[key]}
    if name in _IN_JSON and isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    # to_dict() of transformers writes this in place of the token, or of no token.
    return None if isinstance(value, str) and value == "<HUB_TOKEN>" else value


def convert(name: str, value: object) -> tuple[object, str]:
    """Bring a plain value to the type of its setting.

    Args:
        name: the setting.
        value: as `simplify` returns it.

    Returns:
        The value, and a note if it was read as something else than what was given.

    Raises:
        ValueError: the value has the wrong type; the text says what is possible.
    """
    kinds, possible = _TYPES[name], choices(name)
    if value is None and type(None) in kinds:
        return value, ""
    if possible:
        if value not in possible:
            unquoted = '; unquoted, YAML reads "no" as False' if value is False and "no" in possible else ""
            raise ValueError(f"is not one of {', '.join(possible)}{unquoted}{suggest(value, possible)}")
        return value, ""
    if isinstance(value, str) and float in kinds:
        return _number_in(name, value)
    if isinstance(value, Real) and not isinstance(value, bool):
        if isinstance(value, Integral) and not {int, float}.isdisjoint(kinds):
            return operator.index(value), ""
        if float in kinds:
            return float(value), ""
    elif _is_of(kinds, value, name):
        return dict(value) if isinstance(value, Mapping) else value, ""
    raise ValueError(_wrong_type(name, value, kinds))


def _is_of(kinds: tuple[type, ...], value: object, name: str) -> bool:
    """Whether a value that is no number has one of these types."""
    if isinstance(value, str):
        return str in kinds and name not in _IN_JSON
    if isinstance(value, list):
        return list in kinds and all(isinstance(item, str) for item in value)
    return (isinstance(value, bool) and bool in kinds) or (isinstance(value, Mapping) and dict in kinds)


def _number_in(name: str, text: str) -> tuple[object, str]:
    """Read a number that was written as a string, as YAML loads 2e-5.

    Raises:
        ValueError: it is no number.
    """
    try:
        number = float(text)
    except ValueError:
        raise ValueError(_wrong_type(name, text, _TYPES[name])) from None
    return number, f'{name}="{text}" is a string, read as the number {number!r}'


def _wrong_type(name: str, value: object, kinds: tuple[type, ...]) -> str:
    """Say what type a value has and which are possible."""
    names = [
        _TYPE_NAMES[kind] for kind in kinds if kind in _TYPE_NAMES and not (kind is str and name in _IN_JSON)
    ]
    names += ["a list of strings"] if list in kinds else []
    names += ["None"] if type(None) in kinds else []
    return f"must be {' or '.join(names)}, not {type(value).__name__}"


def check_range(name: str, value: object) -> str:
    """Check one value of the right type by itself.

    Args:
        name: the setting.
        value: as `convert` returns it.

    Returns:
        What is wrong, or empty text.
    """
    if (
        isinstance(value, float)
        and not math.isfinite(value)
        and not (name == "max_grad_norm" and value == math.inf)
    ):
        return "must be a finite number"
    if name not in _RANGES or value is None:
        return ""
    text, is_inside = _RANGES[name]
    return "" if is_inside(value) else f"must be {text}"


_AT_LEAST_1 = ("1 or more", lambda value: value >= 1)
_AT_LEAST_0 = ("0 or more", lambda value: value >= 0)
_BETA = ("from 0 to below 1", lambda value: 0 <= value < 1)

_RANGES: Mapping[str, tuple[str, Callable[[typing.Any], bool]]] = {
    "per_device_train_batch_size": _AT_LEAST_1,
    "per_device_eval_batch_size": _AT_LEAST_1,
    "gradient_accumulation_steps": _AT_LEAST_1,
    "num_train_epochs": ("more than 0; to evaluate only, call validate", lambda value: value > 0),
    "max_steps": ("1 or more, or -1 to train for num_train_epochs", lambda value: value == -1 or value >= 1),
    "learning_rate": _AT_LEAST_0,
    "warmup_steps": (
        "a number of steps, or below 1 a share of them; never negative",
        lambda value: value >= 0,
    ),
    "weight_decay": _AT_LEAST_0,
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": _AT_LEAST_0,
    "max_grad_norm": ("0 (no clipping) or more", lambda value: value >= 0),
    "eval_delay": _AT_LEAST_0,
    "eval_accumulation_steps": _AT_LEAST_1,
    "include_for_metrics": (
        'a list of "inputs" and "loss"; predictions and labels are always given',
        lambda value: {"inputs", "loss"}.issuperset(value),
    ),
    "seed": ("from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32),
    "data_seed": ("from -2**63 to 2**64 - 1", lambda value: -(2**63) <= value < 2**64),
    "dataloader_num_workers": _AT_LEAST_0,
    "dataloader_prefetch_factor": _AT_LEAST_1,
}


def check_together(given: Mapping[str, typing.Any], *, wrong: Collection[str]) -> Iterator[Complaint]:
    """Check values that depend on each other.

    Args:
        given: the values given that are right by themselves.
        wrong: settings whose value is wrong; checks that depend on one of them are left out.

    Yields:
        What contradicts or lacks something else, under the name of a setting that was given.
    """
    for check in (_check_precision, _check_cadence, _check_workers, _check_schedule):
        asked: set[str] = set()

        def value(name: str, asked: set[str] = asked) -> typing.Any:
            asked.add(name)
            return given.get(name, DEFAULTS[name])

        complaints = list(check(value, given))
        if asked.isdisjoint(wrong):
            yield from complaints


def _check_precision(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    """Check that at most one reduced precision is asked for."""
    if value("bf16") and value("fp16"):
        yield "fp16", "contradicts bf16=True; at most one of the two can be True"
    if value("bf16_full_eval") and value("fp16_full_eval"):
        yield "fp16_full_eval", "contradicts bf16_full_eval=True; at most one of the two can be True"


def _check_cadence(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    """Check how often to log and to evaluate."""
    used = {"logging_steps": value("logging_strategy"), "eval_steps": value("eval_strategy")}
    for name, strategy in used.items():
        steps = value(name)
        if name == "eval_steps" and not steps:
            if strategy == "steps" and value("logging_steps") <= 0:
                yield "eval_strategy", 'with "steps" needs eval_steps or logging_steps above 0'
        elif strategy == "steps" and (steps <= 0 or (steps > 1 and steps != int(steps))):
            blamed = name if name in given else f"{name.partition('_')[0]}_strategy"
            yield blamed, f"{name} must be a whole number of steps, or below 1 a share of them; it is {steps}"


def _check_workers(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    """Check what needs worker processes; torch would complain when the first loader is built."""
    if value("dataloader_num_workers") == 0:
        for name in (
            "dataloader_prefetch_factor",
            "dataloader_persistent_workers",
            "dataloader_multiprocessing_context",
        ):
            if value(name):
                yield name, "needs worker processes; set dataloader_num_workers to 1 or more, or leave it out"


def _check_schedule(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    """Check the keyword arguments of the schedule; transformers would complain when it is built."""
    name, kwargs = value("lr_scheduler_type"), value("lr_scheduler_kwargs") or {}
    if name in ("constant", "constant_with_warmup"):  # natively ignored by these two
        return
    blamed = "lr_scheduler_kwargs" if "lr_scheduler_kwargs" in given else "lr_scheduler_type"
    build = typing.cast(Callable[..., object], TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)])
    parameters = dict(inspect.signature(build).parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return  # reduce_lr_on_plateau and greedy are refused by their rule
    for passed in ("optimizer", "num_warmup_steps", "num_training_steps"):
        parameters.pop(passed, None)
    for key, entry in kwargs.items():
        if key not in parameters:
            text = f"{key} is no argument of {name}; possible are {', '.join(parameters)}"
            yield blamed, text + suggest(key, parameters)
        elif isinstance(entry, bool) or (
            isinstance(entry, str) and not isinstance(parameters[key].default, str)
        ):
            yield blamed, f"{key} must be a number, not {entry!r}"
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in kwargs:
            yield blamed, f'{name} needs lr_scheduler_kwargs={{"{key}": ...}}'
    if "min_lr_rate" in parameters and (kwargs.get("min_lr") is None) == (kwargs.get("min_lr_rate") is None):
        yield blamed, f"{name} needs either min_lr or min_lr_rate in lr_scheduler_kwargs"
    if name == "polynomial":
        end = kwargs.get("lr_end", parameters["lr_end"].default)
        if isinstance(end, int | float) and end >= value("learning_rate"):
            yield blamed, f"lr_end={end} must be below learning_rate={value('learning_rate')}"

"""Check whether a schedule can be built from its arguments, before a run fails halfway.

After names and types, which get an explanation, the schedule is built once over a tiny optimizer.
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

from hfbridge.errors import suggest
from hfbridge.settings.rules import Complaint, Value

CONSTANT = ("constant", "constant_with_warmup")
"""Schedules for which transformers ignores `lr_scheduler_kwargs`."""

FOLLOWING = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow a metric."""

_CLASSES: Mapping[str, Callable[..., object]] = {
    "reduce_lr_on_plateau": ReduceLROnPlateau,
    "greedy": GreedyLR,
}
_LISTS = ("min_lr", "max_lr")  # of the schedules that follow a metric: one for each parameter group
_STEPS = 100  # of the schedule that is built to try; how many does not matter


def check_schedule(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    """Check the keyword arguments of the schedule, and what else it needs.

    Args:
        value: a setting by its name, given or default.
        given: the names of the settings that were given.

    Yields:
        The name of a setting, and what is wrong with its value.

    Mirrors: transformers.Trainer.create_scheduler
    Proved by: tests/unit/settings/test_schedulers.py
    """
    name, kwargs = value("lr_scheduler_type"), value("lr_scheduler_kwargs") or {}
    if name in FOLLOWING and value("eval_strategy") == "no":
        yield "lr_scheduler_type", 'follows a metric; set eval_strategy to "steps" or "epoch"'
    if name in CONSTANT:
        return
    blamed = "lr_scheduler_kwargs" if "lr_scheduler_kwargs" in given else "lr_scheduler_type"
    wrong = list(_check_kwargs(name, kwargs, learning_rate=value("learning_rate")))
    if kwargs and not wrong and (error := _build_error(name, kwargs, learning_rate=value("learning_rate"))):
        wrong = [f"{name} raises: {error}"]
    yield from ((blamed, text) for text in wrong)


def _check_kwargs(name: str, kwargs: Mapping[str, Any], *, learning_rate: float) -> Iterator[str]:
    build = _CLASSES.get(name) or TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    parameters = dict(inspect.signature(build).parameters)  # type: ignore[arg-type]
    for passed in ("optimizer", "num_warmup_steps", "num_training_steps"):
        parameters.pop(passed, None)
    for key, entry in kwargs.items():
        if key not in parameters:
            text = f"{key} is no argument of {name}; possible are {', '.join(parameters)}"
            yield text + suggest(key, parameters)
        elif wrong := _wrong_entry(entry, parameters[key], may_be_list=name in FOLLOWING and key in _LISTS):
            yield f"{key} must be {wrong}, not {entry!r}"
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in kwargs:
            yield f'{name} needs lr_scheduler_kwargs={{"{key}": ...}}'
    if "min_lr_rate" in parameters and (kwargs.get("min_lr") is None) == (kwargs.get("min_lr_rate") is None):
        yield f"{name} needs either min_lr or min_lr_rate in lr_scheduler_kwargs"
    if name == "polynomial":
        end = kwargs.get("lr_end", parameters["lr_end"].default)
        if isinstance(end, int | float) and end >= learning_rate:
            yield f"lr_end={end} must be below learning_rate={learning_rate}"


def _wrong_entry(entry: object, parameter: inspect.Parameter, *, may_be_list: bool) -> str:
    """Describe what an argument must be; empty if it is that."""
    default = parameter.default
    if isinstance(default, bool):
        return "" if isinstance(entry, bool) else "True or False"
    if isinstance(default, str):
        return "" if isinstance(entry, str) else "a string"
    if entry is None:
        return "a number" if default is not None else ""
    entries = entry if may_be_list and isinstance(entry, list) else [entry]
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in entries):
        return (
            "a number (1e-6 in YAML is a string, 1.0e-6 a number)" if isinstance(entry, str) else "a number"
        )
    return "" if all(map(math.isfinite, entries)) else "a finite number"


def _build_error(name: str, kwargs: Mapping[str, Any], *, learning_rate: float) -> str:
    """Build the schedule as transformers does, and return the error."""
    groups = [
        {"params": [torch.zeros(1, requires_grad=True)]} for _ in range(2)
    ]  # as in the HF Trainer: two groups
    optimizer = torch.optim.SGD(groups, lr=learning_rate)
    try:
        get_scheduler(
            name,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=_STEPS,
            scheduler_specific_kwargs=dict(kwargs),
        )
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        return str(error)
    return ""

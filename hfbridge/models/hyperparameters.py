"""HFModule's arguments as hyperparameters: for loggers, and for `load_from_checkpoint`.

argument                                   stored as
numbers, text, booleans                    they are
paths                                      text
dtypes                                     their names, such as "bfloat16"
an auto class                              its name
a PEFT configuration                       a dict of the fields that differ from their defaults, "peft_type"
settings                                   a dict of the values passed
lists, tuples and dicts of these           lists and dicts
a model, a function that makes one         {"not_stored": its name}
metrics, functions, any other object       nothing; a checkpoint names them under `LEFT_OUT_KEY`

Private names of Lightning, pinned by tests/unit/models/test_hyperparameters.py: `_set_hparams`,
`_hparams_initial` and `_log_hyperparams`. `save_hyperparameters` compares all arguments of all constructors
with what it is passed, and metrics and arrays cannot be compared.
"""

import copy
import dataclasses
import inspect
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from hfbridge.errors import ModelError
from hfbridge.settings import Settings

LEFT_OUT_KEY = "hfbridge_left_out"
"""Key of a Lightning checkpoint for the arguments that it does not hold, with what they were."""

_NOT_STORED = "not_stored"
# Arguments without which the weights of a checkpoint have no model to be loaded into.
_OF_THE_MODEL = ("model", "auto_class", "model_kwargs", "dtype", "peft_config")


class _NotPlainError(TypeError):
    """A value that is neither a number, text nor a collection of these."""


def store_arguments(module: Any, frame: FrameType | None, names: Collection[str]) -> None:
    """Store the arguments of a module's constructor, or of its subclass's, as its hyperparameters.

    Args:
        module: the module under construction.
        frame: of HFModule's constructor.
        names: of HFModule's arguments, by which `load_from_checkpoint` passes them.
    """
    passed = _outermost_arguments(module, frame)
    module._set_hparams(make_plain({name: value for name, value in passed.items() if name in names}, names))
    module._hparams_initial = copy.deepcopy(module.hparams)
    module._log_hyperparams = True


def make_plain(hyperparameters: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Replace arguments of HFModule, whose `names` are passed, by what is stored of them; others stay."""
    found = {}
    for name, value in hyperparameters.items():
        if name not in names:
            found[name] = value
        elif value is not None and name != "optimizers":
            try:
                found[name] = _plain(_given(value) if name == "settings" else value, name)
            except _NotPlainError:
                if name in _OF_THE_MODEL:
                    found[name] = {_NOT_STORED: _kind_of(value)}
    return found


def check_stored(**arguments: Any) -> None:
    """Check that a checkpoint stored the arguments of HFModule that a model is built from.

    Raises:
        ModelError: one was an object.
    """
    for name, value in arguments.items():
        if isinstance(value, Mapping) and value.keys() == {_NOT_STORED}:
            raise ModelError(
                f"{name}= was an object ({value[_NOT_STORED]}), and a checkpoint does not hold objects. Pass "
                f"it: load_from_checkpoint(path, {name}=...)."
            )


def left_out(module: Any) -> dict[str, str]:
    """Name the arguments of a module that its hyperparameters do not hold, with what they are."""
    values = {
        "compute_metrics": module.compute_metrics,
        "metrics": module.running_metrics,
        "preprocess_logits_for_metrics": module.preprocess_logits_for_metrics,
        "compute_loss_func": module.compute_loss_func,
        "processing_class": module.processing_class,
        "optimizer_cls_and_kwargs": module.optimizer_cls_and_kwargs,
    }
    stored = module.hparams
    return {
        name: _kind_of(value) for name, value in values.items() if value is not None and name not in stored
    }


def describe_left_out(module: Any, checkpoint: Mapping[str, Any]) -> list[str]:
    """Describe what the module that wrote a checkpoint had, and this one has not."""
    present = left_out(module).keys() | module.hparams.keys()
    return [
        f"The checkpoint was written with {name}= ({kind}), which it does not hold. If needed, pass it: "
        f"load_from_checkpoint(path, {name}=...)."
        for name, kind in checkpoint.get(LEFT_OUT_KEY, {}).items()
        if name not in present
    ]


def logged_hyperparameters(
    own: Mapping[str, Any], settings: Settings | None, of_data: Mapping[str, Any]
) -> dict[str, Any]:
    """Combine a module's hyperparameters and the settings of the run, for loggers.

    Args:
        own: hyperparameters of the module.
        settings: of the run; `None` before it is set up.
        of_data: hyperparameters of the data module; Lightning raises for a name with two values.
    """
    found = dict(own)
    if settings is not None and settings.given:
        found |= make_plain({"settings": settings}, ("settings",))
    clashing = {name for name in found.keys() & of_data.keys() if found[name] != of_data[name]}
    if isinstance(of_data.get("settings"), Mapping):
        found.pop("settings", None)
        clashing.discard("settings")
    return {f"module_{name}" if name in clashing else name: value for name, value in found.items()}


def _given(settings: Any) -> dict[str, Any]:
    """Return the values passed as settings."""
    return dict(Settings.of(settings).given)


def _kind_of(value: Any) -> str:
    name: str = getattr(value, "__qualname__", None) or type(value).__qualname__
    return name


def _outermost_arguments(module: Any, frame: FrameType | None) -> dict[str, Any]:
    """Read the arguments that the constructor of a module's own class was called with."""
    found: dict[str, Any] = {}
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            names, _, keywords, values = inspect.getargvalues(frame)
            if names and values.get(names[0]) is module:
                found = {name: values[name] for name in names[1:]}
                found |= values[keywords] if keywords else {}
        frame = frame.f_back
    return found


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value, name)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None or isinstance(value, Path):
        return None if value is None else str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, name) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, name) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(entry, name) for entry in value)
    if name == "auto_class" and isinstance(value, type):
        return value.__name__
    if name == "peft_config" and dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain_config(value)
    raise _NotPlainError


def _plain_config(config: Any) -> dict[str, Any]:
    """Make a dict of the fields of a PEFT configuration that differ from their defaults."""
    differing = {
        entry.name: getattr(config, entry.name)
        for entry in dataclasses.fields(config)
        if entry.init and entry.name != "peft_type" and getattr(config, entry.name) != _default_of(entry)
    }
    return {"peft_type": _plain(config.peft_type, "peft_type"), **_plain(differing, "fields")}


def _default_of(entry: dataclasses.Field[Any]) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()

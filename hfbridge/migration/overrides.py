"""Methods of a `transformers.Trainer` that are overridden.

overridden                                           is named
in a subclass, or a mixin of it                      Mine.compute_loss
on the object: trainer.compute_loss = ...            Mine object: compute_loss = ...
in transformers' class: Trainer.compute_loss = ...   transformers' Trainer.compute_loss = ...
by transformers' or hfbridge's own subclasses        not
a new method, which the HF Trainer does not call     not
"""

import inspect
from collections.abc import Iterator

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from transformers import Trainer as NativeTrainer

_UPSTREAM = ("transformers", "hfbridge")
# Where functions come from that stand around transformers' own: its decorators.
_DECORATORS = ("contextlib", "functools", "torch", "accelerate")
_ORIGINALS = {
    kind: dict(vars(kind))
    for kind in (NativeTrainer, Seq2SeqTrainer, TrainingArguments, Seq2SeqTrainingArguments)
}


def find_overridden(native_trainer: NativeTrainer) -> Iterator[tuple[str, str]]:
    """Name the methods and switches that differ from transformers', and where they were overridden.

    Proved by: tests/unit/migration/test_overrides.py
    """
    return _replaced(native_trainer, NativeTrainer, Seq2SeqTrainer)


def find_overridden_settings(args: TrainingArguments) -> Iterator[str]:
    """Name the methods and properties of settings that differ from transformers'."""
    for name, where in _replaced(args, TrainingArguments, Seq2SeqTrainingArguments):
        if name != "_VALID_DICT_FIELDS":  # which fields a text may be read into
            yield where


def _replaced(given: object, *natives: type) -> Iterator[tuple[str, str]]:
    """Name what differs from transformers' classes, and where it was replaced."""
    kind = type(given)
    of_upstream = [ancestor for ancestor in natives if isinstance(given, ancestor)]
    names = dict.fromkeys(name for ancestor in of_upstream for name in _methods_of(ancestor))
    for name in names:
        if name in vars(given) and callable(vars(given)[name]):
            yield name, f"{kind.__name__} object: {name} = ..."
            continue
        home = next(ancestor for ancestor in kind.__mro__ if name in vars(ancestor))
        if not _is_upstream(home.__module__):
            yield name, f"{home.__name__}.{name}"
        elif _is_patched(home, name):
            yield name, f"transformers' {home.__name__}.{name} = ..."


def _methods_of(kind: type) -> list[str]:
    """List methods, properties and switches of a class, without fields of a dataclass."""
    is_data = set(getattr(kind, "__dataclass_fields__", ()))
    return [
        name for name in vars(kind) if not name.startswith("__") and name not in is_data and "__" not in name
    ]


def _is_upstream(module: str) -> bool:
    return module.partition(".")[0] in _UPSTREAM


def _is_patched(home: type, name: str) -> bool:
    """Whether something in a class of transformers was replaced, before or after hfbridge was imported."""
    value = vars(home)[name]
    if home in _ORIGINALS and value is not _ORIGINALS[home].get(name):
        return True
    while value is not None:
        function = getattr(value, "__func__", getattr(value, "func", value))
        function = value.fget if isinstance(value, property) else function
        if not inspect.isfunction(function):
            return False
        if str(function.__globals__.get("__name__", "")).partition(".")[0] not in (*_UPSTREAM, *_DECORATORS):
            return True
        value = getattr(function, "__wrapped__", None)
    return False

"""Methods of a native Trainer that somebody has replaced, and what to do instead; knows Hugging Face.

    replaced                                             is
    in a subclass, or a mixin of it                      refused, by the subclass's name
    on the object: trainer.compute_loss = ...            refused
    in transformers' class: Trainer.compute_loss = ...   refused
    by transformers' or hfbridge's own subclasses        theirs, and no replacement
    a new method, or one that only its user calls        nothing to refuse

Lightning runs the training, so what stands in these methods would silently not be done.
"""

import inspect
from collections.abc import Collection, Iterator
from typing import Any

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from transformers import Trainer as NativeTrainer

from hfbridge.errors import Problem
from hfbridge.replaced import CALLED_BY_USERS, INSTEAD, OTHERWISE

_UPSTREAM = ("transformers", "hfbridge")
# Where functions come from that stand around transformers' own: its decorators.
_DECORATORS = ("contextlib", "functools", "torch", "accelerate")


def find_replaced(native_trainer: NativeTrainer, *, called: Collection[str] = ()) -> Iterator[Problem]:
    """Find what of a native Trainer has been replaced, and would not be called.

    Args:
        native_trainer: the object.
        called: methods that are called all the same by whoever asks.

    Yields:
        A problem for each, whose subject is the method as the user wrote it.

    Proved by: tests/unit/migrate/test_methods.py
    """
    for name, where in find_overridden(native_trainer):
        if name not in called and name not in CALLED_BY_USERS:
            yield Problem(where, f"Lightning would not call it; {INSTEAD.get(name, OTHERWISE)}")
    for where in find_overridden_settings(native_trainer.args):
        yield Problem(where, "the settings are read field by field; set the fields that it computes")


def find_overridden(native_trainer: NativeTrainer) -> Iterator[tuple[str, str]]:
    """Name the methods and switches that are not as transformers has them, and where they were overridden.

    Args:
        native_trainer: the object.
    """
    return _replaced(native_trainer, NativeTrainer, Seq2SeqTrainer)


def find_overridden_settings(args: TrainingArguments) -> Iterator[str]:
    """Name the methods and properties of settings that are not as transformers has them.

    Args:
        args: of a Trainer.
    """
    for name, where in _replaced(args, TrainingArguments, Seq2SeqTrainingArguments):
        if name != "_VALID_DICT_FIELDS":  # which fields a text may be read into
            yield where


def _replaced(given: object, *natives: type) -> Iterator[tuple[str, str]]:
    """Name what is not as transformers' classes have it, and where it was replaced."""
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
        elif _is_patched(vars(home)[name]):
            yield name, f"transformers' {home.__name__}.{name} = ..."


def _methods_of(kind: type) -> list[str]:
    """Methods, properties and switches of a class of transformers; fields of a dataclass are none."""
    is_data = set(getattr(kind, "__dataclass_fields__", ()))
    return [
        name for name in vars(kind) if not name.startswith("__") and name not in is_data and "__" not in name
    ]


def _is_upstream(module: str) -> bool:
    return module.partition(".")[0] in _UPSTREAM


def _is_patched(value: Any) -> bool:
    """Whether a function in a class of transformers was written elsewhere."""
    function = getattr(value, "__func__", value)
    function = value.fget if isinstance(value, property) else function
    if not inspect.isfunction(function):
        return False
    home = str(function.__globals__.get("__name__", "")).partition(".")[0]
    return home not in (*_UPSTREAM, *_DECORATORS)

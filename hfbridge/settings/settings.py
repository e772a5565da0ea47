"""Settings: what the user asked for, checked as a whole and never changed.

The names, defaults and meanings are those of `transformers.TrainingArguments`; there is no second schema.
Reading settings touches no device, no process group and no file, which constructing a `TrainingArguments`
does; one is built only by `as_training_arguments`.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError
from types import MappingProxyType
from typing import Any, NoReturn

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hfbridge.errors import Problem, SettingsError, raise_problems
from hfbridge.settings import native
from hfbridge.settings.checks import check_range, check_together, convert, simplify, suggest
from hfbridge.settings.fields import DEFAULTS, NO_CHECKPOINTS, NOT_CARRIED, RULES, SEQ2SEQ_FIELDS, show
from hfbridge.settings.legacy import OLD_NAMES, Renaming, rename


class Settings:
    """The settings of a run, by the names of `transformers.TrainingArguments`.

    An attribute is the value given, or transformers' default: `Settings().learning_rate` is 5e-5. Values that
    `TrainingArguments` fills in from others are not: `eval_steps` stays None where `logging_steps` counts,
    and `dataloader_pin_memory` stays True with `use_cpu`.

    Args:
        **values: with the names of transformers 5 or 4.

    Raises:
        SettingsError: with everything that is unknown, wrong or not carried.
    """

    __slots__ = ("_given", "_is_seq2seq", "_notes")

    _given: dict[str, Any]
    _notes: dict[str, str]
    _is_seq2seq: bool

    def __init__(self, /, **values: Any) -> None:
        """Check the values and keep them."""
        self._read(values, rename(values), base={}, is_seq2seq=False)

    @classmethod
    def of(cls, source: "Settings | TrainingArguments | Mapping[str, Any]") -> "Settings":
        """Take settings from where the user keeps them.

        Args:
            source: settings, which are returned as they are; a `TrainingArguments`, which is read field by
                field and left alone; or a mapping with the names of transformers 5 or 4, such as a loaded
                YAML file.

        Returns:
            The settings.

        Raises:
            SettingsError: something in the source is unknown, wrong or not carried, or the source is
                something else.
        """
        if isinstance(source, Settings):
            return source
        if isinstance(source, TrainingArguments):
            values = native.read(source)
            is_seq2seq = isinstance(source, Seq2SeqTrainingArguments)
        elif isinstance(source, Mapping):
            values, is_seq2seq = {str(name): value for name, value in source.items()}, False
        else:
            kind = f"the class {source.__name__}" if isinstance(source, type) else type(source).__name__
            raise SettingsError(
                f"settings cannot be read from {kind}; possible are hfbridge.Settings, a "
                "transformers.TrainingArguments and a dictionary; load a file first"
            )
        settings = cls.__new__(cls)
        settings._read(values, rename(values), base={}, is_seq2seq=is_seq2seq)
        return settings

    @property
    def given(self) -> Mapping[str, Any]:
        """The values given, plain and under the names of transformers 5; a copy that cannot be changed."""
        return MappingProxyType(copy.deepcopy(self._given))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read differently from how it was written, and what one should know about the values."""
        return (*self._notes.values(), *_standing_notes(self))

    def replace(self, /, **changes: Any) -> "Settings":
        """Make settings that differ in some values.

        Args:
            **changes: with the names of transformers 5 or 4; they win over what was given before.

        Returns:
            New settings, checked as a whole.

        Raises:
            SettingsError: the changed settings are wrong or not carried.
        """
        settings = type(self).__new__(type(self))
        renaming = rename(changes)
        kept = {name: value for name, value in self._given.items() if name not in renaming.values}
        renaming.notes = {
            n: text for n, text in self._notes.items() if n not in renaming.values
        } | renaming.notes
        settings._read(changes, renaming, base=kept, is_seq2seq=self._is_seq2seq)
        return settings

    def as_training_arguments(self, *, use_cpu: bool | None = None) -> TrainingArguments:
        """Build the real thing, for the parts of transformers that want one.

        Call this only once the process group of the run exists, or when there will be none: constructing a
        `TrainingArguments` picks the device and, under a launcher, opens the process group.

        Args:
            use_cpu: replaces the setting of that name; None leaves it.

        Returns:
            A new `TrainingArguments`; a `Seq2SeqTrainingArguments` if one was the source or one of its
            fields was given.
        """
        values = copy.deepcopy(self._given)
        if use_cpu is not None:
            values["use_cpu"] = use_cpu
        kind = Seq2SeqTrainingArguments if self._is_seq2seq else TrainingArguments
        return kind(**values)

    def _read(
        self, values: Mapping[str, Any], renaming: Renaming, *, base: dict[str, Any], is_seq2seq: bool
    ) -> None:
        """Check values and keep them, or raise everything that is wrong with them.

        Args:
            values: as the user gave them.
            renaming: the same under new names.
            base: values that were checked before and are kept beside the new ones.
            is_seq2seq: whether they come from a `Seq2SeqTrainingArguments`.
        """
        plain, complaints, notes = dict(base), list(renaming.problems), dict(renaming.notes)
        for name, value in renaming.values.items():
            try:
                plain[name], note = _convert(name, value)
            except ValueError as error:
                complaints.append((name, str(error)))
                continue
            if note:
                notes[name] = f"{notes[name]}; {note}" if name in notes else note
        wrong = {name for name, _ in complaints}
        complaints += check_together(plain, wrong=wrong)
        complaints += _find_refused(plain)
        if complaints:
            _refuse(complaints, {**base, **values}, renaming)
        for name, content in (
            ("_given", copy.deepcopy(plain)),
            ("_notes", notes),
            ("_is_seq2seq", is_seq2seq or not SEQ2SEQ_FIELDS.isdisjoint(plain)),
        ):
            object.__setattr__(self, name, content)

    def __getattr__(self, name: str) -> Any:
        """Look up a setting: the value given, or the default."""
        if name in DEFAULTS:
            return copy.deepcopy(self._given.get(name, DEFAULTS[name]))
        raise AttributeError(f"no setting is called {name}{suggest(name, DEFAULTS)}")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        """Refuse: settings are frozen."""
        raise FrozenInstanceError(f"settings are not changed; use settings.replace({name}=...)")

    def __delattr__(self, name: str) -> NoReturn:
        """Refuse: settings are frozen."""
        raise FrozenInstanceError(f"settings are not changed; {name} cannot be deleted")

    def __dir__(self) -> Iterator[str]:
        """List the settings too, for completion."""
        yield from super().__dir__()
        yield from DEFAULTS

    def __eq__(self, other: object) -> bool:
        """Whether the same values were given; a default that was given differs from one that was not."""
        if not isinstance(other, Settings):
            return NotImplemented
        return self._given == other._given and self._is_seq2seq == other._is_seq2seq

    def __hash__(self) -> int:
        """Hash the names given; values may be lists."""
        return hash(frozenset(self._given))

    def __repr__(self) -> str:
        """Show the values given, never a token."""
        shown = (show(name, value).replace(" = ", "=", 1) for name, value in self._given.items())
        return f"Settings({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by the values given."""
        return _restore, (type(self), copy.deepcopy(self._given), dict(self._notes), self._is_seq2seq)


def _restore(
    kind: type[Settings], given: dict[str, Any], notes: dict[str, str], is_seq2seq: bool
) -> Settings:
    """Rebuild pickled or copied settings, checked again since the installed transformers may be another."""
    settings = kind.__new__(kind)
    settings._read(given, Renaming(values=given, notes=notes), base={}, is_seq2seq=is_seq2seq)
    return settings


def _convert(name: str, value: object) -> tuple[object, str]:
    """Check one value by itself, and make it plain.

    Raises:
        ValueError: what is wrong with it.
    """
    if name not in RULES:
        hint = (
            suggest(name, (*DEFAULTS, *OLD_NAMES))
            or "; hfbridge takes the names of transformers.TrainingArguments"
        )
        raise ValueError(f"unknown{hint}")
    value = simplify(name, value)
    rule = RULES[name]
    if rule.carried == "default" and not rule.needs_saving:
        return value, ""  # whatever is not the default is refused, of the right type or not
    value, note = convert(name, value)
    if wrong := check_range(name, value):
        raise ValueError(wrong)
    return value, note


def _find_refused(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Find the values that are right but not carried."""
    saves = given.get("save_strategy", DEFAULTS["save_strategy"]) != "no"
    return [
        (name, f"{NOT_CARRIED}: {RULES[name].reason}")
        for name, value in given.items()
        if name in RULES and not RULES[name].carries(value) and (saves or not RULES[name].needs_saving)
    ]


def _standing_notes(settings: Settings) -> Iterator[str]:
    """What one should know about values that are carried."""
    given = settings._given
    if settings.save_strategy == "steps":
        yield NO_CHECKPOINTS
    for name, value in given.items():
        rule = RULES[name]
        if rule.note and value != DEFAULTS[name]:
            yield f"{name} is {rule.note}"
        if rule.needs_saving and not rule.carries(value):
            yield f'{name} has no effect with save_strategy="no"'
    if settings.max_steps > 0 and "num_train_epochs" in given:
        yield f"num_train_epochs has no effect: max_steps={settings.max_steps} decides"
    if settings.lr_scheduler_kwargs and settings.lr_scheduler_type in ("constant", "constant_with_warmup"):
        yield f"lr_scheduler_kwargs has no effect with lr_scheduler_type={settings.lr_scheduler_type!r}"


def _refuse(complaints: list[tuple[str, str]], values: Mapping[str, Any], renaming: Renaming) -> NoReturn:
    """Raise all complaints, each about the name and value that the user wrote."""
    found: dict[str, list[Problem]] = {name: [] for name in values}
    for name, text in complaints:
        old, original = renaming.origins.get(name, (name, values.get(name, DEFAULTS.get(name))))
        if old != name:
            text = f"read as {show(name, renaming.values[name])}: {text}"
        found.setdefault(old, []).append(Problem(show(old, original), text))
    problems = [problem for of_one in found.values() for problem in of_one]
    wrong, noun = sum(bool(of_one) for of_one in found.values()), "setting" if len(found) == 1 else "settings"
    headline = f"{wrong} of {len(found)} {noun} cannot be carried to Lightning; nothing was started."
    raise_problems(SettingsError, headline, problems)

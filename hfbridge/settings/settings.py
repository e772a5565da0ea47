"""Settings: what the user asked for, checked as a whole and never changed.

The names, defaults and meanings are those of `transformers.TrainingArguments`; there is no second schema.
Reading settings touches no device and no process group, which constructing a `TrainingArguments` does; one is
built only by `as_training_arguments`.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError
from types import MappingProxyType
from typing import Any, NoReturn

from transformers import GenerationConfig, Seq2SeqTrainingArguments, TrainingArguments

from hfbridge.errors import Problem, SettingsError, raise_problems, suggest
from hfbridge.settings import training_arguments
from hfbridge.settings.cross_checks import check_together
from hfbridge.settings.io import read_file, write_file
from hfbridge.settings.legacy_names import OLD_NAMES, Renaming, rename
from hfbridge.settings.notes import standing_notes
from hfbridge.settings.rules import DEFAULTS, NOT_CARRIED, RULES, SEQ2SEQ_FIELDS, Unread, show
from hfbridge.settings.validation import check_range, convert, simplify

# Names that transformers keeps as mirrors of new ones.
_MIRRORS = {name: OLD_NAMES[name].new for name in OLD_NAMES if name in DEFAULTS}

# Where LightningCLI has read a mapping, which it puts beside what it has read.
_ORIGIN = "__path__"


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

    __slots__ = ("_given", "_notes")

    _given: dict[str, Any]
    _notes: dict[str, str]

    def __init__(self, /, **values: Any) -> None:
        """Check the values and keep them."""
        self._read(values, rename(values), base={})

    @classmethod
    def of(cls, source: "SettingsSource", *, drops_unread: bool = False) -> "Settings":
        """Take settings from where the user keeps them.

        Args:
            source: settings, which are returned as they are; a `TrainingArguments`, which is read field by
                field and left alone; a mapping with the names of transformers 5 or 4; or the path of a YAML
                or JSON file that holds one.
            drops_unread: leave out values of a mapping that nothing reads beside the others, which the HF
                Trainer ignores, instead of refusing them.

        Returns:
            The settings.

        Raises:
            SettingsError: something in the source is unknown, wrong or not carried, or the source is
                something else.
        """
        if isinstance(source, Settings):
            return source
        if isinstance(source, str | os.PathLike):
            return cls.load(source)
        if isinstance(source, TrainingArguments):
            values = training_arguments.read(source)
        elif isinstance(source, Mapping):
            values = {str(name): value for name, value in source.items() if name != _ORIGIN}
        else:
            kind = f"the class {source.__name__}" if isinstance(source, type) else type(source).__name__
            raise SettingsError(
                f"settings cannot be read from {kind}; possible are hfbridge.Settings, a "
                "transformers.TrainingArguments, a dictionary, and the path of a .yaml or .json file"
            )
        settings = cls.__new__(cls)
        settings._read(values, rename(values), base={}, drops_unread=drops_unread)
        return settings

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Settings":
        """Read settings from a file with the names of transformers 5 or 4.

        Args:
            path: a file whose suffix is .yaml, .yml or .json.

        Returns:
            The settings.

        Raises:
            SettingsError: the file cannot be read, is no mapping, or something in it is unknown, wrong or
                not carried.
        """
        values = read_file(path)
        try:
            return cls.of(values)
        except SettingsError as error:
            told = SettingsError(f"{os.fspath(path)}: {error}")
            told.problems = error.problems
            raise told from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the values given to a file that `load` makes equal settings of; tokens are left out.

        Args:
            path: a file whose suffix is .yaml, .yml or .json; one that exists is replaced.

        Raises:
            SettingsError: the file cannot be written, and is left as it was.
        """
        write_file(path, self._given)

    @property
    def given(self) -> Mapping[str, Any]:
        """The values given, plain and under the names of transformers 5; a copy that cannot be changed."""
        return MappingProxyType(copy.deepcopy(self._given))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read differently from how it was written, and what one should know about the values."""
        return (*self._notes.values(), *(text for _, text in self._standing_notes()))

    def notes_on(self, name: str) -> tuple[str, ...]:
        """Those of the notes that are about one setting, by its name in transformers 5."""
        standing = (text for about, text in self._standing_notes() if about == name)
        return (*([self._notes[name]] if name in self._notes else []), *standing)

    def _standing_notes(self) -> Iterator[tuple[str, str]]:
        return standing_notes(self._value, self._given)

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
        settings._read(changes, renaming, base=kept)
        return settings

    def as_training_arguments(
        self, *, use_cpu: bool | None = None, keeps_deepspeed: bool = False
    ) -> TrainingArguments:
        """Build the real thing, for the parts of transformers that want one.

        Call this only once the process group of the run exists, or when there will be none: constructing a
        `TrainingArguments` picks the device and, under a launcher, opens the process group.

        Args:
            use_cpu: replaces the setting of that name; None leaves it.
            keeps_deepspeed: leave `deepspeed` to the native Trainer; hfbridge's own strategy reads it here.

        Returns:
            A new `TrainingArguments`; a `Seq2SeqTrainingArguments` if one was the source or one of its
            fields was given.
        """
        values = copy.deepcopy(self._given)
        if not keeps_deepspeed:
            values.pop("deepspeed", None)  # it would make a plugin
        if isinstance(values.get("generation_config"), Mapping):
            values["generation_config"] = GenerationConfig.from_dict(values["generation_config"])
        if use_cpu is not None:
            values["use_cpu"] = use_cpu
        is_seq2seq = not SEQ2SEQ_FIELDS.isdisjoint(values)
        return (Seq2SeqTrainingArguments if is_seq2seq else TrainingArguments)(**values)

    def _value(self, name: str) -> Any:
        """The value given, or the default, for reading only."""
        return self._given.get(name, DEFAULTS[name])

    def _read(
        self,
        values: Mapping[str, Any],
        renaming: Renaming,
        *,
        base: dict[str, Any],
        drops_unread: bool = False,
    ) -> None:
        """Check values and keep them, or raise everything that is wrong with them.

        Args:
            values: as the user gave them.
            renaming: the same under new names.
            base: values that were checked before and are kept beside the new ones.
            drops_unread: leave out values that nothing reads.
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
        together = list(check_together(plain, wrong=wrong))
        # Without one of them another may be read by nothing.
        while drops_unread and (unread := {name for name, text in together if isinstance(text, Unread)}):
            plain = {name: value for name, value in plain.items() if name not in unread}
            together = list(check_together(plain, wrong=wrong))
        complaints += together
        complaints += _find_refused(plain)
        if complaints:
            _refuse(complaints, {**base, **values}, renaming)
        object.__setattr__(self, "_given", copy.deepcopy(plain))
        object.__setattr__(self, "_notes", notes)

    def __getattr__(self, name: str) -> Any:
        """Look up a setting: the value given, or the default."""
        name = _MIRRORS.get(name, name)
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
        return self._given == other._given

    def __hash__(self) -> int:
        """Hash the names given; values may be lists."""
        return hash(frozenset(self._given))

    def __repr__(self) -> str:
        """Show the values given, never a token."""
        shown = (show(name, value).replace(" = ", "=", 1) for name, value in self._given.items())
        return f"Settings({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by the values given."""
        return _restore, (type(self), copy.deepcopy(self._given), dict(self._notes))


def _restore(kind: type[Settings], given: dict[str, Any], notes: dict[str, str]) -> Settings:
    """Rebuild pickled or copied settings, checked again since the installed transformers may be another."""
    settings = kind.__new__(kind)
    settings._read(given, Renaming(values=given, notes=notes), base={})
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
    if rule.carried == "default":
        return value, ""  # whatever is not the default is refused, of the right type or not
    value, note = convert(name, value)
    if wrong := check_range(name, value):
        raise ValueError(wrong)
    return value, note


def _find_refused(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Find the values that are right but not carried."""
    return [
        (name, f"{NOT_CARRIED}: {RULES[name].reason}")
        for name, value in given.items()
        if name in RULES and not RULES[name].carries(value)
    ]


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


SettingsSource = Mapping[str, Any] | str | os.PathLike[str] | Settings | TrainingArguments
"""What settings are taken from; a path is that of a YAML or JSON file."""

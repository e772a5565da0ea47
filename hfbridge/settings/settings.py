"""Settings of a run by the names, defaults and meanings of `transformers.TrainingArguments`.

Reading settings touches no device and no process group, which constructing a `TrainingArguments` does; only
`as_training_arguments` builds one.
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
from hfbridge.settings.rules import DEFAULTS, RULES, SEQ2SEQ_FIELDS, UNSUPPORTED, Unread, show
from hfbridge.settings.validation import check_range, convert, simplify

# Names that transformers keeps as mirrors of new ones.
_MIRRORS = {name: OLD_NAMES[name].new for name in OLD_NAMES if name in DEFAULTS}

# LightningCLI adds the path of the file to a mapping that it has read.
_ORIGIN = "__path__"


class Settings:
    """The settings of a run, by the names of `transformers.TrainingArguments`; immutable.

    An attribute is the value set, or transformers' default: `Settings().learning_rate` is 5e-5. Values that
    `TrainingArguments` derives from others are not: `eval_steps` stays None where `logging_steps` counts,
    and `dataloader_pin_memory` stays True with `use_cpu`.

    Args:
        **values: with the names of transformers 5 or 4.

    Raises:
        SettingsError: with everything that is unknown, wrong or unsupported.
    """

    __slots__ = ("_given", "_notes")

    _given: dict[str, Any]
    _notes: dict[str, str]

    def __init__(self, /, **values: Any) -> None:
        self._set(values, rename(values))

    @classmethod
    def of(cls, source: "SettingsSource", *, drops_unread: bool = False) -> "Settings":
        """Read settings from any source.

        Args:
            source: settings, returned as they are; a `TrainingArguments`, read field by field and left
                alone; a mapping with the names of transformers 5 or 4; or the path of a YAML or JSON file.
            drops_unread: drop values of a mapping that have no effect, as the HF Trainer does, instead of
                raising.

        Returns:
            The settings.

        Raises:
            SettingsError: something in the source is unknown, wrong or unsupported, or the source is of
                another type.
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
        return cls._make(values, rename(values), drops_unread=drops_unread)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Settings":
        """Read settings from a file with the names of transformers 5 or 4.

        Args:
            path: a .yaml, .yml or .json file.

        Returns:
            The settings.

        Raises:
            SettingsError: the file cannot be read or holds no mapping, or something in it is unknown, wrong
                or unsupported.
        """
        values = read_file(path)
        try:
            return cls.of(values)
        except SettingsError as error:
            located = SettingsError(f"{os.fspath(path)}: {error}")
            located.problems = error.problems
            raise located from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the values set to a file that `load` reads back as equal settings, without tokens.

        Args:
            path: a .yaml, .yml or .json file; an existing one is replaced.

        Raises:
            SettingsError: the file cannot be written, and is left as it was.
        """
        write_file(path, self._given)

    @property
    def given(self) -> Mapping[str, Any]:
        """The values set, plain and under the names of transformers 5; a read-only copy."""
        return MappingProxyType(copy.deepcopy(self._given))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read differently from how it was written, and which values have no effect."""
        return (*self._notes.values(), *(text for _, text in self._standing_notes()))

    def notes_on(self, name: str) -> tuple[str, ...]:
        """Return the notes on one setting, by its name in transformers 5."""
        standing = (text for about, text in self._standing_notes() if about == name)
        return (*([self._notes[name]] if name in self._notes else []), *standing)

    def _standing_notes(self) -> Iterator[tuple[str, str]]:
        return standing_notes(lambda name: self._given.get(name, DEFAULTS[name]), self._given)

    def replace(self, /, **changes: Any) -> "Settings":
        """Make settings that differ in some values.

        Args:
            **changes: with the names of transformers 5 or 4.

        Returns:
            New settings, checked as a whole.

        Raises:
            SettingsError: the changed settings are wrong or unsupported.
        """
        renaming = rename(changes)
        kept = {name: value for name, value in self._given.items() if name not in renaming.values}
        notes = {name: text for name, text in self._notes.items() if name not in renaming.values}
        renaming.notes = notes | renaming.notes
        return self._make(changes, renaming, base=kept)

    def as_training_arguments(
        self, *, use_cpu: bool | None = None, keeps_deepspeed: bool = False
    ) -> TrainingArguments:
        """Build the `TrainingArguments` of these settings.

        Call this only once the process group of the run exists, or when there will be none: constructing a
        `TrainingArguments` picks the device and, under a launcher, opens the process group.

        Args:
            use_cpu: replaces the setting of that name; None leaves it.
            keeps_deepspeed: pass `deepspeed` on to the HF Trainer; hfbridge's strategy reads it from here.

        Returns:
            A `Seq2SeqTrainingArguments` if that was the source or one of its fields is set, else a
            `TrainingArguments`.
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

    @classmethod
    def _make(
        cls,
        values: Mapping[str, Any],
        renaming: Renaming,
        *,
        base: Mapping[str, Any] = MappingProxyType({}),
        drops_unread: bool = False,
    ) -> "Settings":
        settings = cls.__new__(cls)
        settings._set(values, renaming, base=base, drops_unread=drops_unread)
        return settings

    def _set(
        self,
        values: Mapping[str, Any],
        renaming: Renaming,
        *,
        base: Mapping[str, Any] = MappingProxyType({}),
        drops_unread: bool = False,
    ) -> None:
        """Check values, `renaming` under their new names, beside those of `base`, and set all of them.

        Raises:
            SettingsError: with everything that is wrong.
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
        # Without one of them another may have no effect.
        while drops_unread and (unread := {name for name, text in together if isinstance(text, Unread)}):
            plain = {name: value for name, value in plain.items() if name not in unread}
            together = list(check_together(plain, wrong=wrong))
        complaints += together
        complaints += [
            (name, f"{UNSUPPORTED}: {RULES[name].reason}")
            for name, value in plain.items()
            if name in RULES and not RULES[name].supports(value)
        ]
        if complaints:
            _raise_complaints(complaints, {**base, **values}, renaming)
        object.__setattr__(self, "_given", copy.deepcopy(plain))
        object.__setattr__(self, "_notes", notes)

    def __getattr__(self, name: str) -> Any:
        name = _MIRRORS.get(name, name)
        if name in DEFAULTS:
            return copy.deepcopy(self._given.get(name, DEFAULTS[name]))
        raise AttributeError(f"no setting is called {name}{suggest(name, DEFAULTS)}")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise FrozenInstanceError(f"settings are not changed; use settings.replace({name}=...)")

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"settings are not changed; {name} cannot be deleted")

    def __dir__(self) -> Iterator[str]:
        yield from super().__dir__()
        yield from DEFAULTS

    def __eq__(self, other: object) -> bool:
        """Whether the same values were set; a default that was set differs from one that was not."""
        return self._given == other._given if isinstance(other, Settings) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset(self._given))  # values may be lists

    def __repr__(self) -> str:
        shown = (show(name, value).replace(" = ", "=", 1) for name, value in self._given.items())
        return f"Settings({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), copy.deepcopy(self._given), dict(self._notes))


def _restore(kind: type[Settings], given: dict[str, Any], notes: dict[str, str]) -> Settings:
    """Rebuild pickled or copied settings, checked again since the installed transformers may be another."""
    return kind._make(given, Renaming(values=given, notes=notes))


def _convert(name: str, value: object) -> tuple[object, str]:
    """Check one value by itself, and return its plain form and a note.

    Raises:
        ValueError: what is wrong with it.
    """
    if name not in RULES:
        hint = suggest(name, (*DEFAULTS, *OLD_NAMES))
        raise ValueError(f"unknown{hint or '; hfbridge takes the names of transformers.TrainingArguments'}")
    value = simplify(name, value)
    if RULES[name].support == "default":
        return value, ""  # any other value is unsupported, of the right type or not
    value, note = convert(name, value)
    if wrong := check_range(name, value):
        raise ValueError(wrong)
    return value, note


def _raise_complaints(
    complaints: list[tuple[str, str]], values: Mapping[str, Any], renaming: Renaming
) -> NoReturn:
    """Raise all complaints, each about the name and value that the user wrote."""
    found: dict[str, list[Problem]] = {name: [] for name in values}
    for name, text in complaints:
        old, original = renaming.origins.get(name, (name, values.get(name, DEFAULTS.get(name))))
        if old != name:
            text = f"read as {show(name, renaming.values[name])}: {text}"
        found.setdefault(old, []).append(Problem(show(old, original), text))
    wrong, noun = sum(map(bool, found.values())), "setting" if len(found) == 1 else "settings"
    headline = f"{wrong} of {len(found)} {noun} cannot be used; nothing was started."
    raise_problems(SettingsError, headline, [one for problems in found.values() for one in problems])


SettingsSource = Mapping[str, Any] | str | os.PathLike[str] | Settings | TrainingArguments
"""What `Settings.of` reads; a path is that of a YAML or JSON file."""

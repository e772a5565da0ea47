"""Explanation: what was found out about settings, as a page and as data."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hfbridge.errors import Problem, describe_problems
from hfbridge.explain.differences import Difference
from hfbridge.settings import Plan, StrategyChoice
from hfbridge.settings.fields import RULES

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Open:
    """A setting whose value a script finds out when it runs.

    Attributes:
        name: of the setting; empty where not even that is known.
        expression: what stands in the script.
        line: where.
    """

    name: str
    expression: str
    line: int

    @property
    def home(self) -> str:
        """The part of hfbridge, or the argument of Lightning, that gets the value."""
        return RULES[self.name].home if self.name in RULES else ""


@dataclass(frozen=True, slots=True)
class Explained:
    """What was found out about one set of settings.

    Attributes:
        where: the file, or the line of a script.
        plan: what becomes of the settings that are not refused; `None` if nothing does.
        refused: what is not carried out.
        differences: what the native Trainer does that its settings do not say.
        notes: what else one should know.
        open: values that are known when the script runs.
    """

    where: str
    plan: Plan | None
    refused: tuple[Problem, ...] = ()
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()
    open: tuple[Open, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Give the same as plain data; tokens are hidden."""
        return {
            "where": self.where,
            "refused": [_problem(problem) for problem in self.refused],
            "settings": [] if self.plan is None else [_row(row) for row in self.plan.rows],
            "trainer": {} if self.plan is None else _plain(self.plan.trainer_arguments),
            "strategy": None if self.plan is None else _strategy(self.plan.strategy),
            "differences": [
                {"about": list(found.about), "text": found.text, "alike": found.is_alike}
                for found in self.differences
            ],
            "notes": list(self.notes),
            "open": [
                {"setting": one.name, "expression": one.expression, "line": one.line, "becomes": one.home}
                for one in self.open
            ],
        }

    def lines(self) -> Iterator[str]:
        """Lay it out for a page of 100 columns."""
        yield self.where
        if self.refused:
            yield from ("", "refused", describe_problems(self.refused))
        if self.plan is not None:
            yield from ("", str(self.plan))
        if self.open:
            yield from ("", "known when it runs")
            for one in self.open:
                text = f"{one.name or '**'} = {one.expression} (line {one.line})"
                yield from _wrapped(f"{text} -> {one.home}" if one.home else text)
        others = [note for note in self.notes if self.plan is None or note not in self.plan.notes]
        if others:
            yield from ("", "besides")
            for note in others:
                yield from _wrapped(note)
        for headline, is_alike in (
            ("differs from the native Trainer", False),
            ("as natively, and easily overlooked", True),
        ):
            listed = [found for found in self.differences if found.is_alike == is_alike]
            yield from ("", headline) if listed else ()
            for found in listed:
                yield from _wrapped(f"{', '.join(found.about)}: {found.text}" if found.about else found.text)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was found out about settings, a file of them or a script; `str` of it is a page.

    Attributes:
        source: what was asked about.
        parts: one for each set of settings in it.
        overridden: methods of transformers' Trainer that a script replaces, and Lightning would not call.
    """

    source: str
    parts: tuple[Explained, ...]
    overridden: tuple[Problem, ...] = ()

    @property
    def refused(self) -> tuple[Problem, ...]:
        """Everything that is not carried out."""
        return (*(problem for part in self.parts for problem in part.refused), *self.overridden)

    def as_dict(self) -> dict[str, Any]:
        """Give the same as plain data; tokens are hidden."""
        return {
            "source": self.source,
            "is_refused": bool(self.refused),
            "parts": [part.as_dict() for part in self.parts],
            "overridden": [_problem(problem) for problem in self.overridden],
        }

    def __str__(self) -> str:
        """Lay everything out for a page of 100 columns."""
        lines: list[str] = []
        for part in self.parts:
            lines += ["", *part.lines()] if lines else part.lines()
        if self.overridden:
            lines += ["", "replaced methods, refused by from_trainer and `hfbridge run`"]
            lines += [describe_problems(self.overridden)]
        count = len(self.refused)
        total = "Nothing is refused." if not count else f"{count} refused."
        return "\n".join([*lines, "", f"{total} Nothing was loaded."])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _problem(problem: Problem) -> dict[str, str]:
    return {"subject": problem.subject, "text": problem.text}


def _row(row: Any) -> dict[str, Any]:
    is_secret = row.field.endswith("_token") and row.value is not None
    return {
        "setting": row.field,
        "value": "<hidden>" if is_secret else _plain(row.value),
        "becomes": row.home,
        "note": row.note,
    }


def _strategy(choice: StrategyChoice) -> dict[str, Any]:
    return {"kind": choice.kind, "options": _plain(choice.options)}


def _plain(value: Any) -> Any:
    """Make a value what JSON can hold: objects by the name of their class."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value) if type(value).__module__ in ("datetime", "pathlib") else type(value).__name__

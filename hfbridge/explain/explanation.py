"""Explanation: what was found out about settings, as a page and as data."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hfbridge.errors import Problem, describe_problems
from hfbridge.explain.differences import Difference
from hfbridge.settings import Plan
from hfbridge.settings.fields import is_same
from hfbridge.settings.plan import NEVER

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Explained:
    """What was found out about one set of settings.

    Attributes:
        where: the file, or what else holds the settings.
        plan: what becomes of the settings that are not refused; `None` if nothing does.
        refused: what is not carried out.
        differences: what the native Trainer does that its settings do not say.
        notes: what else one should know.
    """

    where: str
    plan: Plan | None
    refused: tuple[Problem, ...] = ()
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Give the same as plain data; tokens are hidden."""
        return {
            "where": self.where,
            "refused": [_problem(problem) for problem in self.refused],
            "differences": [
                {"about": list(found.about), "text": found.text, "alike": found.is_alike}
                for found in self.differences
            ],
            "settings": [] if self.plan is None else [_row(row) for row in self.plan.rows],
            "trainer": {} if self.plan is None else _arguments(self.plan),
            "undecided": [] if self.plan is None else list(self.plan.undecided),
            "strategy": None if self.plan is None else _strategy(self.plan),
            "notes": list(self.notes),
        }

    def lines(self) -> Iterator[str]:
        """Lay it out for a page of 100 columns: what matters most comes first."""
        yield self.where
        if self.refused:
            yield from ("", "refused", describe_problems(self.refused))
        yield from self._told("differs from the native Trainer", is_alike=False)
        if self.plan is not None and self.plan.rows:
            yield from ("", *self.plan.table())
        yield from self._told("as natively, and easily overlooked", is_alike=True)
        rows = "\n".join(row.note for row in self.plan.rows) if self.plan is not None else ""
        others = [note for note in self.notes if note not in rows]
        yield from ("", "besides") if others else ()
        for note in others:
            yield from _wrapped(note)
        if self.plan is not None:
            yield from ("", "lightning.Trainer is given", *self.plan.arguments())

    def _told(self, headline: str, *, is_alike: bool) -> Iterator[str]:
        listed = [found for found in self.differences if found.is_alike == is_alike]
        yield from ("", headline) if listed else ()
        for found in listed:
            yield from _wrapped(f"{', '.join(found.about)}: {found.text}" if found.about else found.text)


@dataclass(frozen=True, slots=True)
class Overridden:
    """A method or attribute of `transformers.Trainer` that a subclass, or the object, overrides.

    Attributes:
        name: of the method or attribute; "args" is the settings.
        where: how the user wrote it: ``WeightedTrainer.compute_loss``.
        becomes: it is called, or read if it is no method, when the HF Trainer does so; or it is refused.
        reason: why it is refused; empty if it is not.
    """

    name: str
    where: str
    becomes: Literal["called", "read", "refused"]
    reason: str = ""

    def __str__(self) -> str:
        """Say what becomes of it."""
        return f"{self.where}: {self.becomes}{f': {self.reason}' if self.reason else ''}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was found out about settings, or about the run of a script; `str` of it is a page.

    Attributes:
        source: what was asked about.
        parts: one for each set of settings in it.
        overridden: what the Trainer of a script overrides.
        ending: how far it went.
    """

    source: str
    parts: tuple[Explained, ...]
    overridden: tuple[Overridden, ...] = ()
    ending: str = "Nothing was loaded."

    @property
    def refused(self) -> tuple[Problem, ...]:
        """Everything that is not carried out."""
        overridden = (Problem(one.where, one.reason) for one in self.overridden if one.becomes == "refused")
        return (*(problem for part in self.parts for problem in part.refused), *overridden)

    def as_dict(self) -> dict[str, Any]:
        """Give the same as plain data; tokens are hidden."""
        return {
            "source": self.source,
            "is_refused": bool(self.refused),
            "parts": [part.as_dict() for part in self.parts],
            "overridden": [asdict(one) for one in self.overridden],
        }

    def __str__(self) -> str:
        """Lay everything out for a page of 100 columns."""
        lines: list[str] = []
        for part in self.parts:
            lines += ["", *part.lines()] if lines else part.lines()
        if self.overridden:
            lines += ["", "overridden", *(line for one in self.overridden for line in _wrapped(str(one)))]
        count = len(self.refused)
        total = f"{count} refused." if count else "Nothing is refused."
        return "\n".join([*lines, "", f"{total} {self.ending}"])


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


def _arguments(plan: Plan) -> dict[str, Any]:
    """Give the arguments of Lightning as data; epochs that never come are "never"."""
    never = {name for name, value in plan.trainer_arguments.items() if is_same(value, NEVER)}
    return {
        name: "never" if name in never else _plain(value) for name, value in plan.trainer_arguments.items()
    }


def _strategy(plan: Plan) -> dict[str, Any] | None:
    """Give the strategy as data; `None` if it is made when the config runs."""
    if "strategy" in plan.undecided:
        return None
    return {"kind": plan.strategy.kind, "options": _plain(plan.strategy.options)}


def _plain(value: Any) -> Any:
    """Make a value what JSON can hold: objects by the name of their class."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value) if type(value).__module__ in ("datetime", "pathlib") else type(value).__name__

"""Explanation: what was found out about settings, as a page and as data."""

import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hfbridge.errors import Problem, describe_problems
from hfbridge.explain.differences import Difference
from hfbridge.settings import UNDECIDED, Plan
from hfbridge.settings.fields import RULES, is_same
from hfbridge.settings.plan import NEVER
from hfbridge.settings.undecided import OF_STRATEGIES

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Open:
    """A setting whose value a script finds out when it runs.

    Attributes:
        name: of the setting, or `Trainer(devices=)`; empty where not even that is known.
        expression: what stands in the script.
        line: where.
        default: the value unless the command line says otherwise, and how the script writes it; `None` if
            there is none, or it cannot be read.
    """

    name: str
    expression: str
    line: int
    default: tuple[Any, str] | None = None

    @property
    def home(self) -> str:
        """What uses the value, or the argument of Lightning that gets it."""
        return RULES[self.name].home if self.name in RULES else ""

    def __str__(self) -> str:
        """Say what stands in the script, and where the value goes."""
        text = f"{self.name or '**'} = {self.expression} (line {self.line})"
        if self.default is not None:
            text += f", {self.default[1]} unless the command line says otherwise"
        return f"{text} -> {self.home}" if self.home else text


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
        is_by_command_line: whether the command line says all settings, so that nothing could be checked.
    """

    where: str
    plan: Plan | None
    refused: tuple[Problem, ...] = ()
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()
    open: tuple[Open, ...] = ()
    is_by_command_line: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Give the same as plain data; tokens are hidden."""
        return {
            "where": self.where,
            "is_by_command_line": self.is_by_command_line,
            "refused": [_problem(problem) for problem in self.refused],
            "differences": [
                {"about": list(found.about), "text": found.text, "alike": found.is_alike}
                for found in self.differences
            ],
            "settings": [] if self.plan is None else [_row(row) for row in self.plan.rows],
            "open": [_open(one) for one in self.open],
            "trainer": {} if self.plan is None else _arguments(self.plan),
            "undecided": {} if self.plan is None else _plain(self.plan.undecided),
            "strategy": None if self.plan is None else _strategy(self.plan),
            "notes": list(self.notes),
        }

    def lines(self, source: str) -> Iterator[str]:
        """Lay it out for a page of 100 columns: what matters most comes first.

        Args:
            source: what was asked about, to show how to ask again.
        """
        yield self.where
        if self.is_by_command_line:
            yield from _by_command_line(source)
        if self.refused:
            yield from ("", "refused", describe_problems(self.refused))
        yield from self._told("differs from the native Trainer", is_alike=False)
        if self.plan is not None and self.plan.rows:
            yield from ("", *self.plan.table())
        if self.open:
            yield from ("", f"{UNDECIDED}; what depends on it is judged then")
            for one in self.open:
                yield from _wrapped(str(one))
        yield from self._told("as natively, and easily overlooked", is_alike=True)
        rows = "\n".join(row.note for row in self.plan.rows) if self.plan is not None else ""
        others = [note for note in self.notes if note not in rows]
        yield from ("", "besides") if others else ()
        for note in others:
            yield from _wrapped(note)
        if self.plan is not None and not self.is_by_command_line:
            yield from ("", "lightning.Trainer is given", *self.plan.arguments())

    def _told(self, headline: str, *, is_alike: bool) -> Iterator[str]:
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
        if self.overridden:
            lines += [self.source, "", "overridden: from_trainer refuses it, `hfbridge run` calls it"]
            lines += [describe_problems(self.overridden)]
        for part in self.parts:
            lines += ["", *part.lines(self.source)] if lines else part.lines(self.source)
        return "\n".join([*lines, "", f"{self._total()} Nothing was loaded."])

    def _total(self) -> str:
        """Say in a sentence what was found, and of how much."""
        count = len(self.refused)
        if not count and self.parts and all(part.is_by_command_line for part in self.parts):
            return "No setting could be checked."
        total = f"{count} refused" if count else "Nothing is refused"
        is_open = any(part.open or part.is_by_command_line for part in self.parts)
        return f"{total} of what is known before it runs." if is_open else f"{total}."


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


def _open(one: Open) -> dict[str, Any]:
    found = {"setting": one.name, "expression": one.expression, "line": one.line, "becomes": one.home}
    return found if one.default is None else {**found, "default": _plain(one.default[0])}


def _arguments(plan: Plan) -> dict[str, Any]:
    """Give the arguments of Lightning as data; epochs that never come are "never"."""
    never = {name for name, value in plan.trainer_arguments.items() if is_same(value, NEVER)}
    return {
        name: "never" if name in never else _plain(value) for name, value in plan.trainer_arguments.items()
    }


def _strategy(plan: Plan) -> dict[str, Any] | None:
    """Give the strategy as data, without options whose settings nobody knows yet."""
    if "strategy" in plan.undecided:
        return None
    choice, undecided = plan.strategy, plan.settings.undecided
    if not undecided.isdisjoint(OF_STRATEGIES):
        return {"kind": choice.kind}
    sources = {"timeout": "ddp_timeout", "process_group_backend": "ddp_backend", "on_cpu": "use_cpu"}
    options = {
        name: value
        for name, value in choice.options.items()
        if undecided.isdisjoint({sources.get(name, f"ddp_{name}")})
    }
    return {"kind": choice.kind, "options": _plain(options)}


def _by_command_line(source: str) -> Iterator[str]:
    """Say that nothing could be checked, and how it can be."""
    yield "  The settings come from the command line, so nothing could be checked. To check, give them:"
    yield f"    hfbridge explain {shlex.quote(source)} -- --output_dir out --learning_rate 1e-4"
    yield "    hfbridge explain settings.yaml"


def _plain(value: Any) -> Any:
    """Make a value what JSON can hold: objects by the name of their class."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value) if type(value).__module__ in ("datetime", "pathlib") else type(value).__name__

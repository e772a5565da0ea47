"""What a run is going to do, as a value and as a page to read."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from hfbridge.settings.fields import show
from hfbridge.settings.settings import Settings
from hfbridge.settings.strategies import StrategyChoice

NEVER = 2**62
"""Epochs between Lightning's own validation runs."""

_PAGE_WIDTH, _VALUE_WIDTH = 100, 30


@dataclass(frozen=True, slots=True)
class Row:
    """Where one setting goes.

    Attributes:
        field: the setting.
        value: its value.
        home: the part of hfbridge, or the argument of Lightning, that gets it.
        note: what one should know about it, or empty.
    """

    field: str
    value: object
    home: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is going to do; `str` of it is a page of 100 columns.

    Attributes:
        settings: the settings, with what Lightning arguments said taken over.
        trainer_arguments: keyword arguments for `lightning.Trainer`.
        rows: where each setting goes that was given, or whose default is not carried as it is.
        notes: what was decided on the way.
        strategy: by which strategy the ranks share the work.
    """

    settings: Settings
    trainer_arguments: Mapping[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    strategy: StrategyChoice

    def __str__(self) -> str:
        """Lay out the settings, each with its note below it, then Lightning's arguments, then other notes."""
        lines = list(_table(self.rows))
        lines += ["", "lightning.Trainer"]
        for name, value in self.trainer_arguments.items():
            lines += _wrap(f"{name} = {_argument(value)}", indent=2)
        shown = "\n".join(row.note for row in self.rows)
        others = [note for note in self.notes if note not in shown]
        lines += ["", "notes"] if others else []
        for note in others:
            lines += _wrap(note, indent=2)
        return "\n".join(lines)


def _table(rows: Iterable[Row]) -> Iterator[str]:
    """Lay out three columns; long values and homes go on below, and a note has lines of its own."""
    cells = [("setting", "value", "goes to", "")]
    for row in rows:
        cells.append((row.field, show(row.field, row.value).partition(" = ")[2], row.home, row.note))
    names = max(len(line[0]) for line in cells)
    values = max(min(len(line[1]), _VALUE_WIDTH) for line in cells)
    homes = _PAGE_WIDTH - names - values - 4
    for name, value, home, note in cells:
        columns = ([name], textwrap.wrap(value, values) or [""], textwrap.wrap(home, homes))
        for first, second, third in zip_longest(*columns, fillvalue=""):
            yield f"{first:<{names}}  {second:<{values}}  {third}".rstrip()
        if note:
            yield from _wrap(f"note: {note}", indent=4)


def _wrap(text: str, *, indent: int) -> list[str]:
    """Wrap a text to the page; lines after the first are indented further."""
    return textwrap.wrap(
        text,
        _PAGE_WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_on_hyphens=False,
    )


def _argument(value: object) -> str:
    """Write an argument of Lightning: objects by their class, the epochs that never come as never."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_argument, value))}]"
    if value == NEVER and not isinstance(value, bool):
        return f"{NEVER} (never)"
    is_plain = value is None or isinstance(value, str | int | float)
    return show("", value).partition(" = ")[2] if is_plain else type(value).__name__

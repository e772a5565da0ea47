"""What a run is going to do, as a value and as a page to read."""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

from hfbridge.settings.rules import is_same, show
from hfbridge.settings.settings import Settings
from hfbridge.settings.strategy_choice import StrategyChoice

NEVER = 2**62
"""Epochs between Lightning's own validation runs."""

UNDECIDED = "known when it runs"
"""Shown for an argument whose value is not known yet."""

_PAGE_WIDTH, _VALUE_WIDTH = 100, 30

# Why an argument for Lightning has its value, where that does not look like the settings.
_WHY: Mapping[str, tuple[object, str]] = {
    "max_epochs": (-1, "no limit: max_steps ends the run"),
    "max_steps": (-1, "no limit: the epochs end the run"),
    "num_sanity_val_steps": (0, "the HF Trainer has no sanity check"),
    "inference_mode": (False, "evaluation runs under torch.no_grad, as in the HF Trainer"),
    "precision": ("32-true", "bf16=True casts in the model's forward, as in the HF Trainer"),
    "gradient_clip_val": (None, "max_grad_norm=0 does not clip"),
    "check_val_every_n_epoch": (NEVER, "eval_strategy sets when to evaluate"),
    "logger": (False, "report_to sets where to log; pass a logger of Lightning's to log there, too"),
    "enable_checkpointing": (False, "save_strategy sets when to save; pass a ModelCheckpoint to use it, too"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """Where one setting goes.

    Attributes:
        field: the setting.
        value: its value.
        used_by: what uses the value, or the argument of Lightning that gets it.
        note: may be empty.
    """

    field: str
    value: object
    used_by: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is going to do; `str` of it is a page of 100 columns.

    Attributes:
        settings: the settings, with the Trainer's arguments that mean the same.
        trainer_arguments: keyword arguments for `lightning.Trainer`.
        rows: of each setting that was passed, or whose default has a note.
        notes: what was decided on the way.
        strategy: by which strategy the ranks share the work.
        undecided: arguments for `lightning.Trainer` that are known only when it runs.
        has_settings: the user passed settings; without any, Lightning's defaults apply.
        validates: the Trainer's arguments set when to validate, not `eval_strategy`.
        passed: the arguments of the Trainer as the user passed them.
    """

    settings: Settings
    trainer_arguments: Mapping[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    strategy: StrategyChoice
    undecided: tuple[str, ...] = ()
    has_settings: bool = True
    validates: bool = False
    passed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __str__(self) -> str:
        lines = [*self.table(), "", "lightning.Trainer", *self.arguments()]
        shown = "\n".join(row.note for row in self.rows)
        others = [note for note in self.notes if note not in shown]
        lines += ["", "notes"] if others else []
        for note in others:
            lines += _wrap(note, indent=2)
        return "\n".join(lines)

    def table(self) -> Iterator[str]:
        """Lay out the settings in three columns, each with its note below it."""
        cells = [("setting", "value", "goes to", "")]
        for row in self.rows:
            shown = show(row.field, row.value).partition(" = ")[2]
            cells.append((row.field, shown, row.used_by, row.note))
        names = max(len(line[0]) for line in cells)
        values = max(min(len(line[1]), _VALUE_WIDTH) for line in cells)
        users = _PAGE_WIDTH - names - values - 4
        for name, value, used_by, note in cells:
            columns = ([name], textwrap.wrap(value, values) or [""], textwrap.wrap(used_by, users))
            for first, second, third in zip_longest(*columns, fillvalue=""):
                yield f"{first:<{names}}  {second:<{values}}  {third}".rstrip()
            if note:
                yield from _wrap(f"note: {note}", indent=4)

    def arguments(self) -> Iterator[str]:
        """Lay out the arguments for `lightning.Trainer`, with a reason where a value needs one."""
        for name, value in self.trainer_arguments.items():
            yield from _wrap(f"{name} = {_argument(name, value)}", indent=2)
        for name in self.undecided:
            yield from _wrap(f"{name}: {UNDECIDED}", indent=2)


def _wrap(text: str, *, indent: int) -> list[str]:
    return textwrap.wrap(
        text,
        _PAGE_WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_on_hyphens=False,
    )


def _argument(name: str, value: object) -> str:
    """Write an argument of Lightning, objects by their class, and why it has that value."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument('', entry) for entry in value)}]"
    is_plain = value is None or isinstance(value, str | int | float)
    text = show("", value).partition(" = ")[2] if is_plain else type(value).__name__
    usual, why = _WHY.get(name, (value, ""))
    if not why or not is_same(value, usual):
        return text
    return f"{'never' if value == NEVER else text} ({why})"

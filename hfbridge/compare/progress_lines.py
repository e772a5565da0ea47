"""How far the engines of a comparison are: bars on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

EVERY_S = 30.0
"""Between two lines on an engine that trains."""


class Progress(Protocol):
    """Progress of one engine."""

    def begin(self) -> None:
        """Show that its processes are started."""

    def show(self, done: int, total: int | None) -> None:
        """Show the completed steps, and the total once it is known."""

    def end(self, text: str) -> None:
        """Show how it has ended."""


@contextmanager
def progress_of(engines: Sequence[str], *, is_shown: bool) -> Iterator[Sequence[Progress]]:
    """Show each engine's progress: on a terminal by a bar, elsewhere by lines without escape codes.

    Args:
        engines: their names.
        is_shown: whether anything is shown at all.

    Proved by: tests/compare/test_progress.py
    """
    if not is_shown or not sys.stderr.isatty():
        total = len(engines)
        yield [_Lines(f"{name} ({n} of {total})", is_shown=is_shown) for n, name in enumerate(engines, 1)]
        return
    width = max(len(name) for name in engines)
    bars = [_Bar(f"{name:{width}}", position) for position, name in enumerate(engines)]
    try:
        yield bars
    finally:
        for bar in bars:
            bar.close()


class _Lines:
    def __init__(self, name: str, *, is_shown: bool) -> None:
        self._name, self._is_shown = name, is_shown
        self._done = 0
        self._written_s: float | None = None  # what was recorded before never begins

    def begin(self) -> None:
        self._write("begins")

    def show(self, done: int, total: int | None) -> None:
        is_due = self._written_s is not None and time.monotonic() - self._written_s >= EVERY_S
        if is_due and done != self._done:
            self._done = done
            self._write(f"step {done}" if total is None else f"step {done} of {total}")

    def end(self, text: str) -> None:
        self._write(text)

    def _write(self, text: str) -> None:
        self._written_s = time.monotonic()
        if self._is_shown:
            sys.stderr.write(f"{self._name}: {text}\n")
            sys.stderr.flush()


class _Bar:
    def __init__(self, description: str, position: int) -> None:
        self._bar: Any = Tqdm(
            desc=description,
            position=position,
            total=None,
            unit="step",
            dynamic_ncols=True,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar}|{postfix}",
            postfix="waits",
        )

    def begin(self) -> None:
        self._bar.set_postfix_str("starts")

    def show(self, done: int, total: int | None) -> None:
        """Update the bar; tqdm decides when to draw."""
        if total is not None and self._bar.total != total:
            self._bar.reset(total)
            self._bar.set_postfix_str("trains", refresh=False)
        self._bar.update(done - self._bar.n)

    def end(self, text: str) -> None:
        self._bar.total = self._bar.total or self._bar.n
        self._bar.set_postfix_str(text)

    def close(self) -> None:
        self._bar.close()

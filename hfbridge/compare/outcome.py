"""The result of a comparison, and its text for a terminal."""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfbridge.compare.engines import Engine
from hfbridge.compare.report.panels import seconds_as_text
from hfbridge.compare.report.summary import QUANTITIES, sentence_of, too_few
from hfbridge.compare.verdict import Verdict

_AGREE = ("exact", "close", "same trajectory")
_LINES_OF_ERROR = 8
_COLUMNS = ("steps", "samples/s", "start-up", "training", "in all", "peak MiB")


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison; `str` of it is a page for a terminal.

    Attributes:
        folder: where its files are; files.py has the table.
        engines: in the order in which they were given.
        verdicts: on each engine beside the first; then on each Lightning engine beside "native" with the same
            strategy, where that is another.
        results: the `done.json` of each engine that finished, by its name.
        failures: the last lines of each engine that did not.
    """

    folder: Path
    engines: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    results: dict[str, dict[str, Any]]
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether all engines agree, to the bit or within the stated tolerance."""
        return all(verdict.grade in _AGREE for verdict in self.verdicts)

    def __str__(self) -> str:
        """Lay out the verdict in a sentence, what the engines took, their errors, and the verdicts."""
        return "\n".join([self._sentence(), "", *self._table(), *self._errors(), *self._verdicts()])

    def _sentence(self) -> str:
        return sentence_of(
            self.verdicts,
            reference=self.engines[0],
            failed=list(self.failures),
            steps=max((result["steps_done"] for result in self.results.values()), default=None),
        )

    def _table(self) -> Iterator[str]:
        rows = {name: _row(self.results.get(name)) for name in self.engines}
        finished = [row for row in rows.values() if len(row) == len(_COLUMNS)]
        widths = [max(map(len, column)) for column in zip(_COLUMNS, *finished, strict=True)]
        first = max(map(len, self.engines))
        for name, row in {"": _COLUMNS, **rows}.items():
            cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=False))
            yield "  ".join([name.ljust(first), *(cells if len(row) > 1 else row)])
        few = [result["steps_done"] for result in self.results.values() if too_few(result["steps_done"])]
        if few:
            yield f"{too_few(min(few)).capitalize()}."

    def _errors(self) -> Iterator[str]:
        for name, text in self.failures.items():
            path = self.folder / Engine.parse(name).slug / "output.txt"
            yield ""
            yield f"{name} has failed; all that it has written is in {path}, and its error ends with:"
            yield textwrap.indent("\n".join(text.splitlines()[-_LINES_OF_ERROR:]), "  ")

    def _verdicts(self) -> Iterator[str]:
        for verdict in self.verdicts:
            yield ""
            yield f"{verdict.ours} beside {verdict.theirs}: {verdict.grade}"
            yield f"  {verdict.why}"
            if verdict.cause is not None:
                yield f"  Likely cause: {verdict.cause}."
            largest = {QUANTITIES.get(name, name): value for name, value in verdict.largest.items()}
            shown = [f"{name} {value:.1e}" for name, value in largest.items() if value]
            if shown:
                yield f"  Largest relative differences: {', '.join(shown)}."


def _row(result: Mapping[str, Any] | None) -> tuple[str, ...]:
    if result is None:
        return ("failed",)
    steps = result["steps_done"]
    startup_s, training_s = result["seconds_startup"], result["seconds_training"]
    return (
        str(steps),
        "n/a" if too_few(steps) else f"{result['samples_per_second']:.1f}",
        seconds_as_text(startup_s),
        seconds_as_text(training_s),
        seconds_as_text(result.get("seconds_in_all", startup_s + training_s)),
        f"{result['peak_memory_bytes'] / 2**20:.0f}",
    )

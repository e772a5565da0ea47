"""The report: one HTML page that needs nothing else, and its figures as PNG files beside it.

| file | what it shows |
| --- | --- |
| `report.html` | everything, the figures inside as SVG in two sizes |
| `loss.png`, `grad_norm.png`, `learning_rate.png` | the engines' curves over each other |
| `metrics.png` | a panel for each metric of the evaluations |
| `differences.png` | relative differences to the first engine, by powers of ten |
| `speed.png` | samples per second, and how long steps took |
| `memory.png` | memory at its fullest, and by step |

What comes from the files is text, never markup: jinja2 escapes it, and matplotlib in the figures.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hfbridge.compare.engines import slug_of
from hfbridge.compare.report import draw, panels, summary
from hfbridge.compare.report.recorded import Recorded, read_comparison
from hfbridge.compare.report.theme import MARKER_PATHS, TONES, Stroke, stroke_of, style_variables
from hfbridge.compare.verdict import Verdict
from hfbridge.utilities.imports import require


def write_report(folder: Path) -> Path:
    """Write the report of a comparison into its folder.

    Nothing is written before all of it has been made. Files of an earlier report are replaced.

    Args:
        folder: the `--out` of a comparison, with its `comparison.json`.

    Returns:
        Path of the page, `report.html`; the figures are PNG files beside it.

    Raises:
        ReportError: files of the comparison are missing, damaged or of another form; all are named.
        MissingDependencyError: jinja2 or matplotlib is not installed.

    Proved by: tests/compare/test_report.py
    """
    folder = Path(folder)
    jinja2 = require("jinja2", extra="report", for_="the report of a comparison")
    recorded = read_comparison(folder)
    costs = summary.costs(recorded)
    figures = panels.figures(recorded, costs)
    drawn = draw.draw_all(figures)
    pictures = {
        figure.name: [
            Picture(panel.title, panel.text, wide, narrow)
            for panel, (wide, narrow) in zip(figure.panels, drawn[figure.name].panels, strict=True)
        ]
        for figure in figures
    }
    page = render(jinja2, recorded, costs, pictures)
    for name, figure in drawn.items():
        (folder / f"{name}.png").write_bytes(figure.png)
    path = folder / "report.html"
    # JSON may hold halves of surrogate pairs, which are no text.
    path.write_text(page, encoding="utf-8", errors="backslashreplace", newline="\n")
    return path


@dataclass(frozen=True)
class Picture:
    """A panel on the page: its title, the same in words, and the drawing in two sizes."""

    title: str
    text: str
    wide: str
    narrow: str


def render(
    jinja2: Any,
    recorded: Recorded,
    costs: Sequence[summary.Cost],
    pictures: dict[str, list[Picture]],
) -> str:
    """Return the page as text."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        exactly=exactly,
        relative=relative,
        seconds=lambda value: missing(value, panels.seconds_as_text),
        mib=lambda value: missing(value, panels.bytes_as_text),
        ratio=lambda value: missing(value, "{:.3f}".format),
        count=lambda value: missing(value, "{:,.4g}".format),
        tone=TONES.__getitem__,
        breakable=lambda name: breakable(jinja2, name),
        named=lambda quantity: summary.QUANTITIES.get(quantity, quantity),
    )
    home = files("hfbridge.compare.report")
    template = environment.from_string(home.joinpath("page.html").read_text(encoding="utf-8"))
    page: str = template.render(
        style=style_variables() + home.joinpath("page.css").read_text(encoding="utf-8"),
        pictures=pictures,
        costs=costs,
        too_few=summary.few_steps(costs),
        recorded=recorded,
        is_thinned=any(len(run.steps) > min(draw.POINTS.values()) for run in recorded.runs),
        points=draw.POINTS[draw.WIDE],
        fewer_points=draw.POINTS[draw.NARROW],
        left_out=summary.metric_names(recorded.runs)[panels.MOST_METRICS :],
        **_findings(recorded, costs),
    )
    return page


def _findings(recorded: Recorded, costs: Sequence[summary.Cost]) -> dict[str, Any]:
    """Collect what the page's texts and tables say, by the names that its template has for it."""
    reference, *others = recorded.runs
    engines = [run.engine for run in recorded.runs]
    configured = summary.engines_with_settings(recorded)
    settings = summary.setting_rows(recorded, configured)
    agreements = [
        (run, {one.quantity: one for one in summary.agreement(reference, run)}) for run in others if run.steps
    ]
    steps = recorded.steps or max(len(run.steps) for run in recorded.runs)
    facts = {
        "Fastest": summary.fastest(costs, reference.engine),
        "Compared with": reference.engine,
        "Engines": str(len(engines)),
        "Ranks": str(recorded.ranks),
        "Optimizer steps": f"{steps:,}",
        "Date": recorded.date,
    }
    return {
        "reference": reference.engine,
        "engines": engines,
        "strokes": {engine: _strokes(place) for place, engine in enumerate(engines)},
        "headline": summary.headline(recorded),
        "grade": summary.worst_grade(recorded.verdicts),
        "facts": [(name, value) for name, value in facts.items() if value],
        "verdicts": [(verdict, largest_of(verdict)) for verdict in recorded.verdicts],
        "quantities": [name for name in summary.QUANTITIES if any(name in found for _, found in agreements)],
        "agreements": agreements,
        "has_marks": bool(panels.marks(recorded)),
        "failures": [(run, f"{slug_of(run.engine)}/output.txt") for run in recorded.runs if run.done is None],
        "configured": configured,
        "unequal": [row for row in settings if row.differs],
        "equal": [row for row in settings if not row.differs],
        "notes": summary.notes(recorded.runs),
        "environment": environment_rows(recorded.environment),
    }


def _strokes(place: int) -> tuple[Stroke, str, str]:
    """Return an engine's stroke, and its dashes and marker as SVG has them."""
    stroke = stroke_of(place)
    return stroke, " ".join(f"{length:g}" for length in stroke.dashes), MARKER_PATHS[stroke.marker]


def largest_of(verdict: Verdict) -> list[tuple[str, str]]:
    """Return the largest relative differences that are not 0, by the page's names of the quantities."""
    named = ((summary.QUANTITIES.get(name, name), value) for name, value in verdict.largest.items())
    return [(name, relative(value)) for name, value in named if value != 0]


def breakable(jinja2: Any, name: str) -> Any:
    """Return a name that may be broken after a colon or slash: markup, with the name's own text escaped."""
    escaped = jinja2.filters.do_forceescape(name)
    return type(escaped)(str(escaped).replace(":", ":<wbr>").replace("/", "/<wbr>"))


def missing(value: float | None, show: Any) -> str:
    """Return a value, or "n/a" where there is none."""
    return "n/a" if value is None else str(show(value))


def exactly(value: Any) -> str:
    """Return a number with all its digits, the beginning of a checksum; "n/a" where there is none."""
    text = "n/a" if value is None else value if isinstance(value, str) else repr(value)
    return text if len(text) <= 24 else f"{text[:16]}..."


def relative(value: float | None) -> str:
    """Return a relative difference; "n/a" where there is none."""
    if value is None:
        return "n/a"
    return f"{value:.2g}" if value == 0 or value >= 0.001 else f"{value:.1e}"


def environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names and values, those of `versions` last and one by one."""
    found: dict[tuple[str, str], None] = {}
    for name, value in sorted(environment.items(), key=lambda item: isinstance(item[1], dict)):
        for key, one in value.items() if isinstance(value, dict) else [(name, value)]:
            text = one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)
            found[str(key), text] = None
    return list(found)

"""Figures drawn by matplotlib, in the colours of the theme: as PNG, and as SVG for a page of either scheme.

No pyplot, and no setting of matplotlib is left changed.
"""

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from hfbridge.compare.report.panels import Bars, Boxes, Curves, Distances, Figure, Panel
from hfbridge.compare.report.summary import thin
from hfbridge.compare.report.theme import LIGHT, stroke_of
from hfbridge.optional import require

WIDE, NARROW = (520, 300), (350, 262)
POINTS = {WIDE: 400, NARROW: 240}
_PIXELS_PER_INCH = 72
_SMALL = 11
_RIGHT, _BELOW, _EDGE = 14, 44, 12


def plot_library(name: str) -> Any:
    """A module of matplotlib.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    return require(name, extra="report", for_="the report of a comparison")


@contextmanager
def _house_style() -> Iterator[None]:
    """Draw with the report's sizes and colours, whatever the user's own settings of matplotlib are."""
    matplotlib = plot_library("matplotlib")
    # Names from files are never formulas: a dollar sign is a dollar sign.
    settings = {
        **matplotlib.rcParamsDefault,
        "backend": matplotlib.rcParams["backend"],
        "axes.edgecolor": LIGHT["rule"],
        "axes.facecolor": "none",
        "axes.labelcolor": LIGHT["muted"],
        "axes.labelsize": _SMALL,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": LIGHT["ink"],
        "axes.titlelocation": "left",
        "axes.titlesize": 13,
        "font.size": _SMALL,
        "grid.color": LIGHT["grid"],
        "grid.linewidth": 1,
        "savefig.facecolor": LIGHT["background"],
        "svg.fonttype": "none",
        "svg.hashsalt": "hfbridge",
        "text.color": LIGHT["ink"],
        "text.parse_math": False,
        "xtick.color": LIGHT["rule"],
        "xtick.labelcolor": LIGHT["muted"],
        "ytick.color": LIGHT["rule"],
        "ytick.labelcolor": LIGHT["muted"],
    }
    with matplotlib.rc_context(settings):
        yield


def plain(text: str) -> str:
    """A text with escapes for what the figures' font lacks."""
    return "".join(
        letter if letter.isprintable() and ord(letter) < 0x500 else letter.encode("unicode_escape").decode()
        for letter in text
    )


@dataclass(frozen=True)
class Drawn:
    """A figure as the report has it.

    Attributes:
        png: all panels with titles and legend, on white.
        panels: each panel as an SVG element, wide and narrow, without title and legend, which the page has.
    """

    png: bytes
    panels: list[tuple[str, str]]


def draw_all(figures: Iterable[Figure]) -> dict[str, Drawn]:
    """Draw figures.

    Args:
        figures: what to draw.

    Returns:
        By their names. The same figures give the same bytes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    with _house_style():
        return {
            figure.name: Drawn(
                _as_png(figure),
                [(_as_svg(figure, panel, WIDE), _as_svg(figure, panel, NARROW)) for panel in figure.panels],
            )
            for figure in figures
        }


def _as_png(figure: Figure) -> bytes:
    """All panels of a figure, two in a row."""
    count = max(len(figure.panels), 1)
    columns = min(count, 2)
    per_row = 2 * columns
    top = 19 * math.ceil(len(figure.engines) / per_row) + _EDGE
    drawing, axes = _new(figure, WIDE, count, columns=columns, top=top, title=30, edge=_EDGE)
    for axis, panel in zip(axes, figure.panels, strict=False):
        axis.set_title(plain(panel.title), pad=9, x=-_left(panel) / _inner(WIDE, panel))
        _draw(axis, panel, figure, POINTS[WIDE])
    if not figure.panels:
        _say(axes[0], "No evaluation was recorded.")
    _legend(drawing, figure, per_row)
    written = io.BytesIO()
    drawing.savefig(written, format="png", dpi=2 * _PIXELS_PER_INCH, metadata={"Software": None})
    return written.getvalue()


def _as_svg(figure: Figure, panel: Panel, size: tuple[int, int]) -> str:
    """One panel as an SVG element, in pixels of this size."""
    drawing, (axis,) = _new(replace(figure, panels=[panel]), size, 1)
    _draw(axis, panel, figure, POINTS[size])
    drawing.patch.set_visible(False)
    written = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    drawing.savefig(written, format="svg", metadata=nothing)
    key = hashlib.sha256(f"{figure.name}/{panel.title}/{size}".encode(errors="backslashreplace")).hexdigest()
    return _for_page(written.getvalue(), f"f{key[:8]}-")


def _for_page(svg: str, prefix: str) -> str:
    """Matplotlib's SVG file as an element: ids of its own, variables for colours, the page's fonts."""
    svg = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    # The page says what it is (role, label) on the figure around it.
    opening = f'<svg {view[0]} aria-hidden="true" focusable="false">'
    svg = opening + svg[svg.index(">") + 1 :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    used = dict.fromkeys(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    own = {id_: f"{prefix}{number}" for number, id_ in enumerate(used)}
    svg = re.sub(r' id="([^"]*)"', lambda id_: f' id="{own[id_[1]]}"' if id_[1] in own else "", svg)
    svg = re.sub(r'(href="#|url\(#)([^")]+)', lambda reference: reference[1] + own[reference[2]], svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", svg)
    # A tenth of a pixel is enough for places; sizes of markers and lines are smaller.
    svg = re.sub(r"(\d\d\.\d)\d+", r"\1", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    svg = _USES.sub(_once, svg)
    names = {colour: name for name, colour in LIGHT.items()}
    svg = re.sub(
        r"#[0-9a-f]{6}\b",
        lambda colour: f"var(--{names[colour[0]]})" if colour[0] in names else colour[0],
        svg,
    )
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


# Markers that follow each other, all of one style.
_USES = re.compile(r'<g( clip-path="[^"]*")?>((?:\s*<use [^>]*style="[^"]*"/>)+)\s*</g>')


def _once(match: re.Match[str]) -> str:
    """Say the style of markers once for all."""
    styles = set(re.findall(r' style="([^"]*)"', match[2]))
    if len(styles) > 1:
        return match[0]
    uses = re.sub(r' style="[^"]*"', "", match[2])
    return f'<g{match[1] or ""} style="{styles.pop()}">{uses}</g>'


def _left(panel: Panel) -> int:
    """Pixels at the left for what stands at the axis."""
    return 62 if isinstance(panel, Curves | Distances) else 2


def _inner(size: tuple[int, int], panel: Panel) -> int:
    """Width of a panel's axes."""
    return size[0] - _left(panel) - _RIGHT


def _new(
    figure: Figure,
    size: tuple[int, int],
    count: int,
    *,
    columns: int = 1,
    top: int = 0,
    title: int = 6,
    edge: int = 0,
) -> tuple[Any, list[Any]]:
    """An empty drawing and its axes, at fixed places, so that panels below each other are in line.

    Args:
        figure: what will be drawn.
        size: of each panel in pixels; one with many bars is higher.
        count: how many panels.
        columns: panels in a row.
        top: pixels above all of them.
        title: pixels above each of them.
        edge: pixels beside and below all of them.
    """
    bars = [
        len(panel.bars) if isinstance(panel, Bars) else len(panel.boxes)
        for panel in figure.panels
        if isinstance(panel, Bars | Boxes)
    ]
    high = max(size[1], 40 * max(bars, default=0) + 60)
    width, height = size[0] * columns + 2 * edge, (high + title) * math.ceil(count / columns) + top + edge
    drawing = plot_library("matplotlib.figure").Figure(
        figsize=(width / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH), dpi=_PIXELS_PER_INCH
    )
    axes = []
    for number in range(count):
        row, column = divmod(number, columns)
        panel = figure.panels[number] if figure.panels else None
        left, inner = (_left(panel), _inner(size, panel)) if panel else (0, size[0])
        bottom = height - top - (row + 1) * (high + title) + _BELOW
        place = (
            (edge + column * size[0] + left) / width,
            bottom / height,
            inner / width,
            (high - _BELOW) / height,
        )
        axes.append(drawing.add_axes(place))
    return drawing, axes


def _legend(drawing: Any, figure: Figure, columns: int) -> None:
    """Names of the engines above all panels, in the order of the list."""
    if not figure.engines:
        return
    lines = plot_library("matplotlib.lines")
    is_points = figure.name == "differences"
    handles = [lines.Line2D([], [], **_line(place, is_points=is_points)) for place, _ in figure.engines]
    # A name with an underscore in front would be left out of a legend.
    names = [f"\u200a{plain(name)}" for _, name in figure.engines]
    drawing.legend(
        handles, names, loc="upper left", ncols=columns, frameon=False, handlelength=3.6, borderaxespad=0.8
    )


def _line(place: int, *, is_points: bool) -> dict[str, Any]:
    """How matplotlib draws the line, or the points, of an engine."""
    stroke = stroke_of(place)
    colour = LIGHT[stroke.name]
    if is_points:
        return {
            "color": colour,
            "linestyle": "none",
            "marker": stroke.marker,
            "markersize": 4.5,
            "markeredgewidth": 1 if stroke.marker == "x" else 0,
        }
    # Matplotlib counts dashes in widths of the line.
    dashes = (0, tuple(length / stroke.width for length in stroke.dashes)) if stroke.dashes else "solid"
    return {
        "color": colour,
        "linestyle": dashes,
        "linewidth": stroke.width,
        "solid_capstyle": "round",
        "solid_joinstyle": "round",
        "dash_joinstyle": "round",
    }


def _draw(axis: Any, panel: Panel, figure: Figure, points: int) -> None:
    """Draw one panel."""
    painters: dict[type, Callable[..., None]] = {Curves: _curves, Distances: _distances}
    if isinstance(panel, Curves | Distances):
        if not panel.curves:
            _say(axis, "Nothing was recorded.")
            return
        painters[type(panel)](axis, panel, points)
        _by_step(axis, panel, figure.marks)
    elif isinstance(panel, Bars):
        _bars(axis, panel)
    else:
        _boxes(axis, panel)


def _say(axis: Any, text: str) -> None:
    """A sentence in place of a picture."""
    axis.set_axis_off()
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color=LIGHT["muted"])


def _by_step(axis: Any, panel: Curves | Distances, marks: Sequence[int]) -> None:
    """What all panels by step have: the axis of steps, and where engines begin to differ."""
    ticker = plot_library("matplotlib.ticker")
    first = min(curve.steps[0] for curve in panel.curves)
    last = max(curve.steps[-1] for curve in panel.curves)
    room = max((last - first) * 0.02, 0.5)
    axis.set_xlim(first - room, last + room)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axis.set_xlabel("optimizer step", loc="right")
    axis.grid(axis="y")
    axis.set_axisbelow(True)
    for step in marks[:3]:
        if first <= step <= last:
            axis.axvline(step, color=LIGHT["muted"], linewidth=1, linestyle=(0, (2, 3)), zorder=1.5)
            is_right = step > (first + last) / 2
            axis.annotate(
                f"differs from step {step:,}",
                (step, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-4 if is_right else 4, -2),
                textcoords="offset points",
                ha="right" if is_right else "left",
                va="top",
                color=LIGHT["muted"],
                bbox={"facecolor": LIGHT["background"], "edgecolor": "none", "pad": 1.5, "alpha": 0.8},
            )


def _curves(axis: Any, panel: Curves, points: int) -> None:
    """Lines over each other, each thinner than the one below it."""
    ticker = plot_library("matplotlib.ticker")
    few = panel.has_points or all(len(curve.steps) < 2 for curve in panel.curves)
    for curve in panel.curves:
        steps, values = thin(curve.steps, curve.values, points)
        line = _line(curve.place, is_points=False)
        marked = {"marker": "o", "markersize": line["linewidth"] + 3.5, "markeredgewidth": 0} if few else {}
        axis.plot(steps, values, **line, **marked)
    if panel.is_log:
        axis.set_yscale("log")
    else:
        axis.yaxis.set_major_locator(ticker.MaxNLocator(5))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: number_as_text(value)))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.margins(y=0.1)
    if panel.from_zero:
        axis.set_ylim(0, 1.15 * max(max(curve.values) for curve in panel.curves) or 1)


def number_as_text(value: float) -> str:
    """A number at an axis."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def _distances(axis: Any, panel: Distances, points: int) -> None:
    """Points by powers of ten; below them a strip, with a lane for each engine, for what is equal."""
    found = [value for curve in panel.curves for value in curve.values if value > 0]
    low = math.floor(math.log10(min(found))) if found else 0
    high = max(math.ceil(math.log10(max(found))) if found else 0, low + 2)
    lanes = len(panel.curves)
    lane = min(0.09 * (high - low), 0.3 * (high - low) / lanes)
    top = low - 0.06 * (high - low)
    bottom = top - lane * (lanes + 0.5)
    axis.axhspan(bottom, top, color=LIGHT["band"], linewidth=0, zorder=0)
    for number, curve in enumerate(panel.curves):
        style = _line(curve.place, is_points=True)
        unequal = [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if value > 0]
        equal = [step for step, value in zip(curve.steps, curve.values, strict=True) if value == 0]
        steps, values = thin([step for step, _ in unequal], [value for _, value in unequal], points)
        axis.plot(steps, [math.log10(value) for value in values], **style)
        height = top - lane * (number + 0.75)
        ends = [end for stretch in _stretches(equal, curve.steps, points) for end in (*stretch, math.nan)]
        axis.plot(ends, [height] * len(ends), color=style["color"], linewidth=3.5, solid_capstyle="butt")
    every = max(1, math.ceil((high - low) / 5))
    ticks = list(range(high, low - 1, -every)) if found else []
    axis.set_yticks([*ticks, (bottom + top) / 2], [*(f"1e{tick}" for tick in ticks), "equal\nto the bit"])
    axis.set_ylim(bottom, high + 0.12 * (high - low))
    if not found:
        axis.annotate(
            "No difference at any step.",
            (0.5, (low + high) / 2),
            xycoords=("axes fraction", "data"),
            ha="center",
            va="center",
            color=LIGHT["muted"],
        )


def _stretches(steps: Sequence[int], all_steps: Sequence[int], most: int) -> list[tuple[float, float]]:
    """Begins and ends of runs of neighbouring steps, half a step wider on both sides.

    Args:
        steps: some of `all_steps`.
        all_steps: ascending.
        most: how many runs may be told apart; where there are more, those too close to be seen apart are one.
    """
    gap = 0 if len(all_steps) <= most else (all_steps[-1] - all_steps[0]) / most
    place = {step: number for number, step in enumerate(all_steps)}
    found: list[tuple[float, float]] = []
    last = None
    for step in steps:
        number = place[step]
        if found and (number - 1 == last or step - 0.5 - found[-1][1] < gap):
            found[-1] = found[-1][0], step + 0.5
        else:
            found.append((step - 0.5, step + 0.5))
        last = number
    return found


def _rows(axis: Any, panel: Bars | Boxes, names: Sequence[str]) -> bool:
    """Prepare an axis with a row for each engine, its name above what is drawn; whether there are any."""
    if not names:
        _say(axis, "Nothing was recorded.")
        return False
    ticker = plot_library("matplotlib.ticker")
    axis.set_ylim(len(names) - 0.45, -0.7)
    axis.yaxis.set_visible(False)
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: number_as_text(value)))
    axis.grid(axis="x")
    axis.set_axisbelow(True)
    for row, name in enumerate(names):
        axis.annotate(
            plain(name), (0, row - 0.26), xycoords=("axes fraction", "data"), va="bottom", ha="left"
        )
    return True


def _share(axis: Any, text: str) -> float:
    """The share of an axis' width that a text takes beside what it belongs to, at most four fifths."""
    return float(min((len(text) * 0.58 * _SMALL + 12) / axis.get_window_extent().width, 0.8))


def _bars(axis: Any, panel: Bars) -> None:
    """A bar for each engine, from 0, with its value."""
    if not _rows(axis, panel, [bar.engine for bar in panel.bars]):
        return
    for row, bar in enumerate(panel.bars):
        axis.barh(row, bar.value, height=0.36, color=LIGHT[stroke_of(bar.place).name])
        axis.annotate(
            bar.text, (bar.value, row), xytext=(5, 0), textcoords="offset points", va="center", ha="left"
        )
    needed = [bar.value / (1 - _share(axis, bar.text)) for bar in panel.bars]
    axis.set_xlim(0, max(needed) or 1)


def _boxes(axis: Any, panel: Boxes) -> None:
    """A box from quartile to quartile, a line from the 5th to the 95th percentile, a stroke at the median."""
    if not _rows(axis, panel, [box.engine for box in panel.boxes]):
        return
    for row, box in enumerate(panel.boxes):
        colour = LIGHT[stroke_of(box.place).name]
        low, first, median, third, high = box.percentiles
        axis.hlines(row, low, high, color=colour, linewidth=2)
        axis.barh(row, third - first, left=first, height=0.36, color=colour)
        axis.vlines(median, row - 0.2, row + 0.2, color=LIGHT["ink"], linewidth=2.5)
        axis.annotate(
            box.text, (high, row), xytext=(6, 0), textcoords="offset points", va="center", ha="left"
        )
    lowest = min(box.percentiles[0] for box in panel.boxes)
    highest = max(box.percentiles[4] for box in panel.boxes)
    room = (highest - lowest) or highest or 1
    left = max(lowest - 0.05 * room, 0)
    needed = [left + (box.percentiles[4] - left) / (1 - _share(axis, box.text)) for box in panel.boxes]
    axis.set_xlim(left, max(*needed, highest + 0.05 * room))

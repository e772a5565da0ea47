"""Panels drawn on matplotlib's axes, in the colours of the light theme."""

import math
from collections.abc import Sequence
from typing import Any

from hfbridge.compare.report.panels import Bars, Boxes, Curves, Distances, Figure, Panel
from hfbridge.compare.report.summary import thin
from hfbridge.compare.report.theme import LIGHT, stroke_of
from hfbridge.utilities.imports import require

TEXT_SIZE = 11
"""Of all texts but titles, in pixels."""


def plot_library(name: str) -> Any:
    """A module of matplotlib.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    return require(name, extra="report", for_="the report of a comparison")


def plain(text: str, most: int = 40) -> str:
    """A text, cut to what a figure has room for, with escapes for what its font lacks."""
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return "".join(
        letter if letter.isprintable() and ord(letter) < 0x500 else letter.encode("unicode_escape").decode()
        for letter in text
    )


def line_style(place: int, *, is_points: bool) -> dict[str, Any]:
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


def draw_panel(axis: Any, panel: Panel, figure: Figure, points: int) -> None:
    """Draw one panel.

    Args:
        axis: on which, of matplotlib.
        panel: what.
        figure: whose it is.
        points: to which a curve is thinned.
    """
    if isinstance(panel, Curves | Distances):
        if not panel.curves:
            say(axis, "Nothing was recorded.")
            return
        if isinstance(panel, Curves):
            _curves(axis, panel, points)
        else:
            _distances(axis, panel, points)
        _by_step(axis, panel, figure.marks)
    elif isinstance(panel, Bars):
        _bars(axis, panel)
    else:
        _boxes(axis, panel)


def say(axis: Any, text: str) -> None:
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
    axis.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, min_n_ticks=1))
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
        line = line_style(curve.place, is_points=False)
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
    high = math.ceil(math.log10(max(found))) if found else 0
    low = min(math.floor(math.log10(min(found))) if found else 0, high - 2)
    lanes = len(panel.curves)
    lane = min(0.09 * (high - low), 0.3 * (high - low) / lanes)
    top = low - 0.06 * (high - low)
    bottom = top - lane * (lanes + 0.5)
    axis.axhspan(bottom, top, color=LIGHT["band"], linewidth=0, zorder=0)
    for number, curve in enumerate(panel.curves):
        style = line_style(curve.place, is_points=True)
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
        say(axis, panel.lacking if isinstance(panel, Bars) else "Nothing was recorded.")
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
    return float(min((len(text) * 0.58 * TEXT_SIZE + 12) / axis.get_window_extent().width, 0.8))


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

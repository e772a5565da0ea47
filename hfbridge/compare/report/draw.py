"""Figures drawn by matplotlib: as PNG, and as SVG elements for a page of either colour scheme.

Without pyplot, and with matplotlib's own settings restored afterwards.
"""

import hashlib
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hfbridge.compare.report.panels import Bars, Curves, Distances, Figure, Panel
from hfbridge.compare.report.summary import thin
from hfbridge.compare.report.theme import LIGHT, stroke_of
from hfbridge.utilities.imports import require

WIDE, NARROW = (520, 300), (350, 262)
POINTS = {WIDE: 400, NARROW: 240}
_DPI = 72  # a point of matplotlib is a pixel of the page

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": LIGHT["rule"],
    "axes.facecolor": "none",
    "axes.labelcolor": LIGHT["muted"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.ymargin": 0.1,
    "figure.dpi": _DPI,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 1,
    "legend.frameon": False,
    "legend.handlelength": 3.6,
    "lines.dash_joinstyle": "round",
    "lines.markeredgewidth": 0,
    "lines.scale_dashes": False,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": LIGHT["background"],
    "svg.fonttype": "none",
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # names from files are never formulas
    **{f"{axis}tick.color": LIGHT["rule"] for axis in "xy"},
    **{f"{axis}tick.labelcolor": LIGHT["muted"] for axis in "xy"},
    **{f"{axis}tick.labelsize": 11 for axis in "xy"},
}


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
    """Draw figures; the same figures give the same bytes.

    Returns:
        By their names.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="report", for_="the report of a comparison")
    # Whatever the user's own settings are; reading the one of the backend would choose one.
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context({**defaults, **_STYLE}):
        return {
            figure.name: Drawn(
                _as_png(figure),
                [(_as_svg(figure, panel, WIDE), _as_svg(figure, panel, NARROW)) for panel in figure.panels],
            )
            for figure in figures
        }


def _new_figure(width: float, height: float, **other: Any) -> Any:
    library = require("matplotlib.figure", extra="report", for_="the report of a comparison")
    return library.Figure(figsize=(width / _DPI, height / _DPI), **other)


def _height(size: tuple[int, int], panels: Iterable[Panel]) -> int:
    """A panel's height in pixels; one with many bars is higher."""
    bars = [len(panel.bars) for panel in panels if isinstance(panel, Bars)]
    return max(size[1], 40 * max(bars, default=0) + 60)


def _as_png(figure: Figure) -> bytes:
    """Draw all panels of a figure, two beside each other."""
    columns = max(1, min(2, len(figure.panels)))
    rows = max(1, math.ceil(len(figure.panels) / columns))
    width, height = WIDE[0] * columns, (_height(WIDE, figure.panels) + 40) * rows
    drawing = _new_figure(width, height, layout="constrained")
    axes = drawing.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(figure.panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, figure.panels, strict=False):
        _draw_panel(axis, panel, figure, POINTS[WIDE])
        axis.set_title(plain(panel.title), pad=10)
    if not figure.panels:
        _say(axes[0], "No evaluation was recorded.")
    if figure.engines:
        is_points = figure.name == "differences"
        handles = [
            axes[0].plot([], [], **_style_of(place, is_points=is_points))[0] for place, _ in figure.engines
        ]
        # A name with an underscore in front would be left out of a legend.
        names = [f"\u200a{plain(name)}" for _, name in figure.engines]
        drawing.legend(handles, names, loc="outside upper left", ncols=2 * columns)
    written = io.BytesIO()
    drawing.savefig(written, format="png", dpi=2 * _DPI, metadata={"Software": None})
    return written.getvalue()


def _as_svg(figure: Figure, panel: Panel, size: tuple[int, int]) -> str:
    """Draw one panel as an SVG element, in pixels of this size; panels below each other are in line."""
    width, height = size[0], _height(size, [panel])
    left = 6 if isinstance(panel, Bars) else 62
    drawing = _new_figure(width, height)
    axis = drawing.add_axes((left / width, 44 / height, (width - left - 14) / width, (height - 50) / height))
    _draw_panel(axis, panel, figure, POINTS[size])
    drawing.patch.set_visible(False)
    written = io.StringIO()
    salt = f"{figure.name}/{panel.title}/{size}".encode(errors="backslashreplace")
    matplotlib = require("matplotlib", extra="report", for_="the report of a comparison")
    with matplotlib.rc_context({"svg.hashsalt": hashlib.sha256(salt).hexdigest()}):  # ids of its own
        drawing.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _for_page(written.getvalue())


_VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}


def _for_page(svg: str) -> str:
    """Make matplotlib's SVG file an element of the page, with variables for colours."""
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda id_: id_[0] if id_[1] in used else "", svg)
    # Only tags: what stands between them are texts. The page says what the figure is (role, label).
    svg = re.sub(r"<[^>]*>", lambda tag: _shorten_tag(tag[0]), svg[svg.index(">") + 1 :])
    return f'<svg {view[0]} aria-hidden="true" focusable="false">' + re.sub(r"\s*\n\s*", "\n", svg).strip()


def _shorten_tag(tag: str) -> str:
    # A tenth of a pixel is enough for places; sizes of markers and lines are smaller.
    tag = re.sub(r"(\d\d\.\d)\d+|(\d\.\d\d)\d+", lambda number: number[1] or number[2], tag)
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: _VARIABLES.get(colour[0], colour[0]), tag)


def plain(text: str, most: int = 40) -> str:
    """Cut a text to what a figure has room for, with escapes for what its font lacks."""
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return "".join(
        letter if letter.isprintable() and ord(letter) < 0x500 else letter.encode("unicode_escape").decode()
        for letter in text
    )


def number_as_text(value: float) -> str:
    """Format a number at an axis."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def _style_of(place: int, *, is_points: bool) -> dict[str, Any]:
    """Return matplotlib's arguments for the line, or the points, of an engine."""
    stroke = stroke_of(place)
    colour = LIGHT[stroke.name]
    if is_points:
        edge = int(stroke.marker == "x")
        style = {"linestyle": "none", "marker": stroke.marker, "markersize": 4.5, "markeredgewidth": edge}
        return {"color": colour, **style}
    dashes = (0, stroke.dashes) if stroke.dashes else "solid"
    return {"color": colour, "linestyle": dashes, "linewidth": stroke.width}


def _say(axis: Any, text: str) -> None:
    """Show a sentence in place of a picture."""
    axis.set_axis_off()
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color=LIGHT["muted"])


def _draw_panel(axis: Any, panel: Panel, figure: Figure, points: int) -> None:
    if isinstance(panel, Bars):
        if panel.bars:
            _draw_bars(axis, panel)
        else:
            _say(axis, panel.lacking)
        return
    if not panel.curves:
        _say(axis, "Nothing was recorded.")
        return
    if isinstance(panel, Curves):
        _draw_curves(axis, panel, points)
    else:
        _draw_distances(axis, panel, points)
    _draw_steps(axis, panel, figure.marks)


def _draw_steps(axis: Any, panel: Curves | Distances, marks: Sequence[int]) -> None:
    """Draw the axis of steps, and where engines begin to differ."""
    first = min(curve.steps[0] for curve in panel.curves)
    last = max(curve.steps[-1] for curve in panel.curves)
    room = max((last - first) * 0.02, 0.5)
    axis.set_xlim(first - room, last + room)
    axis.locator_params(axis="x", nbins=6, integer=True, min_n_ticks=1)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("optimizer step", loc="right")
    axis.grid(axis="y")
    for step in [step for step in marks[:3] if first <= step <= last]:
        axis.axvline(step, color=LIGHT["muted"], linewidth=1, linestyle=(0, (2, 3)), zorder=1.5)
        axis.annotate(
            f" differs from step {step:,} ",
            (step, 0.99),
            xycoords=axis.get_xaxis_transform(),
            ha="right" if step > (first + last) / 2 else "left",
            va="top",
            color=LIGHT["muted"],
            bbox={"facecolor": LIGHT["background"], "edgecolor": "none", "pad": 1.5, "alpha": 0.8},
        )


def _draw_curves(axis: Any, panel: Curves, points: int) -> None:
    """Draw lines over each other, each thinner than the one below it."""
    has_points = panel.has_points or all(len(curve.steps) < 2 for curve in panel.curves)
    for curve in panel.curves:
        style = _style_of(curve.place, is_points=False)
        marked = {"marker": "o", "markersize": style["linewidth"] + 3.5} if has_points else {}
        axis.plot(*thin(curve.steps, curve.values, points), **style, **marked)
    if panel.is_log:
        axis.set_yscale("log")
        axis.minorticks_off()
    else:
        axis.locator_params(axis="y", nbins=5)
    axis.yaxis.set_major_formatter(lambda value, _: number_as_text(value))
    if panel.from_zero:
        axis.set_ylim(0, 1.15 * max(max(curve.values) for curve in panel.curves) or 1)


def _draw_distances(axis: Any, panel: Distances, points: int) -> None:
    """Draw points by powers of ten; below them a strip, with a lane for each engine, for what is equal."""
    found = [value for curve in panel.curves for value in curve.values if value > 0]
    high = math.ceil(math.log10(max(found))) if found else 0
    low = min(math.floor(math.log10(min(found))) if found else 0, high - 2)
    zero = 10.0**low  # the scale is linear below
    axis.set_yscale("symlog", linthresh=zero, linscale=0.15 * (high - low))
    axis.set_ylim(-zero, 10.0 ** (high + 0.12 * (high - low)))
    axis.axhspan(-zero, -zero / 8, color=LIGHT["band"], linewidth=0, zorder=0)
    for number, curve in enumerate(panel.curves, 1):
        lane = -zero * (1 / 8 + 7 / 8 * number / (len(panel.curves) + 1))
        steps, values = thin(curve.steps, curve.values, points)
        axis.plot(steps, [value or lane for value in values], **_style_of(curve.place, is_points=True))
    ticks = range(high, low - 1, -max(1, math.ceil((high - low) / 5))) if found else []
    labels = [*(f"1e{tick}" for tick in ticks), "equal\nto the bit"]
    axis.set_yticks([*(10.0**tick for tick in ticks), -zero * 9 / 16], labels)
    axis.minorticks_off()
    if not found:
        axis.text(
            0.5,
            0.6,
            "No difference at any step.",
            ha="center",
            transform=axis.transAxes,
            color=LIGHT["muted"],
        )


def _draw_bars(axis: Any, panel: Bars) -> None:
    """Draw a bar for each engine, or a box of its quartiles on a line from the 5th to the 95th percentile."""
    places, colours = range(len(panel.bars)), [LIGHT[stroke_of(bar.place).name] for bar in panel.bars]
    names = [f"{plain(bar.engine, 28)}  {bar.label}" for bar in panel.bars]
    axis.set_yticks([place - 0.26 for place in places], names, ha="left", va="bottom", color=LIGHT["ink"])
    axis.tick_params(axis="y", length=0, pad=0)
    axis.spines["left"].set_visible(False)
    if any(bar.percentiles for bar in panel.bars):
        low, first, median, third, high = zip(*(bar.percentiles for bar in panel.bars), strict=True)
        axis.hlines(places, low, high, colors=colours, linewidth=2)
        widths = [to - begin for begin, to in zip(first, third, strict=True)]
        axis.barh(places, widths, left=first, height=0.36, color=colours)
        axis.vlines(median, [p - 0.2 for p in places], [p + 0.2 for p in places], LIGHT["ink"], linewidth=2.5)
        axis.set_xlim(left=max(0, axis.get_xlim()[0]))
    else:
        axis.barh(places, [bar.value for bar in panel.bars], height=0.36, color=colours)
    axis.set_ylim(len(names) - 0.45, -0.75)
    axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter(lambda value, _: number_as_text(value))
    axis.grid(axis="x")

"""Figures drawn by matplotlib, in the colours of the theme: as PNG, and as SVG for a page of either scheme.

No pyplot, and no setting of matplotlib is left changed.
"""

import hashlib
import io
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from hfbridge.compare.report.paint import TEXT_SIZE, draw_panel, line_style, plain, plot_library, say
from hfbridge.compare.report.panels import Bars, Boxes, Curves, Distances, Figure, Panel
from hfbridge.compare.report.theme import LIGHT

WIDE, NARROW = (520, 300), (350, 262)
POINTS = {WIDE: 400, NARROW: 240}
_PIXELS_PER_INCH = 72
_RIGHT, _BELOW, _EDGE = 14, 44, 12


@contextmanager
def _house_style() -> Iterator[None]:
    """Draw with the report's sizes and colours, whatever the user's own settings of matplotlib are."""
    matplotlib = plot_library("matplotlib")
    # Names from files are never formulas: a dollar sign is a dollar sign.
    settings = {
        # Asking which backend is chosen would choose one.
        **{name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"},
        "axes.edgecolor": LIGHT["rule"],
        "axes.facecolor": "none",
        "axes.labelcolor": LIGHT["muted"],
        "axes.labelsize": TEXT_SIZE,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": LIGHT["ink"],
        "axes.titlelocation": "left",
        "axes.titlesize": 13,
        "font.size": TEXT_SIZE,
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
        draw_panel(axis, panel, figure, POINTS[WIDE])
    if not figure.panels:
        say(axes[0], "No evaluation was recorded.")
    _legend(drawing, figure, per_row)
    written = io.BytesIO()
    drawing.savefig(written, format="png", dpi=2 * _PIXELS_PER_INCH, metadata={"Software": None})
    return written.getvalue()


def _as_svg(figure: Figure, panel: Panel, size: tuple[int, int]) -> str:
    """One panel as an SVG element, in pixels of this size."""
    drawing, (axis,) = _new(replace(figure, panels=[panel]), size, 1)
    draw_panel(axis, panel, figure, POINTS[size])
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
    # Only tags: what stands between them are texts, numbers at the axes among them.
    svg = re.sub(r"<[^>]*>", lambda tag: _tag_for_page(tag[0]), svg)
    svg = _USES.sub(_once, svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


_VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}


def _tag_for_page(tag: str) -> str:
    """One tag without the font and with variables for colours and fewer digits."""
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", tag)
    # A tenth of a pixel is enough for places; sizes of markers and lines are smaller.
    tag = re.sub(r"(\d\d\.\d)\d+", r"\1", tag)
    tag = re.sub(r"(\d\.\d\d)\d+", r"\1", tag)
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: _VARIABLES.get(colour[0], colour[0]), tag)


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
    handles = [lines.Line2D([], [], **line_style(place, is_points=is_points)) for place, _ in figure.engines]
    # A name with an underscore in front would be left out of a legend.
    names = [f"\u200a{plain(name)}" for _, name in figure.engines]
    drawing.legend(
        handles, names, loc="upper left", ncols=columns, frameon=False, handlelength=3.6, borderaxespad=0.8
    )

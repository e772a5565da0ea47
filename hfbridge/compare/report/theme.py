"""Colours and lines of the report, light and dark; the page and its figures take them from here. Pure.

Figures are drawn in the colours of `LIGHT`. In a page each of these becomes the variable of its name, so that
the reader's scheme decides; that is why no colour stands for two names.

The engines' colours were chosen so that any two of them stay apart (CIE76 distance of at least 29) for eyes
without one kind of cone, too, and stand out from the background by 3:1. Texts stand out by 4.5:1.
"""

from dataclasses import dataclass

LIGHT = {
    "background": "#ffffff",
    "raised": "#f5f6f8",
    "ink": "#1a1e23",
    "muted": "#58616b",
    "grid": "#e3e6ea",
    "rule": "#c9ced5",
    "band": "#eceff2",
    "link": "#0a5ba8",
    "marked": "#fff3cd",
    "good": "#12653a",
    "good-back": "#e2f4e8",
    "fair": "#7a4d00",
    "fair-back": "#fdf0d5",
    "bad": "#a1161f",
    "bad-back": "#fde8e8",
    "engine-0": "#3695d8",
    "engine-1": "#ee5c10",
    "engine-2": "#095545",
    "engine-3": "#7f077c",
    "engine-4": "#4b430c",
    "engine-5": "#888f9b",
}
DARK = {
    "background": "#14171b",
    "raised": "#1d2126",
    "ink": "#e9ecef",
    "muted": "#a5afb9",
    "grid": "#2b3037",
    "rule": "#434a53",
    "band": "#22272d",
    "link": "#7cc0ff",
    "marked": "#453a10",
    "good": "#7ddba0",
    "good-back": "#12321f",
    "fair": "#f2c572",
    "fair-back": "#38290b",
    "bad": "#ff9a9a",
    "bad-back": "#431a1c",
    "engine-0": "#afc6fa",
    "engine-1": "#cc6238",
    "engine-2": "#20e8ae",
    "engine-3": "#b639d3",
    "engine-4": "#f2c338",
    "engine-5": "#666f84",
}
ENGINE_COLOURS = 6

# Grade of a verdict -> the tone of its badge: good, fair or bad.
TONES = {"exact": "good", "close": "good", "same trajectory": "fair", "differs": "bad", "failed": "bad"}


@dataclass(frozen=True)
class Stroke:
    """How the line of one engine is drawn.

    Attributes:
        name: of its colour.
        width: in pixels. Lines drawn later are thinner, so that equal ones all show.
        dashes: lengths on and off, in pixels; empty for a whole line.
        marker: of matplotlib, where points are drawn.
    """

    name: str
    width: float
    dashes: tuple[float, ...]
    marker: str


_WIDTHS = (5.5, 3.6, 2.6, 1.4)
_DASHES: tuple[tuple[float, ...], ...] = ((), (9.0, 4.0), (4.0, 4.0), (22.0, 5.0))
_MARKERS = "os^Dvx"
# The same shapes in SVG, around 0, about 6 pixels wide.
MARKER_PATHS = {
    "o": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "s": "M-2.8-2.8h5.6v5.6h-5.6z",
    "^": "M0-3.2L3.2 2.8h-6.4z",
    "D": "M0-3.6L3.6 0L0 3.6L-3.6 0z",
    "v": "M0 3.2L3.2-2.8h-6.4z",
    "x": "M-2.8-2.2l.6-.6l2.2 2.2l2.2-2.2l.6 .6l-2.2 2.2l2.2 2.2l-.6 .6l-2.2-2.2l-2.2 2.2l-.6-.6l2.2-2.2z",
}


def stroke_of(place: int) -> Stroke:
    """The stroke of the engine at this place in the list; the reference is at place 0."""
    # Beyond the fourth, thin dashed lines of further colours: so many equal curves cannot be nested.
    nested = place < len(_WIDTHS)
    return Stroke(
        name=f"engine-{place % ENGINE_COLOURS}",
        width=_WIDTHS[place] if nested else 1.3,
        dashes=_DASHES[place] if nested else (3.0 + 2 * (place % 3), 4.0),
        marker=_MARKERS[place % len(_MARKERS)],
    )


def contrast(one: str, other: str) -> float:
    """Contrast of two colours `#rrggbb` as WCAG 2 has it, from 1 to 21."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def style_variables() -> str:
    """The colours as CSS: light by default and on paper, dark where the reader's system is dark."""
    light = "".join(f"--{name}:{colour};" for name, colour in LIGHT.items())
    dark = "".join(f"--{name}:{colour};" for name, colour in DARK.items())
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )

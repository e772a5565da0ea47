"""Colours and line styles of the report, shared by the page and its figures.

Figures are drawn in the colours of `LIGHT`; in a page each becomes the CSS variable of its name, so no colour
has two names. Any two of the engines' colours stay apart (CIE76 distance of at least 29), also with a
missing kind of cone, and have a contrast of 3:1 with the background; texts have 4.5:1.
"""

from dataclasses import dataclass

# Name -> colour in the light and in the dark scheme.
_COLOURS = {
    "background": ("#ffffff", "#14171b"),
    "raised": ("#f5f6f8", "#1d2126"),
    "ink": ("#1a1e23", "#e9ecef"),
    "muted": ("#58616b", "#a5afb9"),
    "grid": ("#e3e6ea", "#2b3037"),
    "rule": ("#c9ced5", "#434a53"),
    "band": ("#eceff2", "#22272d"),
    "link": ("#0a5ba8", "#7cc0ff"),
    "marked": ("#fff3cd", "#453a10"),
    "good": ("#12653a", "#7ddba0"),
    "good-back": ("#e2f4e8", "#12321f"),
    "fair": ("#7a4d00", "#f2c572"),
    "fair-back": ("#fdf0d5", "#38290b"),
    "bad": ("#a1161f", "#ff9a9a"),
    "bad-back": ("#fde8e8", "#431a1c"),
    "engine-0": ("#3695d8", "#afc6fa"),
    "engine-1": ("#ee5c10", "#cc6238"),
    "engine-2": ("#095545", "#20e8ae"),
    "engine-3": ("#7f077c", "#b639d3"),
    "engine-4": ("#4b430c", "#f2c338"),
    "engine-5": ("#888f9b", "#666f84"),
}
LIGHT = {name: light for name, (light, _) in _COLOURS.items()}
DARK = {name: dark for name, (_, dark) in _COLOURS.items()}

# Grade of a verdict -> the tone of its badge.
TONES = {"exact": "good", "close": "good", "same trajectory": "fair", "differs": "bad", "failed": "bad"}

# Lines drawn later are thinner, so that equal ones all show.
_WIDTHS = (5.5, 3.6, 2.6, 1.4)
_DASHES: tuple[tuple[float, ...], ...] = ((), (9.0, 4.0), (4.0, 4.0), (22.0, 5.0))
# Marker of matplotlib -> the same shape in SVG, around 0, about 6 pixels wide.
MARKER_PATHS = {
    "o": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "s": "M-2.8-2.8h5.6v5.6h-5.6z",
    "^": "M0-3.2L3.2 2.8h-6.4z",
    "D": "M0-3.6L3.6 0L0 3.6L-3.6 0z",
    "v": "M0 3.2L3.2-2.8h-6.4z",
    "x": "M-2.8-2.2l.6-.6l2.2 2.2l2.2-2.2l.6 .6l-2.2 2.2l2.2 2.2l-.6 .6l-2.2-2.2l-2.2 2.2l-.6-.6l2.2-2.2z",
}


@dataclass(frozen=True)
class Stroke:
    """The line of one engine: name of its colour, width and dashes in pixels, marker of matplotlib."""

    name: str
    width: float
    dashes: tuple[float, ...]
    marker: str


def stroke_of(place: int) -> Stroke:
    """Return the stroke of the engine at this place in the list; the reference is at place 0."""
    # Beyond the fourth, thin dashed lines of further colours: so many equal curves cannot be nested.
    is_nested = place < len(_WIDTHS)
    return Stroke(
        name=f"engine-{place % 6}",
        width=_WIDTHS[place] if is_nested else 1.3,
        dashes=_DASHES[place] if is_nested else (3.0 + 2 * (place % 3), 4.0),
        marker=list(MARKER_PATHS)[place % len(MARKER_PATHS)],
    )


def style_variables() -> str:
    """Return the colours as CSS: light by default and on paper, dark where the reader's system is dark."""
    light, dark = ("".join(f"--{n}:{c};" for n, c in theme.items()) for theme in (LIGHT, DARK))
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )

"""From the runs to what each figure shows: curves, differences, bars, boxes, and the same in words. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hfbridge.compare.report.recorded import Recorded, Run, is_number
from hfbridge.compare.report.summary import MEASURED, QUANTITIES, Cost, differences, few_steps, metric_names

MIB = 1024 * 1024
MOST_METRICS = 12


@dataclass(frozen=True)
class Curve:
    """One engine's values.

    Attributes:
        place: of the engine in the list.
        steps: ascending.
        values: as many.
    """

    place: int
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Curves:
    """Values by optimizer step.

    Attributes:
        title: what is shown, with its unit.
        text: the same in words, for those who cannot see it.
        curves: in the order to draw them.
        is_log: the values go over several powers of ten.
        from_zero: the axis begins at 0.
        has_points: each value is marked, since there are few.
    """

    title: str
    text: str
    curves: list[Curve]
    is_log: bool = False
    from_zero: bool = False
    has_points: bool = False


@dataclass(frozen=True)
class Distances:
    """Relative differences by optimizer step, by powers of ten; zeros have a strip of their own."""

    title: str
    text: str
    curves: list[Curve]


@dataclass(frozen=True)
class Bar:
    """One engine's value, with the text that stands beside it."""

    place: int
    engine: str
    value: float
    text: str


@dataclass(frozen=True)
class Bars:
    """One value an engine, from 0; `lacking` is told where there are none."""

    title: str
    text: str
    bars: list[Bar]
    lacking: str = "Nothing was recorded."


@dataclass(frozen=True)
class Box:
    """One engine's distribution: the 5th, 25th, 50th, 75th and 95th percentile."""

    place: int
    engine: str
    percentiles: tuple[float, ...]
    text: str


@dataclass(frozen=True)
class Boxes:
    """One distribution an engine."""

    title: str
    text: str
    boxes: list[Box]


Panel = Curves | Distances | Bars | Boxes


@dataclass(frozen=True)
class Figure:
    """What becomes one PNG, and some panels of the page.

    Attributes:
        name: of the PNG, without its ending.
        panels: in reading order.
        engines: (place, name) of those in the legend; empty where the panels name them.
        marks: steps at which a thin line is drawn.
    """

    name: str
    panels: Sequence[Panel]
    engines: tuple[tuple[int, str], ...] = ()
    marks: tuple[int, ...] = ()


def figures(recorded: Recorded, costs: Sequence[Cost]) -> list[Figure]:
    """All figures of a report, in reading order.

    Args:
        recorded: the comparison.
        costs: of its engines.
    """
    runs = recorded.runs
    ran = tuple((place, run.engine) for place, run in enumerate(runs) if run.steps)
    others = tuple((place, name) for place, name in ran if place)
    found = [
        Figure("loss", [_curves(runs, "loss", "Loss")], ran),
        Figure("grad_norm", [_curves(runs, "grad_norm", "Gradient norm")], ran),
        Figure("learning_rate", [_curves(runs, "learning_rate", "Learning rate")], ran),
        Figure("metrics", _metrics(runs), ran),
        Figure("differences", [_distances(runs, quantity) for quantity in MEASURED], others),
    ]
    found = [Figure(one.name, one.panels, one.engines, marks(recorded)) for one in found]
    found += [
        Figure("speed", _speed(runs, costs)),
        Figure("memory", _memory(runs, costs), ran),
    ]
    return found


def marks(recorded: Recorded) -> tuple[int, ...]:
    """Steps from which an engine differs."""
    first = {verdict.first_step for verdict in recorded.verdicts if verdict.grade == "differs"}
    return tuple(sorted(step for step in first if step))


def _curve(place: int, steps: Sequence[int], values: Sequence[float | None], scale: float = 1.0) -> Curve:
    """The finite values of one engine."""
    known = [
        (step, value / scale)
        for step, value in zip(steps, values, strict=True)
        if value is not None and math.isfinite(value)
    ]
    return Curve(place, [step for step, _ in known], [value for _, value in known])


def _curves(runs: Sequence[Run], quantity: str, title: str) -> Curves:
    """A quantity of all engines."""
    found = [
        _curve(place, run.steps, run.columns.get(quantity, []))
        for place, run in enumerate(runs)
        if run.columns.get(quantity)
    ]
    return _panel(title, [curve for curve in found if curve.steps], runs)


def _panel(title: str, curves: list[Curve], runs: Sequence[Run], *, has_points: bool = False) -> Curves:
    """A panel of curves, on a log scale if the middle of the values spans more than two powers of ten."""
    ordered = sorted(value for curve in curves for value in curve.values)
    is_log = False
    if ordered and ordered[0] > 0:
        low, high = ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]
        is_log = high > 100 * low or ordered[-1] > 1000 * high
    shown = f"{title} (log scale)" if is_log else title
    return Curves(shown, _in_words(title, curves, runs), curves, is_log=is_log, has_points=has_points)


def _in_words(title: str, curves: Sequence[Curve], runs: Sequence[Run]) -> str:
    """What the curves show, for those who cannot see them."""
    if not curves:
        return f"{title}: nothing was recorded."
    parts = [
        f"{runs[curve.place].engine} from {curve.values[0]:.4g} at step {curve.steps[0]} "
        f"to {curve.values[-1]:.4g} at step {curve.steps[-1]}"
        for curve in curves
    ]
    return f"{title} by optimizer step: {'; '.join(parts)}."


def _metrics(runs: Sequence[Run]) -> list[Curves]:
    """A panel for each metric of the evaluations."""
    found = []
    for name in metric_names(runs)[:MOST_METRICS]:
        curves = []
        for place, run in enumerate(runs):
            rows = [row for row in run.metrics if is_number(row.get(name))]
            curve = _curve(place, [row["step"] for row in rows], [row[name] for row in rows])
            if curve.steps:
                curves.append(curve)
        if curves:
            found.append(_panel(name, curves, runs, has_points=True))
    return found


def _distances(runs: Sequence[Run], quantity: str) -> Distances:
    """How far each engine is from the first one."""
    curves = []
    for place, run in enumerate(runs[1:], 1):
        steps, found = differences(runs[0], run, quantity)
        if quantity == "parameter_norm":
            # Other weights of the same norm are not equal: no point is truer than one on the strip of zeros.
            unequal = {
                step
                for step, value in zip(*differences(runs[0], run, "parameters"), strict=True)
                if value != 0
            }
            kept = [
                (step, value)
                for step, value in zip(steps, found, strict=True)
                if value or step not in unequal
            ]
            steps, found = [step for step, _ in kept], [value for _, value in kept]
        curve = _curve(place, steps, found)
        if curve.steps:
            curves.append(curve)
    name = QUANTITIES[quantity]
    parts = [_distance_in_words(runs[curve.place].engine, curve) for curve in curves]
    text = f"Relative difference to {runs[0].engine}, {name}: " + ("; ".join(parts) or "nothing to compare")
    return Distances(name[0].upper() + name[1:], f"{text}.", curves)


def _distance_in_words(engine: str, curve: Curve) -> str:
    unequal = [(value, step) for value, step in zip(curve.values, curve.steps, strict=True) if value]
    if not unequal:
        return f"{engine} equal to the bit at {len(curve.steps)} steps"
    largest, at = max(unequal)
    return (
        f"{engine} unequal at {len(unequal)} of {len(curve.steps)} steps, at most {largest:.2g} at step {at}"
    )


def seconds_as_text(value: float) -> str:
    """`45.2 ms`, `3.21 s`, `12 min 5 s`."""
    if value < 1:
        return f"{value * 1000:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    return f"{int(value // 60)} min {round(value % 60)} s"


def bytes_as_text(value: float) -> str:
    """`512 MiB`."""
    return f"{value / MIB:,.0f} MiB"


def _speed(runs: Sequence[Run], costs: Sequence[Cost]) -> list[Panel]:
    """Samples per second, and how long steps took."""
    place = {run.engine: number for number, run in enumerate(runs)}
    bars, boxes = [], []
    for cost in costs:
        name = cost.run.engine
        if cost.samples_per_second is not None:
            share = "" if cost.throughput is None or not place[name] else f" (ratio {cost.throughput:.2f})"
            text = f"{cost.samples_per_second:,.4g}{share}"
            bars.append(Bar(place[name], name, cost.samples_per_second, text))
        if cost.step_s is not None:
            share = "" if cost.overhead is None or not place[name] else f" (ratio {cost.overhead:.2f})"
            milliseconds = tuple(value * 1000 for value in cost.step_s)
            boxes.append(Box(place[name], name, milliseconds, f"{seconds_as_text(cost.step_s[2])}{share}"))
    few = few_steps(costs)
    lacking = f"{few.capitalize()}." if few else Bars.lacking
    rates = "; ".join(f"{bar.engine} {bar.text}" for bar in bars) or few or "not recorded"
    times = "; ".join(f"{box.engine} {box.text}" for box in boxes) or "not recorded"
    return [
        Bars("Samples per second", f"Samples per second: {rates}.", bars, lacking),
        Boxes("Time of a step, ms", f"Median time of a step: {times}.", boxes),
    ]


def _memory(runs: Sequence[Run], costs: Sequence[Cost]) -> list[Panel]:
    """Memory at its fullest, and by step."""
    place = {run.engine: number for number, run in enumerate(runs)}
    bars = [
        Bar(place[cost.run.engine], cost.run.engine, cost.peak_bytes / MIB, bytes_as_text(cost.peak_bytes))
        for cost in costs
        if cost.peak_bytes is not None
    ]
    curves = [
        _curve(number, run.steps, run.columns.get("memory_bytes", []), MIB)
        for number, run in enumerate(runs)
        if run.steps
    ]
    curves = [curve for curve in curves if curve.steps]
    peaks = "; ".join(f"{bar.engine} {bar.text}" for bar in bars) or "not recorded"
    by_step = _in_words("Memory in MiB", curves, runs)
    return [
        Bars("Memory at its fullest, MiB", f"Memory at its fullest: {peaks}.", bars),
        Curves("Memory by step, MiB", by_step, curves, from_zero=True),
    ]

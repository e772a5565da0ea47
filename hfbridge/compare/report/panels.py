"""What each figure of the report shows: curves, differences and bars, and the same in words."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hfbridge.compare.report.recorded import Recorded, Run, is_number
from hfbridge.compare.report.summary import MEASURED, QUANTITIES, Cost, differences, few_steps, metric_names

MIB = 2**20
MOST_METRICS = 12


@dataclass(frozen=True)
class Curve:
    """One engine's values by step; `place` is that of the engine in the list."""

    place: int
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Bar:
    """One engine's value, the text beside its name, and percentiles (5, 25, 50, 75, 95) if any."""

    place: int
    engine: str
    value: float
    label: str
    percentiles: tuple[float, ...] = ()


@dataclass(frozen=True)
class Curves:
    """Values by optimizer step, with a title, the same in words, and how the axis of values is drawn."""

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
class Bars:
    """One value or distribution per engine; `lacking` is shown where there are none."""

    title: str
    text: str
    bars: list[Bar]
    lacking: str = "Nothing was recorded."


Panel = Curves | Distances | Bars


@dataclass(frozen=True)
class Figure:
    """One PNG, and some panels of the page.

    Attributes:
        name: of the PNG, without its ending.
        panels: in reading order.
        engines: (place, name) of those in the legend; empty where the panels name them.
        marks: steps from which an engine differs.
    """

    name: str
    panels: Sequence[Panel]
    engines: tuple[tuple[int, str], ...] = ()
    marks: tuple[int, ...] = ()


def figures(recorded: Recorded, costs: Sequence[Cost]) -> list[Figure]:
    """Describe all figures of a report, in reading order."""
    runs, differing = recorded.runs, marks(recorded)
    ran = tuple((place, run.engine) for place, run in enumerate(runs) if run.steps)
    others = tuple((place, name) for place, name in ran if place)
    titles = {"loss": "Loss", "grad_norm": "Gradient norm", "learning_rate": "Learning rate"}
    return [
        *(Figure(name, [_quantity(runs, name, title)], ran, differing) for name, title in titles.items()),
        Figure(
            "metrics", [_metric(runs, name) for name in metric_names(runs)[:MOST_METRICS]], ran, differing
        ),
        Figure("differences", [_distances(runs, name) for name in MEASURED], others, differing),
        Figure("speed", _speed(runs, costs)),
        Figure("memory", _memory(runs, costs), ran),
    ]


def marks(recorded: Recorded) -> tuple[int, ...]:
    """Return the steps from which an engine differs."""
    first = {verdict.first_step for verdict in recorded.verdicts if verdict.grade == "differs"}
    return tuple(sorted(step for step in first if step))


def _curves(of_runs: Iterable[Iterable[tuple[int, float | None]]]) -> list[Curve]:
    """Keep the finite values of each engine; an engine without any has no curve."""
    found = []
    for place, pairs in enumerate(of_runs):
        known = [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]
        if known:
            found.append(Curve(place, [step for step, _ in known], [value for _, value in known]))
    return found


def _quantity(runs: Sequence[Run], quantity: str, title: str) -> Curves:
    return _panel(
        title, _curves(zip(run.steps, run.columns.get(quantity, ()), strict=False) for run in runs), runs
    )


def _metric(runs: Sequence[Run], name: str) -> Curves:
    found = ([(row["step"], row[name]) for row in run.metrics if is_number(row.get(name))] for run in runs)
    return _panel(name, _curves(found), runs, has_points=True)


def _panel(title: str, curves: list[Curve], runs: Sequence[Run], *, has_points: bool = False) -> Curves:
    """Make a panel of curves, on a log scale if most of the values span more than two powers of ten."""
    ordered = sorted(value for curve in curves for value in curve.values)
    is_log = False
    if ordered and ordered[0] > 0:
        low, high = ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]
        is_log = high > 100 * low or ordered[-1] > 1000 * high
    shown = f"{title} (log scale)" if is_log else title
    return Curves(shown, _in_words(title, curves, runs), curves, is_log=is_log, has_points=has_points)


def _in_words(title: str, curves: Sequence[Curve], runs: Sequence[Run]) -> str:
    parts = [
        f"{runs[curve.place].engine} from {curve.values[0]:.4g} at step {curve.steps[0]} "
        f"to {curve.values[-1]:.4g} at step {curve.steps[-1]}"
        for curve in curves
    ]
    return f"{title} by optimizer step: {'; '.join(parts)}." if parts else f"{title}: nothing was recorded."


def _distances(runs: Sequence[Run], quantity: str) -> Distances:
    """Compare each engine with the first one."""
    of_runs: list[list[tuple[int, float | None]]] = [[]]
    for run in runs[1:]:
        pairs = list(zip(*differences(runs[0], run, quantity), strict=True))
        if quantity == "parameter_norm":
            # Other weights of the same norm are not equal: no point is truer than one on the strip of zeros.
            unequal = {s for s, v in zip(*differences(runs[0], run, "parameters"), strict=True) if v}
            pairs = [(step, value) for step, value in pairs if value or step not in unequal]
        of_runs.append([*pairs])
    curves = _curves(of_runs)
    name = QUANTITIES[quantity]
    parts = [_distance_in_words(runs[curve.place].engine, curve) for curve in curves]
    text = f"Relative difference to {runs[0].engine}, {name}: " + ("; ".join(parts) or "nothing to compare")
    return Distances(name[0].upper() + name[1:], f"{text}.", curves)


def _distance_in_words(engine: str, curve: Curve) -> str:
    largest, at = max(zip(curve.values, curve.steps, strict=True))
    steps, unequal = len(curve.steps), sum(value > 0 for value in curve.values)
    if not unequal:
        return f"{engine} equal to the bit at {steps} steps"
    return f"{engine} unequal at {unequal} of {steps} steps, at most {largest:.2g} at step {at}"


def seconds_as_text(value: float) -> str:
    """Return `45.2 ms`, `3.21 s`, `12 min 5 s`."""
    if value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 120 else f"{int(value // 60)} min {round(value % 60)} s"


def bytes_as_text(value: float) -> str:
    """Return `512 MiB`."""
    return f"{value / MIB:,.0f} MiB"


def _speed(runs: Sequence[Run], costs: Sequence[Cost]) -> list[Panel]:
    places = {run.engine: place for place, run in enumerate(runs)}
    rates, times = [], []
    for cost in costs:
        name = cost.run.engine
        if cost.samples_per_second is not None:
            label = f"{cost.samples_per_second:,.4g}{_ratio(cost.throughput, places[name])}"
            rates.append(Bar(places[name], name, cost.samples_per_second, label))
        if cost.step_s is not None:
            milliseconds = tuple(value * 1000 for value in cost.step_s)
            label = f"{seconds_as_text(cost.step_s[2])}{_ratio(cost.overhead, places[name])}"
            times.append(Bar(places[name], name, milliseconds[2], label, milliseconds))
    few = few_steps(costs)
    lacking = f"{few.capitalize()}." if few else Bars.lacking
    return [
        Bars("Samples per second", _list_bars("Samples per second", rates, few), rates, lacking),
        Bars("Time of a step, ms", _list_bars("Median time of a step", times), times),
    ]


def _ratio(value: float | None, place: int) -> str:
    return f" (ratio {value:.2f})" if place and value is not None else ""


def _list_bars(title: str, bars: Sequence[Bar], lacking: str = "") -> str:
    return f"{title}: {'; '.join(f'{b.engine} {b.label}' for b in bars) or lacking or 'not recorded'}."


def _memory(runs: Sequence[Run], costs: Sequence[Cost]) -> list[Panel]:
    places = {run.engine: place for place, run in enumerate(runs)}
    bars = [
        Bar(places[cost.run.engine], cost.run.engine, cost.peak_bytes / MIB, bytes_as_text(cost.peak_bytes))
        for cost in costs
        if cost.peak_bytes is not None
    ]
    curves = _curves(
        ((s, b and b / MIB) for s, b in zip(run.steps, run.columns.get("memory_bytes", ()), strict=False))
        for run in runs
    )
    by_step = _in_words("Memory in MiB", curves, runs)
    return [
        Bars("Memory at its fullest, MiB", _list_bars("Memory at its fullest", bars), bars),
        Curves("Memory by step, MiB", by_step, curves, from_zero=True),
    ]

"""The verdict on two engines: whether they do the same, and if not, where that begins and why. Pure.

grade             condition
exact             every step's rows, samples, loss, gradient norm, learning rate and parameters, and every
                  metric, are equal to the bit
close             samples and learning rates are equal; nothing else differs by more than `CLOSE`
same trajectory   samples and learning rates are equal, and differences are to be expected (sums over ranks
                  taken in another order, less than float32, a GPU): each step is within a tolerance, and
                  so, much narrower, is the mean of the signed differences: what drifts is no rounding
differs           anything else
failed            one of the two has no end
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from hfbridge.compare.causes import Run, cause_of, is_sharded, of_first_parameters, relative
from hfbridge.compare.record import Metrics, Step

Grade = Literal["exact", "close", "same trajectory", "differs", "failed"]

CLOSE = 1e-5
"""Relative difference that sums in float32, taken in another order, may grow to: some 80 of its roundings."""

_QUANTITIES = ("rows", "samples", "loss", "grad_norm", "learning_rate", "parameters")
_MEASURED = ("loss", "grad_norm", "parameter_norm")
_FIRST_NOISE = 2  # where sums are taken in another order, one of the first steps shows it
_LOW = ("bfloat16", "float16")


class Tolerance(NamedTuple):
    """How far the values of one trajectory may be apart, relatively.

    Attributes:
        step: in each step.
        mean: in the mean of the signed differences of all steps.
    """

    step: float
    mean: float


# Rounding grows from step to step while a model learns. The norm of all parameters hardly feels it.
_OF_SUMS = {
    "loss": Tolerance(1e-2, 1e-3),
    "grad_norm": Tolerance(5e-2, 5e-3),
    "parameter_norm": Tolerance(1e-4, 1e-5),
}
# A value of bf16 has a relative error of 4e-3, a loss is made of some of them, and they do not go one way.
_OF_LOW_PRECISION = {
    "loss": Tolerance(5e-2, 5e-3),
    "grad_norm": Tolerance(2e-1, 2e-2),
    "parameter_norm": Tolerance(1e-3, 1e-4),
}
_SHARDED = (
    "Sums over ranks are taken in another order, that of the gradient norm, too: where the ranks share the "
    "gradients, each sums the squares of its part, and these sums are added."
)
_METRIC = 5e-2  # of a trajectory: a row or two of a small set that change sides


@dataclass(frozen=True)
class Verdict:
    """What a comparison of two engines has found.

    Attributes:
        theirs: the reference.
        ours: the other engine.
        grade: how much they agree.
        first_step: the step in which they differ first, if they do; 0 is before the first one.
        quantity: what differs there first.
        theirs_value: of it.
        ours_value: of it.
        largest: the largest relative difference of each quantity in all steps.
        tolerance: of the grade, in a step's loss; `None` where there is none.
        why: the grade in a sentence.
        cause: the likely cause of a difference; `None` without one.
    """

    theirs: str
    ours: str
    grade: Grade
    first_step: int | None = None
    quantity: str | None = None
    theirs_value: float | int | str | None = None
    ours_value: float | int | str | None = None
    largest: Mapping[str, float] = field(default_factory=dict)
    tolerance: float | None = None
    why: str = ""
    cause: str | None = None

    def as_row(self) -> dict[str, Any]:
        """Return what is written."""
        return asdict(self)


class Point(NamedTuple):
    """Where two runs are not the same.

    Attributes:
        at: index of the step.
        quantity: what differs in it.
    """

    at: int
    quantity: str


class _Noise(NamedTuple):
    """Differences that are to be expected.

    Attributes:
        tolerances: of the quantities; empty if none are.
        why: their reason.
    """

    tolerances: Mapping[str, Tolerance]
    why: str


def judge(theirs: Run, ours: Run) -> Verdict:
    """Compare two runs.

    Args:
        theirs: the reference.
        ours: the other engine.

    Proved by: tests/compare/test_verdict.py, tests/compare/test_causes.py
    """
    names = theirs.engine, ours.engine
    failed = [run for run in (theirs, ours) if run.failure]
    if failed:
        told = (f"{run.engine} has failed: {run.failure.splitlines()[-1]}" for run in failed)
        return Verdict(*names, "failed", why="; ".join(told))
    largest = _largest(theirs, ours)
    if None not in (theirs.first_parameters, ours.first_parameters):
        begun = theirs.first_parameters, ours.first_parameters
        if begun[0] != begun[1]:
            cause = of_first_parameters(theirs, ours)
            return _differs(theirs, ours, 0, "parameters", begun, cause=cause, largest=largest)
    noise = _noise(theirs, ours)
    first = first_difference(theirs.steps, ours.steps)
    metric = _first_metric(theirs.metrics, ours.metrics, _tolerance_of_metrics(first, largest))
    if first is None and len(theirs.steps) == len(ours.steps) and not metric:
        why = f"All {len(ours.steps)} steps are equal to the bit, and so are all metrics."
        if largest.get("metrics"):
            why = f"All {len(ours.steps)} steps are equal to the bit, and the metrics to rounding."
            return Verdict(*names, "close", largest=largest, tolerance=CLOSE, why=why)
        return Verdict(*names, "exact", largest=largest, why=why)
    agreed = _agreement(first, largest, noise, theirs, ours)
    if agreed is None and first is not None:
        return _differs_at(_telling(first, noise, theirs, ours), largest, theirs, ours)
    if len(theirs.steps) != len(ours.steps):
        return _of_length(largest, theirs, ours)
    if metric:
        step, name, values = metric
        cause = "evaluation: training goes the same way, and what is measured on the evaluation set does not"
        return _differs(theirs, ours, step, name, values, cause=cause, largest=largest)
    assert first is not None
    assert agreed is not None
    grade, tolerance, why = agreed
    step, values = theirs.steps[first.at].step, _values(first, theirs, ours)
    return Verdict(*names, grade, step, first.quantity, *values, largest, tolerance, why)


def first_difference(theirs: Sequence[Step], ours: Sequence[Step]) -> Point | None:
    """Find the first step in which two runs are not equal to the bit, and what differs in it first."""
    for index, (their, our) in enumerate(zip(theirs, ours, strict=False)):
        for quantity in _QUANTITIES:
            left, right = getattr(their, quantity), getattr(our, quantity)
            if left != right and not (left != left and right != right):
                return Point(index, quantity)
    return None


def _agreement(
    first: Point | None, largest: Mapping[str, float], noise: _Noise, theirs: Run, ours: Run
) -> tuple[Grade, float, str] | None:
    """Grade runs that are not equal to the bit; `None` if they differ."""
    if _discrete(theirs, ours) is not None or first is None:
        return None
    if all(largest[name] <= CLOSE for name in _MEASURED):
        reason = noise.why or "Operations are done in another order."
        return "close", CLOSE, f"No step's values differ by more than {CLOSE:g}. {reason}"
    if not noise.tolerances:
        return None
    if _outside(noise, theirs, ours) is not None or _drifting(noise, theirs, ours) is not None:
        return None
    tolerance = noise.tolerances["loss"]
    why = (
        f"Each step's loss is within {tolerance.step:g}, and the mean difference within {tolerance.mean:g}. "
        f"{noise.why}"
    )
    return "same trajectory", tolerance.step, why


def _telling(first: Point, noise: _Noise, theirs: Run, ours: Run) -> Point:
    """Choose the difference that tells what is wrong.

    It is the first one, unless that may be rounding, which is seen at once where it is to be expected: then
    it is the first that is larger.
    """
    discrete = _discrete(theirs, ours)
    if not noise.tolerances or first.at >= _FIRST_NOISE or discrete == first:
        return first
    bound = max(CLOSE, noise.tolerances["parameter_norm"].step)
    if first.quantity == "parameters" and noise.tolerances is _OF_SUMS:
        bound = CLOSE  # the norm is equal to the bit: no sum of gradients was taken otherwise
    if _distance(first, theirs, ours) > bound:
        return first
    beyond = [point for point in (discrete, _outside(noise, theirs, ours)) if point is not None]
    if beyond:
        return min(beyond, key=lambda point: point.at)
    return _drifting(noise, theirs, ours) or first


def _discrete(theirs: Run, ours: Run) -> Point | None:
    """Find the first step with other rows, samples or learning rate, which no rounding explains."""
    for index, (their, our) in enumerate(zip(theirs.steps, ours.steps, strict=False)):
        for quantity in ("rows", "samples"):
            if getattr(their, quantity) != getattr(our, quantity):
                return Point(index, quantity)
        if relative(their.learning_rate, our.learning_rate) > 1e-9:
            return Point(index, "learning_rate")
    return None


def _outside(noise: _Noise, theirs: Run, ours: Run) -> Point | None:
    """Find the first step in which a value is beyond the tolerance."""
    for index, (their, our) in enumerate(zip(theirs.steps, ours.steps, strict=False)):
        for name in _MEASURED:
            if relative(getattr(their, name), getattr(our, name)) > noise.tolerances[name].step:
                return Point(index, "parameters" if name == "parameter_norm" else name)
    return None


def _drifting(noise: _Noise, theirs: Run, ours: Run) -> Point | None:
    """Find the quantity that drifts to one side, at the step in which it is farthest."""
    for name in _MEASURED:
        residuals = [
            (b - a) / max(abs(a), abs(b), 1e-300)
            for a, b in _pairs(name, theirs, ours)
            if a is not None and b is not None
        ]
        if residuals and abs(sum(residuals) / len(residuals)) > noise.tolerances[name].mean:
            index = max(range(len(residuals)), key=lambda index: abs(residuals[index]))
            return Point(index, "parameters" if name == "parameter_norm" else name)
    return None


def _noise(theirs: Run, ours: Run) -> _Noise:
    """Tell which differences are to be expected of two engines."""
    reasons, runs = [], (theirs, ours)
    precisions = {run.settings.get("mixed precision") or "no" for run in runs}
    dtypes = {str(run.settings.get("parameters' dtype")) for run in runs}
    low = sorted((precisions - {"no"}) | (dtypes & set(_LOW)))
    if low:
        reasons.append(f"Values are rounded to {' and '.join(low)}.")
    if any(run.settings.get("device") not in (None, "cpu") for run in runs):
        reasons.append("A GPU takes sums in an order of its own.")
    if reasons:
        same = len(precisions) == len(dtypes) == 1
        return _Noise(_OF_LOW_PRECISION if same else {}, " ".join(reasons))
    if is_sharded(theirs) != is_sharded(ours):
        return _Noise(_OF_SUMS, _SHARDED)
    if any((run.settings.get("ranks") or 1) > 1 for run in runs):
        return _Noise(_OF_SUMS, "Sums over ranks are taken in another order.")
    if len({run.settings.get("loss_normalization", "native") for run in runs}) > 1:
        return _Noise(_OF_SUMS, "Losses are weighted before they are summed, and not afterwards.")
    return _Noise({}, "")


def _largest(theirs: Run, ours: Run) -> dict[str, float]:
    """Measure the largest relative difference of each quantity, and of all metrics."""
    found = {
        name: max((relative(*pair) for pair in _pairs(name, theirs, ours)), default=0.0)
        for name in ("loss", "grad_norm", "learning_rate", "parameter_norm")
    }
    distances = _metric_distances(theirs.metrics, ours.metrics)
    return {**found, **({"metrics": max(distances.values())} if distances else {})}


def _pairs(name: str, theirs: Run, ours: Run) -> Iterator[tuple[Any, Any]]:
    for their, our in zip(theirs.steps, ours.steps, strict=False):
        yield getattr(their, name), getattr(our, name)


def _metric_distances(theirs: Sequence[Metrics], ours: Sequence[Metrics]) -> dict[tuple[Any, str], float]:
    """Measure how far metrics are apart, by step and name; infinitely if only one engine has them."""
    left, right = (
        {(row["step"], name): v for row in rows for name, v in row.items()} for rows in (theirs, ours)
    )
    return {
        key: _apart(left.get(key), right.get(key))
        for key in {**left, **right}
        if key[1] not in ("step", "epoch")
    }


def _apart(theirs: Any, ours: Any) -> float:
    if isinstance(theirs, (int, float)) and isinstance(ours, (int, float)):
        return relative(theirs, ours)
    return 0.0 if theirs == ours else float("inf")


def _tolerance_of_metrics(first: Point | None, largest: Mapping[str, float]) -> float:
    """Tell how far metrics may be apart: to rounding where training is the same to rounding."""
    is_close = first is None or all(largest[name] <= CLOSE for name in _MEASURED)
    return CLOSE if first is None else 1e-3 if is_close else _METRIC


def _first_metric(
    theirs: Sequence[Metrics], ours: Sequence[Metrics], tolerance: float
) -> tuple[int, str, tuple[Any, Any]] | None:
    beyond = [key for key, d in _metric_distances(theirs, ours).items() if d > tolerance]
    if not beyond:
        return None
    step, name = min(beyond)
    their, our = (
        next((row.get(name) for row in rows if row["step"] == step), None) for rows in (theirs, ours)
    )
    return int(step), name, (their, our)


def _values(point: Point, theirs: Run, ours: Run) -> tuple[Any, Any]:
    return getattr(theirs.steps[point.at], point.quantity), getattr(ours.steps[point.at], point.quantity)


def _distance(point: Point, theirs: Run, ours: Run) -> float:
    name = "parameter_norm" if point.quantity == "parameters" else point.quantity
    return _apart(*(getattr(run.steps[point.at], name) for run in (theirs, ours)))


def _differs_at(point: Point, largest: Mapping[str, float], theirs: Run, ours: Run) -> Verdict:
    step, values = theirs.steps[point.at].step, _values(point, theirs, ours)
    cause = cause_of(point.quantity, point.at, theirs, ours)
    return _differs(theirs, ours, step, point.quantity, values, cause=cause, largest=largest)


def _of_length(largest: Mapping[str, float], theirs: Run, ours: Run) -> Verdict:
    lengths = len(theirs.steps), len(ours.steps)
    cause = f"length: {theirs.engine} ends after {lengths[0]} steps, {ours.engine} after {lengths[1]}"
    return _differs(theirs, ours, min(lengths) + 1, "steps", lengths, cause=cause, largest=largest)


def _differs(
    theirs: Run,
    ours: Run,
    step: int,
    quantity: str,
    values: tuple[Any, Any],
    *,
    cause: str,
    largest: Mapping[str, float],
) -> Verdict:
    where = f"in step {step}" if step else "before the first step"
    why = f"{quantity} differs first {where}: {_shown(values[0])} and {_shown(values[1])}."
    return Verdict(
        theirs.engine, ours.engine, "differs", step, quantity, *values, largest=largest, why=why, cause=cause
    )


def _shown(value: Any) -> str:
    return f"{value:.8g}" if isinstance(value, float) else str(value)

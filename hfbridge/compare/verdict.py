"""The verdict on two engines: whether they do the same, and if not, where that begins and why.

grade             condition
exact             every step's rows, samples, loss, gradient norm, learning rate and parameters, and every
                  metric, are equal to the bit
close             samples and learning rates are equal; nothing else differs by more than `CLOSE`
same trajectory   samples and learning rates are equal, and differences are to be expected (sums over ranks
                  taken in another order, less than float32, a GPU): each step is within a tolerance, and
                  so, much narrower, is the mean of the signed differences: what drifts is no rounding
differs           anything else
failed            one of the two did not finish
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from hfbridge.compare.causes import (
    Run,
    explain_difference,
    explain_first_parameters,
    is_sharded,
    relative_difference,
)
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
# A value of bf16 has a relative error of 4e-3, a loss is made of some of them, and they have both signs.
_OF_LOW_PRECISION = {
    "loss": Tolerance(5e-2, 5e-3),
    "grad_norm": Tolerance(2e-1, 2e-2),
    "parameter_norm": Tolerance(1e-3, 1e-4),
}
_SHARDED = (
    "Sums over ranks are taken in another order, that of the gradient norm, too: where the ranks shard the "
    "gradients, each sums the squares of its part, and these sums are added."
)
_METRIC = 5e-2  # of a trajectory: a sample or two of a small set that change sides


@dataclass(frozen=True)
class Verdict:
    """What was found about two engines.

    Attributes:
        theirs: the reference.
        ours: the other engine.
        grade: how much they agree.
        first_step: the first that differs, 0 for before the first one; `None` where none does.
        quantity: what differs there first, of `theirs_value` and `ours_value`.
        theirs_value: of the reference.
        ours_value: of the other engine.
        largest: the largest relative difference of each quantity.
        tolerance: of the grade, in a step's loss.
        why: the grade in a sentence.
        cause: the likely cause of a difference.
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
    """Where two runs are not the same: index of the step, and what differs in it."""

    at: int
    quantity: str

    def values(self, theirs: Run, ours: Run) -> tuple[Any, Any]:
        """Return the quantity of both."""
        return getattr(theirs.steps[self.at], self.quantity), getattr(ours.steps[self.at], self.quantity)


class _Noise(NamedTuple):
    """Differences to be expected: tolerances by quantity, empty for none, and their reason."""

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
        reasons = (f"{run.engine} has failed: {run.failure.splitlines()[-1]}" for run in failed)
        return Verdict(*names, "failed", why="; ".join(reasons))
    noise, largest = _noise(theirs, ours), _largest(theirs, ours)

    def differ(step: int, quantity: str, values: tuple[Any, Any], cause: str) -> Verdict:
        where = f"in step {step}" if step else "before the first step"
        shown = " and ".join(f"{v:.8g}" if isinstance(v, float) else str(v) for v in values)
        why = f"{quantity} differs first {where}: {shown}."
        return Verdict(*names, "differs", step, quantity, *values, largest=largest, why=why, cause=cause)

    begun = theirs.first_parameters, ours.first_parameters
    if None not in begun and begun[0] != begun[1]:
        return differ(0, "parameters", begun, explain_first_parameters(theirs, ours))
    first = first_difference(theirs.steps, ours.steps)
    is_close = all(largest[name] <= CLOSE for name in _MEASURED)
    # Metrics may differ by rounding where training does.
    metric_tolerance = CLOSE if first is None else 1e-3 if is_close else _METRIC
    metric = _first_metric(theirs.metrics, ours.metrics, metric_tolerance)
    lengths = len(theirs.steps), len(ours.steps)
    if first is None and lengths[0] == lengths[1] and not metric:
        if largest.get("metrics"):
            why = f"All {lengths[1]} steps are equal to the bit, and the metrics to rounding."
            return Verdict(*names, "close", largest=largest, tolerance=CLOSE, why=why)
        why = f"All {lengths[1]} steps are equal to the bit, and so are all metrics."
        return Verdict(*names, "exact", largest=largest, why=why)
    agreed = None if first is None else _agreement(is_close, noise, theirs, ours)
    if first is not None and agreed is None:
        point = _most_telling(first, noise, theirs, ours)
        cause = explain_difference(point.quantity, point.at, theirs, ours)
        return differ(theirs.steps[point.at].step, point.quantity, point.values(theirs, ours), cause)
    if lengths[0] != lengths[1]:
        cause = f"length: {theirs.engine} ends after {lengths[0]} steps, {ours.engine} after {lengths[1]}"
        return differ(min(lengths) + 1, "steps", lengths, cause)
    if metric:
        cause = "evaluation: training is the same, and what is measured on the evaluation set is not"
        return differ(*metric, cause)
    assert first is not None
    assert agreed is not None
    grade, tolerance, why = agreed
    values = first.values(theirs, ours)
    return Verdict(
        *names, grade, theirs.steps[first.at].step, first.quantity, *values, largest, tolerance, why
    )


def first_difference(theirs: Sequence[Step], ours: Sequence[Step]) -> Point | None:
    """Find the first step in which two runs are not equal to the bit, and what differs in it first."""
    for index, (their, our) in enumerate(zip(theirs, ours, strict=False)):
        for quantity in _QUANTITIES:
            if _distance(getattr(their, quantity), getattr(our, quantity)):
                return Point(index, quantity)
    return None


def _agreement(is_close: bool, noise: _Noise, theirs: Run, ours: Run) -> tuple[Grade, float, str] | None:
    """Grade runs that are not equal to the bit; `None` if they differ."""
    if _first_discrete(theirs, ours) is not None:
        return None
    if is_close:
        reason = noise.why or "Operations are done in another order."
        return "close", CLOSE, f"No step's values differ by more than {CLOSE:g}. {reason}"
    if not noise.tolerances or _first_outside(noise, theirs, ours) or _largest_drift(noise, theirs, ours):
        return None
    tolerance = noise.tolerances["loss"]
    why = (
        f"Each step's loss is within {tolerance.step:g}, and the mean difference within {tolerance.mean:g}. "
        f"{noise.why}"
    )
    return "same trajectory", tolerance.step, why


def _most_telling(first: Point, noise: _Noise, theirs: Run, ours: Run) -> Point:
    """Choose the difference that shows what is wrong.

    It is the first one, unless that may be rounding, which shows at once where it is to be expected: then it
    is the first that is larger.
    """
    discrete = _first_discrete(theirs, ours)
    if not noise.tolerances or first.at >= _FIRST_NOISE or discrete == first:
        return first
    bound = max(CLOSE, noise.tolerances["parameter_norm"].step)
    if first.quantity == "parameters" and noise.tolerances is _OF_SUMS:
        bound = CLOSE  # the norm is equal to the bit: no sum of gradients was taken otherwise
    measured = first._replace(quantity="parameter_norm") if first.quantity == "parameters" else first
    if _distance(*measured.values(theirs, ours)) > bound:
        return first
    beyond = [point for point in (discrete, _first_outside(noise, theirs, ours)) if point is not None]
    if beyond:
        return min(beyond, key=lambda point: point.at)
    return _largest_drift(noise, theirs, ours) or first


def _first_discrete(theirs: Run, ours: Run) -> Point | None:
    """Find the first step with other rows, samples or learning rate, which no rounding explains."""
    for index, (their, our) in enumerate(zip(theirs.steps, ours.steps, strict=False)):
        for quantity in ("rows", "samples"):
            if getattr(their, quantity) != getattr(our, quantity):
                return Point(index, quantity)
        if relative_difference(their.learning_rate, our.learning_rate) > 1e-9:
            return Point(index, "learning_rate")
    return None


def _first_outside(noise: _Noise, theirs: Run, ours: Run) -> Point | None:
    """Find the first step in which a value is beyond the tolerance."""
    for index, (their, our) in enumerate(zip(theirs.steps, ours.steps, strict=False)):
        for name in _MEASURED:
            if relative_difference(getattr(their, name), getattr(our, name)) > noise.tolerances[name].step:
                return Point(index, "parameters" if name == "parameter_norm" else name)
    return None


def _largest_drift(noise: _Noise, theirs: Run, ours: Run) -> Point | None:
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
    """Find which differences are to be expected of two engines."""
    reasons, runs = [], (theirs, ours)
    precisions = {run.settings.get("mixed precision") or "no" for run in runs}
    dtypes = {str(run.settings.get("parameters' dtype")) for run in runs}
    low = sorted((precisions - {"no"}) | (dtypes & {"bfloat16", "float16"}))
    if low:
        reasons.append(f"Values are rounded to {' and '.join(low)}.")
    if any(run.settings.get("device") not in (None, "cpu") for run in runs):
        reasons.append("A GPU takes sums in an order of its own.")
    if reasons:
        is_same = len(precisions) == len(dtypes) == 1
        return _Noise(_OF_LOW_PRECISION if is_same else {}, " ".join(reasons))
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
        name: max((relative_difference(*pair) for pair in _pairs(name, theirs, ours)), default=0.0)
        for name in ("loss", "grad_norm", "learning_rate", "parameter_norm")
    }
    distances = [_distance(*pair) for pair in _metric_pairs(theirs.metrics, ours.metrics).values()]
    return {**found, "metrics": max(distances)} if distances else found


def _pairs(name: str, theirs: Run, ours: Run) -> Iterator[tuple[Any, Any]]:
    for their, our in zip(theirs.steps, ours.steps, strict=False):
        yield getattr(their, name), getattr(our, name)


def _metric_pairs(
    theirs: Sequence[Metrics], ours: Sequence[Metrics]
) -> dict[tuple[Any, str], tuple[Any, Any]]:
    """Pair metrics by step and name; `None` where only one engine has them."""
    left, right = (
        {(entry["step"], name): value for entry in entries for name, value in entry.items()}
        for entries in (theirs, ours)
    )
    keys = [key for key in {**left, **right} if key[1] not in ("step", "epoch")]
    return {key: (left.get(key), right.get(key)) for key in keys}


def _first_metric(
    theirs: Sequence[Metrics], ours: Sequence[Metrics], tolerance: float
) -> tuple[int, str, tuple[Any, Any]] | None:
    pairs = _metric_pairs(theirs, ours)
    beyond = [key for key, pair in pairs.items() if _distance(*pair) > tolerance]
    if not beyond:
        return None
    step, name = min(beyond)
    return int(step), name, pairs[step, name]


def _distance(theirs: Any, ours: Any) -> float:
    """Measure how far two values are apart; texts, or values of which only one is there, infinitely."""
    if isinstance(theirs, (int, float)) and isinstance(ours, (int, float)):
        return relative_difference(theirs, ours)
    return 0.0 if theirs == ours else float("inf")

"""Why two engines differ, as far as their records tell. Pure.

what differs first                       evidence                                  cause
rows, samples                            the same micro-batches elsewhere, or not  order of samples
loss                                     a factor, of the gradient norm, too       loss scale
                                         random states differ                      dropout
                                         of the size of bf16's rounding            precision
gradient norm, the loss being equal      a factor                                  loss scale
                                         one of the two shares its gradients       norm of shards
                                         it is max_grad_norm                       clipping
                                         random states, size, as above             dropout, precision
learning rate                            that of another step, or a factor         schedule
parameters, all else being equal         the norm is beyond max_grad_norm          clipping
                                         it is not                                 optimizer
metrics, parameters being equal                                                    evaluation
number of steps                                                                    length
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hfbridge.compare.record import Metrics, Step

BF16 = 2.0**-8
"""The largest relative error of rounding to bfloat16."""

_OF_BF16 = 8 * BF16  # of a loss, which several rounded operations have made
_ROUNDING = 1e-5  # of a loss or norm in float32
_SAME_FACTOR = 2e-3
_NEAREST_FACTOR = 0.02  # a loss that is nearer to 1 is no factor of somebody's


@dataclass(frozen=True)
class Run:
    """What one engine has done.

    Attributes:
        engine: its name.
        steps: what is recorded of each optimizer step.
        metrics: rows of its evaluations.
        first_parameters: digest of the parameters that it began with; `None` if it is not known.
        settings: with which it trained.
        failure: why it has no end; empty if it has one.
    """

    engine: str
    steps: Sequence[Step] = ()
    metrics: Sequence[Metrics] = ()
    first_parameters: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""


def relative(theirs: float | None, ours: float | None) -> float:
    """Measure a difference by the larger of two values; infinite if only one is a number."""
    if theirs is None or ours is None:
        return 0.0 if theirs is ours else float("inf")
    if theirs == ours or (theirs != theirs and ours != ours):
        return 0.0
    if theirs != theirs or ours != ours or float("inf") in (abs(theirs), abs(ours)):
        return float("inf")
    return abs(ours - theirs) / max(abs(theirs), abs(ours))


def is_sharded(run: Run) -> bool:
    """Whether the ranks of a run shared its gradients, so that none has seen all of them."""
    return str(run.settings.get("strategy") or "").startswith(("deepspeed", "fsdp"))


def cause_of(quantity: str, index: int, theirs: Run, ours: Run) -> str:
    """Name the likely cause of a difference.

    Args:
        quantity: what differs first.
        index: of the step in which it does, in both runs.
        theirs: reference.
        ours: the other.
    """
    causes: Mapping[str, Callable[[int, Run, Run], str]] = {
        "rows": _of_samples,
        "samples": _of_samples,
        "loss": _of_loss,
        "grad_norm": _of_norm,
        "learning_rate": _of_rate,
        "parameters": _of_parameters,
    }
    return causes[quantity](index, theirs, ours)


def of_first_parameters(theirs: Run, ours: Run) -> str:
    """Name the likely cause of weights that differ before the first step."""
    dtypes = [run.settings.get("parameters' dtype") for run in (theirs, ours)]
    if dtypes[0] != dtypes[1]:
        return f"precision: the parameters are {dtypes[0]} in one and {dtypes[1]} in the other"
    return (
        "weights: the engines do not begin with the same ones; build() draws them from something that "
        "differs between processes"
    )


def _of_samples(index: int, theirs: Run, ours: Run) -> str:
    their, our = theirs.steps[index], ours.steps[index]
    if their.rows != our.rows:
        return f"order of samples: the step has {their.rows} rows in one and {our.rows} in the other"
    elsewhere = next((step.step for step in theirs.steps if step.samples == our.samples), None)
    if elsewhere is not None:
        return (
            f"order of samples: what {ours.engine} trains in step {our.step}, {theirs.engine} trains in step "
            f"{elsewhere}"
        )
    return (
        "order of samples: other rows, or the same in another order (seed, sampler, shuffling, the ranks' "
        "shares), or a collator that has drawn otherwise (masking)"
    )


def _of_loss(index: int, theirs: Run, ours: Run) -> str:
    their, our = theirs.steps[index], ours.steps[index]
    factor, distance = _ratio(their.loss, our.loss), relative(their.loss, our.loss)
    of_norm = _ratio(their.grad_norm, our.grad_norm)
    if abs(factor - 1) > _NEAREST_FACTOR:
        known = _known_factor(factor, theirs, ours)
        if relative(factor, of_norm) < _SAME_FACTOR:
            return f"loss scale: loss and gradient norm are {factor:.4g} times {theirs.engine}'s{known}"
        if known and relative(of_norm, 1.0) < _SAME_FACTOR:
            return (
                f"loss scale: the loss is {factor:.4g} times {theirs.engine}'s{known}, the gradient norm is "
                "equal: only what is logged is scaled"
            )
    return _of_forward(distance, their, our, theirs, ours)


def _of_forward(distance: float, their: Step, our: Step, theirs: Run, ours: Run) -> str:
    """Name the cause of a forward, or a backward, with other results on the same rows and weights."""
    if their.random != our.random:
        return (
            "dropout: the rows are the same and the random states differ, so other units are dropped, or one "
            "of the two drops none"
        )
    precisions = [run.settings.get("mixed precision") for run in (theirs, ours)]
    if precisions[0] != precisions[1]:
        return f"precision: mixed precision is {precisions[0]} in one and {precisions[1]} in the other"
    of_norm = relative(their.grad_norm, our.grad_norm)  # a mean loss may agree by chance
    if max(distance, of_norm) <= _ROUNDING:
        return "rounding: the difference is that of sums in float32 that are taken in another order"
    if distance <= _OF_BF16:
        distance = max(distance, of_norm)
        return (
            f"precision: rows and random states are the same, and a relative difference of {distance:.1e} is "
            f"of the size of bf16's rounding (up to {BF16:.1e} a value)"
        )
    return (
        "model: rows and random states are the same, the results are not: another loss function, or other "
        "weights that no step has trained"
    )


def _of_norm(index: int, theirs: Run, ours: Run) -> str:
    their, our = theirs.steps[index], ours.steps[index]
    factor, limit = _ratio(their.grad_norm, our.grad_norm), _limit(ours) or _limit(theirs)
    distance = relative(their.grad_norm, our.grad_norm)
    if is_sharded(theirs) != is_sharded(ours) and their.random == our.random and distance <= _OF_BF16:
        return _of_shards(distance, theirs, ours)
    if limit and any(
        relative(one.grad_norm, limit) < _SAME_FACTOR < relative(other.grad_norm, limit)
        and (other.grad_norm or 0) > limit
        for one, other in ((their, our), (our, their))
    ):
        return f"clipping: one of the two notes the norm after clipping to max_grad_norm={limit:g}"
    known = _known_factor(factor, theirs, ours)
    if known:
        return (
            f"loss scale: the loss is equal and the gradient norm {factor:.4g} times "
            f"{theirs.engine}'s{known}: the gradients are scaled after the loss was noted, or those of ranks "
            "or micro-batches are summed and not averaged"
        )
    if their.random == our.random and distance > _OF_BF16:
        return (
            "gradients: the loss is equal and the gradient is not: those of some micro-batches or ranks are "
            "missing, or some were not cleared"
        )
    return _of_forward(distance, their, our, theirs, ours)


def _of_shards(distance: float, theirs: Run, ours: Run) -> str:
    whole, shared = (ours, theirs) if is_sharded(theirs) else (theirs, ours)
    return (
        f"norm of shards: loss and samples are equal, and the gradient norms are {distance:.1e} apart. "
        f"In {whole.engine} each rank has the whole gradient and sums its squares; in {shared.engine} each "
        "has a part, sums the squares of that, and the ranks' sums are added: another order, which rounds "
        "otherwise"
    )


def _of_rate(index: int, theirs: Run, ours: Run) -> str:
    our = ours.steps[index]
    their_rates = [step.learning_rate for step in theirs.steps]
    factor = _ratio(their_rates[index], our.learning_rate)
    ranks = int(_number(theirs, "ranks"))
    for offset, what in ((1, "one step ahead"), (-1, "one step behind")):
        if _agrees_when_shifted(their_rates, ours.steps, offset):
            return f"schedule: the learning rates of {ours.engine} are {what} of {theirs.engine}'s"
    if ranks > 1 and our.step * ranks <= len(their_rates):
        there = their_rates[(our.step - 1) * ranks]
        if relative(there, our.learning_rate) < 1e-6:
            return f"schedule: it moves on {ranks} times in a step, once for each rank"
    steady = {
        round(_ratio(a, b.learning_rate), 6) for a, b in zip(their_rates, ours.steps, strict=False) if a
    }
    if len(steady) == 1:
        return f"schedule: the learning rate is {factor:.4g} times {theirs.engine}'s in all steps"
    return (
        "schedule: the learning rates go another way: warm-up, number of steps that the schedule was made "
        "for, or its kind"
    )


def _agrees_when_shifted(theirs: Sequence[float], ours: Sequence[Step], offset: int) -> bool:
    pairs = [
        (theirs[index + offset], step.learning_rate)
        for index, step in enumerate(ours)
        if 0 <= index + offset < len(theirs)
    ]
    return len(pairs) > 2 and len(set(pairs)) > 2 and all(relative(*pair) < 1e-9 for pair in pairs)


def _of_parameters(index: int, theirs: Run, ours: Run) -> str:
    limits = [_limit(run) for run in (theirs, ours)]
    norms = [step.grad_norm or 0.0 for step in theirs.steps[: index + 1]]
    if limits[0] != limits[1]:
        return f"clipping: max_grad_norm is {limits[0]:g} in one and {limits[1]:g} in the other"
    limit = limits[0]
    if limit and norms[-1] > limit:
        first = all(norm <= limit for norm in norms[:-1]) and len(norms) > 1
        evidence = (
            "; no step before was clipped, and all are equal"
            if first
            else "; or the optimizer's update differs"
        )
        return (
            f"clipping: loss and gradient norm are equal, the norm of {norms[-1]:.4g} is beyond "
            f"max_grad_norm={limit:g}, and the update is not the same{evidence}"
        )
    return (
        "optimizer: loss, gradient norm and learning rate are equal and the update is not: another "
        "optimizer, weight decay, betas or epsilon, or gradients clipped that should not be"
    )


def _known_factor(factor: float, theirs: Run, ours: Run) -> str:
    """Name the number that a factor, or its inverse, is; empty if it is none that is known."""
    for value, name in _factors(theirs, ours):
        for one, verb in ((value, "is"), (1 / value, "is one by")):
            if value > 1 and relative(factor, one) < _SAME_FACTOR:
                return f", which {verb} {name}{_native_factor(theirs, ours)}"
    return ""


def _factors(theirs: Run, ours: Run) -> Iterator[tuple[float, str]]:
    for run in (theirs, ours):
        steps, ranks = _number(run, "gradient_accumulation_steps"), _number(run, "ranks")
        yield steps, f"gradient_accumulation_steps={steps:g}"
        yield ranks, f"the number of ranks, {ranks:g}"
        yield steps * ranks, f"gradient_accumulation_steps times ranks, {steps:g} times {ranks:g}"


def _native_factor(theirs: Run, ours: Run) -> str:
    kinds = {run.settings.get("loss_normalization", "native") for run in (theirs, ours)}
    if kinds != {"exact", "native"}:
        return ""
    return (
        "; the native Trainer has this factor for models that ignore num_items_in_batch, and hfbridge's "
        '"exact" '
        "has not"
    )


def _ratio(theirs: float | None, ours: float | None) -> float:
    return ours / theirs if theirs and ours is not None else float("nan")


def _limit(run: Run) -> float:
    return _number(run, "max_grad_norm", default=0.0)


def _number(run: Run, name: str, *, default: float = 1.0) -> float:
    return float(run.settings.get(name) or default)

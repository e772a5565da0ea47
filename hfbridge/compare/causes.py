"""Name why two engines differ, as far as their records show.

what differs first                       evidence                                  cause
rows, samples                            the same micro-batches elsewhere, or not  order of samples
loss                                     a factor, of the gradient norm, too       loss scale
                                         random states differ                      dropout
                                         of the size of bf16's rounding            precision
gradient norm, the loss being equal      a factor                                  loss scale
                                         one of the two shards its gradients       norm of shards
                                         it is max_grad_norm                       clipping
                                         random states, size, as above             dropout, precision
learning rate                            that of another step, or a factor         schedule
parameters, all else being equal         the norm is beyond max_grad_norm          clipping
                                         it is not                                 optimizer
metrics, parameters being equal                                                    evaluation
number of steps                                                                    length
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hfbridge.compare.record import Metrics, Step

BF16 = 2.0**-8
"""The largest relative error of rounding to bfloat16."""

_OF_BF16 = 8 * BF16  # of a loss, which several rounded operations have made
_ROUNDING = 1e-5  # of a loss or norm in float32
_SAME_FACTOR = 2e-3
_NEAREST_FACTOR = 0.02  # a loss that is nearer to 1 has not been scaled


@dataclass(frozen=True)
class Run:
    """What one engine recorded.

    Attributes:
        engine: its name.
        steps: one record per optimizer step.
        metrics: one entry per evaluation.
        first_parameters: digest of the initial parameters; `None` if unknown.
        settings: with which it trained.
        failure: why it did not finish; empty if it did.
    """

    engine: str
    steps: Sequence[Step] = ()
    metrics: Sequence[Metrics] = ()
    first_parameters: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""


def relative_difference(theirs: float | None, ours: float | None) -> float:
    """Return a difference relative to the larger value.

    Returns:
        From 0 (equal to the bit, NaN included) to 2; infinity if only one is there, or is finite.
    """
    if theirs is None or ours is None:
        return 0.0 if theirs is ours else math.inf
    if theirs == ours or (math.isnan(theirs) and math.isnan(ours)):
        return 0.0
    if not (math.isfinite(theirs) and math.isfinite(ours)):
        return math.inf
    return abs(ours - theirs) / max(abs(theirs), abs(ours))


def is_sharded(run: Run) -> bool:
    """Whether the ranks of a run shard its gradients, so that none has all of them."""
    return str(run.settings.get("strategy") or "").startswith(("deepspeed", "fsdp"))


def explain_difference(quantity: str, index: int, theirs: Run, ours: Run) -> str:
    """Name the likely cause of a difference.

    Args:
        quantity: what differs first.
        index: of the step in which it does, in both runs.
        theirs: reference.
        ours: the other.
    """
    explain = {
        "rows": _explain_samples,
        "samples": _explain_samples,
        "loss": _explain_loss,
        "grad_norm": _explain_norm,
        "learning_rate": _explain_rate,
        "parameters": _explain_parameters,
    }[quantity]
    return explain(index, theirs, ours)


def explain_first_parameters(theirs: Run, ours: Run) -> str:
    """Name the likely cause of weights that differ before the first step."""
    their, our = (run.settings.get("parameters' dtype") for run in (theirs, ours))
    if their != our:
        return f"precision: the parameters are {their} in one and {our} in the other"
    return (
        "weights: the engines do not begin with the same ones; build() draws them from something that "
        "differs between processes"
    )


def _explain_samples(index: int, theirs: Run, ours: Run) -> str:
    their, our = theirs.steps[index], ours.steps[index]
    if their.rows != our.rows:
        return f"order of samples: the step has {their.rows} rows in one and {our.rows} in the other"
    other = next((step.step for step in theirs.steps if step.samples == our.samples), None)
    if other is not None:
        return (
            f"order of samples: what {ours.engine} trains in step {our.step}, {theirs.engine} trains in step "
            f"{other}"
        )
    return (
        "order of samples: other rows, or another order (seed, sampler, shuffling, shards of the ranks), or "
        "other random choices of the collator (masking)"
    )


def _explain_loss(index: int, theirs: Run, ours: Run) -> str:
    their, our = theirs.steps[index], ours.steps[index]
    factor, of_norm = _ratio(their.loss, our.loss), _ratio(their.grad_norm, our.grad_norm)
    if abs(factor - 1) > _NEAREST_FACTOR:
        known = _known_factor(factor, theirs, ours)
        if relative_difference(factor, of_norm) < _SAME_FACTOR:
            return f"loss scale: loss and gradient norm are {factor:.4g} times {theirs.engine}'s{known}"
        if known and relative_difference(of_norm, 1.0) < _SAME_FACTOR:
            return (
                f"loss scale: the loss is {factor:.4g} times {theirs.engine}'s{known}, the gradient norm is "
                "equal: only what is logged is scaled"
            )
    return _explain_forward(relative_difference(their.loss, our.loss), index, theirs, ours)


def _explain_forward(distance: float, index: int, theirs: Run, ours: Run) -> str:
    """Name the cause of a forward, or a backward, with other results on the same samples and weights."""
    their, our = theirs.steps[index], ours.steps[index]
    if their.random != our.random:
        return (
            "dropout: the rows are the same and the random states differ, so other units are dropped, or one "
            "of the two drops none"
        )
    precisions = [run.settings.get("mixed precision") for run in (theirs, ours)]
    if precisions[0] != precisions[1]:
        return f"precision: mixed precision is {precisions[0]} in one and {precisions[1]} in the other"
    largest = max(distance, relative_difference(their.grad_norm, our.grad_norm))  # a loss may agree by chance
    if largest <= _ROUNDING:
        return "rounding: the difference is that of sums in float32 that are taken in another order"
    if distance <= _OF_BF16:
        return (
            f"precision: rows and random states are the same, and a relative difference of {largest:.1e} is "
            f"of the size of bf16's rounding (up to {BF16:.1e} a value)"
        )
    return (
        "model: rows and random states are the same, the results are not: another loss function, or other "
        "weights that no step has trained"
    )


def _explain_norm(index: int, theirs: Run, ours: Run) -> str:
    their, our = theirs.steps[index], ours.steps[index]
    limit = _number(ours, "max_grad_norm", 0.0) or _number(theirs, "max_grad_norm", 0.0)
    distance, is_same_random = relative_difference(their.grad_norm, our.grad_norm), their.random == our.random
    if is_sharded(theirs) != is_sharded(ours) and is_same_random and distance <= _OF_BF16:
        full, sharded = (ours, theirs) if is_sharded(theirs) else (theirs, ours)
        return (
            f"norm of shards: loss and samples are equal, and the gradient norms are {distance:.1e} apart. "
            f"In {full.engine} each rank has the whole gradient and sums its squares; in {sharded.engine} "
            "each has a part, sums the squares of that, and the ranks' sums are added: another order, which "
            "rounds otherwise"
        )
    if limit and any(
        relative_difference(one.grad_norm, limit) < _SAME_FACTOR < relative_difference(other.grad_norm, limit)
        and (other.grad_norm or 0) > limit
        for one, other in ((their, our), (our, their))
    ):
        return f"clipping: one of the two notes the norm after clipping to max_grad_norm={limit:g}"
    factor = _ratio(their.grad_norm, our.grad_norm)
    known = _known_factor(factor, theirs, ours)
    if known:
        return (
            f"loss scale: the loss is equal and the gradient norm {factor:.4g} times "
            f"{theirs.engine}'s{known}: the gradients are scaled after the loss was noted, or those of ranks "
            "or micro-batches are summed and not averaged"
        )
    if is_same_random and distance > _OF_BF16:
        return (
            "gradients: the loss is equal and the gradient is not: those of some micro-batches or ranks are "
            "missing, or some were not cleared"
        )
    return _explain_forward(distance, index, theirs, ours)


def _explain_rate(index: int, theirs: Run, ours: Run) -> str:
    our = ours.steps[index]
    rates = [step.learning_rate for step in theirs.steps]
    ranks = int(_number(theirs, "ranks"))
    for offset, where in ((1, "ahead of"), (-1, "after")):
        if _agree_when_shifted(rates, ours.steps, offset):
            return f"schedule: the learning rates of {ours.engine} are one step {where} {theirs.engine}'s"
    at = (our.step - 1) * ranks
    if (
        ranks > 1
        and our.step * ranks <= len(rates)
        and relative_difference(rates[at], our.learning_rate) < 1e-6
    ):
        return f"schedule: it moves on {ranks} times in a step, once for each rank"
    factors = {round(_ratio(a, b.learning_rate), 6) for a, b in zip(rates, ours.steps, strict=False) if a}
    if len(factors) == 1:
        factor = _ratio(rates[index], our.learning_rate)
        return f"schedule: the learning rate is {factor:.4g} times {theirs.engine}'s in all steps"
    return "schedule: another warm-up, another number of steps for which it was made, or another kind"


def _agree_when_shifted(theirs: Sequence[float], ours: Sequence[Step], offset: int) -> bool:
    pairs = [
        (theirs[index + offset], step.learning_rate)
        for index, step in enumerate(ours)
        if 0 <= index + offset < len(theirs)
    ]
    return len(set(pairs)) > 2 and all(relative_difference(*pair) < 1e-9 for pair in pairs)


def _explain_parameters(index: int, theirs: Run, ours: Run) -> str:
    limit, our_limit = (_number(run, "max_grad_norm", 0.0) for run in (theirs, ours))
    if limit != our_limit:
        return f"clipping: max_grad_norm is {limit:g} in one and {our_limit:g} in the other"
    *earlier, norm = [step.grad_norm or 0.0 for step in theirs.steps[: index + 1]]
    if limit and norm > limit:
        is_first = earlier and max(earlier) <= limit
        evidence = "no step before was clipped, and all are equal" if is_first else "or the update differs"
        return (
            f"clipping: loss and gradient norm are equal, the norm of {norm:.4g} is beyond "
            f"max_grad_norm={limit:g}, and the update is not the same; {evidence}"
        )
    return (
        "optimizer: loss, gradient norm and learning rate are equal and the update is not: another "
        "optimizer, weight decay, betas or epsilon, or gradients clipped that should not be"
    )


def _known_factor(factor: float, theirs: Run, ours: Run) -> str:
    """Name the setting that a factor, or its inverse, equals; empty if there is none."""
    kinds = {run.settings.get("loss_normalization", "native") for run in (theirs, ours)}
    hint = (
        "; the HF Trainer has this factor for models that ignore num_items_in_batch, and hfbridge's "
        '"exact" has not'
    )
    for value, name in _factors(theirs, ours):
        for one, verb in ((value, "is"), (1 / value, "is one by")):
            if value > 1 and relative_difference(factor, one) < _SAME_FACTOR:
                return f", which {verb} {name}{hint if kinds == {'exact', 'native'} else ''}"
    return ""


def _factors(theirs: Run, ours: Run) -> Iterator[tuple[float, str]]:
    for run in (theirs, ours):
        steps, ranks = _number(run, "gradient_accumulation_steps"), _number(run, "ranks")
        yield steps, f"gradient_accumulation_steps={steps:g}"
        yield ranks, f"the number of ranks, {ranks:g}"
        yield steps * ranks, f"gradient_accumulation_steps times ranks, {steps:g} times {ranks:g}"


def _ratio(theirs: float | None, ours: float | None) -> float:
    return ours / theirs if theirs and ours is not None else math.nan


def _number(run: Run, name: str, default: float = 1.0) -> float:
    return float(run.settings.get(name) or default)

"""From collected predictions to the metrics the native Trainer reports; knows Hugging Face.

<prefix>_loss                     weighted mean of the batches' losses
<prefix>_<name>                   what compute_metrics returns
<prefix>_runtime, _samples_per_second, _steps_per_second
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import EvalPrediction
from transformers.trainer_utils import denumpify_detensorize, speed_metrics

from hfbridge.errors import MetricsError
from hfbridge.evaluation.gather import Collected

logger = logging.getLogger(__name__)

ComputeMetrics = Callable[[EvalPrediction], dict[str, Any]]


def metrics_of(
    collected: Collected,
    *,
    prefix: str,
    compute_metrics: ComputeMetrics | None,
    by_rows: bool,
    drop_non_finite: bool,
) -> dict[str, Any]:
    """Compute the metrics of one evaluation, without its speed.

    Args:
        collected: predictions, labels and losses of the whole set.
        prefix: "eval", say; put before every name that does not begin with it.
        compute_metrics: the user's function; called when there are predictions and labels.
        by_rows: weigh the batches' losses by rows, as native does, and not by items.
        drop_non_finite: leave NaN and infinite losses out of the mean, unless all are.

    Raises:
        MetricsError: `compute_metrics` did not return a dict.

    Mirrors: transformers.Trainer.evaluation_loop
    """
    metrics: dict[str, Any] = {}
    if compute_metrics is not None and collected.predictions is not None and collected.label_ids is not None:
        given = EvalPrediction(predictions=collected.predictions, label_ids=collected.label_ids)
        metrics = checked_metrics(compute_metrics(given), compute_metrics)
    metrics = denumpify_detensorize(metrics)
    if collected.losses is not None:
        metrics[f"{prefix}_loss"] = mean_loss(collected, by_rows=by_rows, drop_non_finite=drop_non_finite)
    for name in list(metrics):
        if not name.startswith(f"{prefix}_"):
            metrics[f"{prefix}_{name}"] = metrics.pop(name)
    return metrics


def rehearse(compute_metrics: ComputeMetrics, predictions: Any, label_ids: Any) -> None:
    """Call `compute_metrics` on a few rows before training, to see that it returns a dict.

    An exception of the function is not reported: many metrics need more than a few rows, or all classes.

    Raises:
        MetricsError: it returned something else.
    """
    try:
        returned = compute_metrics(EvalPrediction(predictions=predictions, label_ids=label_ids))
    except Exception as error:
        logger.info("compute_metrics could not be tried on a few rows: %s", error)
        return
    checked_metrics(returned, compute_metrics)


def checked_metrics(returned: object, compute_metrics: ComputeMetrics) -> dict[str, Any]:
    """Copy what `compute_metrics` returned.

    Raises:
        MetricsError: it is not a dict with names as keys.
    """
    name = getattr(compute_metrics, "__qualname__", repr(compute_metrics))
    if not isinstance(returned, dict) or not all(isinstance(key, str) for key in returned):
        raise MetricsError(
            f"compute_metrics ({name}) returned {returned!r}; it must return a dict of names and values, "
            "such as "
            '{"accuracy": 0.91}.'
        )
    return dict(returned)


def mean_loss(collected: Collected, *, by_rows: bool, drop_non_finite: bool) -> float:
    """Average the batches' losses by what they are means of.

    Args:
        collected: losses and weights; there is at least one.
        by_rows: the weights are rows: repeat each loss as often and average in the losses' own precision, as
            native does, whose rounding is part of its result. Otherwise they are items, averaged in float64.
        drop_non_finite: leave NaN and infinite losses out, unless all are.
    """
    losses, weights = collected.losses, collected.weights
    assert losses is not None
    assert weights is not None
    finite = np.isfinite(losses)
    if drop_non_finite and finite.any():
        losses, weights = losses[finite], weights[finite]
    if by_rows:
        return float(np.repeat(losses, weights).mean())
    return float(np.average(losses.astype(np.float64), weights=weights)) if weights.any() else 0.0


def speed_of(prefix: str, *, start_s: float, samples: int, batches: int) -> dict[str, float]:
    """Report how long an evaluation took and how many samples and batches it did in a second."""
    speed: dict[str, float] = speed_metrics(prefix, start_s, num_samples=samples, num_steps=batches)
    return speed

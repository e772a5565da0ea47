"""Compute the metrics that the HF Trainer reports from collected predictions.

<prefix>_loss                     weighted mean of the batches' losses
<prefix>_model_preparation_time   seconds of preparing the model, without training before
<prefix>_<name>                   what compute_metrics returns
<prefix>_runtime, _samples_per_second, _steps_per_second
"""

import inspect
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from transformers import EvalPrediction
from transformers.trainer_utils import denumpify_detensorize, speed_metrics

from hfbridge.errors import MetricsError, name_of
from hfbridge.evaluation.collector import Collected

ComputeMetrics = Callable[..., dict[str, Any]]
_OWN_NAMES = ("loss", "model_preparation_time", "runtime", "samples_per_second", "steps_per_second")


def prediction_of(collected: Collected, *, includes: Iterable[str]) -> EvalPrediction:
    """Make the argument of `compute_metrics`; `includes` may hold "inputs" and "loss"."""
    return EvalPrediction(
        predictions=collected.predictions,
        label_ids=collected.label_ids,
        inputs=collected.inputs if "inputs" in includes else None,
        losses=collected.losses if "loss" in includes else None,
    )


def name_metrics(
    computed: dict[str, Any], *, prefix: str, loss: float | None, preparation_s: float | None
) -> dict[str, Any]:
    """Return the metrics of one evaluation, without its speed.

    Args:
        computed: by `compute_metrics`.
        prefix: such as "eval"; added to every name that does not begin with it.
        loss: mean loss of the set; `None` without labels.
        preparation_s: time of preparing the model; `None` leaves it out.

    Mirrors: transformers.Trainer.evaluation_loop
    """
    metrics: dict[str, Any] = denumpify_detensorize(dict(computed))
    if loss is not None:
        metrics[f"{prefix}_loss"] = loss
    if preparation_s is not None:
        metrics[f"{prefix}_model_preparation_time"] = round(preparation_s, 4)
    for name in list(metrics):
        if not name.startswith(f"{prefix}_"):
            metrics[f"{prefix}_{name}"] = metrics.pop(name)
    return metrics


def checked_metrics(returned: object, compute_metrics: ComputeMetrics) -> dict[str, Any]:
    """Copy what `compute_metrics` returned.

    Raises:
        MetricsError: it is not a dict with names as keys.
    """
    if not isinstance(returned, dict) or not all(isinstance(key, str) for key in returned):
        raise MetricsError(
            f"compute_metrics ({name_of(compute_metrics)}) returned {returned!r}; it must return a dict of "
            'names and values, such as {"accuracy": 0.91}.'
        )
    return dict(returned)


def check_saved(metrics: dict[str, Any]) -> None:
    """Check that the metrics of a run can be saved with its log entries, in trainer_state.json.

    Raises:
        MetricsError: JSON does not hold one of them; that would end the run at its first checkpoint.
    """
    for name, value in metrics.items():
        try:
            json.dumps(value, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise MetricsError(
                "compute_metrics must return what JSON holds, which checkpoints keep in trainer_state.json; "
                f"{name} holds a {type(value).__name__}. Return numbers, texts or lists: array.tolist(), "
                'say; or set save_strategy="no".'
            ) from error


def join_metrics(computed: dict[str, Any], running: dict[str, float], *, prefix: str) -> dict[str, Any]:
    """Join the metrics of `compute_metrics` and of `metrics`.

    Args:
        computed: the former.
        running: the latter.
        prefix: of the evaluation.

    Raises:
        MetricsError: both have a metric of one name, or one has a name of the evaluation itself.
    """
    taken = {*(name.removeprefix(f"{prefix}_") for name in computed), *_OWN_NAMES}
    shared = [name for name in running if name.removeprefix(f"{prefix}_") in taken]
    if shared:
        raise MetricsError(
            f"metrics= has {', '.join(shared)}, a name of compute_metrics or of the evaluation itself "
            f'({", ".join(sorted(taken))}). Rename it: metrics={{"name": metric}}.'
        )
    return {**computed, **running}


def checked_logits(logits: Any, preprocess: Callable[..., Any]) -> Any:
    """Return what `preprocess_logits_for_metrics` made of a batch's logits.

    Raises:
        MetricsError: it is `None`, with which the HF Trainer silently does not call `compute_metrics`.
    """
    if logits is None:
        raise MetricsError(
            f"preprocess_logits_for_metrics ({name_of(preprocess)}) returned None; it must return a tensor "
            "or a tuple of tensors, the predictions for compute_metrics. Is its return statement missing?"
        )
    return logits


def check_called_by_batch(compute_metrics: ComputeMetrics) -> None:
    """Check that `compute_metrics` can be called batch by batch.

    Raises:
        MetricsError: it has no parameter `compute_result`.

    Mirrors: transformers.Trainer._validate_args
    """
    parameters = inspect.signature(compute_metrics).parameters
    if "compute_result" not in parameters:
        raise MetricsError(
            f"batch_eval_metrics=True, and compute_metrics ({name_of(compute_metrics)}) takes "
            f"{', '.join(parameters) or 'nothing'}. It must take compute_result, which is True for the last "
            "batch, when it returns the metrics of all."
        )


def check_is_computed(name: str, known: Iterable[str]) -> None:
    """Check that evaluations have the metric of `metric_for_best_model`.

    Args:
        name: the setting.
        known: metrics of an evaluation.

    Raises:
        MetricsError: they do not have it.
    """
    wanted, names = metric_name(name), sorted(known)
    if wanted not in names:
        raise MetricsError(
            f"metric_for_best_model={name!r} is no metric of the evaluation, which has {', '.join(names)}. "
            "Choose one of these, or return it from compute_metrics."
        )


def metric_name(name: str) -> str:
    """Return the full name of the metric of `metric_for_best_model`."""
    return name if name.startswith("eval_") else f"eval_{name}"


def mean_loss(collected: Collected, *, drop_non_finite: bool) -> float | None:
    """Average the losses of samples, in their own precision, or those of batches by their items, in float64.

    Args:
        collected: without losses the mean is `None`.
        drop_non_finite: leave NaN and infinite losses out, unless all are.

    Raises:
        MetricsError: the losses of a single round were gathered as objects, with which the HF Trainer fails.

    Mirrors: transformers.Trainer.evaluation_loop
    """
    if collected.means is not None:
        losses, weights = _finite(drop_non_finite, collected.means, collected.items)
        return float(np.average(losses.astype(np.float64), weights=weights)) if weights.any() else 0.0
    losses = collected.losses
    if losses is None:
        return None
    if isinstance(losses, list):
        if any(part.ndim == 0 for part in losses):
            raise MetricsError(
                "eval_use_gather_object=True does not support a set of a single round on several ranks. "
                "Leave "
                'it out, or use loss_normalization="exact".'
            )
        losses = np.concatenate(losses)
    (losses,) = _finite(drop_non_finite, losses)
    return float(losses.mean())


def _finite(drops: bool, losses: Any, *others: Any) -> tuple[Any, ...]:
    """Drop losses that are not finite, and the values that belong to them."""
    finite = np.isfinite(losses)
    if not drops or not finite.any():
        return losses, *others
    return tuple(values[finite] for values in (losses, *others))


def speed_of(prefix: str, *, start_s: float, samples: int, batches: int) -> dict[str, float]:
    """Return runtime, samples per second and batches per second of an evaluation."""
    speed: dict[str, float] = speed_metrics(prefix, start_s, num_samples=samples, num_steps=batches)
    return speed

"""From collected predictions to the metrics the native Trainer reports; knows Hugging Face.

<prefix>_loss                     weighted mean of the batches' losses
<prefix>_model_preparation_time   seconds that the model took to be made ready; where no training precedes
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

from hfbridge.errors import MetricsError
from hfbridge.evaluation.collector import Collected

ComputeMetrics = Callable[..., dict[str, Any]]
_OWN_NAMES = ("loss", "model_preparation_time", "runtime", "samples_per_second", "steps_per_second")


def prediction_of(collected: Collected, *, includes: Iterable[str]) -> EvalPrediction:
    """Make what `compute_metrics` is given.

    Args:
        collected: what the whole set gave.
        includes: "inputs", "loss", both or neither: what is given beside predictions and labels.
    """
    return EvalPrediction(
        predictions=collected.predictions,
        label_ids=collected.label_ids,
        inputs=collected.inputs if "inputs" in includes else None,
        losses=collected.losses if "loss" in includes else None,
    )


def name_metrics(
    computed: dict[str, Any], *, prefix: str, loss: float | None, preparation_s: float | None
) -> dict[str, Any]:
    """Put the metrics of one evaluation together, without its speed.

    Args:
        computed: what `compute_metrics` returned.
        prefix: "eval", say; put before every name that does not begin with it.
        loss: mean loss of the set; `None` without labels.
        preparation_s: how long the model took to be made ready; `None` leaves it out.

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
            f"compute_metrics ({_name(compute_metrics)}) returned {returned!r}; it must return a dict of "
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


def joined_metrics(computed: dict[str, Any], running: dict[str, float], *, prefix: str) -> dict[str, Any]:
    """Join what `compute_metrics` and `metrics` gave.

    Args:
        computed: the former.
        running: the latter.
        prefix: of the names of the evaluation.

    Raises:
        MetricsError: both give a number of one name, or one goes by a name of the evaluation's own.
    """

    def plain(name: str) -> str:
        return name.removeprefix(f"{prefix}_")

    taken = {*map(plain, computed), *_OWN_NAMES}
    shared = [name for name in running if plain(name) in taken]
    if shared:
        raise MetricsError(
            f"metrics= has {', '.join(shared)}, a name that compute_metrics or the evaluation itself gives "
            f'another number ({", ".join(sorted(taken))}). Name it otherwise: metrics={{"name": metric}}.'
        )
    return {**computed, **running}


def checked_logits(logits: Any, preprocess: Callable[..., Any]) -> Any:
    """Return what `preprocess_logits_for_metrics` made of a batch's logits.

    Raises:
        MetricsError: nothing; natively that leaves `compute_metrics` uncalled, without a word.
    """
    if logits is None:
        raise MetricsError(
            f"preprocess_logits_for_metrics ({_name(preprocess)}) returned None; it must return what "
            "compute_metrics is to get as predictions: a tensor, or a tuple of tensors. Is its return "
            "statement missing?"
        )
    return logits


def check_called_by_batch(compute_metrics: ComputeMetrics) -> None:
    """See that `compute_metrics` can be called batch by batch.

    Raises:
        MetricsError: it does not take `compute_result`.

    Mirrors: transformers.Trainer._validate_args
    """
    parameters = inspect.signature(compute_metrics).parameters
    if "compute_result" not in parameters:
        raise MetricsError(
            f"batch_eval_metrics=True, and compute_metrics ({_name(compute_metrics)}) takes "
            f"{', '.join(parameters) or 'nothing'}. It must take compute_result, too: it is called for every "
            "batch with tensors, and compute_result=True for the last one, when it returns the metrics of "
            "all."
        )


def check_is_computed(name: str, known: Iterable[str]) -> None:
    """See that evaluations give the metric that `metric_for_best_model` names.

    Args:
        name: the setting.
        known: names of the metrics of an evaluation.

    Raises:
        MetricsError: they do not.
    """
    wanted, names = metric_name(name), sorted(known)
    if wanted not in names:
        raise MetricsError(
            f"metric_for_best_model={name!r} is no metric of the evaluation, which gave {', '.join(names)}. "
            "Choose one of these, or have compute_metrics return it."
        )


def metric_name(name: str) -> str:
    """Name the metric that `metric_for_best_model` means."""
    return name if name.startswith("eval_") else f"eval_{name}"


def mean_loss(collected: Collected, *, drop_non_finite: bool) -> float | None:
    """Average the losses of the rows; or, in float64, those of the batches by what they are means of.

    Args:
        collected: without losses there is no mean. Those of rows are averaged in their own precision, as
            native does, whose rounding is part of its result.
        drop_non_finite: leave NaN and infinite losses out, unless all are.

    Raises:
        MetricsError: the losses of a single round were gathered as objects; native fails, too.

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
                "eval_use_gather_object=True: on several ranks the losses of a set of a single round cannot "
                'be joined that way. Leave it out, or use loss_normalization="exact".'
            )
        losses = np.concatenate(losses)
    (losses,) = _finite(drop_non_finite, losses)
    return float(losses.mean())


def _finite(drops: bool, losses: Any, *others: Any) -> tuple[Any, ...]:
    """Leave losses that are not finite out, and what belongs to them."""
    finite = np.isfinite(losses)
    if not drops or not finite.any():
        return losses, *others
    return tuple(values[finite] for values in (losses, *others))


def speed_of(prefix: str, *, start_s: float, samples: int, batches: int) -> dict[str, float]:
    """Report how long an evaluation took and how many samples and batches it did in a second."""
    speed: dict[str, float] = speed_metrics(prefix, start_s, num_samples=samples, num_steps=batches)
    return speed


def _name(function: object) -> str:
    return getattr(function, "__qualname__", repr(function))

"""Update metrics of torchmetrics batch by batch, without keeping logits.

a batch's outputs and labels [batch, ...]        arguments of a metric's `update`
[batch, length, classes], [batch, length]        [labels, classes], [labels] (not Perplexity); labels of the
                                                 next position where the loss predicts it
[batch, 1] and [batch]                           [batch] and [batch]
multi-label: float labels                        integer labels
several outputs, one tensor of labels            the first output
anything else, such as several labels            both unchanged
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.metric import jit_distributed_available
from torchmetrics.text import Perplexity
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from hfbridge.distributed.collectives import gather as gather_objects
from hfbridge.errors import MetricsError

MetricsSource = Metric | MetricCollection | Mapping[str, Metric | MetricCollection]

_IGNORED = -100
_MOST_NUMBERS = 1000  # of one metric, in a log entry
_OF_SEQUENCES = (Perplexity,)  # need unflattened outputs and labels


class RunningMetrics:
    """Metrics of an evaluation that are updated batch by batch, and are in no checkpoint.

    Private names of torchmetrics, pinned by tests/unit/evaluation/test_torchmetrics.py: `Metric._reductions`
    and `Metric._sync_dist`, which decide whether ranks can join a state.

    Args:
        metrics: copied; a single metric is named by its class, as in a MetricCollection.

    Raises:
        MetricsError: these are no metrics of torchmetrics.

    Proved by: tests/unit/evaluation/test_torchmetrics.py, tests/parity/test_running_metrics.py,
        tests/distributed/test_running_metrics.py
    """

    def __init__(self, metrics: MetricsSource) -> None:
        copied = _to_collection(metrics)
        of_sequences, others = dict[str, Any](), dict[str, Any]()
        for name, metric in _named(copied):
            needs_sequences = any(isinstance(part, _OF_SEQUENCES) for part in metric.modules())
            (of_sequences if needs_sequences else others)[name] = metric
        self._of_labels = MetricCollection(others, compute_groups=False) if of_sequences else copied
        self._of_sequences = MetricCollection(of_sequences, compute_groups=False)
        self._ranks, self._has_labels, self._has_samples = 1, False, False
        for metric in self._every_metric():
            if metric.dist_sync_fn is None:
                metric.dist_sync_fn = _gather_states
            if metric.distributed_available_fn is jit_distributed_available:
                metric.distributed_available_fn = self._are_shared

    def begin(self, *, ranks: int) -> None:
        """Reset all metrics for an evaluation by some ranks."""
        self._ranks, self._has_labels, self._has_samples = ranks, False, False
        self._of_labels.reset()
        self._of_sequences.reset()

    def update(self, outputs: Any, labels: Any, *, rows: int, shifts: bool, are_flags: bool) -> None:
        """Update by a batch of this rank.

        Args:
            outputs: a tensor or a tuple of them, [batch, ...].
            labels: a tensor or a tuple of them, [batch, ...].
            rows: the first samples, which count; the others are repeated.
            shifts: the loss compares each output with the label of the next position.
            are_flags: labels are those of a multi-label model, a number for each class.

        Raises:
            MetricsError: a metric does not accept them.
        """
        preds, target = pair_of(outputs, labels, shifts=shifts, are_flags=are_flags)
        first = target[0] if isinstance(target, tuple) else target
        if len(first) > rows:
            preds, target = _cut(preds, rows), _cut(target, rows)
        self._has_labels = True
        if (device := first.device) != self._device:
            self._of_labels.to(device)
            self._of_sequences.to(device)
        if rows == 0:
            return
        self._has_samples = True
        for metrics, given in (
            (self._of_labels, flattened(preds, target)),
            (self._of_sequences, (preds, target)),
        ):
            try:
                metrics.update(*given)
            except Exception as error:
                raise MetricsError(_why(metrics, *given, error)) from error

    def compute(self, *, is_trial: bool) -> dict[str, float]:
        """Compute all metrics over the samples of all ranks, and reset them.

        Args:
            is_trial: there are few samples, so metrics must not warn.

        Returns:
            Numbers by name; none if no batch had labels.

        Raises:
            MetricsError: a result is no number, or the ranks' states cannot be joined.
        """
        if not self._has_labels:
            return {}
        if self._are_shared():
            self._check_lists()
        numbers: dict[str, float] = {}
        with warnings.catch_warnings():
            if is_trial or not self._has_samples:
                warnings.simplefilter("ignore")
            for metrics in (self._of_labels, self._of_sequences):
                for name, value in metrics.compute().items():
                    numbers |= numbers_of(name, value)
        self.begin(ranks=self._ranks)
        return numbers

    def _are_shared(self) -> bool:
        return self._ranks > 1 and jit_distributed_available()

    @property
    def _device(self) -> torch.device:
        return next(self._every_metric()).device

    def _every_metric(self) -> Iterator[Metric]:
        """Yield all metrics, nested ones included."""
        for metrics in (self._of_labels, self._of_sequences):
            yield from (metric for metric in metrics.modules() if isinstance(metric, Metric))

    def _check_lists(self) -> None:
        """Check that all ranks gather equally many tensors, which would otherwise hang."""
        names = [type(metric).__name__ for metric in self._every_metric()]
        lengths = [
            len(value)
            if isinstance(value, list)
            and metric._reductions[state] is not dim_zero_cat
            and type(metric)._sync_dist is Metric._sync_dist
            else 0
            for metric in self._every_metric()
            for state, value in metric.metric_state.items()
        ]
        of_ranks = gather_objects((names, lengths))
        if any(found[0] != names for found in of_ranks):
            raise MetricsError(
                f"metrics= differ by rank: {'; '.join(', '.join(found[0]) for found in of_ranks)}. Pass the "
                "same on all ranks."
            )
        if any(found[1] != lengths for found in of_ranks):
            raise MetricsError(
                f"metrics=: among {', '.join(names)} is a metric with lists, which torchmetrics joins "
                f"only if they are equally long on all ranks; their lengths are "
                f"{'; '.join(str(found[1]) for found in of_ranks)}. Evaluate in one process, or use "
                "compute_metrics."
            )


def pair_of(outputs: Any, labels: Any, *, shifts: bool, are_flags: bool) -> tuple[Any, Any]:
    """Return outputs and labels as metrics compare them, not yet flattened (see the table above)."""
    if isinstance(labels, tuple):
        return outputs, labels
    if isinstance(outputs, (tuple, list)):
        outputs = outputs[0]
    if not isinstance(outputs, Tensor):
        return outputs, labels
    if shifts and labels.ndim == 2 and outputs.shape[:2] == labels.shape:
        return outputs[:, :-1], labels[:, 1:]
    if outputs.shape == (*labels.shape, 1):
        return outputs.squeeze(-1), labels
    if are_flags and labels.is_floating_point() and bool((labels == labels.round()).all()):
        return outputs, labels.long()
    return outputs, labels


def flattened(outputs: Any, labels: Any) -> tuple[Any, Any]:
    """Flatten to one row for each label, if each has its scores; return anything else unchanged."""
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor) or labels.ndim < 2:
        return outputs, labels
    if outputs.shape[:-1] != labels.shape:
        return outputs, labels
    return outputs.flatten(0, -2), labels.flatten()


def numbers_of(name: str, value: Any) -> dict[str, float]:
    """Name each number of a result: `f1`, or `f1_0`, `f1_1` where there is one a class.

    Raises:
        MetricsError: the result is neither a number nor an array of some numbers.
    """
    if isinstance(value, (int, float)):
        return {name: value}
    if not isinstance(value, (Tensor, np.ndarray, np.generic)):
        raise MetricsError(
            f"metrics=: {name} returned a {type(value).__name__}, {_shown(value)}. A log entry holds "
            "numbers: return one, or a tensor with one for each class; compute curves and texts in "
            "compute_metrics."
        )
    array = torch.as_tensor(value).cpu()
    if array.numel() == 1:
        return {name: array.item()}
    if array.numel() > _MOST_NUMBERS:
        raise MetricsError(
            f"metrics=: {name} returned {array.numel()} numbers, {_shown(value)}. A log entry holds up to "
            f'{_MOST_NUMBERS} of one metric: average them, with average="macro", say.'
        )
    return {
        "_".join((name, *map(str, index))): array[index].item() for index in np.ndindex(tuple(array.shape))
    }


def _to_collection(metrics: Any) -> MetricCollection:
    """Copy metrics into a collection."""
    if isinstance(metrics, Mapping) and not isinstance(metrics, MetricCollection):
        wrong = [
            f"{name!r}: {metric!r}"
            for name, metric in metrics.items()
            if not isinstance(name, str) or not isinstance(metric, (Metric, MetricCollection))
        ]
    else:
        wrong = [] if isinstance(metrics, (Metric, MetricCollection)) else [repr(metrics)]
    if wrong:
        raise MetricsError(
            f"metrics={', '.join(wrong)}: it must be a torchmetrics Metric, a MetricCollection, or a dict of "
            'these, such as {"f1": MulticlassF1Score(num_classes=3)}: objects, not classes. Pass a function '
            "as compute_metrics=."
        )
    if not isinstance(metrics, Metric) and not len(metrics):
        raise MetricsError("metrics= holds no metric. Leave it out, or add one.")
    if isinstance(metrics, MetricCollection):
        return copy.deepcopy(metrics)
    copied: Any = copy.deepcopy(dict(metrics) if isinstance(metrics, Mapping) else metrics)
    return MetricCollection(copied, compute_groups=False)


def _named(metrics: MetricCollection) -> Iterator[tuple[str, Metric]]:
    yield from metrics.items(keep_base=False, copy_state=False)


def _cut(data: Any, rows: int) -> Any:
    if isinstance(data, (tuple, list)):
        return type(data)(_cut(part, rows) for part in data)
    return data[:rows] if isinstance(data, Tensor) and data.ndim else data


def _gather_states(state: Tensor, group: Any = None) -> list[Tensor]:
    """Gather a state as torchmetrics does; of a rank without samples, in the others' shape and dtype."""
    if group is None and state.ndim:
        kinds = gather_objects((state.shape[1:], state.dtype, bool(state.numel())))
        held = [(shape, dtype) for shape, dtype, has_numbers in kinds if has_numbers]
        if held and not state.numel():
            shape, dtype = held[0]
            state = state.new_zeros((0, *shape), dtype=dtype)
    gathered: list[Tensor] = gather_all_tensors(state, group)
    return gathered


def _why(metrics: MetricCollection, preds: Any, target: Any, error: Exception) -> str:
    """Explain which metric does not accept a batch."""
    failed = ", ".join(name for name, metric in _named(metrics) if not _takes(metric, preds, target))
    text = str(error).strip().rstrip(".")
    hint = ""
    if isinstance(target, Tensor) and bool((target == _IGNORED).any()):
        hint = f" To ignore labels of {_IGNORED}, set ignore_index={_IGNORED} in the metric."
    return (
        f"metrics=: {failed or 'a metric'} does not take a batch's outputs, {_shown(preds)}, and labels, "
        f"{_shown(target)}: {text}.{hint} Choose a metric for these shapes, change the outputs in "
        "preprocess_logits_for_metrics, or pass a Metric of your own."
    )


def _takes(metric: Metric, preds: Any, target: Any) -> bool:
    tried = copy.deepcopy(metric)
    try:
        tried.update(preds, target)
    except Exception:
        return False  # the caller reports the error
    return True


def _shown(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_shown, value))})"
    return repr(value)

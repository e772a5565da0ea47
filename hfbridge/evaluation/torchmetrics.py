"""torchmetrics' metrics, updated batch by batch, so that no logits wait for an evaluation's end.

    a batch's outputs and labels              what a metric's `update` is given
    [rows, classes] and [rows]                both as they are
    [rows, length, classes], [rows, length]   [labels, classes] and [labels] (not Perplexity)
      where the loss predicts the next token  each output with the label of the next position
    [rows, 1] and [rows]                      [rows] and [rows]
    [rows, classes] of a multi-label model    its labels, natively floats, as integers
    several outputs and one tensor of labels  the first output
    several labels, as in question answering  outputs and labels as they are: tuples, for a Metric of your own
    generated token ids and labels            both as they are, for a Metric of your own that decodes them

Outputs are what `preprocess_logits_for_metrics` makes of them. Labels of -100 are left to the metrics'
`ignore_index`. Each rank counts its own rows, none twice; torchmetrics joins the ranks' states in `compute`.

Private names of torchmetrics, pinned by tests/unit/evaluation/test_torchmetrics.py: `Metric._reductions`,
by which lists that ranks cannot join are found, and `Metric._sync_dist`, which joins them.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
_MOST_NUMBERS = 1000  # of one metric, in a row of the log
_OF_SEQUENCES = (Perplexity,)  # take outputs and labels of whole rows


class RunningMetrics:
    """Metrics of an evaluation that are updated as its batches come.

    They are no part of the module that holds this, nor of its checkpoints: each evaluation begins anew.

    Args:
        metrics: copied; a metric by itself goes by the name of its class, as in a MetricCollection.

    Raises:
        MetricsError: these are no metrics of torchmetrics.

    Proved by: tests/unit/evaluation/test_torchmetrics.py, tests/parity/test_running_metrics.py,
        tests/distributed/test_running_metrics.py
    """

    def __init__(self, metrics: MetricsSource) -> None:
        given = _collected(metrics)
        of_rows: dict[str, Any] = {name: one for name, one in _named(given) if _takes_sequences(one)}
        others: dict[str, Any] = {name: one for name, one in _named(given) if name not in of_rows}
        self._of_labels = MetricCollection(others, compute_groups=False) if of_rows else given
        self._of_rows = MetricCollection(of_rows, compute_groups=False)
        self._ranks, self._has_labels, self._has_rows = 1, False, False
        for metric in self._every_metric():
            if metric.dist_sync_fn is None:
                metric.dist_sync_fn = _gather_states
            if metric.distributed_available_fn is jit_distributed_available:
                metric.distributed_available_fn = self._are_shared

    def begin(self, *, ranks: int) -> None:
        """Forget all batches.

        Args:
            ranks: ranks that share the set.
        """
        self._ranks, self._has_labels, self._has_rows = ranks, False, False
        self._of_labels.reset()
        self._of_rows.reset()

    def update(self, outputs: Any, labels: Any, *, rows: int, shifts: bool, are_flags: bool) -> None:
        """Take in a batch of this rank.

        Args:
            outputs: a tensor or a tuple of them, first dimension the rows.
            labels: likewise.
            rows: of these how many count; the others are repeated, to fill a round up.
            shifts: the loss compares each output with the label of the next position.
            are_flags: labels are those of a multi-label model, a number for each class.

        Raises:
            MetricsError: a metric does not take them.
        """
        preds, target = pair_of(outputs, labels, shifts=shifts, are_flags=are_flags)
        preds, target = _first(rows, preds, target)
        first = target[0] if isinstance(target, tuple) else target
        self._has_labels = True
        if (device := first.device) != self._device:
            self._of_labels.to(device)
            self._of_rows.to(device)
        if rows == 0:
            return
        self._has_rows = True
        for metrics, given in (
            (self._of_labels, flattened(preds, target)),
            (self._of_rows, (preds, target)),
        ):
            try:
                metrics.update(*given)
            except Exception as error:
                raise MetricsError(_why(metrics, *given, error)) from error

    def compute(self, *, is_trial: bool) -> dict[str, float]:
        """Compute all metrics over the rows of all ranks, and forget the batches.

        Args:
            is_trial: on a few rows only: what metrics warn of is not told.

        Returns:
            Numbers by their names; none if no batch had labels.

        Raises:
            MetricsError: a result is no number, or the ranks' states cannot be joined.
        """
        if not self._has_labels:
            return {}
        if self._are_shared():
            self._check_lists()
        numbers: dict[str, float] = {}
        with _silence() if is_trial or not self._has_rows else warnings.catch_warnings():
            for metrics in (self._of_labels, self._of_rows):
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
        """Go through all metrics, those in others included."""
        for metrics in (self._of_labels, self._of_rows):
            yield from (metric for metric in metrics.modules() if isinstance(metric, Metric))

    def _check_lists(self) -> None:
        """See that all ranks have as many tensors to gather, or they would wait for each other in vain.

        Raises:
            MetricsError: they do not.
        """
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
                f"metrics= differ by rank: {'; '.join(', '.join(found[0]) for found in of_ranks)}. Give all "
                "ranks the same."
            )
        if any(found[1] != lengths for found in of_ranks):
            raise MetricsError(
                f"metrics=: among {', '.join(names)} is a metric that keeps lists which torchmetrics joins "
                f"only if they are equally long on all ranks, and theirs are not: "
                f"{'; '.join(str(found[1]) for found in of_ranks)}. Evaluate in one process, or compute "
                "it in compute_metrics."
            )


def pair_of(outputs: Any, labels: Any, *, shifts: bool, are_flags: bool) -> tuple[Any, Any]:
    """Pair a batch's outputs with what they are compared with; the table above says how.

    Returns:
        Outputs and labels, not yet flattened.
    """
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
    """Make one row of each label, if each has its scores; leave anything else as it is."""
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
            f"metrics=: {name} gave a {type(value).__name__}, {_shown(value)}. A row holds numbers: have it "
            "give one, or a tensor with one for each class; compute curves and texts in compute_metrics."
        )
    array = torch.as_tensor(value).cpu()
    if array.numel() == 1:
        return {name: array.item()}
    if array.numel() > _MOST_NUMBERS:
        raise MetricsError(
            f"metrics=: {name} gave {array.numel()} numbers, {_shown(value)}. A row holds up to "
            f'{_MOST_NUMBERS} of one metric: average them, with average="macro", say.'
        )
    return {
        "_".join((name, *map(str, index))): array[index].item() for index in np.ndindex(tuple(array.shape))
    }


def _collected(metrics: Any) -> MetricCollection:
    """Copy metrics into a collection.

    Raises:
        MetricsError: these are no metrics.
    """
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
            f"metrics={', '.join(wrong)}: it may be a torchmetrics Metric, a MetricCollection, or a dict of "
            'these by their names, such as {"f1": MulticlassF1Score(num_classes=3)}: objects, not classes. A '
            "function of all predictions is compute_metrics=."
        )
    if not isinstance(metrics, Metric) and not len(metrics):
        raise MetricsError("metrics= holds no metric. Leave it out, or give it one.")
    if isinstance(metrics, MetricCollection):
        return copy.deepcopy(metrics)
    copied: Any = copy.deepcopy(dict(metrics) if isinstance(metrics, Mapping) else metrics)
    return MetricCollection(copied, compute_groups=False)


def _named(metrics: MetricCollection) -> Iterator[tuple[str, Metric]]:
    yield from metrics.items(keep_base=False, copy_state=False)


def _takes_sequences(metric: Metric) -> bool:
    return any(isinstance(part, _OF_SEQUENCES) for part in metric.modules())


def _first(rows: int, outputs: Any, labels: Any) -> tuple[Any, Any]:
    """Cut outputs and labels to their first rows, if they have more."""
    if len(labels[0] if isinstance(labels, tuple) else labels) <= rows:
        return outputs, labels
    return _cut(outputs, rows), _cut(labels, rows)


def _cut(data: Any, rows: int) -> Any:
    if isinstance(data, (tuple, list)):
        return type(data)(_cut(part, rows) for part in data)
    return data[:rows] if isinstance(data, Tensor) and data.ndim else data


@contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _gather_states(state: Tensor, group: Any = None) -> list[Tensor]:
    """Gather a state as torchmetrics does; of a rank without rows, in the others' shape and dtype."""
    if group is None and state.ndim:
        kinds = gather_objects((state.shape[1:], state.dtype, bool(state.numel())))
        held = [(shape, dtype) for shape, dtype, has_numbers in kinds if has_numbers]
        if held and not state.numel():
            shape, dtype = held[0]
            state = state.new_zeros((0, *shape), dtype=dtype)
    gathered: list[Tensor] = gather_all_tensors(state, group)
    return gathered


def _why(metrics: MetricCollection, preds: Any, target: Any, error: Exception) -> str:
    """Say which metric did not take a batch, and what it was given."""
    failed = ", ".join(name for name, metric in _named(metrics) if not _takes(metric, preds, target))
    text = str(error).strip().rstrip(".")
    hint = ""
    if isinstance(target, Tensor) and bool((target == _IGNORED).any()):
        hint = f" Labels of {_IGNORED} are not to count: give the metric ignore_index={_IGNORED}."
    return (
        f"metrics=: {failed or 'a metric'} does not take a batch's outputs, {_shown(preds)}, and labels, "
        f"{_shown(target)}: {text}.{hint} Choose a metric for these shapes, have "
        "preprocess_logits_for_metrics make other outputs, or give a Metric of your own."
    )


def _takes(metric: Metric, preds: Any, target: Any) -> bool:
    tried = copy.deepcopy(metric)
    try:
        tried.update(preds, target)
    except Exception:
        return False  # as it has for the caller, who tells why
    return True


def _shown(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_shown, value))})"
    return repr(value)

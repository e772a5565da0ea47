"""Predictions of an evaluation, collected batch by batch; knows Hugging Face.

per batch       loss (scalar); logits, labels and inputs (tensors or tuples of them, first dimension the rows)
at the end      numpy arrays over the whole set, padded with -100 where lengths differ, or a list of those
                of each batch
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_pt_utils import EvalLoopContainer, nested_numpify


@dataclass(frozen=True)
class EvalSet:
    """A set to evaluate.

    Attributes:
        prefix: what its metrics' names begin with: "eval", "eval_<key>" or "test".
        samples: rows of the set.
        batches: batches it is read in; the last may hold fewer rows than the others.
        batch_size: rows of a full batch.
    """

    prefix: str
    samples: int
    batches: int
    batch_size: int

    def is_last(self, index: int) -> bool:
        """Whether a batch, counted from 0, is the last one."""
        return index + 1 == self.batches

    def rows_of(self, index: int) -> int:
        """Rows of a batch."""
        return min(self.batch_size, self.samples - index * self.batch_size)


@dataclass(frozen=True)
class Collected:
    """What an evaluation has seen.

    Attributes:
        predictions: array, tuple of arrays, list of these, or `None` when only losses were kept.
        label_ids: likewise; `None` without labels.
        inputs: likewise; `None` if not kept.
        losses: mean loss of each batch, `None` without labels.
        items: items that each of them is a mean of.
        rows: rows of the same batches.
    """

    predictions: Any
    label_ids: Any
    inputs: Any
    losses: np.ndarray[Any, Any] | None
    items: np.ndarray[Any, np.dtype[np.int64]]
    rows: np.ndarray[Any, np.dtype[np.int64]]

    def losses_of_rows(self, *, joined: bool) -> Any:
        """Repeat each batch's mean loss for each of its rows.

        Args:
            joined: as one array, and not as a list with one for each batch.
        """
        if self.losses is None:
            return None
        if joined:
            return np.repeat(self.losses, self.rows)
        return [np.repeat(loss, count) for loss, count in zip(self.losses, self.rows, strict=True)]


class Collector:
    """Collect losses, logits, labels and inputs of one evaluation.

    Args:
        move_every: batches after which what is kept moves from the device to numpy; `None` keeps it there
            until the end.
        joins: join the batches; otherwise they become a list.

    Mirrors: transformers.Trainer.evaluation_loop
    """

    def __init__(self, *, move_every: int | None, joins: bool = True) -> None:
        self._move_every = move_every
        self._kept = [EvalLoopContainer(joins, padding_index=-100) for _ in range(3)]
        self._losses: list[Tensor] = []
        self._items: list[int] = []
        self._rows: list[int] = []
        self._batches = 0

    def add_loss(self, loss: Tensor, *, items: int, rows: int) -> None:
        """Take in the mean loss of a batch (scalar), with the items and rows it stands for."""
        self._losses.append(loss)
        self._items.append(items)
        self._rows.append(rows)

    def add(self, logits: Any, labels: Any, inputs: Any = None) -> None:
        """Take in what is kept of a batch; `None` for nothing."""
        self._batches += 1
        for container, given in zip(self._kept, (logits, labels, inputs), strict=True):
            if given is not None:
                container.add(given)
            if self._move_every is not None and self._batches % self._move_every == 0:
                container.to_cpu_and_numpy()

    def finish(self) -> Collected:
        """Hand over everything as numpy arrays."""
        losses = nested_numpify(torch.stack(self._losses)) if self._losses else None
        items, rows = (np.asarray(counts, dtype=np.int64) for counts in (self._items, self._rows))
        predictions, labels, inputs = (container.get_arrays() for container in self._kept)
        return Collected(predictions, labels, inputs, losses, items, rows)


def gather(data: Any, *, is_last: bool, remainder: int, as_objects: bool) -> Any:
    """Gather a batch's tensors as accelerate does: the last batch is cut to the rows that the set has left.

    In one process that changes nothing, unless something's first dimension is not the rows; and as objects a
    tuple of tensors is cut like a tensor.

    Args:
        data: tensors or tuples of them, or anything else.
        is_last: this is the last batch.
        remainder: rows of the set modulo those of a batch; 0 if short batches are dropped.
        as_objects: `eval_use_gather_object`.

    Mirrors: accelerate.Accelerator.gather_for_metrics
    """
    one_process: Any = SimpleNamespace(
        gather=lambda tensors: tensors,
        gradient_state=SimpleNamespace(end_of_dataloader=is_last, remainder=remainder),
    )
    return Accelerator.gather_for_metrics(one_process, data, use_gather_object=as_objects)

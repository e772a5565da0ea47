"""Predictions of an evaluation, collected batch by batch; knows Hugging Face.

per batch       loss (scalar), logits and labels (tensors or tuples of them, first dimension the rows)
at the end      numpy arrays over the whole set, padded with -100 where lengths differ
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_pt_utils import EvalLoopContainer, nested_numpify


@dataclass(frozen=True)
class Collected:
    """What an evaluation has seen.

    Attributes:
        predictions: array, tuple of arrays, or `None` when only losses were kept.
        label_ids: array, tuple of arrays, or `None` without labels.
        losses: mean loss of each batch, `None` without labels.
        weights: items or rows that each of them is a mean of.
    """

    predictions: Any
    label_ids: Any
    losses: np.ndarray[Any, Any] | None
    weights: np.ndarray[Any, np.dtype[np.int64]] | None


class Collector:
    """Collect losses, logits and labels of one evaluation.

    Args:
        move_every: batches after which logits and labels move from the device to numpy; `None` keeps them
            there until the end.

    Mirrors: transformers.Trainer.evaluation_loop
    """

    def __init__(self, *, move_every: int | None) -> None:
        self._move_every = move_every
        self._predictions = EvalLoopContainer(True, padding_index=-100)
        self._labels = EvalLoopContainer(True, padding_index=-100)
        self._losses: list[Tensor] = []
        self._weights: list[int] = []
        self._batches = 0

    def add(self, loss: Tensor | None, weight: int, logits: Any, labels: Any) -> None:
        """Take in one batch.

        Args:
            loss: mean loss of the batch, scalar, or `None`.
            weight: how many items the mean counts for.
            logits: model outputs to keep, or `None`.
            labels: labels to keep, or `None`.
        """
        self._batches += 1
        if loss is not None:
            self._losses.append(loss)
            self._weights.append(weight)
        if logits is not None:
            self._predictions.add(logits)
        if labels is not None:
            self._labels.add(labels)
        if self._move_every is not None and self._batches % self._move_every == 0:
            self._predictions.to_cpu_and_numpy()
            self._labels.to_cpu_and_numpy()

    def finish(self) -> Collected:
        """Hand over everything as numpy arrays."""
        losses = nested_numpify(torch.stack(self._losses)) if self._losses else None
        weights = np.asarray(self._weights, dtype=np.int64) if self._losses else None
        return Collected(self._predictions.get_arrays(), self._labels.get_arrays(), losses, weights)

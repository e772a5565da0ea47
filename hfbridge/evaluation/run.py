"""One evaluation from its first batch to its metrics; knows Hugging Face."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hfbridge.evaluation.gather import Collector
from hfbridge.evaluation.metrics import ComputeMetrics, metrics_of, rehearse, speed_of
from hfbridge.evaluation.predict import Batch, predict_batch

LossOf = Callable[[nn.Module, Batch], tuple[Tensor, Any, int]]


@dataclass
class Evaluation:
    """Collect predictions batch by batch, then compute the metrics the native Trainer reports.

    Attributes:
        model: the Hugging Face model, in eval mode while batches are added.
        loss_of: computes loss, outputs and items of a batch that has labels.
        label_names: the labels a batch must have all of for a loss to be computed.
        has_own_loss: the model returns a loss without any labels.
        compute_metrics: the user's function, or `None`.
        keeps_logits: logits and labels are collected for it.
        rows_per_batch: weigh a batch's loss by its rows (native), of which a full batch has so many; `None`
            weighs by items ("exact").
        move_every: batches after which what was collected moves from the device to numpy; `None`: at the end.
        drop_non_finite: leave NaN and infinite losses out of the mean, unless all are.
    """

    model: nn.Module
    loss_of: LossOf
    label_names: Sequence[str]
    has_own_loss: bool
    compute_metrics: ComputeMetrics | None
    keeps_logits: bool
    rows_per_batch: int | None
    move_every: int | None
    drop_non_finite: bool
    _collector: Collector = field(init=False)
    _start_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._collector = Collector(move_every=self.move_every)
        self._start_s = time.time()

    def add(self, batch: Batch, *, index: int, samples: int) -> None:
        """Run one batch.

        Args:
            batch: inputs and labels, on the model's device.
            index: number of the batch, from 0.
            samples: rows of the whole set; the last batch may hold fewer than the others.
        """
        seen = predict_batch(
            self.model,
            batch,
            loss_of=self.loss_of,
            label_names=self.label_names,
            has_own_loss=self.has_own_loss,
            keeps_logits=self.keeps_logits,
        )
        weight = seen.weight
        if self.rows_per_batch is not None:
            weight = min(self.rows_per_batch, samples - index * self.rows_per_batch)
        self._collector.add(seen.loss, weight, seen.logits, seen.labels)

    def rehearse(self, batch: Batch) -> None:
        """Try `compute_metrics` on one batch, to see that it returns a dict.

        A model whose first forward settles `config.problem_type` is left to settle it in training.

        Raises:
            MetricsError: it returned something else.
        """
        config: Any = getattr(self.model, "config", None)
        is_open = getattr(config, "problem_type", "") is None
        self.add(batch, index=0, samples=1)
        if is_open:
            config.problem_type = None
        collected = self._collector.finish()
        if self.compute_metrics is not None and collected.label_ids is not None:
            rehearse(self.compute_metrics, collected.predictions, collected.label_ids)

    def finish(self, prefix: str, *, samples: int, batches: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Compute the metrics.

        Args:
            prefix: put before every name, such as "eval".
            samples: rows of the whole set.
            batches: batches of the whole set.

        Returns:
            Loss and metrics, and apart from them the speed.

        Raises:
            MetricsError: `compute_metrics` did not return a dict.
        """
        metrics = metrics_of(
            self._collector.finish(),
            prefix=prefix,
            compute_metrics=self.compute_metrics,
            by_rows=self.rows_per_batch is not None,
            drop_non_finite=self.drop_non_finite,
        )
        return metrics, speed_of(prefix, start_s=self._start_s, samples=samples, batches=batches)

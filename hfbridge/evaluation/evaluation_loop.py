"""One evaluation from its first batch to its metrics; knows Hugging Face."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import find_batch_size, slice_tensors
from torch import Tensor, nn
from transformers import EvalPrediction, Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from hfbridge.distributed.collectives import raise_on_all_ranks, rank
from hfbridge.errors import MetricsError
from hfbridge.evaluation.collector import AnySet, Collected, Collector, EvalSet, Part, StreamedSet, UserSet
from hfbridge.evaluation.gather import gather, known_to_all, of_each_rank, pad
from hfbridge.evaluation.generation import Generation, generates, keeping_config
from hfbridge.evaluation.metrics import (
    ComputeMetrics,
    check_saved,
    checked_logits,
    checked_metrics,
    joined_metrics,
    mean_loss,
    name_metrics,
    prediction_of,
    speed_of,
)
from hfbridge.evaluation.prediction_step import Batch, Prediction, predict_batch
from hfbridge.evaluation.torchmetrics import RunningMetrics

logger = logging.getLogger(__name__)

LossOf = Callable[[nn.Module, Batch], tuple[Tensor, Any, int]]
PreprocessLogits = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class EvalOptions:
    """What the settings say about evaluations.

    Attributes:
        weight_by_sample: samples weigh, and rounds are gathered, as in "native"; otherwise as in "exact",
            where items weigh and each batch is what it is in one process.
        drop_non_finite: leave NaN and infinite losses out of the mean, unless all are.
        move_every: batches after which what was collected moves from the device to numpy; `None`: at the end.
        joins: predictions of all batches are joined, and not listed.
        by_batch: `compute_metrics` is called for every batch.
        includes: "inputs", "loss": what it gets beside predictions and labels.
        as_objects: in "native", rounds are gathered as objects.
        keep_padded_samples: in "native", rows that fill up the last round are not cut off.
    """

    weight_by_sample: bool
    drop_non_finite: bool = True
    move_every: int | None = None
    joins: bool = True
    by_batch: bool = False
    includes: frozenset[str] = frozenset()
    as_objects: bool = False
    keep_padded_samples: bool = False

    @classmethod
    def of(
        cls,
        args: TrainingArguments,
        *,
        weight_by_sample: bool,
        is_first: bool,
        keep_padded_samples: bool | None = None,
    ) -> "EvalOptions":
        """Read the settings.

        Args:
            args: the settings.
            weight_by_sample: as above.
            is_first: no evaluation went before; natively `eval_use_gather_object` is forgotten after it.
            keep_padded_samples: as above; `None` is as `Seq2SeqTrainer` does, whose arguments these may be.
        """
        if keep_padded_samples is None:
            keep_padded_samples = isinstance(args, Seq2SeqTrainingArguments)
        return cls(
            weight_by_sample=weight_by_sample,
            drop_non_finite=args.logging_nan_inf_filter,
            move_every=args.eval_accumulation_steps,
            joins=args.eval_do_concat_batches,
            by_batch=args.batch_eval_metrics,
            includes=frozenset(args.include_for_metrics),
            as_objects=args.eval_use_gather_object and is_first and not generates(args),
            keep_padded_samples=keep_padded_samples,
        )


@dataclass
class Evaluation:
    """Collect predictions batch by batch, then compute the metrics the native Trainer reports.

    Attributes:
        model: the Hugging Face model, in eval mode while batches are added.
        of: the set.
        options: what the settings say.
        loss_of: computes loss, outputs and items of a batch that has labels.
        label_names: the labels a batch must have all of for a loss to be computed.
        has_own_loss: the model returns a loss without any labels.
        compute_metrics: the user's function, or `None`.
        preprocess_logits: the user's function of logits and labels, or `None`.
        keeps_logits: somebody asks for logits and labels; if all of them see those batch by batch, nothing
            but losses is collected.
        is_prediction: logits and labels are collected all the same.
        preparation_s: reported with the metrics, unless `None`.
        generation: how predictions are generated, if they are.
        running: metrics that are updated with every batch, or `None`.
        shifts: the loss compares logits with the next position's labels; `running` does, too.
        is_saved: checkpoints of the run keep the metrics.

    Mirrors: transformers.Trainer.evaluation_loop
    Proved by: tests/parity/test_evaluation_options.py
    """

    model: nn.Module
    of: AnySet
    options: EvalOptions
    loss_of: LossOf
    label_names: Sequence[str]
    has_own_loss: bool
    compute_metrics: ComputeMetrics | None
    preprocess_logits: PreprocessLogits | None
    keeps_logits: bool
    is_prediction: bool = False
    preparation_s: float | None = None
    generation: Generation | None = None
    running: RunningMetrics | None = None
    shifts: bool = False
    is_saved: bool = False
    collected: Collected | None = field(init=False, default=None)
    _collector: Collector = field(init=False)
    _shares_logits: bool = field(init=False)
    _start_s: float = field(init=False)
    _batches: int = field(init=False, default=0)
    _last: Sequence[Part] = field(init=False, default=())
    _is_rehearsal: bool = field(init=False, default=False)
    _failure: MetricsError | None = field(init=False, default=None)
    _computed: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        options, waits = self.options, self.compute_metrics is not None and not self.options.by_batch
        collects = self.keeps_logits and (self.is_prediction or waits)
        self._shares_logits = collects or (options.by_batch and self.compute_metrics is not None)
        keeps = ["logits", "labels"] if collects else []
        keeps += ["inputs"] if waits else []
        # In "exact" the mean loss is that of the batches; the rows' losses are for compute_metrics.
        keeps += ["losses"] if options.weight_by_sample or (waits and "loss" in options.includes) else []
        move_every = None if options.by_batch else options.move_every
        self._collector = Collector(
            move_every=move_every,
            joins=options.joins,
            keeps=keeps,
            lists_objects=not options.weight_by_sample,
        )
        if self.running is not None:
            self.running.begin(ranks=self.of.ranks)
        self._start_s = time.time()

    @property
    def has_begun(self) -> bool:
        """Whether a batch was added."""
        return self._batches > 0

    @property
    def is_empty(self) -> bool:
        """Whether the set has no samples."""
        return isinstance(self.of, EvalSet) and self.of.samples == 0

    @property
    def is_done(self) -> bool:
        """Whether all batches are added."""
        return self._batches == self.of.batches

    def add(self, batch: Batch) -> Any:
        """Run one batch.

        Args:
            batch: inputs and labels, on the model's device.

        Returns:
            Its logits: a tensor or a tuple of them; an empty tuple if none are kept.

        Raises:
            MetricsError: `preprocess_logits` returned nothing, or a running metric cannot be updated.
        """
        if isinstance(self.of, UserSet):
            self.of.add_round(find_batch_size(batch) or 0)
        if isinstance(self.of, StreamedSet) and not self.options.weight_by_sample:
            batch = self._without_repeated(batch)
        if self.generation is not None and self.keeps_logits:
            seen = self.generation.predict(self.model, batch, loss_of=self.loss_of)
        else:
            seen = predict_batch(
                self.model,
                batch,
                loss_of=self.loss_of,
                label_names=self.label_names,
                has_own_loss=self.has_own_loss,
                keeps_logits=self.keeps_logits,
                keeps_objects=self.preprocess_logits is not None,
            )
        inputs = None
        if "inputs" in self.options.includes:
            whole, name = self.options.by_batch, getattr(self.model, "main_input_name", "input_ids")
            inputs = batch if whole else batch[name]
        options, logits = self.options, None
        if self.running is not None or not options.weight_by_sample or self.of.ranks == 1:
            logits = self._preprocess(seen.logits, seen.labels)
        if self.running is not None and seen.logits is not None:
            self._try_update(self.running, logits, seen.labels)
        share = self._share_natively if options.weight_by_sample else self._share_exactly
        self._last = share(seen, logits, inputs)
        self._batches += 1
        for part in self._last:
            self._collector.add(part)
        return () if seen.logits is None else seen.logits

    def close_batch(self) -> None:
        """Have `compute_metrics` see what was added last, if it is called for every batch.

        Raises:
            MetricsError: it did not return a dict after the last batch.
        """
        parts, self._last = self._last, ()
        function, includes = self.compute_metrics, self.options.includes
        if not self.options.by_batch or function is None:
            return
        for number, part in enumerate(parts, 1):
            if part.logits is None or part.labels is None:
                return
            given = EvalPrediction(
                predictions=part.logits,
                label_ids=part.labels,
                inputs=part.inputs,
                losses=part.losses if "loss" in includes else None,
            )
            is_last = self.is_done and number == len(parts)
            with raise_on_all_ranks() if is_last else nullcontext():
                returned: Any = function(given, compute_result=is_last)
                if is_last and returned is not None:  # natively, too, None stands for no metrics
                    self._computed = checked_metrics(returned, function)

    def sanity_check(self, batches: Iterable[Batch]) -> frozenset[str] | None:
        """Try the evaluation on some batches, to see that `compute_metrics` returns a dict.

        An exception of the function is not reported: many metrics need more than a few rows, or all classes.
        One that is called for every batch keeps what it has seen, and is not tried. A model whose first
        forward settles `config.problem_type` is left to settle it in training.

        Returns:
            The names of the metrics that all ranks have; `None` if the function could not be tried on all.

        Raises:
            MetricsError: `compute_metrics` or `preprocess_logits` returned what it should not.
        """
        config: Any = getattr(self.model, "config", None)
        is_open = getattr(config, "problem_type", "") is None
        self._is_rehearsal = True
        with keeping_config(self.model):
            for batch in batches:
                self.add(batch)
        if is_open:
            config.problem_type = None
        if self.options.by_batch and self.compute_metrics is not None:
            return None
        return known_to_all(self.try_finish())

    def try_finish(self) -> frozenset[str] | None:
        """Compute the metrics of a few samples; many metrics need more than these, or all classes.

        Returns:
            The names of the metrics; `None` if a function of the user's raised an error.

        Raises:
            MetricsError: `compute_metrics` or `preprocess_logits` returned what it should not.
        """
        self._is_rehearsal = True
        try:
            metrics, speed = self.finish()
            return frozenset((*metrics, *speed))
        except MetricsError:
            raise
        except Exception as error:
            logger.info("the metrics could not be tried on a few samples: %s", error)
            return None

    def finish(self) -> tuple[dict[str, Any], dict[str, float]]:
        """Compute the metrics.

        Returns:
            Loss and metrics, and apart from them the speed.

        Raises:
            MetricsError: `compute_metrics` did not return a dict, or it and a running metric give two numbers
                of one name.
        """
        options, of = self.options, self.of
        found = self._collector.finish()
        if of.order is not None:
            found = found.put_back(of.order)
        self.collected = found
        has_both = found.predictions is not None and found.label_ids is not None
        if self.compute_metrics is not None and has_both and not options.by_batch:
            given = prediction_of(found, includes=options.includes)
            with raise_on_all_ranks():
                self._computed = checked_metrics(self.compute_metrics(given), self.compute_metrics)
        if self.running is not None:
            with raise_on_all_ranks():
                if self._failure is not None:
                    raise self._failure
            with raise_on_all_ranks():
                numbers = self.running.compute(is_trial=self._is_rehearsal)
                self._computed = joined_metrics(self._computed, numbers, prefix=of.prefix)
        metrics = name_metrics(
            self._computed,
            prefix=of.prefix,
            loss=mean_loss(found, drop_non_finite=options.drop_non_finite),
            preparation_s=self.preparation_s,
        )
        if self.is_saved and self._is_rehearsal:  # later a callback may have changed the log entry
            check_saved(metrics)
        speed = speed_of(of.prefix, start_s=self._start_s, samples=of.samples, batches=of.steps)
        return metrics, speed

    def output(self, metrics: dict[str, Any]) -> PredictionOutput:
        """Put predictions and labels beside the metrics; known once the evaluation is finished."""
        assert self.collected is not None
        return PredictionOutput(self.collected.predictions, self.collected.label_ids, metrics)

    def _own_rows(self) -> int:
        """Count this rank's rows of the round in hand, without repeated ones."""
        rows, number = self.of.rows_by_rank(self._batches), rank() if self.of.ranks > 1 else 0
        return rows[number] if number < len(rows) else 0

    def _without_repeated(self, batch: Batch) -> Batch:
        """Cut off the rows by which accelerate fills the last round of a stream up.

        A batch of nothing else is left as it is: its rank runs along, and what comes of it is dropped.
        """
        rows = self._own_rows()
        if self.of.ranks == 1 or not 0 < rows < (find_batch_size(batch) or 0):
            return batch
        cut: Batch = slice_tensors(batch, slice(rows))
        return cut

    def _try_update(self, running: RunningMetrics, logits: Any, labels: Any) -> None:
        """Update; what fails on some ranks of an evaluation only is raised on all of them at its end."""
        with raise_on_all_ranks() if self._is_rehearsal else nullcontext():
            try:
                if self._failure is None:
                    self._update(running, logits, labels)
            except MetricsError as error:
                if self.of.ranks == 1 or self._is_rehearsal:
                    raise
                self._failure = error

    def _update(self, running: RunningMetrics, logits: Any, labels: Any) -> None:
        """Have the running metrics see this rank's rows of a round, but those that fill it up.

        Raises:
            MetricsError: there are no labels to evaluate by, or a metric does not take the batch.
        """
        if labels is None or labels == ():
            if self.is_prediction:
                return
            raise MetricsError(
                f"metrics= compare outputs with labels, and the set {self.of.prefix!r} has not all of "
                f"{', '.join(self.label_names) or 'those that label_names would name'}. Give it labels, or "
                "leave metrics= out."
            )
        problem = getattr(getattr(self.model, "config", None), "problem_type", None)
        running.update(
            logits,
            labels,
            rows=self._own_rows(),
            shifts=self.shifts and self.generation is None,
            are_flags=problem == "multi_label_classification",
        )

    def _share_natively(self, seen: Prediction, own_logits: Any, inputs: Any) -> list[Part]:
        """Gather the round that a batch belongs to, in the native order.

        Mirrors: transformers.Trainer.evaluation_loop
        """
        ranks = self.of.ranks
        losses = None if seen.loss is None else self._gather(seen.loss.repeat(self.of.batch_size))
        if inputs is not None and not self.options.by_batch:
            inputs = self._gather(pad(inputs, ranks=ranks))
        if not self._shares_logits:
            return [Part(losses, None, None, inputs)]
        labels, logits = pad(seen.labels, ranks=ranks), own_logits
        if ranks > 1:
            logits = self._preprocess(pad(seen.logits, ranks=ranks), labels)
        logits = None if logits is None else self._gather(logits)
        labels = None if labels is None else self._gather(labels)
        return [Part(losses, logits, labels, inputs)]

    def _share_exactly(self, seen: Prediction, own_logits: Any, inputs: Any) -> list[Part]:
        """Gather what each rank's batch gave, as it would be in one process; those of repeated rows go."""
        loss, ranks = seen.loss, self.of.ranks
        logits, labels = (own_logits, seen.labels) if self._shares_logits else (None, None)
        items = None if loss is None else torch.tensor(seen.weight, device=loss.device)
        parts = []
        for rows, (mean, held, *kept) in zip(
            self.of.rows_by_rank(self._batches),
            of_each_rank((loss, items, logits, labels, inputs), ranks=ranks),
            strict=False,
        ):
            losses = None if mean is None else mean.repeat(rows)
            parts.append(Part(losses, kept[0], kept[1], kept[2], mean, 0 if mean is None else int(held)))
        return parts

    def _preprocess(self, logits: Any, labels: Any) -> Any:
        """Call the user's function; in a rehearsal its errors are those of all ranks.

        Raises:
            MetricsError: it returned nothing.
        """
        function = self.preprocess_logits
        if logits is None or function is None:
            return logits
        with raise_on_all_ranks() if self._is_rehearsal else nullcontext():
            return checked_logits(function(logits, labels), function)

    def _gather(self, data: Any) -> Any:
        of, index = self.of, self._batches
        return gather(
            data,
            ranks=of.ranks,
            is_last=of.is_last(index),
            remainder=0 if self.options.keep_padded_samples else of.remainder_of(index),
            as_objects=self.options.as_objects,
        )

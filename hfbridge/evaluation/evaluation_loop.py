"""Run one evaluation from its first batch to its metrics."""

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
from hfbridge.evaluation.gather import gather, gather_per_rank, intersect_across_ranks, pad
from hfbridge.evaluation.generation import Generation, is_generating, preserve_generation_config
from hfbridge.evaluation.metrics import (
    ComputeMetrics,
    check_saved,
    checked_logits,
    checked_metrics,
    join_metrics,
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
    """Settings of evaluations.

    Attributes:
        weight_by_sample: weight losses by samples and gather rounds, as in "native"; otherwise weight them by
            items and gather each batch as it is, as in "exact".
        drop_non_finite: leave NaN and infinite losses out of the mean, unless all are.
        move_every: batches after which predictions move from the device to numpy; `None`: at the end.
        joins: join the predictions of all batches.
        by_batch: call `compute_metrics` for every batch.
        includes: "inputs", "loss": what it gets beside predictions and labels.
        as_objects: in "native", gather rounds as objects.
        keep_padded_samples: in "native", keep the samples that pad the last round.
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
            is_first: the HF Trainer ignores `eval_use_gather_object` after the first evaluation.
            keep_padded_samples: as above; `None`: for `Seq2SeqTrainingArguments`.
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
            as_objects=args.eval_use_gather_object and is_first and not is_generating(args),
            keep_padded_samples=keep_padded_samples,
        )


@dataclass
class Evaluation:
    """Collect predictions batch by batch, then compute the metrics that the HF Trainer reports.

    Attributes:
        model: the Hugging Face model, in eval mode.
        of: the set.
        options: settings.
        loss_of: computes loss, outputs and items of a batch with labels.
        label_names: a loss is computed if a batch has all of these.
        has_own_loss: the model returns a loss without labels.
        compute_metrics: the user's function, or `None`.
        preprocess_logits: the user's function of logits and labels, or `None`.
        keeps_logits: logits and labels are needed, if only batch by batch.
        is_prediction: collect logits and labels in any case.
        preparation_s: reported with the metrics, unless `None`.
        generation: how to generate predictions, or `None`.
        running: metrics that are updated with every batch, or `None`.
        shifts: the loss compares logits with the next position's labels; so does `running`.
        is_saved: checkpoints keep the metrics.

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
    _gathers_logits: bool = field(init=False)
    _start_s: float = field(init=False)
    _batches: int = field(init=False, default=0)
    _last: Sequence[Part] = field(init=False, default=())
    _is_sanity_check: bool = field(init=False, default=False)
    _failure: MetricsError | None = field(init=False, default=None)
    _computed: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        options, waits = self.options, self.compute_metrics is not None and not self.options.by_batch
        collects = self.keeps_logits and (self.is_prediction or waits)
        self._gathers_logits = collects or (options.by_batch and self.compute_metrics is not None)
        keeps = ["logits", "labels"] if collects else []
        keeps += ["inputs"] if waits else []
        # In "exact" the mean loss is that of the batches; the samples' losses are for compute_metrics.
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
        """Run one batch, on the model's device.

        Returns:
            Its logits: a tensor or a tuple of them; an empty tuple if none are kept.

        Raises:
            MetricsError: `preprocess_logits` returned `None`, or a running metric cannot be updated.
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
            name = getattr(self.model, "main_input_name", "input_ids")
            inputs = batch if self.options.by_batch else batch[name]
        options, logits = self.options, None
        if self.running is not None or not options.weight_by_sample or self.of.ranks == 1:
            logits = self._preprocess(seen.logits, seen.labels)
        if self.running is not None and seen.logits is not None:
            self._try_update(self.running, logits, seen.labels)
        gather_parts = self._gather_round if options.weight_by_sample else self._gather_batches
        self._last = gather_parts(seen, logits, inputs)
        self._batches += 1
        for part in self._last:
            self._collector.add(part)
        return () if seen.logits is None else seen.logits

    def close_batch(self) -> None:
        """Call `compute_metrics` on the last batch, if it is called for every batch.

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
                if is_last and returned is not None:  # None means no metrics in the HF Trainer, too
                    self._computed = checked_metrics(returned, function)

    def sanity_check(self, batches: Iterable[Batch]) -> frozenset[str] | None:
        """Run the evaluation on some batches, to check what `compute_metrics` returns.

        A function that is called for every batch has a state, and is not called. `config.problem_type`, which
        a model sets in its first forward, is reset.

        Returns:
            The names of the metrics that all ranks have; `None` if a rank could not compute them.

        Raises:
            MetricsError: `compute_metrics` or `preprocess_logits` returned a wrong type.
        """
        config: Any = getattr(self.model, "config", None)
        is_unset = getattr(config, "problem_type", "") is None
        self._is_sanity_check = True
        with preserve_generation_config(self.model):
            for batch in batches:
                self.add(batch)
        if is_unset:
            config.problem_type = None
        if self.options.by_batch and self.compute_metrics is not None:
            return None
        return intersect_across_ranks(self.try_finish())

    def try_finish(self) -> frozenset[str] | None:
        """Compute the metrics of a few samples; many metrics need more, or all classes.

        Returns:
            The names of the metrics; `None` if a function of the user's raised an error.

        Raises:
            MetricsError: `compute_metrics` or `preprocess_logits` returned a wrong type.
        """
        self._is_sanity_check = True
        try:
            metrics, speed = self.finish()
            return frozenset((*metrics, *speed))
        except MetricsError:
            raise
        except Exception as error:
            logger.info("the metrics of a few samples could not be computed: %s", error)
            return None

    def finish(self) -> tuple[dict[str, Any], dict[str, float]]:
        """Compute the metrics.

        Returns:
            Loss and metrics, and separately the speed.

        Raises:
            MetricsError: `compute_metrics` did not return a dict, or a running metric has the same name.
        """
        options, of = self.options, self.of
        found = self._collector.finish()
        if of.order is not None:
            found = found.restore_order(of.order)
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
                numbers = self.running.compute(is_trial=self._is_sanity_check)
                self._computed = join_metrics(self._computed, numbers, prefix=of.prefix)
        metrics = name_metrics(
            self._computed,
            prefix=of.prefix,
            loss=mean_loss(found, drop_non_finite=options.drop_non_finite),
            preparation_s=self.preparation_s,
        )
        if self.is_saved and self._is_sanity_check:  # later a callback may have changed the log entry
            check_saved(metrics)
        speed = speed_of(of.prefix, start_s=self._start_s, samples=of.samples, batches=of.steps)
        return metrics, speed

    def output(self, metrics: dict[str, Any]) -> PredictionOutput:
        """Combine predictions, labels and metrics of a finished evaluation."""
        assert self.collected is not None
        return PredictionOutput(self.collected.predictions, self.collected.label_ids, metrics)

    def _own_samples(self) -> int:
        """Count this rank's samples of the current round, without repeated ones."""
        rows, number = self.of.rows_by_rank(self._batches), rank() if self.of.ranks > 1 else 0
        return rows[number] if number < len(rows) else 0

    def _without_repeated(self, batch: Batch) -> Batch:
        """Drop the samples by which accelerate pads the last round of a stream, but not all of a batch."""
        samples = self._own_samples()
        if self.of.ranks == 1 or not 0 < samples < (find_batch_size(batch) or 0):
            return batch
        own: Batch = slice_tensors(batch, slice(samples))
        return own

    def _try_update(self, running: RunningMetrics, logits: Any, labels: Any) -> None:
        """Update; an error of an evaluation on several ranks is raised at its end, on all of them."""
        with raise_on_all_ranks() if self._is_sanity_check else nullcontext():
            try:
                if self._failure is None:
                    self._update(running, logits, labels)
            except MetricsError as error:
                if self.of.ranks == 1 or self._is_sanity_check:
                    raise
                self._failure = error

    def _update(self, running: RunningMetrics, logits: Any, labels: Any) -> None:
        """Update the running metrics by this rank's samples, without repeated ones."""
        if labels is None or labels == ():
            if self.is_prediction:
                return
            raise MetricsError(
                f"metrics= compare outputs with labels, and the set {self.of.prefix!r} has not all of "
                f"{', '.join(self.label_names) or 'those that label_names would name'}. Add labels, or leave "
                "metrics= out."
            )
        problem = getattr(getattr(self.model, "config", None), "problem_type", None)
        running.update(
            logits,
            labels,
            rows=self._own_samples(),
            shifts=self.shifts and self.generation is None,
            are_flags=problem == "multi_label_classification",
        )

    def _gather_round(self, seen: Prediction, own_logits: Any, inputs: Any) -> list[Part]:
        """Gather the round that a batch belongs to, in the HF Trainer's order.

        Mirrors: transformers.Trainer.evaluation_loop
        """
        ranks = self.of.ranks
        losses = None if seen.loss is None else self._gather(seen.loss.repeat(self.of.batch_size))
        if inputs is not None and not self.options.by_batch:
            inputs = self._gather(pad(inputs, ranks=ranks))
        if not self._gathers_logits:
            return [Part(losses, None, None, inputs)]
        labels, logits = pad(seen.labels, ranks=ranks), own_logits
        if ranks > 1:
            logits = self._preprocess(pad(seen.logits, ranks=ranks), labels)
        logits = None if logits is None else self._gather(logits)
        labels = None if labels is None else self._gather(labels)
        return [Part(losses, logits, labels, inputs)]

    def _gather_batches(self, seen: Prediction, own_logits: Any, inputs: Any) -> list[Part]:
        """Gather each rank's batch as in one process, without repeated samples."""
        loss, ranks = seen.loss, self.of.ranks
        logits, labels = (own_logits, seen.labels) if self._gathers_logits else (None, None)
        items = None if loss is None else torch.tensor(seen.weight, device=loss.device)
        parts = []
        for samples, (mean, held, *kept) in zip(
            self.of.rows_by_rank(self._batches),
            gather_per_rank((loss, items, logits, labels, inputs), ranks=ranks),
            strict=False,
        ):
            losses = None if mean is None else mean.repeat(samples)
            parts.append(Part(losses, kept[0], kept[1], kept[2], mean, 0 if mean is None else int(held)))
        return parts

    def _preprocess(self, logits: Any, labels: Any) -> Any:
        """Call the user's function; in a sanity check its errors are raised on all ranks."""
        function = self.preprocess_logits
        if logits is None or function is None:
            return logits
        with raise_on_all_ranks() if self._is_sanity_check else nullcontext():
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

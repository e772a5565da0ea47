"""Evaluator: the native Trainer's evaluations inside Lightning's loops over validation and prediction sets.

CallbackHost passes Lightning's hooks on to it, so that a step pays for one callback; knows both worlds. One
run of Lightning's validation loop evaluates all sets, one after the other:

    native                                   Lightning moment
    evaluate() begins                        on_validation_start; for a further set, the end of the last one
    prediction_step                          HFModule.validation_step, predict_step
    on_prediction_step                       on_validation_batch_end, on_predict_batch_end
    on_log, on_evaluate                      on_validation_batch_end of a set's last batch
    (the dict that evaluate() returns)       on_validation_epoch_end: callback_metrics, HFModule.eval_metrics
    on_predict, PredictionOutput             on_predict_epoch_end
"""

import weakref
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from transformers import TrainingArguments
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import PredictionOutput

from hfbridge.data.loader import EvalLoader
from hfbridge.data.streams import StreamEvalLoader
from hfbridge.evaluation.gather import EvalSet, StreamedSet
from hfbridge.evaluation.generate import Generation, generates
from hfbridge.evaluation.memory import MemoryTracker, Stage
from hfbridge.evaluation.metrics import check_called_by_batch, check_is_computed, metric_name
from hfbridge.evaluation.run import EvalOptions, Evaluation
from hfbridge.model.chunked import logits_kept
from hfbridge.model.prepare import takes_skip_logits

_JOINS_CROSSWISE = (
    "eval_use_gather_object=True: natively, the first evaluation on several ranks joins the rounds row by "
    "row, the first rows of all rounds and so on, and drops rows. Leave it out, or "
)


class Evaluator:
    """Run the evaluations of a module.

    Attributes:
        memory: measures the stages of the runs of one Trainer.
        is_first_run: the Trainer has run nothing before, as a native Trainer that was just made.
        predicts: the next prediction run makes a `PredictionOutput`, whose metrics begin with this.
        prediction: what that run has made.
        generate_arguments: what the next runs give `generate` beside the settings.
        rehearses: a run that evaluates tries that on a few rows before it begins.

    Proved by: tests/parity/test_evaluation_options.py
    """

    def __init__(self) -> None:
        self.memory = MemoryTracker(True)
        self.is_first_run = True
        self.predicts: str | None = None
        self.prediction: PredictionOutput | None = None
        self.generate_arguments: dict[str, Any] = {}
        self.keeps_repeated = False
        self.rehearses = True
        self._trainer: weakref.ref[pl.Trainer] | None = None
        self._evaluated = False
        self._preparation_s: float | None = None
        self._current: Evaluation | None = None
        self._loaders: list[EvalLoader | StreamEvalLoader] = []
        self._metrics: dict[str, Any] = {}
        self._speed: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the Trainer out of copies, as Lightning's modules do."""
        return {**self.__dict__, "_trainer": None}

    def follow(
        self, trainer: pl.Trainer, *, skip_memory_metrics: bool, preparation_s: float | None = None
    ) -> None:
        """Take a Trainer for one that has run before, as the native Trainer that it stands for has.

        Args:
            trainer: the Trainer.
            skip_memory_metrics: measure nothing.
            preparation_s: what that one's first evaluation has told; `None` if it began with training.
        """
        self._trainer, self.is_first_run = weakref.ref(trainer), False
        self._preparation_s = preparation_s
        self.memory = MemoryTracker(skip_memory_metrics)

    def begin_run(self, module: Any, args: TrainingArguments) -> None:
        """Measure the setting-up, and see that the module's functions fit the settings.

        Raises:
            MetricsError: `compute_metrics` cannot be called batch by batch.
        """
        if args.batch_eval_metrics and module.compute_metrics is not None:
            check_called_by_batch(module.compute_metrics)
        crosses = args.eval_use_gather_object and args.world_size > 1 and not generates(args)
        if crosses and module.loss_normalization == "native":
            module.tell(f"{_JOINS_CROSSWISE}{module.advice.exact}.")
        if self.is_first_run:
            self.memory = MemoryTracker(args.skip_memory_metrics)
            self.memory.begin("init")

    def rehearse(self, module: Any, data: Any) -> None:
        """Try the evaluation on a few rows of each set: a mistake in it should not wait for its turn.

        All ranks try the same rows, and a whole evaluation together; what is wrong on one is raised on all.
        Nothing is tried with streams: some can be read only once.

        If `metric_for_best_model` is not among what these rows give, a whole evaluation tells: the names of
        some metrics depend on the classes that occur.

        Raises:
            MetricsError: a function of the user's returned what it should not, or the metric is not computed.
        """
        args, wanted = module.args, module.args.metric_for_best_model
        follows = wanted is not None and args.eval_strategy != "no"
        if not self.rehearses or any(data.is_streamed(split) for split in data.eval_splits):
            return
        batches = {
            split: module.receive(data.first_eval_batch(split), module.device) for split in data.eval_splits
        }
        if module.compute_metrics is None and module.running_metrics is None and not follows:
            return
        module.model.eval()
        known = [
            self._new_evaluation(module, _set_of(batch, split, args.eval_batch_size)).rehearse([batch])
            for split, batch in batches.items()
        ]
        if not follows or None in known:
            return
        if metric_name(wanted) not in _union(known):
            known = [
                self._new_evaluation(module, _set_in(loader, args)).rehearse(
                    module.receive(batch, module.device) for batch in loader
                )
                for loader in _listed(data.val_dataloader())
            ]
        if None not in known:
            check_is_computed(wanted, _union(known))

    def add(self, batch: Any) -> Any:
        """Run one batch of the current set; returns its logits."""
        assert self._current is not None
        return self._current.add(batch)

    def generation_of(self, module: Any) -> Generation | None:
        """Say how evaluations and predictions generate; `None` if they do not."""
        if not generates(module.args):
            return None
        return Generation.of(
            module.args,
            given=self.generate_arguments,
            processing_class=module.processing_class,
            by_rows=module.loss_normalization == "native",
        )

    # Lightning's hooks.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a run."""
        self.is_first_run = self._trainer is None or self._trainer() is not trainer
        if self.is_first_run:
            self._trainer = weakref.ref(trainer)
            self._evaluated, self._preparation_s = False, None
        # No inference tensors, as natively, under a plain lightning.Trainer, too.
        trainer.validate_loop.inference_mode = trainer.predict_loop.inference_mode = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the training."""
        self.memory.begin("train")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the first set."""
        self._metrics, self._speed = {}, {}
        self._loaders = _listed(trainer.val_dataloaders)
        self._start(trainer, pl_module)
        self._begin(pl_module, "eval")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Fire `on_prediction_step`; after a set's last batch report it, and begin with the next."""
        module: Any = pl_module
        evaluation = self._close_batch(module)
        if not evaluation.is_done:
            return
        metrics, speed = evaluation.finish()
        row = {**metrics, **speed}
        module.host.report_evaluation(trainer, row)
        self.memory.end("eval", row)
        self._metrics |= {name: value for name, value in row.items() if name not in speed}
        self._speed |= speed
        module.eval_metrics = {**module.eval_metrics, **row} if dataloader_idx else row
        if self._loaders:
            self._begin(module, "eval")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the metrics of all sets to Lightning's `callback_metrics`."""
        numbers = {name: value for name, value in self._metrics.items() if isinstance(value, (int, float))}
        numbers.pop("epoch", None)
        # trainer.validate returns what goes to Lightning's loggers; during fit the host logs the native row.
        to_loggers = None if trainer.state.fn != TrainerFn.FITTING else False
        # On several ranks Lightning warns of what is not synchronised; it does not, of the same on all.
        same: Any = {"batch_size": 1, "sync_dist": True, "rank_zero_only": True}
        pl_module.log_dict(numbers, prog_bar=True, logger=to_loggers, **same)
        pl_module.log_dict(self._speed, logger=to_loggers, **same)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to collect, if a `PredictionOutput` is asked for."""
        if self.predicts is not None:
            self._loaders = _listed(trainer.predict_dataloaders)
            self._start(trainer, pl_module)
            self._begin(pl_module, "test", prefix=self.predicts)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Fire `on_prediction_step`."""
        if self.predicts is not None:
            self._close_batch(pl_module)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute the metrics and fire `on_predict`.

        Mirrors: transformers.Trainer.predict
        """
        if self.predicts is None:
            return
        assert self._current is not None
        module: Any = pl_module
        evaluation, self._current = self._current, None
        metrics, speed = evaluation.finish()
        metrics.update(speed)
        module.host.fire("on_predict", metrics=metrics)
        self.memory.end("test", metrics)
        self.prediction = evaluation.output(metrics)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Stop measuring memory, and let go of what was collected."""
        self.memory.abandon()
        self._current = None

    # Parts of the above.

    def _new_evaluation(
        self,
        module: Any,
        of: EvalSet | StreamedSet,
        *,
        is_first: bool = False,
        is_prediction: bool = False,
        preparation_s: float | None = None,
    ) -> Evaluation:
        """Make ready to evaluate a set; the other arguments are those of `Evaluation` and `EvalOptions`."""
        args, normalization = module.args, module.run.normalization
        by_rows = module.loss_normalization == "native"
        asks = (module.compute_metrics, module.running_metrics) != (None, None)
        keeps_logits = (is_prediction or asks) and not args.prediction_loss_only
        extra = {} if keeps_logits or not takes_skip_logits(module.model) else {"skip_logits": True}

        def loss_of(model: Any, batch: Any) -> Any:
            with logits_kept(module.run.chunked, keeps=keeps_logits):
                return normalization.loss_for_evaluation(model, batch).evaluate(model, {**batch, **extra})

        return Evaluation(
            model=module.model,
            of=of,
            options=EvalOptions.of(
                args, by_rows=by_rows, is_first=is_first, keeps_repeated=self.keeps_repeated
            ),
            loss_of=loss_of,
            label_names=module.label_names,
            has_own_loss=normalization.traits.returns_loss_alone,
            compute_metrics=module.compute_metrics,
            preprocess_logits=module.preprocess_logits_for_metrics,
            keeps_logits=keeps_logits,
            is_prediction=is_prediction,
            preparation_s=preparation_s,
            generation=self.generation_of(module),
            running=module.running_metrics,
            shifts=normalization.traits.shift,
        )

    def _start(self, trainer: pl.Trainer, module: Any) -> None:
        """Put an optimizer's averaged weights in; outside of training be what a new native Trainer is."""
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "eval"):
                optimizer.eval()
        if trainer.state.fn == TrainerFn.FITTING:
            return
        if trainer.global_step == 0 and self._preparation_s is None:
            self._preparation_s = module.run.preparation_s

    def _begin(self, module: Any, stage: Stage, *, prefix: str | None = None) -> None:
        loader = self._loaders.pop(0)
        self.memory.begin(stage)
        module.host.handler.eval_dataloader = loader
        self._current = self._new_evaluation(
            module,
            _set_in(loader, module.args, prefix),
            is_first=not self._evaluated,
            is_prediction=stage == "test",
            preparation_s=self._preparation_s,
        )
        self._evaluated = True

    def _close_batch(self, module: Any) -> Evaluation:
        assert self._current is not None
        module.host.fire("on_prediction_step")
        self._current.close_batch()
        return self._current


def _listed(loaders: Any) -> list[EvalLoader | StreamEvalLoader]:
    return list(loaders) if isinstance(loaders, list) else [loaders]


def _union(known: Iterable[Iterable[str] | None]) -> set[str]:
    return {name for names in known for name in names or ()}


def _set_in(
    loader: EvalLoader | StreamEvalLoader, args: TrainingArguments, prefix: str | None = None
) -> EvalSet | StreamedSet:
    if isinstance(loader, StreamEvalLoader):
        return StreamedSet(prefix or loader.prefix, loader.batch_size, loader, ranks=args.world_size)
    config: Any = args.accelerator_config
    return EvalSet(
        prefix or loader.prefix,
        loader.samples,
        len(loader),
        loader.batch_size,
        ranks=args.world_size,
        splits=config.split_batches,
        order=loader.order,
    )


def _set_of(batch: Any, prefix: str, batch_size: int) -> EvalSet:
    """Describe one batch, which all ranks have, as a whole set."""
    return EvalSet(prefix, find_batch_size(batch) or 1, 1, batch_size)


class EvaluationHooks(pl.Callback):
    """Pass Lightning's hooks around evaluations on to an `Evaluator`.

    Args:
        evaluator: what runs the evaluations.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a run."""
        self.evaluator.setup(trainer, pl_module, stage)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the first set."""
        self.evaluator.on_validation_start(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any
    ) -> None:
        """Close a batch, and a set after its last one."""
        self.evaluator.on_validation_batch_end(trainer, pl_module, *batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the metrics of all sets."""
        self.evaluator.on_validation_epoch_end(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to collect."""
        self.evaluator.on_predict_start(trainer, pl_module)

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        """Close a batch."""
        self.evaluator.on_predict_batch_end(trainer, pl_module, *batch)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute the metrics."""
        self.evaluator.on_predict_epoch_end(trainer, pl_module)

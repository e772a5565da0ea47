"""Evaluator: the HF Trainer's evaluations inside Lightning's validation, test and prediction loops.

One run of Lightning's validation loop evaluates all sets, one after the other:

    transformers.Trainer                     Lightning
    evaluate() begins                        on_validation_start; for a further set, the end of the last one
    prediction_step                          HFModule.validation_step, predict_step
    on_prediction_step                       on_validation_batch_end, on_predict_batch_end
    on_log, on_evaluate                      on_validation_batch_end of a set's last batch
    (the dict that evaluate() returns)       on_validation_epoch_end: callback_metrics, Evaluator.metrics
    on_predict, PredictionOutput             on_predict_epoch_end
"""

import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from transformers import TrainingArguments
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import PredictionOutput

from hfbridge.data.dataloaders import EvalLoader
from hfbridge.data.iterable import StreamEvalLoader
from hfbridge.evaluation.collector import AnySet, EvalSet, StreamedSet, UserSet, is_list_of_objects
from hfbridge.evaluation.evaluation_loop import EvalOptions, Evaluation
from hfbridge.evaluation.generation import Generation, is_generating
from hfbridge.evaluation.memory import MemoryTracker, Stage
from hfbridge.evaluation.metrics import check_called_by_batch, check_is_computed, metric_name
from hfbridge.losses.chunked import logits_kept
from hfbridge.models.preparation import takes_skip_logits

OF_LOADER = "/dataloader_idx_"
"""What Lightning appends to metric names, with a number, where there are several loaders."""
_JOINS_CROSSWISE = (
    "eval_use_gather_object=True: as in transformers.Trainer, the first evaluation on several ranks reorders "
    'and drops samples. Leave it out, or pass loss_normalization="exact".'
)
_JOINS_OBJECTS = (
    "Labels are dicts: as in transformers.Trainer, compute_metrics does not get those of all samples; "
    'loss_normalization="exact" gives it all of them.'
)


class Evaluator:
    """Run the evaluations of a module.

    Attributes:
        memory: measures the stages of the runs of one Trainer.
        is_first_run: the Trainer has run nothing before.
        predicts: the next prediction run makes a `PredictionOutput`, whose metrics begin with this.
        prediction: its result.
        generate_arguments: passed to `generate` beside the settings.
        known_metrics: names that `sanity_check` has computed.
        metrics: of the last evaluation, of all its sets.

    Proved by: tests/parity/test_evaluation_options.py
    """

    def __init__(self) -> None:
        self.memory = MemoryTracker(True)
        self.is_first_run = True
        self.predicts: str | None = None
        self.prediction: PredictionOutput | None = None
        self.generate_arguments: dict[str, Any] = {}
        self.keep_padded_samples: bool | None = None
        self.known_metrics: set[str] = set()
        self.metrics: dict[str, Any] = {}
        self._trainer: weakref.ref[pl.Trainer] | None = None
        self._evaluated = False
        self._preparation_s: float | None = None
        self._module: Any = None
        self._stage: Stage = "eval"
        self._current: Evaluation | None = None
        self._index = -1
        self._loaders: list[tuple[str, Any]] = []
        self._limits: list[Any] = []
        self._reported: list[str] = []
        self._is_sanity_check = False
        self._metrics: dict[str, Any] = {}
        self._speed: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the Trainer out of copies, as Lightning's modules do."""
        return {**self.__dict__, "_trainer": None, "_module": None, "_loaders": []}

    def follow(
        self, trainer: pl.Trainer, *, skip_memory_metrics: bool, preparation_s: float | None = None
    ) -> None:
        """Continue after runs of the HF Trainer that a Trainer stands for."""
        self._trainer, self.is_first_run = weakref.ref(trainer), False
        self._preparation_s = preparation_s
        self.memory = MemoryTracker(skip_memory_metrics)

    def begin_run(self, module: Any, args: TrainingArguments) -> None:
        """Begin to measure the setup, and check that the module's functions fit the settings.

        Raises:
            MetricsError: `compute_metrics` cannot be called batch by batch.
        """
        if args.batch_eval_metrics and module.compute_metrics is not None:
            check_called_by_batch(module.compute_metrics)
        crosses = args.eval_use_gather_object and args.world_size > 1 and not is_generating(args)
        if crosses and module.loss_normalization == "native":
            module.info_once(_JOINS_CROSSWISE)
        if self.is_first_run:
            self.memory = MemoryTracker(args.skip_memory_metrics)
            self.memory.begin("init")

    def sanity_check(self, module: Any, data: Any) -> None:
        """Try the evaluation on a few samples of each set, before training starts.

        Streams and the user's loaders are left out, since some can be read only once, and in "native" the
        user's functions, which are called as by the HF Trainer. Some metrics' names depend on the classes
        that occur: a full evaluation decides if `metric_for_best_model` is not among the first.

        Raises:
            MetricsError: a function of the user's returned what it should not, or the metric is not computed.
        """
        args, wanted = module.args, module.args.metric_for_best_model
        follows = wanted is not None and args.eval_strategy != "no"
        functions = (module.compute_metrics, module.preprocess_logits_for_metrics, module.compute_loss_func)
        calls_user = any(functions) or module.overrides("compute_loss")
        is_native = module.loss_normalization == "native"
        is_left = is_native and (calls_user or module.running_metrics is None)
        if is_left or any(data.is_streamed(split) for split in data.eval_splits):
            return
        prepare = module.run.prepare_inputs
        first = {split: data.first_eval_batch(split) for split in data.eval_splits}
        batches = {split: prepare(batch) for split, batch in first.items() if batch is not None}
        if module.compute_metrics is None and module.running_metrics is None and not follows:
            return
        module.model.eval()
        known = [
            self._new_evaluation(module, _set_of(batch, split, args.eval_batch_size)).sanity_check([batch])
            for split, batch in batches.items()
        ]
        self.known_metrics = _union(known)
        if not follows or None in known:
            return
        if metric_name(wanted) not in _union(known):
            known = [
                self._new_evaluation(module, set_in(loader, args)).sanity_check(map(prepare, loader))
                for _, loader in named_loaders(data.val_dataloader(), "eval")
            ]
        if None not in known:
            check_is_computed(wanted, _union(known))

    def add(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Run one batch of a set; returns its logits."""
        assert self._module is not None
        if dataloader_idx != self._index:  # only for the user's loaders: the others know their last batch
            self._close_set()
            self._begin(dataloader_idx)
        assert self._current is not None
        if not self._current.has_begun and self._module.loss_normalization == "native":
            self._warn_of_objects(batch)
        return self._current.add(batch)

    def _warn_of_objects(self, batch: Any) -> None:
        module = self._module
        if module.compute_metrics is not None and is_list_of_objects(batch.get("labels")):
            module.info_once(_JOINS_OBJECTS)

    def generation_of(self, module: Any) -> Generation | None:
        """Say how evaluations and predictions generate; `None` if they do not."""
        if not is_generating(module.args):
            return None
        return Generation.of(
            module.args,
            given=self.generate_arguments,
            processing_class=module.processing_class,
            weight_by_sample=module.loss_normalization == "native",
        )

    # Lightning's hooks.

    def set_up(self, trainer: pl.Trainer) -> None:
        """Begin a run."""
        self.is_first_run = self._trainer is None or self._trainer() is not trainer
        if self.is_first_run:
            self._trainer = weakref.ref(trainer)
            self._evaluated, self._preparation_s = False, None

    def forget(self) -> None:
        """Treat the Trainer's next run as its first: this one only tried batch sizes or learning rates."""
        self._trainer = None

    def try_batch(self, module: Any, batch: Any) -> None:
        """Evaluate one batch for a finder of Lightning's, which runs without callbacks."""
        args = module.args
        self._new_evaluation(module, UserSet("eval", args.eval_batch_size, ranks=args.world_size)).add(batch)

    def begin(self, trainer: pl.Trainer, module: Any, loaders: Any, stage: Stage, limits: Any) -> None:
        """Begin with the first set."""
        self._metrics, self._speed, self._reported = {}, {}, []
        self._module, self._stage, self._current, self._index = module, stage, None, -1
        self._loaders = named_loaders(loaders, stage)
        if self.predicts is not None:
            self._loaders = [(self.predicts, loader) for _, loader in self._loaders]
        self._limits = list(limits) if isinstance(limits, list) else [limits] * len(self._loaders)
        self._start(trainer, module)
        if all(isinstance(loader, EvalLoader | StreamEvalLoader) for _, loader in self._loaders):
            self._begin(0)

    def on_batch_end(self) -> None:
        """Fire `on_prediction_step`; after a set's last batch report it, and begin with the next."""
        evaluation = self._current
        if evaluation is None or not evaluation.has_begun:
            return  # a subclass's own step
        if not self._is_sanity_check:
            self._module.host.fire("on_prediction_step")
        evaluation.close_batch()
        if evaluation.is_done and self.predicts is None:
            self._close_set()
            if self._index + 1 < len(self._loaders):
                self._begin(self._index + 1)

    def report_empty(self, trainer: pl.Trainer, module: Any) -> None:
        """Report sets without samples, over which Lightning's loop does not run."""
        loaders = trainer.val_dataloaders
        are_ours = all(isinstance(loader, EvalLoader) for _, loader in named_loaders(loaders, "eval"))
        if are_ours and not any(trainer.num_val_batches):
            self.begin(trainer, module, loaders, "eval", trainer.num_val_batches)
            self._close_set()
            for index in range(1, len(self._loaders)):
                self._begin(index)
                self._close_set()

    def on_epoch_end(self, trainer: pl.Trainer) -> None:
        """Log the metrics of all sets to Lightning's `callback_metrics`."""
        self._close_set()
        numbers = {name: value for name, value in self._metrics.items() if isinstance(value, (int, float))}
        numbers.pop("epoch", None)
        # trainer.validate returns what goes to Lightning's loggers; during fit the host logs the full entry.
        to_loggers = None if trainer.state.fn != TrainerFn.FITTING else False
        # On several ranks Lightning warns of what is not synchronized, except of rank 0's alone.
        same: Any = {"batch_size": 1, "sync_dist": True, "rank_zero_only": True}
        for values, shown in ((numbers, True), (self._speed, False)):
            plain = {name: value for name, value in values.items() if OF_LOADER not in name}
            self._module.log_dict(plain, prog_bar=shown, logger=to_loggers, **same)
            for name in values.keys() - plain.keys():
                # `LightningModule.log` does not accept such names, which it makes itself in a loader's steps.
                log_result(trainer, name, values[name], prog_bar=shown, logger=to_loggers is None)

    def on_predict_epoch_end(self) -> None:
        """Compute the metrics of a `PredictionOutput` and fire `on_predict`.

        Mirrors: transformers.Trainer.predict
        """
        if self.predicts is None:
            return
        assert self._current is not None
        evaluation, self._current = self._current, None
        metrics, speed = evaluation.finish()
        metrics.update(speed)
        self._module.host.fire("on_predict", metrics=metrics)
        self.memory.end("test", metrics)
        self.prediction = evaluation.output(metrics)

    def on_exception(self) -> None:
        """Stop measuring memory, and drop what was collected."""
        self.memory.abandon()
        self._current = None

    # Parts of the above.

    def _new_evaluation(
        self,
        module: Any,
        of: AnySet,
        *,
        is_first: bool = False,
        is_prediction: bool = False,
        preparation_s: float | None = None,
    ) -> Evaluation:
        """Prepare to evaluate a set; the other arguments are those of `Evaluation` and `EvalOptions`."""
        args, normalization = module.args, module.run.normalization
        has_metrics = (module.compute_metrics, module.running_metrics) != (None, None)
        keeps_logits = (is_prediction or has_metrics) and not args.prediction_loss_only
        extra = {} if keeps_logits or not takes_skip_logits(module.model) else {"skip_logits": True}

        def loss_of(model: Any, batch: Any) -> Any:
            with logits_kept(module.run.chunked, keeps=keeps_logits):
                return normalization.loss_for_evaluation(model, batch).evaluate(model, {**batch, **extra})

        return Evaluation(
            model=module.model,
            of=of,
            options=EvalOptions.of(
                args,
                weight_by_sample=module.loss_normalization == "native",
                is_first=is_first,
                keep_padded_samples=self.keep_padded_samples,
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
            is_saved=args.save_strategy != "no" and module.trainer.state.fn == TrainerFn.FITTING,
        )

    def _start(self, trainer: pl.Trainer, module: Any) -> None:
        """Use an optimizer's averaged weights; outside of training report the preparation time."""
        self._is_sanity_check = trainer.sanity_checking
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "eval"):
                optimizer.eval()
        is_fit = trainer.state.fn == TrainerFn.FITTING
        if not is_fit and trainer.global_step == 0 and self._preparation_s is None:
            self._preparation_s = module.run.preparation_s

    def _begin(self, index: int) -> None:
        """Begin to evaluate the set of a loader."""
        module, self._index = self._module, index
        prefix, loader = self._loaders[index]
        if not self._is_sanity_check:
            self.memory.begin(self._stage)
        module.host.handler.eval_dataloader = loader
        self._current = self._new_evaluation(
            module,
            set_in(loader, module.args, prefix, self._limits[index]),
            is_first=not self._evaluated,
            is_prediction=self.predicts is not None,
            preparation_s=None if self._is_sanity_check else self._preparation_s,
        )
        self._evaluated |= not self._is_sanity_check

    def _close_set(self) -> None:
        """Compute the metrics of the current set and report them."""
        evaluation, self._current = self._current, None
        if evaluation is None or not (evaluation.has_begun or evaluation.is_empty):
            return
        if self._is_sanity_check:
            evaluation.try_finish()
            return
        module = self._module
        metrics, speed = (self._with_number_of_loader(found) for found in evaluation.finish())
        entry = {**metrics, **speed}
        module.host.report_evaluation(module.trainer, entry)
        self.memory.end(self._stage, entry)
        self._metrics |= {name: value for name, value in entry.items() if name not in speed}
        self._speed |= speed
        self.metrics = {**self.metrics, **entry} if self._reported else entry
        self._reported.append(evaluation.of.prefix)

    def _with_number_of_loader(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Append to names what Lightning appends for several of the user's loaders."""
        loader = self._loaders[self._index][1]
        if len(self._loaders) == 1 or isinstance(loader, EvalLoader | StreamEvalLoader):
            return dict(metrics)
        suffix = f"{OF_LOADER}{self._index}"
        return {name if name == "epoch" else f"{name}{suffix}": value for name, value in metrics.items()}


def _union(known: Iterable[Iterable[str] | None]) -> set[str]:
    return {name for names in known for name in names or ()}


def named_loaders(loaders: Any, stage: str) -> list[tuple[str, Any]]:
    """Pair evaluation loaders with the prefix of their metrics: that of the user's is the stage."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    several = loaders if isinstance(loaders, list | tuple) else [loaders]
    ours = EvalLoader | StreamEvalLoader
    return [(loader.prefix if isinstance(loader, ours) else stage, loader) for loader in several]


def set_in(
    loader: Any, args: TrainingArguments, prefix: str | None = None, limit: float = math.inf
) -> AnySet:
    """Describe the set that a loader reads."""
    if isinstance(loader, StreamEvalLoader):
        return StreamedSet(prefix or loader.prefix, loader.batch_size, loader, ranks=args.world_size)
    if not isinstance(loader, EvalLoader):
        return UserSet(prefix or "eval", args.eval_batch_size, ranks=args.world_size)
    config: Any = args.accelerator_config
    batches = int(min(len(loader), limit))
    per_round = loader.batch_size * (1 if config.split_batches else args.world_size)
    return EvalSet(
        prefix or loader.prefix,
        min(loader.samples, batches * per_round),
        batches,
        loader.batch_size,
        ranks=args.world_size,
        splits=config.split_batches,
        order=None if loader.order is None else loader.order[: batches * per_round],
    )


def _set_of(batch: Any, prefix: str, batch_size: int) -> EvalSet:
    """Describe one batch, which all ranks have, as a set."""
    return EvalSet(prefix, find_batch_size(batch) or 1, 1, batch_size)


def log_result(trainer: pl.Trainer, name: str, value: float, *, prog_bar: bool, logger: bool) -> None:
    """Log a number under any name, as `LightningModule.log` does, at the end of an evaluation.

    Mirrors: lightning.pytorch.LightningModule.log
    """
    results, module = trainer._results, trainer.lightning_module
    assert results is not None
    number = torch.tensor(value, dtype=torch.float32, device=module.device)
    function = module._current_fx_name or "on_validation_epoch_end"
    results.log(function, name, number, prog_bar=prog_bar, logger=logger, batch_size=1, rank_zero_only=True)


class EvaluationHooks(pl.Callback):
    """Pass Lightning's evaluation hooks to an `Evaluator`, so that a step pays for one callback."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin with the first set."""
        pl_module.ensure_ready()
        limits = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self.evaluator.begin(trainer, pl_module, trainer.val_dataloaders, "eval", limits)

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin with the first set."""
        pl_module.ensure_ready()
        self.evaluator.begin(trainer, pl_module, trainer.test_dataloaders, "test", trainer.num_test_batches)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin to collect, if a `PredictionOutput` was requested."""
        pl_module.ensure_ready()
        if self.evaluator.predicts is not None:
            self.evaluator.begin(
                trainer, pl_module, trainer.predict_dataloaders, "test", trainer.num_predict_batches
            )

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any
    ) -> None:
        """Close a batch, and a set after its last one."""
        self.evaluator.on_batch_end()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the metrics of all sets."""
        self.evaluator.on_epoch_end(trainer)

    on_test_epoch_end = on_validation_epoch_end

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute the metrics."""
        self.evaluator.on_predict_epoch_end()

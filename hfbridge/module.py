"""HFModule: any Hugging Face model as a LightningModule.

One Lightning batch is one micro-batch; the first of an optimizer step counts the items of all of them.

    a Lightning hook                 stands for, in the HF Trainer
    configure_model                  set_seed, build the model, wrap its forward
    configure_optimizers             create_optimizer, create_scheduler
    training_step                    get_batch_samples' count, _prepare_inputs, training_step
    configure_gradient_clipping      _clip_grad_norm, on_pre_optimizer_step
    optimizer_step                   optimizer.step, on_optimizer_step
    validation_step, test_step,      prediction_step; callbacks/evaluation.py has the rest of evaluation_loop
      predict_step
    on_load_checkpoint               _load_from_checkpoint; checkpoints/resume.py has the rest
"""

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import lightning.pytorch as pl
import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.optim import Optimizer
from transformers import Trainer as NativeTrainer
from transformers import TrainingArguments
from transformers.utils.logging import set_verbosity

from hfbridge.callbacks.attachment import attach_host, insert_host
from hfbridge.callbacks.checkpointing import write_on_first_rank
from hfbridge.callbacks.connector import configure_trainer, current_micro_batch, datamodule_of, note_of_seeds
from hfbridge.callbacks.evaluation import Evaluator
from hfbridge.callbacks.run_data import RunData, UserData
from hfbridge.callbacks.trainer_state import CallbackHost
from hfbridge.checkpoints.checkpoint_io import read_directories
from hfbridge.checkpoints.resume import Resumption, fill_checkpoint
from hfbridge.data.accumulation import MicroBatch
from hfbridge.data.dataloaders import EvalLoader, first_samples
from hfbridge.datamodule import HFDataModule
from hfbridge.errors import BridgeWarning, ModelError
from hfbridge.evaluation.evaluation_loop import PreprocessLogits
from hfbridge.evaluation.memory import explain_eval_oom
from hfbridge.evaluation.metrics import ComputeMetrics
from hfbridge.evaluation.prediction_step import logits_in
from hfbridge.evaluation.torchmetrics import MetricsSource, RunningMetrics
from hfbridge.losses.chunked import check_chunked
from hfbridge.losses.criterion import LossFunction
from hfbridge.losses.step_loss import scale_for_accumulation
from hfbridge.migration.to_trainer import make_native
from hfbridge.models.forward_errors import explain_no_gradient
from hfbridge.models.hyperparameters import (
    LEFT_OUT_KEY,
    check_stored,
    describe_left_out,
    left_out,
    logged_hyperparameters,
    make_plain,
    store_arguments,
)
from hfbridge.models.loading import (
    ModelSource,
    backbone,
    build_model,
    built_model,
    check_function,
    check_source,
    is_built,
)
from hfbridge.models.model_run import ModelRun
from hfbridge.models.optimizers import (
    OptimizerClass,
    Optimizers,
    OwnSchedule,
    StepRecord,
    check_optimizers,
    learning_rate_of,
)
from hfbridge.models.peft import read_peft_config
from hfbridge.models.training_mode import set_training
from hfbridge.settings import Settings, SettingsSource
from hfbridge.strategies import Sharing
from hfbridge.utilities.instantiate import ProcessorSource, find_factory, make_processor


class HFModule(pl.LightningModule):
    """Train any Hugging Face model with Lightning, step for step as `transformers.Trainer` would.

    Args:
        model: a model, a function that returns one, or the name or folder of one together with `auto_class`.
            A named model is built, seeded, when the run begins, or by `module.configure_model()`.
        auto_class: the `AutoModelFor...` class, or its name, of a named model.
        model_kwargs: further arguments of `from_pretrained`, such as `{"num_labels": 3}`.
        dtype: dtype of a named model's weights; "auto" keeps the saved one. `bf16=True` in the settings keeps
            the weights and casts in the forward.
        peft_config: a configuration of PEFT, such as `peft.LoraConfig(r=8)`, or a dict of its fields with
            "peft_type": only these adapters are trained.
        settings: only under a plain `lightning.Trainer`; also those of the data module.
        processing_class: tokenizer or processor, or the name or folder of one; the model's special tokens are
            aligned with it.
        compute_metrics: function of an `EvalPrediction` that returns a dict of metrics.
        metrics: a torchmetrics `Metric`, `MetricCollection` or dict of these, updated batch by batch with
            logits [samples, classes] and labels [samples]; tokens are samples. Neither is kept.
        preprocess_logits_for_metrics: function of a batch's logits and labels that returns the predictions of
            `compute_metrics` and `metrics`, such as `logits.argmax(-1)`.
        compute_loss_func: function of outputs, labels and `num_items_in_batch` that returns the loss.
        optimizers: an optimizer and a schedule of your own; `None` is the one of the settings.
        optimizer_cls_and_kwargs: an optimizer class and its arguments, in place of `optim` and `optim_args`.
        loss_normalization: "exact": the gradient of an optimizer step does not depend on how its samples are
            split into micro-batches. "native": that of `transformers.Trainer`, to the bit, including its
            factor for models that ignore `num_items_in_batch`.
        chunked_loss: compute the loss of a language model without holding its logits, in less memory and
            equal but for the last digits. Metrics that need logits get them.

    Attributes:
        schedule: the run's learning-rate schedule.
        last_step: gradient norm and learning rate of the epoch's last optimizer step.
        resumption: resume state; `None` for a new run.
        _reused_optimizer: the optimizer of the next run.
        evaluator: runs the evaluations.
        compile_context: the compiler of a model that was passed compiled.
        label_names: names under which labels reach the model; known once the run is set up.
    notes: logged by `info_once`.

    Raises:
        ModelError: `model` and `auto_class` do not name a model with a head, the folder does not exist, or
            two arguments exclude each other.
        MetricsError: `metrics` holds something else.

    Mirrors: transformers.Trainer
    Proved by: tests/parity/test_steps.py
    """

    _run: ModelRun | None = None
    _host: CallbackHost | None = None
    _data: RunData | None = None
    _has_begun = False
    _learning_rate: float | None = None
    _reused_optimizer: Optimizer | None = None
    resumption: Resumption | None = None
    schedule: Any = None
    compile_context: Any = None

    def __init__(
        self,
        model: ModelSource,
        auto_class: Any = None,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        dtype: str | torch.dtype = "auto",
        peft_config: Mapping[str, Any] | Any = None,
        settings: SettingsSource | None = None,
        processing_class: ProcessorSource | None = None,
        compute_metrics: ComputeMetrics | None = None,
        metrics: MetricsSource | None = None,
        preprocess_logits_for_metrics: PreprocessLogits | None = None,
        compute_loss_func: LossFunction | None = None,
        optimizers: Optimizers = (None, None),
        optimizer_cls_and_kwargs: OptimizerClass | None = None,
        loss_normalization: Literal["exact", "native"] = "exact",
        chunked_loss: bool = False,
    ) -> None:
        super().__init__()
        store_arguments(self, inspect.currentframe(), _ARGUMENTS)
        check_stored(model=model, model_kwargs=model_kwargs, peft_config=peft_config)
        _check_no_module(model)
        model = find_factory(model, auto_class)
        has_function = compute_loss_func is not None or self.overrides("compute_loss")
        check_chunked(chunked_loss, has_function=has_function)
        check_source(model, auto_class, dtype=dtype, model_kwargs=model_kwargs, has_function=has_function)
        if loss_normalization not in ("exact", "native"):
            raise ModelError(f"loss_normalization={loss_normalization!r}; it may be 'exact' or 'native'.")
        check_function("compute_metrics", compute_metrics, "an EvalPrediction", optional="compute_result")
        preprocess, of = preprocess_logits_for_metrics, "logits and labels"
        check_function("preprocess_logits_for_metrics", preprocess, of, positional=2)
        items = "num_items_in_batch"
        of = f"outputs, labels and {items} (by that name)"
        check_function("compute_loss_func", compute_loss_func, of, positional=2, optional=items)
        check_optimizers(None if peft_config is not None else model, optimizers, optimizer_cls_and_kwargs)
        self._build: Callable[..., nn.Module] | None = None
        is_named, is_object = isinstance(model, (str, Path)), isinstance(model, nn.Module)
        is_ready = is_object and peft_config is None
        if peft_config is not None:
            peft_config = read_peft_config(peft_config, model, auto_class)
        if not is_ready:
            self._build = partial(
                build_model,
                model,
                auto_class=auto_class,
                dtype=dtype,
                model_kwargs=dict(model_kwargs or {}),
                peft_config=peft_config,
                has_function=has_function,
            )
        in_parts = is_named and peft_config is None
        self._is_built = {"in_parts": in_parts, "seeds_again": is_named or is_object}
        if is_ready:
            self.model = model
        self.given_settings = None if settings is None else Settings.of(settings)
        self.evaluator = Evaluator()
        self.notes = list[str]()
        self.label_names: list[str] = []
        self.processing_class: Any = make_processor(processing_class)
        self.compute_metrics = compute_metrics
        self.running_metrics = None if metrics is None else RunningMetrics(metrics)
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.compute_loss_func = compute_loss_func
        self._user_optimizers, self.optimizer_cls_and_kwargs = optimizers, optimizer_cls_and_kwargs
        self.loss_normalization, self.chunked_loss = loss_normalization, chunked_loss
        self.last_step = StepRecord()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a compiled model is kept as its module and its compiler."""
        if name == "_current_fx_name":  # set twice a hook
            self.__dict__[name] = value
        elif name == "model" and isinstance(value, OptimizedModule):
            self.compile_context = value.dynamo_ctx
            super().__setattr__(name, value._orig_mod)
        else:
            super().__setattr__(name, value)

    sets_use_cache = True  # the setting goes into the model's configuration
    model: Any = property(built_model)
    is_built: Any = property(is_built)
    backbone: Any = property(backbone)

    def overrides(self, name: str) -> bool:
        """Whether a subclass overrides a method of HFModule."""
        return is_overridden(name, self, HFModule)

    @property
    def hparams_initial(self) -> Any:
        """The hyperparameters for loggers, with the settings of the run."""
        of_data = getattr(getattr(self._trainer, "datamodule", None), "hparams_initial", {})
        settings = None if self._data is None else self._data.settings
        return AttributeDict(logged_hyperparameters(super().hparams_initial, settings, of_data))

    @property
    def run(self) -> ModelRun:
        """What the run does with the model; known once it is set up."""
        assert self._run is not None
        return self._run

    @property
    def args(self) -> TrainingArguments:
        """The settings as TrainingArguments; made when the run is set up."""
        return self.run.args

    @property
    def data(self) -> RunData:
        """The data of the run; known once it is set up."""
        assert self._data is not None
        return self._data

    @property
    def host(self) -> CallbackHost:
        """The callback that keeps the `TrainerState` of the run."""
        assert self._host is not None
        return self._host

    @property
    def lr_schedule(self) -> Any:
        """The learning-rate schedule of the run, which callbacks may have replaced; `None` without one."""
        configs = self.trainer.lr_scheduler_configs
        found = configs[0].scheduler if configs else self.schedule
        return found.schedule if isinstance(found, OwnSchedule) else found

    @property
    def learning_rate(self) -> float | None:
        """The learning rate of the settings, or what `LearningRateFinder` or `Tuner` has set."""
        settings = self.given_settings if self._data is None else self._data.settings
        if self._learning_rate is not None or settings is None:
            return self._learning_rate
        return float(settings.learning_rate)

    @learning_rate.setter
    def learning_rate(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate

    @property
    def has_host(self) -> bool:
        """Whether the host is among the Trainer's callbacks: Lightning's finders try runs without any."""
        return self._host in self.trainer.callbacks  # type: ignore[attr-defined]

    @property
    def eval_metrics(self) -> dict[str, Any]:
        """Metrics of the last evaluation, of all its sets."""
        return self.evaluator.metrics

    @property
    def sharing(self) -> Sharing:
        """How the ranks of the run share the model; known once it is set up."""
        return self.run.sharing

    @property
    def log_history(self) -> list[dict[str, float]]:
        """Log entries of the run as `transformers.Trainer` makes them, each with its step."""
        return [] if self._host is None else self._host.state.log_history

    def __getstate__(self) -> dict[str, Any]:
        """Leave the run out of copies, which callbacks make to average weights."""
        own = dict.fromkeys(("_run", "_host", "_data", "schedule", "resumption", "compile_context"))
        return {**super().__getstate__(), **own, "_reused_optimizer": None, "evaluator": Evaluator()}

    def forward(self, **inputs: Any) -> Any:
        """Call the Hugging Face model.

        Raises:
            ModelError: a named model that no run has built yet.
        """
        return self.model(**inputs)

    def freeze(self) -> Self:
        """Freeze all parameters of the model, as Lightning does.

        Raises:
            ModelError: a named model that is not built yet.
        """
        _ = self.model
        return super().freeze()

    def load_state_dict(self, *arguments: Any, **named: Any) -> Any:
        """Load weights, as `torch.nn.Module.load_state_dict` does.

        Raises:
            ModelError: a named model that is not built yet.
        """
        _ = self.model
        return super().load_state_dict(*arguments, **named)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Add the host of state, TrainerCallbacks and evaluations to the Trainer's callbacks, once."""
        self._has_begun = False
        self._host, added = attach_host(self)
        return added

    def setup(self, stage: str) -> None:
        """Set the run up, unless `RunSetup` has."""
        self.begin_run()

    def begin_run(self, *, builds: bool = False) -> None:
        """Set the run up, once.

        Args:
            builds: also build the model, unless the strategy shards it, for callbacks that are set up before
                Lightning calls `configure_model`.

        Raises:
            ModelError: `optimizers` was passed, and the strategy replaces the parameters in it.
        """
        if not self._has_begun:
            self.resumption, self.schedule, self._has_begun = None, None, True
            if not self.has_host:
                self._host = insert_host(self)
            self.evaluator.set_up(self.trainer)
            datamodule = datamodule_of(self.trainer)
            is_ours = isinstance(datamodule, HFDataModule)
            self._data = datamodule if is_ours else UserData(self.trainer)
            if self.trainer.state.fn == TrainerFn.FITTING and not is_ours:
                configure_trainer(self.trainer, self.data.settings)
            self.info_once(note_of_seeds(self.data.settings))
            self._run = ModelRun(self, self.data.settings)
            set_verbosity(self.args.get_process_log_level())
            self.evaluator.begin_run(self, self.args)
            read_directories(self.trainer.strategy)
        if builds:
            self.run.build_early()

    def ensure_ready(self) -> None:
        """Set the run up and prepare the model, where a subclass's hooks have not called `super()`."""
        self.begin_run()
        HFModule.configure_model(self)

    def end_run(self) -> None:
        """Undo changes to the model and the user's optimizer; a second call does nothing."""
        self._has_begun = False
        if self._run is not None:
            self._run.close()

    def configure_model(self) -> None:
        """Seed, build the model if needed, and wrap its forward; without a Trainer only build it.

        Training starts in the random state of the HF Trainer; models/loading.py has the table.
        """
        if self._trainer is None:
            if not self.is_built:
                assert self._build is not None
                self.model = self._build()
            return
        self.begin_run()
        if not self.run.is_built:
            self.model = self.run.build(self._build, **self._is_built)
            self.label_names = self.run.label_names
            self.run.prepare()
            if self.trainer.state.fn == TrainerFn.FITTING:
                self.model.train()  # before Lightning's summary of the model
            self.run.expect_trials(self.trainer)
            self.host.attach(self, self.args)

    def configure_optimizers(self) -> Any:
        """Make optimizer and schedule as `transformers.Trainer` does."""
        self.ensure_ready()
        return self.run.configure_optimizers(max_steps=self.data.schedule.max_steps)

    def on_fit_start(self) -> None:
        """Sanity-check evaluation before training starts."""
        evaluates = self.args.eval_strategy != "no" or self.args.eval_on_start
        if evaluates and self.trainer.limit_val_batches:
            with isolate_rng(), explain_eval_oom(self.args), _nothing_logged(self):
                self.evaluator.sanity_check(self, self.data)
        self.model.train()
        self.run.begin_training()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Complete a checkpoint that Lightning has read, and keep the resume state.

        Raises:
            CheckpointError: it is another model's, or has no position of its run.
        """
        if not self.is_built:
            self.configure_model()
        for note in describe_left_out(self, checkpoint):
            self.info_once(note)
        if self._host is not None and self._trainer is not None:
            self._host.checkpoints.spoil("other weights were loaded after its run")
        self.resumption = fill_checkpoint(self, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to a Lightning checkpoint what an exact resume needs, and plain hyperparameters."""
        if stored := checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY):
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = make_plain(stored, _ARGUMENTS)
        checkpoint[LEFT_OUT_KEY] = left_out(self)
        if self._host is not None:
            checkpoint |= self._host.checkpoints.describe(self, checkpoint)

    def save_pretrained(self, path: str | os.PathLike[str], *, merge: bool = False) -> None:
        """Write the model, and its tokenizer or processor, into a folder for `from_pretrained`.

        Rank 0 writes. Under FSDP all ranks must call it.

        Args:
            path: the folder.
            merge: write the full model with PEFT's adapters merged into its weights, as `merge_and_unload`
                does, and not the adapters alone; the trained model stays as it is.

        Raises:
            ModelError: a named model that is not built yet, or nothing can be merged.
            CheckpointError: it cannot be written.

        Mirrors: transformers.Trainer.save_model
        Proved by: tests/unit/checkpoints/test_convert.py
        """
        write_on_first_rank(self, self.model, Path(path), merge=merge)

    to_native = make_native

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute a micro-batch's share of its optimizer step's loss.

        Returns:
            The share times `accumulate_grad_batches`, by which Lightning divides, scalar: its mean over the
            micro-batches of a step is the step's loss.

        Mirrors: transformers.Trainer.training_step
        """
        loss = self.loss_share(batch)
        accumulation = self.trainer.accumulate_grad_batches
        has_step = getattr(current_micro_batch(self.trainer, batch), "step", None) is not None
        if accumulation > 1 and self._run.sharing.divides_again:  # type: ignore[union-attr]
            loss.register_hook(lambda gradient: gradient * accumulation)
        return scale_for_accumulation(loss, accumulation) if has_step and accumulation > 1 else loss

    def loss_share(self, batch: Any) -> Tensor:
        """Compute a micro-batch's share of its optimizer step's loss, scalar.

        Args:
            batch: columns by name, on the model's device. One without a step gets its own mean loss.
        """
        run, host = self._run, self._host
        trainer: Any = self._trainer
        assert run is not None
        assert host is not None
        has_host = host in trainer.callbacks
        if not has_host:
            run.begin_trial()
        has_step = type(batch) is MicroBatch and batch.step is not None
        micro_batch = batch if has_step else current_micro_batch(trainer, batch)
        step, index = (None, 0) if micro_batch is None else (micro_batch.step, micro_batch.index)
        if step is None:
            run.warn_of_mean()
        elif step.loss is None:
            run.begin_step(step)
        for to_training in run.optimizers_to_training:
            to_training()
        set_training(run.preparation.trained)
        loss = run.loss_share(batch, step, index)
        if not loss.requires_grad and not self.overrides("training_step"):
            explain_no_gradient(self.model, run.parameters.total)
        every = run.args.torch_empty_cache_steps
        if every is not None and host.state.global_step % every == 0:
            clear_device_cache()
        share = loss if step is not None else loss / trainer.accumulate_grad_batches
        if has_host:
            host.add_micro_batch(share.detach(), batch)
        return loss

    def compute_loss(self, outputs: Any, batch: Any) -> Tensor:
        """Compute the loss of a micro-batch; override it to train and evaluate with another one.

        The loss of an optimizer step is the mean over all its items: labels that are not ignored, or samples.

            class Focal(HFModule):
                def compute_loss(self, outputs, batch):
                    return focal_loss(outputs.logits, batch["labels"])

        Args:
            outputs: of the model's forward, with labels if it takes them.
            batch: the micro-batch, on the model's device, with its labels.

        Returns:
            The mean over the micro-batch, scalar: by default the model's own, or that of
            `label_smoothing_factor` or `compute_loss_func`.

        Mirrors: transformers.Trainer.compute_loss
        Proved by: tests/lightning/test_overrides.py
        """
        return self.run.criterion.loss_of(self.model, outputs, batch)

    def clip_gradients(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip gradients as Lightning does; a value passed here replaces transformers' default of 1.0."""
        trainer, is_given = self.trainer, "max_grad_norm" in self.data.settings.given
        if gradient_clip_val is None or is_given or trainer.gradient_clip_val is None:
            super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        algorithm = GradClipAlgorithmType(
            gradient_clip_algorithm or trainer.gradient_clip_algorithm or "norm"
        )
        trainer.precision_plugin.clip_gradients(optimizer, gradient_clip_val, algorithm)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip all gradients of the model and keep their norm; a `gradient_clip_val` of 0 does not clip."""
        host = self.host
        host.end_micro_batch()
        host.checkpoints.before_step()
        by_value = gradient_clip_algorithm == "value"
        limit = 0.0 if gradient_clip_val is None or by_value else gradient_clip_val
        self.last_step.grad_norm = self.sharing.clip(self.model, limit)
        if by_value and gradient_clip_val:
            nn.utils.clip_grad_value_(self.model.parameters(), gradient_clip_val)
        host.fire("on_pre_optimizer_step")
        self.last_step.is_updating = not self._run.notes_update  # type: ignore[union-attr]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Take the step and keep its learning rate; the schedule is stepped afterwards."""
        optimizer.step(closure=optimizer_closure)
        self.last_step.is_updated, self.last_step.is_updating = True, False
        self.host.fire("on_optimizer_step")
        self.last_step.learning_rate = learning_rate_of(optimizer, self.lr_schedule)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients, unless CallbackHost has, after the last step, as the HF Trainer does."""
        if self.overrides("optimizer_zero_grad") or not self.has_host:
            optimizer.zero_grad()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Collect loss, logits and labels of one batch."""
        batch = self.run.prepare_inputs(batch)
        if self.has_host:
            self.evaluator.add(batch, dataloader_idx)
        else:
            self.evaluator.try_batch(self, batch)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return a batch's logits, a tensor or a tuple of them, or what is generated for it, on the CPU."""
        batch = self.run.prepare_inputs(batch)
        if self.evaluator.predicts is not None:
            return self.evaluator.add(batch)
        loader = self.trainer.predict_dataloaders
        own = loader.own_samples(batch_idx) if isinstance(loader, EvalLoader) else None
        if (generation := self.evaluator.generation_of(self)) is not None:
            return first_samples(generation.tokens(self.model, batch).cpu(), own)
        with torch.no_grad():
            outputs = self.model(**batch)
        logits = logits_in(outputs, self.model, has_loss=isinstance(outputs, Mapping) and "loss" in outputs)
        return first_samples(send_to_device(logits, "cpu"), own)

    def info_once(self, note: str) -> None:
        """Log a note once, on rank 0; an empty one is ignored."""
        if note and note not in self.notes:
            self.notes.append(note)
            rank_zero_info(f"hfbridge: {note}")


@contextmanager
def _nothing_logged(module: HFModule) -> Iterator[None]:
    """Leave out what a subclass logs in `compute_loss`."""
    vars(module).update(dict.fromkeys(("log", "log_dict"), lambda *arguments, **named: None))
    try:
        yield
    finally:
        del vars(module)["log"], vars(module)["log_dict"]


def _check_no_module(model: object) -> None:
    """Check that a model is not a LightningModule without forward, and warn of what another would lose."""
    if isinstance(model, NativeTrainer):
        raise ModelError(
            "model= must be a model, got a `transformers.Trainer`. Call `hfbridge.from_trainer(trainer)`."
        )
    if not isinstance(model, pl.LightningModule):
        return
    name = type(model).__name__
    if isinstance(model, HFModule):
        raise ModelError(f"model= must be a Hugging Face model, got `{name}`, which is an HFModule: pass it.")
    advice = f"`hfbridge.Trainer(settings).fit({name}(...), data)` trains a LightningModule as it is."
    if not is_overridden("forward", model, pl.LightningModule):
        raise ModelError(f"model= must be a Hugging Face model, got the LightningModule `{name}`. {advice}")
    lost = [hook for hook in ("training_step", "configure_optimizers") if is_overridden(hook, model)]
    if lost:
        warnings.warn(
            f"HFModule calls only `{name}.forward`, and not its {' and '.join(lost)}. {advice}",
            BridgeWarning,
            stacklevel=3,
        )


_ARGUMENTS = frozenset(inspect.signature(HFModule.__init__).parameters) - {"self"}

# Lightning reads this signature at every step; kept, it costs a third.
HFModule.training_step.__signature__ = inspect.signature(HFModule.training_step)  # type: ignore[attr-defined]

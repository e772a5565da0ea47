"""NativeHost: the state of a run, stored on the `transformers.Trainer` that it belongs to.

CallbackHost's own                    here
state, control, args, callbacks       those of the Trainer, live
a log entry                           Trainer.log
the best metric so far                Trainer._determine_best_metric
an evaluation                         the Trainer's own, if its class overrides a part of that
on_init_end                           was called by Trainer.__init__
the loss since the last log entry     the Trainer's `_tr_loss`; not resumed
overridden methods, memory            called in place of the host's own; measured by the Trainer's tracker
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from accelerate.state import AcceleratorState, PartialState
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import Trainer as NativeTrainer
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import TrainerMemoryTracker

from hfbridge.callbacks.evaluation import Evaluator
from hfbridge.callbacks.jit_checkpoint import SigtermCheckpoint
from hfbridge.callbacks.trainer_state import EVENTS, CallbackHost
from hfbridge.dropin.log_messages import log_begin, log_end
from hfbridge.dropin.replaced_methods import (
    COUNTS,
    ENDS,
    EVALUATES,
    FIXED,
    LOGS,
    RESUMES,
    SAVES,
    STEPS,
    Overrides,
    Watched,
)
from hfbridge.dropin.run_setup import innermost
from hfbridge.errors import Problem, SettingsError, raise_problems
from hfbridge.evaluation.memory import MemoryTracker, Stage
from hfbridge.evaluation.metrics import metric_name
from hfbridge.losses.running_loss import LoggedLoss
from hfbridge.models.flops import FlopsCounter
from hfbridge.models.optimizers import follows_metric

_SHARED = frozenset({"fsdp", "fsdp2", "deepspeed"})
"""Strategies that shard the model, whose checkpoints only they can write."""


class NativeHost(CallbackHost):
    """Store the state of a run on a `transformers.Trainer`, and call its callbacks and methods.

    Args:
        native: the Trainer.
        evaluator: runs the evaluations.
        evaluates_itself: the Trainer's own methods evaluate.
        ignore_keys: of the model's outputs, not gathered by these.
        overrides: what the Trainer overrides.
        is_shared: the model is sharded.
        trial: of a hyperparameter search; `None` outside of one.

    Attributes:
        is_shared: the model is sharded.
        row: the last log entry, as callbacks have left it.
        train_loss: mean loss of the run, once it has ended.

    Proved by: tests/dropin/test_train.py
    """

    restore_running_loss = warn_existing_checkpoints = checks_limit_first = False

    def __init__(
        self,
        native: NativeTrainer,
        evaluator: Evaluator,
        *,
        evaluates_itself: bool,
        ignore_keys: list[str] | None,
        overrides: Overrides,
        is_shared: bool,
        trial: Any = None,
    ) -> None:
        self._native: Any = native
        self.is_shared = is_shared
        self._overrides, self._trial = overrides, trial
        kept = native.state, native.control
        super().__init__(evaluator)
        native.state, native.control = kept
        self._handled_events = EVENTS  # callbacks may be added during the run
        self._evaluates_itself, self._ignore_keys = evaluates_itself, ignore_keys
        self._trainer: pl.Trainer | None = None
        self._shared = [(kind, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState)]
        self.row: dict[str, Any] = {}
        self.train_loss = 0.0
        evaluator.memory = NativeMemory(native._memory_tracker)

    @property
    def state(self) -> TrainerState:
        """The Trainer's."""
        state: TrainerState = self._native.state
        return state

    @state.setter
    def state(self, value: TrainerState) -> None:
        self._native.state = value

    @property
    def control(self) -> TrainerControl:
        """The Trainer's."""
        control: TrainerControl = self._native.control
        return control

    @control.setter
    def control(self, value: TrainerControl) -> None:
        self._native.control = value

    @property
    def args(self) -> TrainingArguments:
        """The Trainer's."""
        args: TrainingArguments = self._native.args
        return args

    @args.setter
    def args(self, value: TrainingArguments | None) -> None:
        """Keep the Trainer's."""

    @property
    def handler(self) -> CallbackHandler:
        """The Trainer's."""
        handler: CallbackHandler = self._native.callback_handler
        return handler

    @handler.setter
    def handler(self, value: CallbackHandler | None) -> None:
        """Keep the Trainer's."""

    def join(self, trainer: pl.Trainer) -> None:
        """Join Lightning's callbacks before those that save."""
        listed: Iterable[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [cb for cb in listed if not isinstance(cb, Checkpoint)]
        savers = [cb for cb in listed if isinstance(cb, Checkpoint)]
        trainer.callbacks = [*others, self, *savers]  # type: ignore[attr-defined]

    @contextmanager
    def replaced_sigterm_callback(self) -> Iterator[None]:
        """Replace transformers' SIGTERM callback, which saves within a step, by hfbridge's."""
        handler = self.handler
        natives = [cb for cb in handler.callbacks if type(cb) is JITCheckpointCallback]
        others = {id(cb): SigtermCheckpoint() for cb in natives}
        handler.callbacks = [others.get(id(cb), cb) for cb in handler.callbacks]
        try:
            yield
        finally:
            back = dict(zip(map(id, others.values()), natives, strict=True))
            handler.callbacks = [back.get(id(cb), cb) for cb in handler.callbacks]

    @property
    def saves_by_trainer(self) -> bool:
        """Whether transformers' methods write checkpoints, and not the strategy."""
        return self._saves_by_override and not self.is_shared

    @property
    def _saves_by_override(self) -> bool:
        """Whether overridden methods save; each trial of a search has its own folder."""
        return self._trial is not None or self._overrides.any(SAVES)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        assert self._trainer is not None
        self.checkpoints.save(self._trainer, self._trainer.lightning_module, waits=True)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._saves_by_override:
            super()._save(trainer, pl_module)
            return
        self.checkpoints.before_step()
        self.store_flops()
        self._native._save_checkpoint(self._native.model_wrapped, self._trial)

    def _load_best(self, pl_module: pl.LightningModule) -> None:
        if not self._overrides.any(ENDS):
            super()._load_best(pl_module)
            return
        self.checkpoints.finish(pl_module, load=lambda best: self._native._load_best_model())

    def _make_logged(self, device: torch.device, args: TrainingArguments) -> LoggedLoss:
        return NativeLogged(self._native, device, drop_non_finite=args.logging_nan_inf_filter)

    def _make_counter(self, module: Any, args: TrainingArguments) -> FlopsCounter:
        """Count operations alone; the Trainer's own method counts tokens, and warns."""
        return FlopsCounter(module.model, tokens="no", pad_token_id=None, ranks=module.trainer.world_size)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Fire `on_step_begin`, and apply what callbacks have changed."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._follow_changes(pl_module)

    def _follow_changes(self, module: Any) -> None:
        """Apply what a callback has set on the Trainer since the last step, as the HF Trainer would."""
        native, changed = self._native, self._watched.find_changed()
        if not changed:
            return
        if "optimizer" in changed and not self.is_shared:
            changed.remove("optimizer")
            module.run.replace_optimizer(innermost(native.optimizer))
        for name in FIXED.intersection(changed):
            module.info_once(
                f"A callback has changed {name} during the run, without effect. Set it before train."
            )
        now = Overrides.of(native)
        kept = {"compute_loss_func", "max_grad_norm"}
        seen = kept.intersection(changed) | (kept & self._overrides.where.keys())
        now.where.update((name, f"{type(native).__name__} object: {name} = ...") for name in seen)
        now.check(type(native).__name__, module.loss_normalization)
        self._overrides = module.overrides_of = now
        self._evaluates_itself |= now.any(EVALUATES | STEPS | LOGS)

    def add_micro_batch(self, loss: torch.Tensor, inputs: Any) -> None:
        """Add one micro-batch's loss, and count its operations and tokens."""
        native, counts_itself = self._native, self._overrides.any(COUNTS)
        super().add_micro_batch(loss, inputs if isinstance(inputs, Mapping) and not counts_itself else {})
        source = getattr(inputs, "source", None)
        inputs = inputs if source is None else source
        if counts_itself:
            native.current_flos += float(native.floating_point_ops(inputs))
        else:
            assert self.counter is not None
            native.current_flos = float(self.counter.flops)
        native._track_num_input_tokens(inputs)

    def store_flops(self) -> None:
        """Add the operations counted since the last time to the state."""
        if self._overrides.any(COUNTS):
            self._native.store_flos()
        else:
            super().store_flops()
            self._native.current_flos = 0

    def _log_evaluate_save(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, ends_epoch: bool = False
    ) -> None:
        if not self._overrides.any(LOGS):
            super()._log_evaluate_save(trainer, pl_module, ends_epoch=ends_epoch)
            return
        native, module = self._native, pl_module
        step: Any = module.last_step
        self.store_flops()
        native._maybe_log_save_evaluate(
            native._tr_loss,
            step.grad_norm,
            native.model_wrapped,
            self._trial,
            trainer.current_epoch,
            self._ignore_keys,
            self._start_s,
            learning_rate=step.learning_rate,
        )

    def attach(self, module: Any, args: TrainingArguments) -> None:
        """Set the run's model on the Trainer, and restore its accelerator's state.

        All accelerators of a process share it, and the `TrainingArguments` of the run have reset it.
        """
        super().attach(module, args)
        for kind, kept in self._shared:
            kind._shared_state.clear()
            kind._shared_state.update(kept)
        self._native.model = self._native.model_wrapped = module.model

    def show_state(self, module: Any) -> None:
        """Set the run's state on the Trainer, before optimizer and schedule are made.

        Mirrors: transformers.Trainer._init_training_state
        """
        schedule, resumption = module.data.schedule, module.resumption
        self.state = self._new_state() if resumption is None else resumption.new_state()
        if resumption is None:
            self.state.compute_steps(self.args, schedule.max_steps)
        self.state.max_steps, self.state.num_train_epochs = schedule.max_steps, schedule.epochs

    def show_model(self, module: Any) -> None:
        """Set the model on the Trainer as the strategy has prepared it, for evaluations."""
        native: Any = self._native
        native.model_wrapped = module.run.sharing.forward_through(module.model)
        if native.is_deepspeed_enabled:
            native.deepspeed = native.model_wrapped
        if not any(known is module.model for known in native.accelerator._models):
            native.accelerator._models.append(module.model)

    def fire(self, event: str, **extra: Any) -> None:
        """Call the callbacks' method of an event."""
        if event == "on_train_begin":  # not Lightning's loader, whose batches know their steps
            own = getattr(self._trainer.datamodule, "own_loader", None)  # type: ignore[union-attr]
            with isolate_rng():
                loader = self._native.get_train_dataloader() if own is None else own.loader
            self.handler.train_dataloader = loader
            assert self._schedule is not None
            log_begin(self._native, loader, self._schedule)
        super().fire(event, **extra)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a new `TrainerState`, and set optimizer, schedule and counters on the Trainer."""
        self._trainer = trainer
        super().on_fit_start(trainer, pl_module)
        module: Any = pl_module
        native = self._native
        if self._trial is not None:
            state = self.state
            state.is_hyper_param_search = True
            state.init_training_references(native, state.max_steps, state.num_train_epochs, self._trial)
        native.lr_scheduler = module.lr_schedule
        native.optimizer = native.accelerator.prepare_optimizer(trainer.optimizers[0], device_placement=False)
        self.handler.optimizer = native.optimizer
        native._train_batch_size = module.data.train_batch_size  # not that of a resumed run
        native._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        native._initial_global_step = self.state.global_step
        self.show_model(module)
        self._watched = Watched(native)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call the overridden methods that restore a checkpoint, before training begins."""
        native, resumed_from = self._native, getattr(pl_module, "resumed_from", None)
        if resumed_from is not None and self._overrides.any(RESUMES - {"_load_from_checkpoint"}):
            native._load_optimizer_and_scheduler(resumed_from)
            native._load_scaler(resumed_from)
            native._load_callback_state()
        super().on_train_start(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log that the run has ended, and its log entry."""
        log_end()
        super().on_train_end(trainer, pl_module)

    def _add_log_entry(self, logs: dict[str, Any], start_s: float | None) -> dict[str, Any]:
        self.row, self.train_loss = logs, logs.get("train_loss", self.train_loss)
        self._native.log(logs, *([] if start_s is None else [start_s]))
        return dict(logs)

    def _evaluate(self, trainer: pl.Trainer, *, ends_epoch: bool = False) -> None:
        if not self._evaluates_itself and not self._watched.has_evaluated_change:
            super()._evaluate(trainer, ends_epoch=ends_epoch)
            self._native.model.eval()  # as the HF Trainer does, until the next optimizer step
            return
        self.checkpoints.before_step()
        native, follows = self._native, self._follows_metric
        skips = {} if follows else {"skip_scheduler": True}
        metrics = native._evaluate(self._trial, self._ignore_keys, **skips)
        self._is_new_best = bool(follows and native._determine_best_metric(metrics, self._trial))

    def _follow_metric(self, module: Any) -> None:
        """Record the best value of `metric_for_best_model`, and step a schedule that follows it.

        Mirrors: transformers.Trainer._evaluate
        """
        metrics, wanted = module.eval_metrics, self.args.metric_for_best_model
        self._is_new_best = self._native._determine_best_metric(metrics, self._trial)
        if wanted is not None and follows_metric(module.lr_schedule):
            module.lr_schedule.step(metrics[metric_name(wanted)])


def join_host(
    native: Any,
    trainer: Any,
    module: Any,
    *,
    overrides: Overrides,
    ignore_keys: list[str] | None = None,
    trial: Any = None,
    kind: type[NativeHost] = NativeHost,
) -> Any:
    """Make the host of a `transformers.Trainer`'s run, and add it to Lightning's callbacks.

    Args:
        native: the Trainer.
        trainer: Lightning's.
        module: of the run.
        overrides: what the Trainer overrides.
        ignore_keys: of the model's outputs, not gathered by its evaluations.
        trial: of a hyperparameter search.
        kind: of the host.

    Raises:
        SettingsError: its own methods would write parts of a checkpoint of a sharded model.
    """
    has_own = ignore_keys is not None or trial is not None or overrides.any(EVALUATES | STEPS | LOGS)
    is_shared = trainer.plan.strategy.kind in _SHARED
    if is_shared:
        _check_shared(overrides, trainer.plan.strategy.kind, saves=native.args.save_strategy != "no")
    host = kind(
        native,
        module.evaluator,
        evaluates_itself=has_own,
        ignore_keys=ignore_keys,
        overrides=overrides,
        is_shared=is_shared,
        trial=trial,
    )
    host.join(trainer)
    return host


def _check_shared(overrides: Overrides, strategy: str, *, saves: bool) -> None:
    """Check that no overridden method steps or saves a sharded model, which only the strategy does."""
    problems = [
        Problem(
            where, f'strategy="{strategy}" runs the backward and clips; use "ddp", or override training_step'
        )
        for where in overrides.named({"accelerator.backward", "accelerator.clip_grad_norm_"})
    ]
    text = (
        f'strategy="{strategy}" shares the model among the ranks, and writes the checkpoint; use "ddp", '
        'save_strategy="no", or a TrainerCallback with on_save'
    )
    if saves:
        written = overrides.named(SAVES - {"_save_checkpoint", "_get_output_dir"})
        problems += [Problem(where, text) for where in written]
    if problems:
        headline = "The model is sharded, and overridden methods would reach it; nothing was started."
        raise_problems(SettingsError, headline, problems)


class NativeLogged(LoggedLoss):
    """Sum the losses where the HF Trainer does, in attributes of the Trainer.

    Mirrors: transformers.Trainer._maybe_log_save_evaluate
    """

    def __init__(self, native: Any, device: torch.device, *, drop_non_finite: bool) -> None:
        self._native = native
        super().__init__(device, drop_non_finite=drop_non_finite)

    @property
    def sum(self) -> torch.Tensor:
        """The losses since the last log entry."""
        found: torch.Tensor = self._native._tr_loss
        return found

    @sum.setter
    def sum(self, value: torch.Tensor) -> None:
        self._native._tr_loss = value

    @property
    def _drained(self) -> float:
        found: float = self._native._total_loss_scalar
        return found

    @_drained.setter
    def _drained(self, value: float) -> None:
        self._native._total_loss_scalar = value

    @property
    def _last_logged_step(self) -> int:
        found: int = self._native._globalstep_last_logged
        return found

    @_last_logged_step.setter
    def _last_logged_step(self, value: int) -> None:
        self._native._globalstep_last_logged = value


class NativeMemory(MemoryTracker):
    """Measure a run by the Trainer's tracker, which `train` has started."""

    def __init__(self, tracker: TrainerMemoryTracker) -> None:
        super().__init__(True)
        self._tracker: Any = tracker

    def begin(self, stage: Stage) -> None:
        """Do nothing: the tracker has started, and does not measure evaluations within a run."""

    def end(self, stage: Stage, metrics: dict[str, Any] | None = None) -> None:
        """End the run, and add what was measured to its metrics."""
        if stage == "train":
            _finalize_training(self._tracker, metrics)

    def abandon(self) -> None:
        """Stop measuring after an error."""
        self._tracker.peak_monitoring = False
        self._tracker.cur_stage = None


def _finalize_training(tracker: Any, metrics: dict[str, Any] | None) -> None:
    """End the run; the tracker takes its stage from the name of the function that calls it."""
    tracker.stop_and_update_metrics(metrics)

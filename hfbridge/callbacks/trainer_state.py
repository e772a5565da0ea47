"""CallbackHost: the HF Trainer's events, log entries and state inside Lightning's loop.

It is a Lightning callback that runs after the user's callbacks and before checkpoints are written.

    event of a TrainerCallback Lightning's hook
    on_init_end                the end of HFModule.configure_model, once a Trainer
    on_train_begin             on_train_start
    on_epoch_begin             on_train_epoch_start
    on_step_begin              on_train_batch_start, of an optimizer step's first micro-batch
    on_substep_end             on_train_batch_end, of one after which no step was taken
    on_pre_optimizer_step      HFModule.configure_gradient_clipping, after clipping
    on_optimizer_step          HFModule.optimizer_step, after the step
    on_step_end, on_log,
      on_save                  on_train_batch_end, of one after which a step was taken; gradients cleared
    on_prediction_step, on_log,
      on_evaluate, on_predict  callbacks/evaluation.py has the table
    on_epoch_end               on_train_epoch_end
    on_log, on_train_end       on_train_end
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    ExportableState,
    PrinterCallback,
)
from transformers.trainer_utils import speed_metrics

from hfbridge.callbacks.checkpointing import RunCheckpoints
from hfbridge.callbacks.connector import (
    current_micro_batch,
    end_epoch,
    has_whole_epochs,
    lightning_validates,
    run_validation,
    skip_empty_hooks,
)
from hfbridge.callbacks.evaluation import EvaluationHooks, Evaluator
from hfbridge.callbacks.jit_checkpoint import SigtermCheckpoint
from hfbridge.callbacks.moment import BufferCopies, end_last_step
from hfbridge.callbacks.monitors import check_monitors
from hfbridge.callbacks.requeue import Requeue
from hfbridge.callbacks.run_data import UserData
from hfbridge.checkpoints.resume import check_optimizer_state, restore_callback_state
from hfbridge.data.accumulation import DataPosition, MicroBatch, Schedule
from hfbridge.data.dataloaders import ResumableMixin
from hfbridge.evaluation.memory import explain_eval_oom
from hfbridge.evaluation.metrics import check_is_computed, metric_name
from hfbridge.losses.running_loss import LoggedLoss
from hfbridge.models.flops import FlopsCounter
from hfbridge.models.optimizers import follows_metric, learning_rate_of
from hfbridge.utilities import rng

EVENTS = frozenset(name for name in vars(TrainerCallback) if name.startswith("on_"))


class CallbackHost(EvaluationHooks):
    """Keep the `TrainerState` and call TrainerCallbacks; `DefaultFlowCallback` says when to log and evaluate.

    Args:
        evaluator: runs the evaluations.
        callbacks: the user's `TrainerCallback` objects or classes.
        initialized: callbacks whose `on_init_end` was called.
        print_logs: log entries are printed where no bar is shown.

    Attributes:
        restore_running_loss: a resumed run counts the loss since the last log entry, unlike the HF Trainer.
        warn_existing_checkpoints: warn of another run's checkpoints in `output_dir`.
        checks_limit_first: a run that is resumed at its last step takes no further one. The HF Trainer checks
            `max_steps` after a step only, and takes one if epochs are left.

    Proved by: tests/parity/test_events.py
    """

    restore_running_loss = warn_existing_checkpoints = checks_limit_first = True

    def __init__(
        self,
        evaluator: Evaluator,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        *,
        initialized: Sequence[TrainerCallback] = (),
        print_logs: bool = True,
    ) -> None:
        super().__init__(evaluator)
        self._initialized_callbacks, self._print_logs = tuple(initialized), print_logs
        self.callbacks = tuple(callbacks)
        self.state = TrainerState()
        self.control = TrainerControl()
        # Until `attach` and `on_fit_start` have set them up.
        self.logged: LoggedLoss = None  # type: ignore[assignment]
        self.args: TrainingArguments = None  # type: ignore[assignment]
        self.handler: CallbackHandler = None  # type: ignore[assignment]
        self._schedule: Schedule = None  # type: ignore[assignment]
        self.counter: FlopsCounter = None  # type: ignore[assignment]
        self._trainer: pl.Trainer | None = None
        self._handled_events: frozenset[str] = frozenset()
        self.position = DataPosition()
        self.end_micro_batch: Callable[[], None] = lambda: None  # called when a backward is over
        self._start_s = 0.0
        self._is_within_step = self._is_partial = self._has_loss = self._has_losses = False
        self._clears = self._clears_late = self._has_gradients = False
        self._is_automatic = self._knows_steps = True
        self._losses: list[torch.Tensor] = []  # of the current step of a module that optimizes manually
        self._micro_batch: MicroBatch | None = None
        self.at_begin: tuple[Any, ...] | None = None
        self._generators = rng.Recorder()
        self._buffers: BufferCopies | None = None
        self._loaders: list[Any] | None = None
        self._keeps_loaders = self._keeps_states = self.ends_epoch = False
        self.pending: Literal["nothing", "step", "actions", "evaluation"] = "nothing"
        self.closed_epochs, self.validated_batch = 0, -1
        self.trainer_step = 0  # trainer.global_step when the last step was closed
        self._first_step = self._first_tokens = 0
        self._follows_metric = self._is_new_best = False
        self.checkpoints, self._requeue = RunCheckpoints(self), Requeue()
        skip_empty_hooks(self)

    def attach(self, module: Any, args: TrainingArguments) -> None:
        """Build the HF Trainer's callback list, kept for all runs of a Trainer; fire `on_init_end`."""
        self.args, self._trainer = args, module.trainer
        if self.handler is not None:
            self.handler.model = module.model
            return
        printer = [PrinterCallback] if args.disable_tqdm and self._print_logs else []
        reporters = get_reporting_integration_callbacks(args.report_to)
        reporters += [SigtermCheckpoint()] if args.enable_jit_checkpoint else []
        self.handler = handler = CallbackHandler(
            [DefaultFlowCallback, *reporters, *self.callbacks, *printer],
            module.model,
            module.processing_class,
            *module._user_optimizers,
        )
        self._handled_events = frozenset(
            e for e in EVENTS if any(_overrides(cb, e) for cb in handler.callbacks)
        )
        self.state = self._new_state()
        everyone = handler.callbacks
        handler.callbacks = [
            cb for cb in everyone if not any(cb is other for other in self._initialized_callbacks)
        ]
        self.fire("on_init_end")
        handler.callbacks = everyone

    def fire(self, event: str, **extra: Any) -> None:
        """Call the callbacks that override an event, except in trials of Lightning's finders."""
        if event in self._handled_events and self in self._trainer.callbacks:  # type: ignore[union-attr]
            self.checkpoints.before_step()  # a callback may change weights
            try:
                self.control = getattr(self.handler, event)(self.args, self.state, self.control, **extra)
            except StopIteration as error:  # which Lightning's loops take for the end of the data
                raise RuntimeError(f"a TrainerCallback raised StopIteration in {event}") from error

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin a new `TrainerState`, or resume one."""
        pl_module.ensure_ready()
        pl_module.run.end_trials(trainer)
        self.evaluator.memory.begin("train")
        handler, args = self.handler, self.args
        self._schedule = schedule = pl_module.data.schedule
        self.logged = self._make_logged(pl_module.device, args)
        self._begin_state(pl_module)
        self.state.max_steps, self.state.num_train_epochs = schedule.max_steps, schedule.epochs
        if self.counter is None:  # a run that begins again keeps what was counted, as in the HF Trainer
            self.counter = self._make_counter(pl_module, args)
            self.end_micro_batch = self.counter.finish_backward
        data = pl_module.data
        by_lightning = pl_module.resumption is None or isinstance(data, UserData)
        if trainer.ckpt_path is not None and by_lightning and has_whole_epochs(data.settings):
            # Lightning resumes a run that epochs end, and not steps, at the end of an epoch.
            trainer.fit_loop.epoch_loop.max_steps = -1
        handler.optimizer = next(iter(trainer.optimizers), None)
        handler.lr_scheduler = pl_module.lr_schedule
        self._is_within_step, self.at_begin, self.pending = False, None, "nothing"
        self.closed_epochs, self.validated_batch = self.position.epoch, -1
        pl_module.last_step.is_updating = pl_module.last_step.is_updated = False
        self._requeue.install_signal_handler(trainer)
        warns = self.warn_existing_checkpoints and pl_module.resumption is None
        self.checkpoints.open(trainer, is_resumed=not warns)
        self._clears = pl_module.automatic_optimization and not pl_module.overrides("optimizer_zero_grad")
        # A loss that cannot be computed in chunks is reported before the first event of a step.
        tries = pl_module.run.chunked is not None and not pl_module.sharing.is_sharded
        self._tries_step = tries and not pl_module.overrides("training_step")
        self._clears_late = self._clears and is_overridden("on_train_batch_end", pl_module)

    def _make_logged(self, device: torch.device, args: TrainingArguments) -> LoggedLoss:
        return LoggedLoss(device, drop_non_finite=args.logging_nan_inf_filter)

    def _make_counter(self, module: Any, args: TrainingArguments) -> FlopsCounter:
        return FlopsCounter(
            module.model,
            tokens=args.include_num_input_tokens_seen,  # type: ignore[arg-type]
            pad_token_id=getattr(module.processing_class, "pad_token_id", None),
            ranks=module.trainer.world_size,
        )

    def _begin_state(self, module: Any) -> None:
        """Make a new `TrainerState`, or restore the one of a checkpoint.

        Mirrors: transformers.Trainer._init_training_state
        """
        resumption = module.resumption
        if resumption is None and 0 < self.state.global_step == module.trainer.global_step:
            self.logged.resume(self.state.global_step, None)  # Lightning continues the same loops
        elif resumption is None:
            self.state, self.position = self._new_state(), DataPosition()
            self.state.global_step = module.trainer.global_step  # of another module that it has trained
            self.state.train_batch_size = module.data.train_batch_size
            self.state.compute_steps(self.args, module.data.schedule.max_steps)
        else:
            if resumption.optimizer is not None:
                check_optimizer_state(
                    module.trainer.optimizers[0], resumption.optimizer, is_sharded=module.sharing.is_sharded
                )
            if follows_metric(module.lr_schedule) and resumption.schedule is not None:
                module.lr_schedule.load_state_dict(resumption.schedule)
            self.state, self.position = resumption.new_state(), resumption.start.position
            if isinstance(module.data, UserData) and resumption.start.states is not None:
                rng.restore(resumption.start.states)  # HFDataModule's loader does it by itself
            self.control = restore_callback_state(self.state, self.args, self.handler, self.control)
            self.logged.resume(self.state.global_step, resumption.loss if self.restore_running_loss else None)
        self._first_step, self._first_tokens = self.state.global_step, self.state.num_input_tokens_seen

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Fire `on_train_begin`, and evaluate if `eval_on_start`."""
        check_monitors(trainer, pl_module)
        self.trainer_step = trainer.global_step  # which Lightning restores after on_fit_start
        self.handler.train_dataloader = trainer.train_dataloader
        data: Any = pl_module.data
        if isinstance(data, UserData):
            data.restore_loaders()
        self._start_s = time.time()
        pl_module.run.begin_training()  # where a subclass's on_fit_start has not
        self._is_automatic = pl_module.automatic_optimization
        # A strategy of Lightning's that accumulates by itself takes no step with a short last one.
        self._knows_steps = self._is_automatic and not trainer.strategy.handles_gradient_accumulation
        self._adopt_progress(trainer, pl_module)
        self._keeps_states = not isinstance(trainer.train_dataloader, ResumableMixin)
        self._loaders = data.loader_states() if isinstance(data, UserData) else None
        self._keeps_loaders = bool(self._loaders)
        buffers = BufferCopies(pl_module.model)
        self._buffers = buffers if buffers.names else None
        self._requeue.agree()
        self.checkpoints.let_go()  # of the moment before a sanity check
        self.checkpoints.begin(trainer, pl_module)
        pl_module.model.zero_grad()
        self.control.should_training_stop = False
        self.fire("on_train_begin")
        resumption: Any = pl_module.resumption
        if resumption is not None and resumption.due is not None:
            end_last_step(self, pl_module, resumption)
        elif self.args.eval_on_start:
            self.pending = "evaluation"
            self._evaluate(trainer)
            self.pending = "nothing"
        if resumption is not None and resumption.is_mid_epoch:  # for which Lightning begins no epoch
            self._begin_epoch(pl_module)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the moment before: the random state is restored after the check."""
        self.checkpoints.keep(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the first set; a checkpoint that is written meanwhile is of the moment before."""
        if _is_fitting(trainer):
            self.checkpoints.keep(pl_module)
        super().on_validation_start(trainer, pl_module)

    def _adopt_progress(self, trainer: pl.Trainer, module: Any) -> None:
        """Continue from counters that Lightning restored from a checkpoint without the state of a run."""
        self.trainer_step = trainer.global_step
        if module.resumption is not None or self.state.global_step or not trainer.global_step:
            return
        is_automatic = module.automatic_optimization
        steps = trainer.global_step if is_automatic else trainer.fit_loop.epoch_loop._batches_that_stepped
        self.state.global_step, self.state.epoch = steps, steps / self._schedule.steps_per_epoch
        self.position = DataPosition(*divmod(steps, self._schedule.steps_per_epoch))
        self.logged.resume(steps, None)
        self._first_step = steps

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Fire `on_epoch_begin`; a log entry before the epoch's first step has no gradient norm."""
        if trainer.reload_dataloaders_every_n_epochs and isinstance(pl_module.data, UserData):  # type: ignore[attr-defined]
            self._schedule = schedule = pl_module.data.plan_rest()
            self.state.max_steps, self.state.num_train_epochs = schedule.max_steps, schedule.epochs
        self._begin_epoch(pl_module)

    def _begin_epoch(self, module: Any) -> None:
        module.last_step.forget()
        self.control.should_epoch_stop = self._is_within_step = False
        self.fire("on_epoch_begin")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Fire `on_step_begin` with the first micro-batch of an optimizer step."""
        self._has_loss = False
        if self._has_gradients:
            self._has_gradients = False
            pl_module.model.zero_grad()
        has_step = type(batch) is MicroBatch and batch.step is not None
        self._micro_batch = micro_batch = batch if has_step else current_micro_batch(trainer, batch)
        if micro_batch is not None and micro_batch.is_last and micro_batch.step.ends_epoch:  # type: ignore[union-attr]
            end_epoch(trainer)  # Lightning counts the micro-batches of any other epoch
        if self._is_within_step:
            return
        self._is_within_step = True
        if self._tries_step and micro_batch is not None and micro_batch.step is not None:
            self._tries_step = False
            with trainer.precision_plugin.forward_context():  # as around training_step
                pl_module.run.begin_step(micro_batch.step)
        state, schedule = self.state, self.handler.lr_scheduler
        self.at_begin = (
            self.logged.sum,
            state.num_input_tokens_seen,
            self.counter.flops,
            len(state.log_history),
            getattr(schedule, "last_epoch", None),
            self._generators.capture() if self._keeps_states else None,
            self._loaders,
            None if self._buffers is None else self._buffers.take(),
        )
        control = self.control
        control.should_log = control.should_evaluate = control.should_save = False
        self.fire("on_step_begin")

    def add_micro_batch(self, loss: torch.Tensor, inputs: Any) -> None:
        """Add one micro-batch's loss, and count its operations and tokens."""
        self._has_loss = self._has_losses = True
        self.logged.add(loss, global_step=self.state.global_step)
        self.state.num_input_tokens_seen += self.counter.add(inputs)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close a micro-batch and, if a step was taken after it, an optimizer step."""
        if not self._has_loss:
            self._add_outputs(outputs, batch, is_automatic=pl_module.automatic_optimization)
        micro_batch = self._micro_batch
        if self._knows_steps and micro_batch is not None and micro_batch.step is not None:
            taken = int(micro_batch.is_last)
        else:
            taken = trainer.global_step - self.trainer_step
        if taken:
            self._is_partial = False
            self._end_step(trainer, pl_module, batch_idx, taken)
            return
        self._is_partial = True  # gradients of a step that a callback ends here stay, as in the HF Trainer
        self.end_micro_batch()
        if self._is_automatic:
            self.fire("on_substep_end")
        if self._requeue.is_due:
            self._requeue.act()
        if self.control.should_training_stop or self.control.should_epoch_stop:
            self._is_within_step = False
            trainer.should_stop |= self.control.should_training_stop
            end_epoch(trainer)

    def _add_outputs(self, outputs: Any, batch: Any, *, is_automatic: bool) -> None:
        """Add the loss that a subclass's `training_step` returned."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            return
        if not is_automatic:  # a step may be taken after any number of these, whose mean is its loss
            self._losses.append(loss.detach())
            loss = torch.zeros_like(self._losses[0])
        self.add_micro_batch(loss.detach(), batch if isinstance(batch, Mapping) else {})

    def _end_step(self, trainer: pl.Trainer, module: Any, batch_idx: int, taken: int) -> None:
        """Close an optimizer step: clear gradients, count, then log, evaluate and save if they are due."""
        self._has_gradients = self._clears_late  # which the module's hook may read
        if self._clears and not self._clears_late:
            module.model.zero_grad()
        if self._losses:
            self.add_losses()
        position, epoch = self.next_place(batch_idx)
        state, step = self.state, module.last_step
        # No call, in which an interrupt may come, between these.
        state.global_step, state.epoch, self.position = state.global_step + 1, epoch, position
        self.trainer_step, self.at_begin, self.pending = self.trainer_step + taken, None, "step"
        step.is_updating = step.is_updated = self._is_within_step = False
        self._micro_batch = None
        self.fire("on_step_end")
        self.pending, self.ends_epoch = "actions", False
        self._log_evaluate_save(trainer, module)
        self.pending = "nothing"
        self._stop(trainer)
        if self._keeps_loaders:
            self._loaders = module.data.loader_states()
        if self._requeue.is_due:
            self._requeue.act()
        if self.control.should_epoch_stop:
            end_epoch(trainer)

    def add_losses(self) -> None:
        """Add the mean loss of a module that optimizes manually."""
        if self._losses:
            self.logged.add(torch.stack(self._losses).mean(), global_step=self.state.global_step)
            self._losses.clear()

    def next_place(self, batch_idx: int) -> tuple[DataPosition, float]:
        """Return where in the data the run is once the current optimizer step is counted, and its epoch."""
        micro_batch, epoch = self._micro_batch, self._trainer.current_epoch  # type: ignore[union-attr]
        if micro_batch is None or micro_batch.step is None:
            done, position = batch_idx + 1, self.position.next()
        else:
            done, position = micro_batch.step.done_micro_batches, micro_batch.step.position
        return position, epoch + done / self._schedule.micro_batches_per_epoch

    def _stop(self, trainer: pl.Trainer) -> None:
        """Stop training if a callback requested it, but not at the last step."""
        if self.control.should_training_stop:
            # Lightning validates once more when it is stopped, at the last step as well.
            trainer.should_stop |= not 0 < trainer.max_steps <= trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fire `on_epoch_end`, then log, evaluate and save if they are due."""
        self.fire("on_epoch_end")
        self.closed_epochs = self.position.epoch
        self.pending, self.ends_epoch = "actions", True
        self._log_evaluate_save(trainer, pl_module, ends_epoch=True)
        self.pending = "nothing"
        self._stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the entry of the full run, load the best weights, and fire `on_train_end`.

        Mirrors: transformers.Trainer._finalize_training
        """
        state = self.state
        steps = state.global_step - self._first_step
        samples = self._schedule.samples * steps / max(state.max_steps, 1)
        metrics = speed_metrics("train", self._start_s, num_samples=samples, num_steps=steps)
        self.store_flops()
        metrics["total_flos"] = state.total_flos
        metrics["train_loss"] = self.logged.mean(state.global_step)
        self.evaluator.memory.end("train", metrics)
        self._log(trainer, metrics)
        self.checkpoints.keep(pl_module)
        self._load_best(pl_module)
        if self.args.load_best_model_at_end and state.best_global_step not in (None, state.global_step):
            self.checkpoints.spoil(
                f"it holds the weights of step {state.best_global_step}, which were the best"
            )
        self.fire("on_train_end")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Restore the model, which Lightning tears down only after a completed run.

        Checkpoints that callbacks save afterwards are of the moment kept here.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            self.checkpoints.keep(pl_module)
        self.evaluator.on_exception()
        self._requeue.close()
        pl_module.end_run()
        self.checkpoints.abandon()

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Release the run's directory; a run that only tried batch sizes or learning rates does not count."""
        self.checkpoints.close()
        self._requeue.close()
        pl_module.end_run()
        if pl_module.run.has_tried:
            self.evaluator.forget()

    def report_evaluation(self, trainer: pl.Trainer, metrics: dict[str, Any]) -> None:
        """Log an evaluation, with the epoch, and fire `on_evaluate`."""
        self._log(trainer, metrics)
        self.control.should_evaluate = False
        self.fire("on_evaluate", metrics=metrics)

    def _new_state(self) -> TrainerState:
        """Make a state that holds what callbacks export, as they stand now."""
        return TrainerState(
            stateful_callbacks=self.exports(),  # type: ignore[arg-type]
            is_local_process_zero=self.args.local_process_index == 0,
            is_world_process_zero=self.args.process_index == 0,
        )

    def exports(self) -> list[ExportableState]:
        """List what has a state that checkpoints keep."""
        return [cb for cb in (*self.handler.callbacks, self.control) if isinstance(cb, ExportableState)]

    def _log_evaluate_save(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, ends_epoch: bool = False
    ) -> None:
        """Log, then evaluate, then save, where the control's flags say so.

        Mirrors: transformers.Trainer._maybe_log_save_evaluate
        """
        if self.control.should_log:
            self._log_training(trainer, pl_module)
        if self.control.should_evaluate:
            # Before Lightning's callbacks save: they keep schedule and best value.
            self._follows_metric = True
            try:
                self._evaluate(trainer, ends_epoch=ends_epoch)
            finally:
                self._follows_metric = False
            if self.args.save_strategy == "best":
                self.control.should_save = self._is_new_best
        if self.control.should_save:
            self._save(trainer, pl_module)
            self.fire("on_save")

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.checkpoints.save(trainer, pl_module, waits="on_save" in self._handled_events)

    def _load_best(self, pl_module: pl.LightningModule) -> None:
        self.checkpoints.finish(pl_module)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any
    ) -> None:
        """Close a batch; an evaluation may take longer than SLURM waits."""
        super().on_validation_batch_end(trainer, pl_module, *batch)
        if self._requeue.signal is not None and trainer.world_size == 1:
            self._requeue.act()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the metrics of all sets, and follow the one that the settings name."""
        super().on_validation_epoch_end(trainer, pl_module)
        if self._follows_metric or (lightning_validates(trainer) and _is_fitting(trainer)):
            self._follow_metric(pl_module)
        if _is_fitting(trainer):
            self.validated_batch = trainer.fit_loop.epoch_loop.total_batch_idx
            self.checkpoints.let_go()

    def _evaluate(self, trainer: pl.Trainer, *, ends_epoch: bool = False) -> None:
        self.checkpoints.before_step()  # a callback may put other weights in
        with explain_eval_oom(self.args):
            run_validation(trainer, ends_epoch=ends_epoch, clears=not self._is_partial)
            self.evaluator.report_empty(trainer, trainer.lightning_module)

    def _follow_metric(self, module: Any) -> None:
        """Step a schedule that follows a metric, and keep the best value of `metric_for_best_model`.

        Mirrors: transformers.Trainer._evaluate
        Mirrors: transformers.Trainer._determine_best_metric
        """
        args, state = self.args, self.state
        self._is_new_best = False
        if args.metric_for_best_model is None:
            return
        check_is_computed(args.metric_for_best_model, module.eval_metrics)
        value = module.eval_metrics[metric_name(args.metric_for_best_model)]
        if follows_metric(module.lr_schedule):
            module.lr_schedule.step(value)
        if state.best_metric is None:
            state.best_metric = float("-inf" if args.greater_is_better else "inf")
        best = state.best_metric
        self._is_new_best = bool(value > best if args.greater_is_better else value < best)
        if self._is_new_best:
            state.best_metric = value
            if args.save_strategy != "no":
                state.best_global_step = state.global_step

    def _log_training(self, trainer: pl.Trainer, module: Any) -> None:
        if not self.logged.is_due(self.state.global_step):
            return
        step = module.last_step
        loss = self.logged.drain(self.state.global_step)
        logs: dict[str, Any] = {"loss": loss} if self._has_losses else {}
        self._has_losses = False
        if step.grad_norm is not None:
            logs["grad_norm"] = step.grad_norm.item()
        rate = step.learning_rate
        if rate is None and trainer.optimizers:
            rate = learning_rate_of(trainer.optimizers[0], module.lr_schedule)
        if rate is not None:
            logs["learning_rate"] = rate
        # What `self.log` would do, without the result objects that it leaves to be read at every step.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in logs.items()})
        trainer.progress_bar_metrics.update(logs)
        self.store_flops()
        self._log(trainer, logs, start_s=self._start_s)

    def _log(self, trainer: pl.Trainer, logs: dict[str, Any], *, start_s: float | None = None) -> None:
        """Add an entry to the log history, for the callbacks and Lightning's loggers."""
        entry = self._add_log_entry(logs, start_s)
        numbers = {name: value for name, value in entry.items() if isinstance(value, (int, float))}
        loggers = trainer.loggers if trainer.state.fn == TrainerFn.FITTING else ()
        if loggers:
            trainer.logged_metrics.update({name: torch.tensor(value) for name, value in numbers.items()})
        for lightning_logger in loggers:
            lightning_logger.log_metrics(numbers, step=self.state.global_step)
            lightning_logger.save()  # its files hold the entry from now on, as those of report_to do

    def _add_log_entry(self, logs: dict[str, Any], start_s: float | None) -> dict[str, Any]:
        """Complete a log entry and fire `on_log`; returns the entry as it was before.

        Mirrors: transformers.Trainer.log
        """
        state = self.state
        if state.epoch is not None:
            logs["epoch"] = state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = state.num_input_tokens_seen
            if start_s is not None:
                tokens = state.num_input_tokens_seen - self._first_tokens
                logs.update(speed_metrics("train", start_s, num_tokens=tokens))
        entry = dict(logs)
        state.log_history.append({**entry, "step": state.global_step})
        self.control.should_log = False
        self.fire("on_log", logs=logs)
        return entry

    def store_flops(self) -> None:
        """Add the operations counted since the last call to the state."""
        self.state.total_flos += self.counter.drain_flops()


def _is_fitting(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _overrides(callback: TrainerCallback, event: str) -> bool:
    method = getattr(callback, event)
    return getattr(method, "__func__", method) is not getattr(TrainerCallback, event)

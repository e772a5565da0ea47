"""An epoch of Lightning's in which a step costs what somebody listens to; knows both worlds.

Lightning asks every callback, module, profiler and plugin at each of some thirty moments of a step.
`LeanEpochLoop` finds out once an epoch who overrides what. Where nobody overrides anything in the middle of a
step, it takes the steps itself: the same calls of torch and of HFModule, the same counters at the same
moments, hooks at the beginning and at the end of a step for those who have them. Else the epoch is
Lightning's.

    what needs Lightning's own loop                        because
    hooks around backward, zero_grad, optimizer.step       they run inside the step
    a subclass's steps, batch and transfer hooks           likewise
    a profiler, a precision plugin, a strategy that is     they may do anything
      neither one device's nor hfbridge's DDP
    schedules that are not stepped once a step             Lightning counts for them
    the first step after a checkpoint                      counters are put right in it

    private names of Lightning                             for
    _TrainingEpochLoop, its counters, `_results`,          the loop, which does the rest: validation,
      `_restarting`, `_batches_that_stepped`                 stopping, saving loggers
    _broadcast_sigterm_tensor                              SIGTERM on several ranks: sigterm.py
    _PrefetchDataFetcher, _MaxSizeCycle, `iterator`,       the window, without a pytree being built for it
      `_iterator`, `iterators`
    _logger_connector._first_loop_iter                     `self.log` in a hook
    DDPStrategy._ddp_comm_state                            DDP that averages models takes its own steps
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.combined_loader import _MaxSizeCycle
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from hfbridge.attach import has_plain_backward
from hfbridge.data.loader import WindowLoader
from hfbridge.data.streams import StreamLoader
from hfbridge.data.window import Window
from hfbridge.datamodule import HFDataModule
from hfbridge.module import HFModule
from hfbridge.sigterm import ask_at_sigterm, listens_to_sigterm
from hfbridge.stopping import CommonStop
from hfbridge.strategies import DDPStrategy

# Hooks inside a step: whoever overrides one gets Lightning's own loop.
_OF_CALLBACKS = ("on_before_zero_grad", "on_before_optimizer_step")
_OF_HFMODULE = ("training_step", "configure_gradient_clipping", "optimizer_step", "optimizer_zero_grad")
_OF_MODULES = (
    *_OF_CALLBACKS,
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "lr_scheduler_step",
)
_OF_DATA = ("on_before_batch_transfer", "on_after_batch_transfer")


class NoProfiler(PassThroughProfiler):
    """A profiler that costs nothing: Lightning asks it for some sixty context managers a step."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Return one shared empty context."""
        return self._nothing


class LeanEpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the steps of an epoch, which goes the short way where nobody would notice.

    What is rare stays Lightning's: after a step that may be the epoch's last, or that asked to stop,
    `advance` returns, and Lightning decides what comes next.

    Where one of several ranks has heard SIGTERM, all end after the same step.

    Proved by: tests/unit/test_lean.py, tests/distributed/test_stopping.py
    """

    _lean: "LeanStep | None" = None
    _stop: CommonStop | None = None

    def on_run_start(self, data_fetcher: Any) -> None:
        """Begin an epoch, and find out who listens."""
        super().on_run_start(data_fetcher)
        self._lean = lean_step(self, data_fetcher)
        if self._stop is None and self.trainer.world_size > 1 and listens_to_sigterm(self.trainer):
            self._stop = CommonStop()
            ask_at_sigterm(self.trainer, self._stop)

    def advance(self, data_fetcher: Any) -> None:
        """Take one step Lightning's way, or as many of the short ones as there are."""
        lean, trainer = self._lean, self.trainer
        if lean is None or self._restarting:
            super().advance(data_fetcher)
            return
        progress, steps = self.batch_progress, self.automatic_optimization.optim_progress.optimizer.step
        ready, completed, length = progress.current, steps.total, trainer.fit_loop.max_batches
        while True:
            lean.take()
            if trainer.callbacks != lean.callbacks:
                self._lean = lean_step(self, data_fetcher)
                return
            is_last = progress.is_last_batch or ready.ready == length or completed.completed == self.max_steps
            if is_last or trainer.should_stop or trainer.received_sigterm:
                return
            self._batches_that_stepped += 1

    def _broadcast_sigterm_tensor(self) -> None:
        """End the run where the ranks have agreed to.

        Raises:
            SIGTERMException: likewise.

        Mirrors: lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._broadcast_sigterm_tensor
        """
        if self._stop is not None and not self._stop.passes():
            self.trainer._signal_connector.received_sigterm = True
            raise SIGTERMException

    def teardown(self) -> None:
        """Let go of the run."""
        self._lean = None
        if self._stop is not None:
            self._stop.close()
            self._stop = None
        super().teardown()


def lean_step(loop: _TrainingEpochLoop, fetcher: Any) -> "LeanStep | None":
    """Make the short step of an epoch about to begin; `None` if somebody needs Lightning's own."""
    trainer = loop.trainer
    windows = _windows_of(fetcher)
    if windows is None or not (_is_plain(trainer) and _nobody_listens(trainer)):
        return None
    if loop._should_check_val_epoch():  # the host decides on evaluations; not so here
        return None
    return LeanStep(loop, fetcher, windows)


def _windows_of(fetcher: Any) -> Iterator[Window] | None:
    """Find the iterator of the run's only loader below Lightning's own; `None` if it is another's."""
    if type(fetcher) is not _PrefetchDataFetcher or fetcher.length is None:
        return None
    loader, cycle = fetcher.combined_loader.iterables, getattr(fetcher.iterator, "_iterator", None)
    if not isinstance(loader, WindowLoader | StreamLoader) or not isinstance(cycle, _MaxSizeCycle):
        return None
    windows: Iterator[Window] = cycle.iterators[0]
    return windows


def _is_plain(trainer: pl.Trainer) -> bool:
    """Whether profiler, precision, strategy and schedules do nothing of their own in a step."""
    strategy: Any = trainer.strategy
    plain_strategy = type(strategy) is SingleDeviceStrategy or (
        type(strategy) is DDPStrategy and strategy._ddp_comm_state is None
    )
    schedules = trainer.lr_scheduler_configs
    return (
        plain_strategy
        and type(trainer.profiler) in (PassThroughProfiler, NoProfiler)  # type: ignore[attr-defined]
        and type(trainer.precision_plugin) is Precision
        and len(trainer.optimizers) == 1
        and trainer.accumulate_grad_batches == 1
        and all(s.interval == "step" and s.frequency == 1 and not s.reduce_on_plateau for s in schedules)
    )


def _nobody_listens(trainer: pl.Trainer) -> bool:
    """Whether nobody overrides a hook that runs inside a step."""
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return (
        isinstance(module, HFModule)
        and isinstance(data, HFDataModule)
        and module.automatic_optimization
        and has_plain_backward(trainer)
        and not any(is_overridden(hook, module, HFModule) for hook in _OF_HFMODULE)
        and not any(is_overridden(hook, module) for hook in _OF_MODULES)
        and not is_overridden("transfer_batch_to_device", data, HFDataModule)
        and not any(is_overridden(hook, data) for hook in _OF_DATA)
        and not any(is_overridden(hook, cb) for hook in _OF_CALLBACKS for cb in callbacks)
    )


class LeanStep:
    """One optimizer step, from the next window to the callbacks' end of it.

    Args:
        loop: whose counters it moves.
        fetcher: Lightning's, which counts windows.
        windows: those that are left of the epoch.

    Attributes:
        callbacks: those it was made for.
    """

    def __init__(self, loop: _TrainingEpochLoop, fetcher: Any, windows: Iterator[Window]) -> None:
        trainer, module = loop.trainer, loop.trainer.lightning_module
        self.callbacks: list[pl.Callback] = list(trainer.callbacks)
        self._loop, self._trainer, self._module, self._fetcher = loop, trainer, module, fetcher
        self._windows = windows
        self._optimizer, self._epoch = trainer.optimizers[0], trainer.current_epoch
        self._schedules: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._device = trainer.strategy.root_device
        batches: Any = loop.batch_progress
        of_optimizer: Any = loop.automatic_optimization.optim_progress.optimizer
        self._batches = batches.total, batches.current
        self._steps = of_optimizer.step.total, of_optimizer.step.current
        self._clearings = of_optimizer.zero_grad.total, of_optimizer.zero_grad.current
        self._talks = trainer.world_size > 1
        self._at_start = self._hooks("on_train_batch_start")
        self._at_end = self._hooks("on_train_batch_end")

    def _hooks(self, name: str) -> list[Callable[..., Any]]:
        return [getattr(cb, name) for cb in self.callbacks if is_overridden(name, cb)]

    def take(self) -> None:
        """Take the step.

        Raises:
            StopIteration: there is no window, or a callback ended the epoch within this one.

        Mirrors: lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop.advance
        """
        loop, trainer, module = self._loop, self._trainer, self._module
        if self._talks:
            loop._broadcast_sigterm_tensor()
        window = module.receive(self._next_window(), self._device)
        running = vars(module)
        total, current = self._batches
        index = current.ready
        total.ready, current.ready = total.ready + 1, index + 1
        connector, results = trainer._logger_connector, loop._results
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch, results.batch_size, results.dataloader_idx = window, None, None
        running["_current_fx_name"] = "on_train_batch_start"
        for hook in self._at_start:
            hook(trainer, module, window, index)
        total.started, current.started = total.started + 1, current.started + 1
        loss = self._step(window, index, running)
        total.processed, current.processed = total.processed + 1, current.processed + 1
        running["_current_fx_name"] = "lr_scheduler_step"
        for schedule in self._schedules:
            loop.scheduler_progress.increment_ready()
            schedule.step()
            loop.scheduler_progress.increment_completed()
        running["_current_fx_name"] = "on_train_batch_end"
        for hook in self._at_end:
            hook(trainer, module, {"loss": loss}, window, index)
        running["_current_fx_name"] = None
        if results:  # somebody used `self.log`
            connector.on_batch_end()
        results.batch = results.batch_size = None
        total.completed, current.completed = total.completed + 1, current.completed + 1
        if results:
            connector.update_train_step_metrics()

    def _step(self, window: Window, index: int, running: dict[str, Any]) -> Any:
        """Compute the gradients of a window, clip them and step; returns the last loss, detached.

        Mirrors: lightning.pytorch.loops.optimization.automatic._AutomaticOptimization.run
        """
        module, optimizer = self._module, self._optimizer
        total, current = self._steps
        total.ready, current.ready = total.ready + 1, current.ready + 1
        running["_current_fx_name"] = "training_step"
        loss = module.training_step(window, index)
        for of in self._clearings:  # gradients are cleared by the host, after the step
            of.ready, of.started, of.completed = of.ready + 1, of.started + 1, of.completed + 1
        running["_current_fx_name"] = "backward"
        loss.backward()
        running["_current_fx_name"] = "configure_gradient_clipping"
        module.configure_gradient_clipping(optimizer)
        running["_current_fx_name"] = "optimizer_step"
        module.optimizer_step(self._epoch, index, optimizer)
        total.completed, current.completed = total.completed + 1, current.completed + 1
        return loss.detach()

    def _next_window(self) -> Window:
        """Fetch a window, and count it.

        Mirrors: lightning.pytorch.loops.fetchers._PrefetchDataFetcher.__next__
        """
        fetcher = self._fetcher
        try:
            window = next(self._windows)
        except StopIteration:
            fetcher.done = True
            raise
        fetcher.fetched += 1
        fetcher.done = self._loop.batch_progress.is_last_batch = fetcher.fetched >= fetcher.length
        return window

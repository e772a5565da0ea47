"""An epoch of Lightning's in which a step costs only the hooks that are overridden.

Once an epoch `LeanEpochLoop` finds out which hooks are overridden. Where none is in the middle of a step, it
runs the micro-batches itself, with the same calls of torch and HFModule and the same counters; otherwise, and
for the first step after a checkpoint, it is Lightning's loop. A micro-batch knows when its step is taken.

    private names of Lightning                             for
    _TrainingEpochLoop, its counters, `_results`,          the loop, which does the rest: validation,
      `_restarting`, `_batches_that_stepped`                 stopping, saving loggers
    _accumulated_batches_reached                           steps of different numbers of micro-batches
    _broadcast_sigterm_tensor,                             SIGTERM on several ranks: Lightning broadcasts at
      _signal_connector._sigterm_notifier_fn                 every step, and from its handler, where the
                                                             collective meets those of a step
    _PrefetchDataFetcher, its `batches`, _MaxSizeCycle,    the micro-batch, without a pytree being built for
      `iterator`, `_iterator`, `iterators`                   it
    _logger_connector._first_loop_iter                     `self.log` in a hook
    DDPStrategy._ddp_comm_state                            DDP that averages models takes its own steps
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
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

from hfbridge.callbacks.connector import datamodule_of, has_plain_backward, overrides_hook
from hfbridge.data.accumulation import MicroBatch, group_micro_batches
from hfbridge.data.dataloaders import TrainLoader
from hfbridge.data.iterable import StreamLoader
from hfbridge.datamodule import HFDataModule
from hfbridge.distributed.coordinated_stop import CoordinatedStop
from hfbridge.losses.step_loss import scale_for_accumulation
from hfbridge.module import HFModule
from hfbridge.strategies import DDPStrategy

# Hooks inside a step: Lightning's own loop calls them.
_OF_CALLBACKS = ("on_before_zero_grad", "on_before_optimizer_step")
_OF_HFMODULE = (
    "training_step",
    "loss_share",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
)
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
    """A profiler that costs nothing: Lightning gets some sixty context managers a step from it."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Return one shared empty context."""
        return self._nothing


class LeanEpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the steps of an epoch, which calls only the hooks that are overridden.

    After a step that may be the epoch's last, or that requested a stop, `advance` returns and Lightning
    decides what comes next. If one of several ranks gets SIGTERM, all end after the same step.

    Proved by: tests/unit/loops/test_epoch_loop.py, tests/distributed/test_stopping.py
    """

    _lean: "LeanStep | None" = None
    _stop: CoordinatedStop | None = None
    _steps: "_UserSteps | _StreamSteps | None" = None
    _states_to_load: Sequence[Any] = ()

    @property
    def current(self) -> MicroBatch | None:
        """The last micro-batch of the user's loader; `None` for other loaders."""
        return None if self._steps is None else self._steps.current

    def on_run_start(self, data_fetcher: Any) -> None:
        """Begin an epoch, and find out which hooks are overridden."""
        states, self._states_to_load = self._states_to_load, []
        if states and self._restarting:
            data_fetcher.combined_loader._load_state_dicts(states)
            iter(data_fetcher)
        super().on_run_start(data_fetcher)
        self._steps = user_steps(self.trainer, data_fetcher)
        self._lean = lean_step(self, data_fetcher)
        if self._stop is None and self.trainer.world_size > 1 and lightning_handles_sigterm(self.trainer):
            self._stop = CoordinatedStop()
            stop_at_sigterm(self.trainer, self._stop)

    def advance(self, data_fetcher: Any) -> None:
        """Run one micro-batch by Lightning's loop, or the epoch's by `LeanStep`."""
        lean, trainer = self._lean, self.trainer
        if lean is None or self._restarting:
            super().advance(data_fetcher)
            return
        progress, steps = self.batch_progress, self.automatic_optimization.optim_progress.optimizer.step
        completed = steps.total
        while True:
            steps_taken = lean.take()
            if trainer.callbacks != lean.callbacks:
                self._lean = lean_step(self, data_fetcher)
                return
            is_last = progress.is_last_batch or completed.completed == self.max_steps
            if is_last or trainer.should_stop or trainer.received_sigterm:
                return
            self._batches_that_stepped += steps_taken

    def loader_states(self) -> list[Any]:
        """Return the states of the user's training loaders, as of the step that was fetched last."""
        loader = self.trainer.fit_loop._combined_loader
        if loader is None or isinstance(self.trainer.train_dataloader, TrainLoader | StreamLoader):
            return []
        ahead = None if self._steps is None else self._steps.loader_state
        return loader._state_dicts() if ahead is None else [ahead]

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Add the state of a loader that is read ahead."""
        saved: dict[str, Any] = super().on_save_checkpoint()
        if self._steps is not None and self._steps.loader_state is not None:
            saved["loaders"] = self.loader_states()
        return saved

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of such a loader until the epoch begins."""
        super().on_load_checkpoint(state_dict)
        self._states_to_load = state_dict.get("loaders", [])

    def _accumulated_batches_reached(self) -> bool:
        """Whether the optimizer step is taken after this micro-batch: the micro-batch knows.

        Mirrors: lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._accumulated_batches_reached
        """
        for source in (self, self.trainer.train_dataloader):
            found = getattr(source, "current", None)
            if isinstance(found, MicroBatch):
                return found.is_last
        return super()._accumulated_batches_reached()

    def _broadcast_sigterm_tensor(self) -> None:
        """End the run where the ranks have agreed to.

        Mirrors: lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._broadcast_sigterm_tensor
        """
        if self._stop is not None and not self._stop.should_continue():
            self.trainer._signal_connector.received_sigterm = True
            raise SIGTERMException

    def teardown(self) -> None:
        """End the run."""
        self._lean = self._steps = None
        if self._stop is not None:
            self._stop.close()
            self._stop = None
        super().teardown()


class _UserSteps:
    """Group the batches of a loader of the user's into optimizer steps, each fetched before it is trained."""

    def __init__(
        self,
        batches: Iterator[Any],
        accumulation: Callable[[], int],
        *,
        fetcher: Any = None,
        state: Callable[[], Any] | None = None,
        groups: bool = True,
    ) -> None:
        self._groups = groups
        self._batches, self._accumulation = batches, accumulation
        self._fetcher, self._state = fetcher, state
        self._numbers: list[tuple[Any, ...]] = []
        self.current: MicroBatch | None = None
        self.loader_state: Any = None

    def __iter__(self) -> Iterator[Any]:
        if not self._groups:
            yield from ((batch, *self._numbers.pop(0)) for batch in self._columns())
            return
        looks_ahead = self._fetcher is not None
        for step in group_micro_batches(self._columns(), self._accumulation, prefetches=looks_ahead):
            for self.current in step:
                if looks_ahead and step.ends_epoch and self.current.is_last:
                    self._fetcher.done = True
                yield (self.current, *self._numbers.pop(0))

    def _columns(self) -> Iterator[Any]:
        while True:
            self.loader_state = None if self._state is None else self._state()
            try:
                batch, *number = next(self._batches)
            except StopIteration:
                self.loader_state = None
                return
            self._numbers.append(tuple(number))
            yield batch


class _StreamSteps:
    """Hand out the micro-batches of HFDataModule's stream without a length, not one ahead."""

    loader_state = None

    def __init__(self, batches: Iterator[Any], fetcher: Any) -> None:
        self._batches, self._fetcher = batches, fetcher
        self.current: MicroBatch | None = None

    def __iter__(self) -> Iterator[Any]:
        for micro_batch, *numbers in self._batches:
            step, self.current = micro_batch.step, micro_batch
            if step is not None and step.ends_epoch and micro_batch.is_last:
                self._fetcher.done = True
            yield (micro_batch, *numbers)


def user_steps(trainer: pl.Trainer, fetcher: Any) -> "_UserSteps | _StreamSteps | None":
    """Have Lightning's fetcher group the batches of the user's loader into optimizer steps.

    Returns:
        What groups them, or only keeps the state of a prefetched loader where HFModule does not train on
        them; `None` where the batches know their step.
    """
    module, loader = trainer.lightning_module, trainer.train_dataloader
    groups = isinstance(module, HFModule) and not is_overridden("training_step", module, HFModule)
    is_single = hasattr(loader, "__iter__") and not isinstance(loader, list | tuple | dict)
    is_endless = getattr(fetcher, "length", 0) is None  # then Lightning fetches one batch ahead
    knows_steps = isinstance(loader, TrainLoader) or (isinstance(loader, StreamLoader) and not is_endless)
    if knows_steps or type(fetcher) is not _PrefetchDataFetcher or not is_single:
        return None
    if isinstance(loader, StreamLoader):
        fetched, fetcher.batches = fetcher.batches, []
        stream = _StreamSteps(_rest_of(fetched, fetcher.iterator), fetcher)
        fetcher.iterator = iter(stream)
        return stream
    if not groups:
        state_of: Any = getattr(loader, "state_dict", None)
        if not is_endless or state_of is None:
            return None
        steps = _UserSteps(
            _rest_of([], fetcher.iterator),
            lambda: trainer.accumulate_grad_batches,
            state=state_of,
            groups=False,
        )
        fetcher.iterator = iter(steps)
        return steps
    fetched, fetcher.batches = fetcher.batches, []
    batches, limit = _rest_of(fetched, fetcher.iterator), trainer.num_training_batches
    if not is_endless and isinstance(limit, int):  # `limit_train_batches` may end the epoch
        batches = islice(batches, limit - trainer.fit_loop.epoch_loop.batch_progress.current.ready)
    steps = _UserSteps(
        batches,
        lambda: trainer.accumulate_grad_batches,
        fetcher=fetcher if is_endless else None,
        state=getattr(loader, "state_dict", None) if is_endless else None,
    )
    fetcher.iterator = iter(steps)
    return steps


def _rest_of(fetched: list[Any], batches: Any) -> Iterator[Any]:
    """Yield what was fetched and what follows, without `iter`, which restarts Lightning's iterator."""
    yield from fetched
    end = object()
    while (batch := next(batches, end)) is not end:
        yield batch


def lean_step(loop: _TrainingEpochLoop, fetcher: Any) -> "LeanStep | None":
    """Make the `LeanStep` of an epoch about to begin; `None` where Lightning's own loop is needed."""
    trainer, batches = loop.trainer, _micro_batches_of(fetcher)
    # If the Trainer's arguments have Lightning validate, that may come after any micro-batch.
    if batches is None or loop._should_check_val_epoch():
        return None
    is_lean = _is_plain(trainer) and _no_hooks_overridden(trainer)
    return LeanStep(loop, fetcher, batches) if is_lean else None


def _micro_batches_of(fetcher: Any) -> Iterator[MicroBatch] | None:
    """Find the iterator of HFDataModule's loader below Lightning's own; `None` for any other."""
    if type(fetcher) is not _PrefetchDataFetcher or fetcher.length is None:
        return None
    loader, cycle = fetcher.combined_loader.iterables, getattr(fetcher.iterator, "_iterator", None)
    if not isinstance(loader, TrainLoader | StreamLoader) or not isinstance(cycle, _MaxSizeCycle):
        return None
    batches: Iterator[MicroBatch] = cycle.iterators[0]
    return batches


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
        and all(s.interval == "step" and s.frequency == 1 and not s.reduce_on_plateau for s in schedules)
    )


def _no_hooks_overridden(trainer: pl.Trainer) -> bool:
    """Whether no hook that runs inside a step is overridden."""
    module, data = trainer.lightning_module, datamodule_of(trainer)
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return (
        isinstance(module, HFModule)
        and isinstance(data, HFDataModule)
        and module.has_host
        and module.automatic_optimization
        and has_plain_backward(trainer)
        and not any(is_overridden(hook, module, HFModule) for hook in _OF_HFMODULE)
        and not any(is_overridden(hook, module) for hook in _OF_MODULES)
        and not is_overridden("transfer_batch_to_device", data)
        and not any(is_overridden(hook, data) for hook in _OF_DATA)
        and not any(overrides_hook(hook, cb) for hook in _OF_CALLBACKS for cb in callbacks)
    )


class LeanStep:
    """One micro-batch, from fetching it to the callbacks' end of it; with its step, if it is the last."""

    def __init__(self, loop: _TrainingEpochLoop, fetcher: Any, batches: Iterator[MicroBatch]) -> None:
        trainer, module = loop.trainer, loop.trainer.lightning_module
        self.callbacks: list[pl.Callback] = list(trainer.callbacks)
        self._loop, self._trainer, self._module, self._fetcher = loop, trainer, module, fetcher
        self._micro_batches = batches
        self._optimizer, self._epoch = trainer.optimizers[0], trainer.current_epoch
        self._schedules: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._device = trainer.strategy.root_device
        self._moves = self._device.type != "cpu"
        progress: Any = loop.batch_progress
        of_optimizer: Any = loop.automatic_optimization.optim_progress.optimizer
        self._batches = progress.total, progress.current
        self._steps = of_optimizer.step.total, of_optimizer.step.current
        self._clearings = of_optimizer.zero_grad.total, of_optimizer.zero_grad.current
        self._has_ranks = trainer.world_size > 1
        self._at_start = self._hooks("on_train_batch_start")
        self._at_end = self._hooks("on_train_batch_end")
        # The host, which is always there, has the loss.
        self._divides = len(self._at_end) > 1 and trainer.accumulate_grad_batches > 1

    def _hooks(self, name: str) -> list[Callable[..., Any]]:
        return [getattr(cb, name) for cb in self.callbacks if overrides_hook(name, cb)]

    def take(self) -> int:
        """Run the micro-batch.

        Returns:
            Optimizer steps that were taken: 0 or 1.

        Raises:
            StopIteration: there is no micro-batch left.

        Mirrors: lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop.advance
        """
        loop, trainer, module = self._loop, self._trainer, self._module
        if self._has_ranks:
            loop._broadcast_sigterm_tensor()
        batch = self._next()
        if self._moves:
            batch = batch.to(self._device)
        running = vars(module)
        total, current = self._batches
        index = current.ready
        total.ready, current.ready = total.ready + 1, index + 1
        connector, results = trainer._logger_connector, loop._results
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch, results.batch_size, results.dataloader_idx = batch, None, None
        running["_current_fx_name"] = "on_train_batch_start"
        for hook in self._at_start:
            hook(trainer, module, batch, index)
        total.started, current.started = total.started + 1, current.started + 1
        steps = batch.is_last or loop.batch_progress.is_last_batch
        loss = self._step(batch, index, running) if steps else self._accumulate(batch, running)
        total.processed, current.processed = total.processed + 1, current.processed + 1
        if steps:
            running["_current_fx_name"] = "lr_scheduler_step"
            for schedule in self._schedules:
                loop.scheduler_progress.increment_ready()
                schedule.step()
                loop.scheduler_progress.increment_completed()
        running["_current_fx_name"] = "on_train_batch_end"
        if self._divides:  # the same number in the precision that it has in Lightning's own loop
            accumulation = trainer.accumulate_grad_batches
            loss = scale_for_accumulation(loss, accumulation) / accumulation
        for hook in self._at_end:
            hook(trainer, module, {"loss": loss}, batch, index)
        running["_current_fx_name"] = None
        if results:  # `self.log` was called
            connector.on_batch_end()
        results.batch = results.batch_size = None
        total.completed, current.completed = total.completed + 1, current.completed + 1
        if results:
            connector.update_train_step_metrics()
        return int(steps)

    def _accumulate(self, batch: MicroBatch, running: dict[str, Any]) -> Any:
        """Add the gradients of a micro-batch after which no step is taken; returns its loss, detached."""
        if self._has_ranks:
            with self._trainer.strategy.block_backward_sync():
                return self._backward(batch, running)
        return self._backward(batch, running)

    def _backward(self, batch: MicroBatch, running: dict[str, Any]) -> Any:
        running["_current_fx_name"] = "training_step"
        loss = self._module.loss_share(batch)
        if batch.index == 0:
            for of in self._clearings:  # gradients are cleared by the host, after the step
                of.ready, of.started, of.completed = of.ready + 1, of.started + 1, of.completed + 1
        running["_current_fx_name"] = "backward"
        loss.backward()
        return loss.detach()

    def _step(self, batch: MicroBatch, index: int, running: dict[str, Any]) -> Any:
        """Add the gradients of a step's last micro-batch, clip and step; returns its loss, detached.

        Mirrors: lightning.pytorch.loops.optimization.automatic._AutomaticOptimization.run
        """
        module, optimizer, trainer = self._module, self._optimizer, self._trainer
        total, current = self._steps
        total.ready, current.ready = total.ready + 1, current.ready + 1
        loss = self._backward(batch, running)
        running["_current_fx_name"] = "configure_gradient_clipping"
        module.configure_gradient_clipping(
            optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        )
        running["_current_fx_name"] = "optimizer_step"
        module.optimizer_step(self._epoch, index, optimizer)
        total.completed, current.completed = total.completed + 1, current.completed + 1
        return loss

    def _next(self) -> MicroBatch:
        """Fetch a micro-batch, and count it.

        Mirrors: lightning.pytorch.loops.fetchers._PrefetchDataFetcher.__next__
        """
        fetcher = self._fetcher
        try:
            batch = next(self._micro_batches)
        except StopIteration:
            fetcher.done = True
            raise
        fetcher.fetched += 1
        fetcher.done = self._loop.batch_progress.is_last_batch = fetcher.fetched >= fetcher.length
        return batch


def lightning_handles_sigterm(trainer: pl.Trainer) -> bool:
    """Whether Lightning handles SIGTERM, and not a callback or the user; it is the same on all ranks."""
    return _notifier(trainer) in _handlers()


def stop_at_sigterm(trainer: pl.Trainer, stop: CoordinatedStop) -> None:
    """Have SIGTERM stop all ranks, in place of Lightning's broadcast.

    Mirrors: lightning.pytorch.trainer.connectors.signal_connector._SignalConnector._sigterm_notifier_fn
    Proved by: tests/distributed/test_stopping.py
    """

    def request_stop(number: int, frame: Any) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None and not stop.stop_requested:
            launcher.kill(number)  # sends it to the ranks it has started
        stop.stop_requested = True

    handlers = _handlers()
    handlers[handlers.index(_notifier(trainer))] = request_stop


def _notifier(trainer: pl.Trainer) -> Any:
    return trainer._signal_connector._sigterm_notifier_fn


def _handlers() -> list[Any]:
    """List the functions that Lightning's handler of SIGTERM calls; empty for another handler."""
    found: list[Any] = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", [])
    return found

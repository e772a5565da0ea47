"""RunCheckpoints: when a run writes checkpoints, and what goes into them.

settings that save, or a callback's should_save    checkpoint-N, by a CheckpointWriter
enable_jit_checkpoint                              the same, after SIGTERM
ModelCheckpoint, trainer.save_checkpoint           a Lightning file, with what checkpoints/resume.py needs
"""

import warnings
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from hfbridge.callbacks.jit_checkpoint import SigtermCheckpoint
from hfbridge.callbacks.moment import Moment, moment_of, place_of, step_schedule
from hfbridge.checkpoints import layout
from hfbridge.checkpoints.convert import save_pretrained
from hfbridge.checkpoints.reader import RankState
from hfbridge.checkpoints.resume import describe_run
from hfbridge.checkpoints.weights import check_is_saved
from hfbridge.checkpoints.writer import CheckpointWriter
from hfbridge.distributed import collectives
from hfbridge.errors import BridgeWarning, CheckpointError, ModelError
from hfbridge.models.peft import merged
from hfbridge.strategies import Sharing

_BEFORE_NEXT_STEP = (  # what may run between a save and the moment `before_step` is called
    "on_train_batch_start",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
_READS_ONLY = (  # modules that define such hooks, and change neither weights nor optimizer
    "hfbridge.",
    "lightning.pytorch.core.",
    "lightning.pytorch.callbacks.callback",
    "lightning.pytorch.callbacks.device_stats_monitor",
    "lightning.pytorch.callbacks.early_stopping",
    "lightning.pytorch.callbacks.lr_monitor",
    "lightning.pytorch.callbacks.model_checkpoint",
    "lightning.pytorch.callbacks.on_exception_checkpoint",
    "lightning.pytorch.callbacks.progress.",
    "lightning.pytorch.callbacks.throughput_monitor",
    "lightning.pytorch.callbacks.timer",
)

_NO_OPTIMIZER = (
    "Checkpoints of save_strategy hold no optimizer, which Lightning's DeepSpeedStrategy keeps. "
    "Resume from those of a ModelCheckpoint, or use hfbridge.strategies.DeepSpeedStrategy."
)


class RunCheckpoints:
    """Write the checkpoints of a run.

    Proved by: tests/parity/test_checkpoints.py, tests/faults/test_signals.py
    """

    def __init__(self, host: Any) -> None:
        self._host = host
        self._writer: CheckpointWriter | None = None
        self._is_open = False
        self._kept: Moment | str | None = None  # an earlier moment, or why there is none

    def open(self, trainer: pl.Trainer, *, is_resumed: bool) -> None:
        """Lock the directory, if the settings enable checkpoints.

        Raises:
            CheckpointError: it cannot be written, or another run is writing into it.
        """
        self.close()  # of a run that begins again
        self._is_open, self._kept = True, None
        args = self._host.args
        if args.save_strategy != "no" or args.enable_jit_checkpoint:
            module: Any = trainer.lightning_module
            check_is_saved(module.model, loads_best=args.load_best_model_at_end)
            self._writer_for(trainer).warn_existing_checkpoints(is_resumed=is_resumed)

    def begin(self, trainer: pl.Trainer, module: Any) -> None:
        """Save a checkpoint at SIGTERM from now on."""
        for callback in self._sigterm_callbacks():
            callback.install_signal_handler(lambda: self.save(trainer, module, waits=True))

    def save(self, trainer: pl.Trainer, module: Any, *, waits: bool) -> None:
        """Write a checkpoint of this step; `waits` until it is complete.

        Raises:
            CheckpointError: it cannot be written.
        """
        host = self._host
        host.store_flops()
        writer, sharing, optimizer = self._writer_for(trainer), module.sharing, trainer.optimizers[0]
        only_model, schedule = host.args.save_only_model, module.lr_schedule
        if only_model or sharing.keeps_schedule:
            schedule = None
        optimizer_state = None if only_model else sharing.optimizer_state(module.model, optimizer)
        if sharing.keeps_optimizer and not only_model:
            module.info_once(_NO_OPTIMIZER)
        writer.save(
            module.model,
            host.state,
            weights=sharing.weights(module.model),
            optimizer=optimizer_state,
            schedule=None if schedule is None else schedule.state_dict(),
            processing_class=processing_class_of(module),
            exports=host.exports(),
            position=place_of(host, module, host.position)[0],
            waits=waits,
            is_live=not sharing.is_sharded and sharing.save_parts is None,
            save_parts=sharing.save_parts,
        )
        hooked = (*trainer.callbacks, module)  # type: ignore[attr-defined]
        # Some optimizers swap weights before the forward.
        if hasattr(optimizer, "train") or any(map(may_change_weights, hooked)):
            writer.before_step()

    def before_step(self) -> None:
        """Wait until weights and optimizer are copied."""
        if self._writer is not None:
            self._writer.before_step()

    def keep(self, module: Any) -> None:
        """Keep the present moment for checkpoints that are written later, until `let_go`."""
        if self._is_open and self._kept is None:
            self._kept = moment_of(self._host, module)

    def let_go(self) -> None:
        """Have checkpoints hold the moment at which they are written."""
        self._kept = None

    def spoil(self, reason: str) -> None:
        """Replace the kept moment by the reason why a run cannot be resumed from the present weights."""
        if self._kept is not None:
            self._kept = reason

    def describe(self, module: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return what a Lightning checkpoint keeps of the run; called by all ranks.

        Args:
            module: the HFModule.
            checkpoint: Lightning's, without optimizer and schedule if `save_weights_only`. What belongs to
                another moment is replaced.
        """
        host = self._host
        if not self._is_open:
            return {}
        moment = self._kept
        if moment is None:
            host.store_flops()
            moment = moment_of(host, module)
        if isinstance(moment, str):
            return {layout.REASON_KEY: moment}
        state = replace(moment.state)
        state.total_flos += host.counter.of_all_ranks(moment.flops)
        rank_state = RankState(moment.random_states, moment.position)
        weights = checkpoint["state_dict"]
        entries = describe_run(module, state, rank_state, processing_class_of(module), weights)
        if checkpoint.get("lr_schedulers") == [] and moment.schedules is not None:
            entries["lr_schedulers"] = moment.schedules  # that Lightning does not step
        if moment.needs_schedule_step:
            step_schedule(module.trainer, checkpoint)
        if moment.is_within_step and "loaders" in moment.position:
            checkpoint.get("loops", {}).pop("fit_loop", None)  # it is counted anew
        for name, buffer in (moment.buffers or {}).items():
            if f"{layout.PREFIX}{name}" in checkpoint["state_dict"]:
                checkpoint["state_dict"][f"{layout.PREFIX}{name}"] = buffer
        return entries

    def finish(self, module: Any, *, load: Callable[[Path], None] | None = None) -> None:
        """Load the best weights with `load_best_model_at_end`, and close the directory.

        Args:
            module: the HFModule.
            load: loads the weights of a checkpoint; by default the module's strategy does.

        Mirrors: transformers.Trainer._finalize_training
        """
        if (writer := self._writer) is None:
            return

        def load_by_strategy(best: Path) -> None:
            with collectives.raise_on_all_ranks():
                weights = writer.read_best(module.model, best)
            module.sharing.load_weights(module.model, weights)

        with closing(writer):
            writer.load_best(self._host.state, load=load_by_strategy if load is None else load)
        self._writer = None

    def abandon(self) -> None:
        """Release the directory and the signal handler after an exception."""
        for callback in self._sigterm_callbacks():
            callback.restore_signal_handler()
        try:
            self.close()
        except CheckpointError as error:  # must not replace the exception being raised
            warnings.warn(str(error), BridgeWarning, stacklevel=2)

    def close(self) -> None:
        """Release the directory of a completed run."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _sigterm_callbacks(self) -> list[SigtermCheckpoint]:
        handler = self._host.handler
        callbacks = [] if handler is None else handler.callbacks
        return [callback for callback in callbacks if isinstance(callback, SigtermCheckpoint)]

    def _writer_for(self, trainer: pl.Trainer) -> CheckpointWriter:
        if self._writer is None:
            asynchronous = getattr(trainer, "asynchronous_saving", False)
            self._writer = CheckpointWriter(self._host.args, asynchronous=asynchronous)
        return self._writer


def may_change_weights(hooked: pl.Callback | pl.LightningModule) -> bool:
    """Whether a callback or module has hooks of its own that run before the next optimizer step."""
    hooks = (getattr(hooked, name, None) for name in _BEFORE_NEXT_STEP)
    modules = [getattr(hook, "__module__", None) or "" for hook in hooks if hook is not None]
    return not all(module.startswith(_READS_ONLY) for module in modules)


def write_on_first_rank(module: Any, model: nn.Module, folder: Path, *, merge: bool = False) -> None:
    """Write a model for `from_pretrained`; where it is sharded, all ranks return when it is complete.

    Raises:
        CheckpointError: it cannot be written; on all ranks.
        ModelError: it cannot be merged.
    """
    sharing: Sharing | None = None if module._run is None else module.sharing
    is_sharded = sharing is not None and sharing.is_sharded
    if merge and is_sharded:
        raise ModelError(
            "merge=True needs the full model, got a shard on each rank. Save without merge, and merge in one "
            "process: PeftModel.from_pretrained(model, folder).merge_and_unload()."
        )
    weights = sharing.weights(model) if is_sharded else None  # type: ignore[union-attr]
    with collectives.raise_on_all_ranks() if is_sharded else nullcontext():
        if collectives.rank() == 0:
            written = merged(model) if merge else model
            save_pretrained(written, folder, processing_class_of(module), weights=weights)


def processing_class_of(module: Any) -> Any:
    """Find the tokenizer or processor that is written beside the model; `None` without one."""
    trainer = module._trainer
    data = None if trainer is None else getattr(trainer, "datamodule", None)
    given = module.processing_class or getattr(data, "processing_class", None)
    return given or getattr(getattr(data, "data_collator", None), "tokenizer", None)

"""RunCheckpoints: when a run writes checkpoints, and what goes into them; knows both worlds.

settings that save, or a callback's should_save    checkpoint-N, by a CheckpointWriter
enable_jit_checkpoint                              the same, after SIGTERM
ModelCheckpoint, trainer.save_checkpoint           a Lightning file, with what checkpoints/resume.py needs
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from hfbridge import ranks
from hfbridge.callbacks.jit_checkpoint import SigtermCheckpoint
from hfbridge.callbacks.run_data import UserData
from hfbridge.checkpoints.export import save_pretrained
from hfbridge.checkpoints.resume import describe_run, position_of
from hfbridge.checkpoints.weights import check_is_saved
from hfbridge.checkpoints.writer import CheckpointWriter, export
from hfbridge.errors import BridgeWarning, CheckpointError, ModelError
from hfbridge.model.adapters import merged
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
    "Lightning's DeepSpeedStrategy keeps the optimizer in its engine: the checkpoints of save_strategy hold "
    "weights and state alone. Resume from those of a ModelCheckpoint, or train by "
    "hfbridge.strategies.DeepSpeedStrategy."
)


class RunCheckpoints:
    """Write the checkpoints of a run.

    Args:
        host: what keeps the state of the run.

    Attributes:
        is_resumable: whether a run can go on from a Lightning checkpoint of this moment.

    Proved by: tests/parity/test_checkpoints.py
    """

    def __init__(self, host: Any) -> None:
        self._host = host
        self._writer: CheckpointWriter | None = None
        self.is_resumable = False

    def open(self, trainer: pl.Trainer, *, is_resumed: bool) -> None:
        """Hold the directory, if the settings ask for checkpoints.

        Raises:
            CheckpointError: it cannot be written, or another run is writing into it.
        """
        self._close()  # that of a run that begins again
        self.is_resumable = False
        args = self._host.args
        if args.save_strategy != "no" or args.enable_jit_checkpoint:
            module: Any = trainer.lightning_module
            check_is_saved(module.model, loads_best=args.load_best_model_at_end)
            self._writer_for(trainer).tell_of_earlier_runs(is_resumed=is_resumed)

    def begin(self, trainer: pl.Trainer, module: Any) -> None:
        """Training begins: from now on a checkpoint may be asked for."""
        self.is_resumable = True
        for callback in self._sigterm_callbacks():
            callback.listen(lambda: self.save(trainer, module, waits=True))

    def save(self, trainer: pl.Trainer, module: Any, *, waits: bool) -> None:
        """Write a checkpoint of this step, for a callback also where no setting asks for any.

        Args:
            trainer: the Trainer.
            module: the module.
            waits: whether somebody wants to see it as soon as this returns.

        Raises:
            CheckpointError: it cannot be written.
        """
        host = self._host
        host.store_flops()
        writer, sharing, optimizer = self._writer_for(trainer), module.sharing, trainer.optimizers[0]
        only_model, schedule = host.args.save_only_model, module.lr_schedule
        optimizer_state = None if only_model else sharing.optimizer_state(module.model, optimizer)
        if sharing.keeps_optimizer and not only_model:
            module.tell(_NO_OPTIMIZER)
        writer.save(
            module.model,
            host.state,
            weights=sharing.weights(module.model),
            optimizer=optimizer_state,
            schedule=None
            if only_model or sharing.keeps_schedule or schedule is None
            else schedule.state_dict(),
            processing_class=processing_class_of(module),
            exports=host.exports(),
            position=self._position(trainer),
            waits=waits,
            is_live=not sharing.is_sharded and sharing.save_parts is None,
            save_parts=sharing.save_parts,
        )
        listeners = (*trainer.callbacks, module)  # type: ignore[attr-defined]
        # Some optimizers swap weights before the forward.
        if hasattr(optimizer, "train") or any(map(may_change_weights, listeners)):
            writer.before_step()

    def before_step(self) -> None:
        """Wait for what is being copied of weights and optimizer."""
        if self._writer is not None:
            self._writer.before_step()

    def describe(self, module: Any, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Make what a Lightning checkpoint of this moment keeps of the run; called by all ranks.

        Args:
            module: the HFModule.
            checkpoint: what Lightning keeps: neither optimizer nor schedule with `save_weights_only`.
        """
        host = self._host
        host.store_flops()
        state = copy.deepcopy(host.state)
        export(state, host.exports())
        position = self._position(module.trainer)
        weights = checkpoint["state_dict"]
        entries = describe_run(module, state, position, processing_class_of(module), weights)
        if checkpoint.get("lr_schedulers") == [] and module.lr_schedule is not None:
            entries["lr_schedulers"] = [module.lr_schedule.state_dict()]  # that Lightning does not step
        return entries

    def finish(self, module: Any, *, load: Callable[[Path], None] | None = None) -> None:
        """Put the best weights into the model, if asked for, when training has ended.

        Args:
            module: the HFModule.
            load: puts the weights of a checkpoint into the model; `None` does so by the module's strategy.

        Mirrors: transformers.Trainer._finalize_training
        """
        if (writer := self._writer) is None:
            return

        def load_by_strategy(best: Path) -> None:
            with ranks.together():
                weights = writer.read_best(module.model, best)
            module.sharing.load_weights(module.model, weights)

        with closing(writer):
            writer.load_best(self._host.state, load=load_by_strategy if load is None else load)
        self._writer = None

    def abandon(self, *, is_half_done: bool) -> None:
        """Let go of directory and signal after an exception.

        Args:
            is_half_done: the optimizer was changing the weights; a run cannot go on from them.
        """
        self.is_resumable &= not is_half_done
        for callback in self._sigterm_callbacks():
            callback.listen_no_more()
        try:
            self._close()
        except CheckpointError as error:  # not in place of the exception that is on its way
            warnings.warn(str(error), BridgeWarning, stacklevel=2)

    def close(self) -> None:
        """Let go of the directory of a run that has ended."""
        self._close()

    def _position(self, trainer: pl.Trainer) -> dict[str, Any]:
        loader: Any = trainer.train_dataloader
        module: Any = trainer.lightning_module
        position = position_of(loader, self._host.logged.record, self._host.position, module.data.layout)
        if isinstance(module.data, UserData):
            position["loaders"] = module.data.loader_states()
        return position

    def _sigterm_callbacks(self) -> list[SigtermCheckpoint]:
        handler = self._host.handler
        callbacks = [] if handler is None else handler.callbacks
        return [callback for callback in callbacks if isinstance(callback, SigtermCheckpoint)]

    def _writer_for(self, trainer: pl.Trainer) -> CheckpointWriter:
        if self._writer is None:
            asynchronous = getattr(trainer, "asynchronous_saving", False)
            self._writer = CheckpointWriter(self._host.args, asynchronous=asynchronous)
        return self._writer

    def _close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()


def may_change_weights(listener: pl.Callback | pl.LightningModule) -> bool:
    """Whether a callback or module has hooks of its own that run before the next optimizer step."""
    hooks = (getattr(listener, name, None) for name in _BEFORE_NEXT_STEP)
    modules = [getattr(hook, "__module__", None) or "" for hook in hooks if hook is not None]
    return not all(module.startswith(_READS_ONLY) for module in modules)


def write_on_first_rank(module: Any, model: nn.Module, folder: Path, *, merge: bool = False) -> None:
    """Write a model for `from_pretrained`; where the ranks share it, all of them return when it is there.

    Args:
        module: the HFModule.
        model: its model.
        folder: where to.
        merge: what adapters do is put into the weights of a copy.

    Raises:
        CheckpointError: it cannot be written; on every rank that was waiting.
        ModelError: it cannot be merged.
    """
    sharing: Sharing | None = None if module._run is None else module.sharing
    is_sharded = sharing is not None and sharing.is_sharded
    if merge and is_sharded:
        raise ModelError(
            "merge=True: each rank holds a part of the model only. Save the adapter, without merge, and "
            "merge it in one process: PeftModel.from_pretrained(model, folder).merge_and_unload()."
        )
    weights = sharing.weights(model) if is_sharded else None  # type: ignore[union-attr]
    with ranks.together() if is_sharded else nullcontext():
        if ranks.rank() == 0:
            written = merged(model) if merge else model
            save_pretrained(written, folder, processing_class_of(module), weights=weights)


def processing_class_of(module: Any) -> Any:
    """Find the tokenizer or processor that is written beside the model; `None` without one."""
    trainer = module._trainer
    data = None if trainer is None else getattr(trainer, "datamodule", None)
    given = module.processing_class or getattr(data, "processing_class", None)
    return given or getattr(getattr(data, "data_collator", None), "tokenizer", None)

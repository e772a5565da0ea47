"""Add HFModule's callbacks to a Trainer: RunSetup first, CallbackHost before checkpoints."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from hfbridge.callbacks.connector import overrides_hook, skip_empty_hooks
from hfbridge.callbacks.trainer_state import CallbackHost

_NEEDS_NO_MODEL = (  # modules whose callbacks' `setup` does not look at the model
    "hfbridge.",
    "lightning.pytorch.callbacks.batch_size_finder",
    "lightning.pytorch.callbacks.device_stats_monitor",
    "lightning.pytorch.callbacks.early_stopping",
    "lightning.pytorch.callbacks.lr_finder",
    "lightning.pytorch.callbacks.model_checkpoint",
    "lightning.pytorch.callbacks.on_exception_checkpoint",
    "lightning.pytorch.callbacks.prediction_writer",
    "lightning.pytorch.callbacks.progress.",
    "lightning.pytorch.callbacks.throughput_monitor",
)


class RunSetup(pl.Callback):
    """Set the run up before callbacks that need its model: Lightning sets up modules after callbacks."""

    def __init__(self) -> None:
        skip_empty_hooks(self)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the run up if a callback may need its model."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        module: Any = pl_module
        if any(_may_need_model(cb) for cb in callbacks):
            module.begin_run(builds=True)


def _may_need_model(callback: Any) -> bool:
    defined_in = getattr(getattr(callback, "setup", None), "__module__", None) or ""
    return overrides_hook("setup", callback) and not defined_in.startswith(_NEEDS_NO_MODEL)


def attach_host(module: Any) -> tuple[CallbackHost, list[pl.Callback]]:
    """Find or make the host of a module, and remove those of other modules from its Trainer's list.

    Returns:
        The host, and what `configure_callbacks` is to add.
    """
    trainer: Any = module.trainer
    host = next(
        (cb for cb in trainer.callbacks if isinstance(cb, CallbackHost) and cb.evaluator is module.evaluator),
        None,
    )
    others = [cb for cb in trainer.callbacks if cb is host or not isinstance(cb, RunSetup | CallbackHost)]
    trainer.callbacks = [RunSetup(), *others]
    if host is not None:
        return host, []
    host = CallbackHost(
        module.evaluator,
        getattr(trainer, "trainer_callbacks", ()),
        initialized=getattr(trainer, "initialized_callbacks", ()),
        print_logs=getattr(trainer, "print_logs", True),
    )
    return host, [host]


def insert_host(module: Any) -> CallbackHost:
    """Add the host of a module to its Trainer's list, where `configure_callbacks` has not."""
    host, added = attach_host(module)
    callbacks: list[Any] = module.trainer.callbacks
    place = next((n for n, callback in enumerate(callbacks) if isinstance(callback, Checkpoint)), None)
    callbacks[len(callbacks) if place is None else place : place] = added
    return host

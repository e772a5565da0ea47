"""SLURM's requeue signal (`SLURMEnvironment(auto_requeue=True)`): save and requeue between micro-batches."""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from hfbridge.distributed.coordinated_stop import CoordinatedStop

_HANDLER = "_slurm_sigusr_handler_fn"  # of Lightning's signal connector; tests/faults/test_signals.py pins it


class Requeue:
    """Run Lightning's signal handler where a checkpoint can be written, on all ranks together.

    Lightning runs it wherever the signal arrives: also within `optimizer.step()`, at different moments on
    several ranks.

    Attributes:
        signal: the signal that has arrived; `None` without one.
        is_due: call `act` after a micro-batch.

    Proved by: tests/faults/test_signals.py
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.is_due = False
        self._trainer: Any = None
        self._stop: CoordinatedStop | None = None

    def install_signal_handler(self, trainer: pl.Trainer) -> None:
        """Replace the handler that Lightning is about to register."""
        self.signal, self.is_due, self._trainer = None, False, trainer
        vars(trainer._signal_connector)[_HANDLER] = self._note

    def agree(self) -> None:
        """Coordinate several ranks; a collective."""
        trainer = self._trainer
        environment = trainer._accelerator_connector.cluster_environment
        if trainer.world_size > 1 and isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._stop, self.is_due = CoordinatedStop(), True

    def act(self) -> None:
        """Save and requeue, if requested; called by all ranks after the same micro-batches."""
        if self._stop is not None:
            self._stop.stop_requested |= self.signal is not None
            if self._stop.should_continue():
                return
            self._stop.close()
        number, self.signal, self.is_due = self.signal, None, self._stop is not None
        connector: Any = self._trainer._signal_connector
        getattr(type(connector), _HANDLER)(connector, number, None)
        if self._stop is not None:
            self._stop = CoordinatedStop()

    def close(self) -> None:
        """Restore Lightning's handler."""
        self.is_due = False
        if self._trainer is not None:
            vars(self._trainer._signal_connector).pop(_HANDLER, None)
            self._trainer = None
        if self._stop is not None:
            self._stop.close()
            self._stop = None

    def _note(self, number: int, frame: Any) -> None:
        self.signal, self.is_due = number, True

"""A checkpoint when the machine is about to be taken away (`enable_jit_checkpoint`)."""

import signal
from collections.abc import Callable
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

from hfbridge.distributed import collectives
from hfbridge.distributed.coordinated_stop import CoordinatedStop


class SigtermCheckpoint(JITCheckpointCallback):
    """Save and stop a few seconds after SIGTERM, at the end of a step, and on all ranks together.

    The HF Trainer may save between backward and optimizer step, with random numbers of the step drawn
    already, from where no run resumes exactly, and each rank saves when it gets the signal itself.

    Proved by: tests/faults/test_saving.py
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stop: CoordinatedStop | None = None
        self._has_stopped = False

    def install_signal_handler(self, save: Callable[[], None]) -> None:
        """Handle SIGTERM in place of Lightning until training ends."""
        self.jit_manager = _Manager(save)
        self.jit_manager.setup_signal_handler()  # type: ignore[no-untyped-call]
        self._has_stopped = False
        if collectives.count() > 1:
            self._stop = CoordinatedStop()

    def restore_signal_handler(self) -> None:
        """Restore the former handler of SIGTERM."""
        self._end_agreeing()
        manager, self.jit_manager = self.jit_manager, None
        if manager is not None and manager._original_sigterm_handler is not None:
            signal.signal(signal.SIGTERM, manager._original_sigterm_handler)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait: random numbers may have been drawn for the step's data."""

    on_step_begin = on_pre_optimizer_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save, if a rank has got the signal."""
        if self._agrees():
            super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save, if a rank has got the signal."""
        if self._agrees():
            super().on_epoch_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the former handler of SIGTERM, on all ranks."""
        super().on_train_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        self._end_agreeing()

    def _agrees(self) -> bool:
        """Whether all ranks save here, since one has got the signal."""
        if self.jit_manager is None or self._stop is None:
            return True
        self._stop.stop_requested |= self.jit_manager.is_checkpoint_requested
        if self._has_stopped or self._stop.should_continue():
            return False
        self._has_stopped = self.jit_manager.is_checkpoint_requested = True
        return True

    def _end_agreeing(self) -> None:
        if self._stop is not None:
            self._stop.close()
            self._stop = None


class _Manager(CheckpointManager):
    """Request a checkpoint some seconds after SIGTERM."""

    def __init__(self, save: Callable[[], None]) -> None:
        super().__init__(trainer=None)
        self._save = save

    def execute_jit_checkpoint(self) -> None:
        """Save."""
        self.is_checkpoint_requested = False
        self._save()

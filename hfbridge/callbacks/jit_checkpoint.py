"""A checkpoint when the machine is about to be taken away (`enable_jit_checkpoint`); knows Hugging Face."""

import signal
from collections.abc import Callable
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

from hfbridge.distributed import collectives
from hfbridge.distributed.coordinated_stop import CoordinatedStop


class SigtermCheckpoint(JITCheckpointCallback):
    """Save and stop after SIGTERM, as natively a few seconds later, in case the process is killed anyway.

    Natively it may also save between backward pass and optimizer step, with random numbers of the step drawn
    already, from where no run goes on exactly. This one waits for the end of the step. And natively each of
    several ranks saves when it has heard the signal itself; here all do, at the same moment of a step.

    Proved by: tests/faults/test_saving.py
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stop: CoordinatedStop | None = None
        self._has_stopped = False

    def install_signal_handler(self, save: Callable[[], None]) -> None:
        """Take SIGTERM over from Lightning until training ends.

        Args:
            save: writes a checkpoint of the present step.
        """
        self.jit_manager = _Manager(save)
        self.jit_manager.setup_signal_handler()  # type: ignore[no-untyped-call]
        self._has_stopped = False
        if collectives.count() > 1:
            self._stop = CoordinatedStop()

    def restore_signal_handler(self) -> None:
        """Give SIGTERM back."""
        self._end_agreeing()
        manager, self.jit_manager = self.jit_manager, None
        if manager is not None and manager._original_sigterm_handler is not None:
            signal.signal(signal.SIGTERM, manager._original_sigterm_handler)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait: the step's data have been fetched, for which random numbers may have been drawn."""

    on_step_begin = on_pre_optimizer_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save, if a rank has heard the signal."""
        if self._agrees():
            super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Likewise."""
        if self._agrees():
            super().on_epoch_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give SIGTERM back, on all ranks."""
        super().on_train_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        self._end_agreeing()

    def _agrees(self) -> bool:
        """Whether all ranks save here, since one has heard the signal; a single process asks itself."""
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
    """Asks for a checkpoint some seconds after SIGTERM."""

    def __init__(self, save: Callable[[], None]) -> None:
        super().__init__(trainer=None)
        self._save = save

    def execute_jit_checkpoint(self) -> None:
        """Save."""
        self.is_checkpoint_requested = False
        self._save()

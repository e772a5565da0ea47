"""Memory metrics of the stages of a run (`skip_memory_metrics=False`), and running out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainingArguments
from transformers.trainer_utils import TrainerMemoryTracker

from hfbridge.errors import SettingsError

Stage = Literal["init", "train", "eval", "test"]


class MemoryTracker(TrainerMemoryTracker):
    """transformers' tracker with explicit stages, where the original reads the name of the calling function.

    A stage within another one, such as an evaluation while training, is not measured.

    Args:
        skip_memory_metrics: measure nothing, as without psutil.
    """

    def __init__(self, skip_memory_metrics: bool) -> None:
        super().__init__(skip_memory_metrics)  # type: ignore[no-untyped-call]
        self._stage: Stage = "init"

    def derive_stage(self) -> str:
        """Return the current stage."""
        return self._stage

    def begin(self, stage: Stage) -> None:
        """Begin to measure a stage; "init" ends when the next begins."""
        if not self.skip_memory_metrics and self.cur_stage == "init":
            self.end("init")
        self._stage = stage
        self.start()  # type: ignore[no-untyped-call]

    def end(self, stage: Stage, metrics: dict[str, Any] | None = None) -> None:
        """End a stage, and add what was measured to its metrics; only "init" has none."""
        self._stage = stage
        self.stop_and_update_metrics(metrics)  # type: ignore[no-untyped-call]

    def abandon(self) -> None:
        """Stop measuring after an error, which would leave the thread of the original running."""
        self.peak_monitoring = False
        self.cur_stage = None


@contextmanager
def explain_eval_oom(args: TrainingArguments) -> Iterator[None]:
    """Suggest a smaller evaluation batch size if an evaluation runs out of memory.

    Raises:
        SettingsError: out of memory, with `auto_find_batch_size`.

    Mirrors: transformers.Trainer._evaluate
    """
    try:
        yield
    except RuntimeError as error:
        if not args.auto_find_batch_size or not should_reduce_batch_size(error):
            raise
        raise SettingsError(
            "Memory ran out in an evaluation, and auto_find_batch_size finds the size of training batches. "
            f"Set per_device_eval_batch_size below {args.per_device_eval_batch_size}."
        ) from error

"""Lightning reads `checkpoint-N` directories; knows both worlds."""

import zlib
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from hfbridge.checkpoints import layout
from hfbridge.checkpoints.lightning_format import to_lightning
from hfbridge.checkpoints.reader import find_last, read_checkpoint, state_from, weights_alone
from hfbridge.distributed import collectives
from hfbridge.errors import CheckpointError


class NewestOf(str):
    """A run's directory, in place of its newest whole checkpoint, until the ranks are connected."""

    __slots__ = ()


def read_directories(strategy: Strategy) -> None:
    """Have a strategy that reads files in Lightning's own way read `checkpoint-N` directories, too."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = NativeCheckpointIO(reads_together=True)


class NativeCheckpointIO(TorchCheckpointIO):
    """Lightning's own reading and writing of files, which takes a native directory for one, too.

    Nothing but tensors and plain data is unpickled, whatever Lightning is told.

    Args:
        reads_together: all ranks of a run call it. Then all raise if one cannot read its files, and the first
            rank alone chooses the newest checkpoint.

    Proved by: tests/distributed/test_checkpoints.py
    """

    def __init__(self, *, reads_together: bool = False) -> None:
        super().__init__()
        self._reads_together = reads_together

    def load_checkpoint(self, path: Any, *arguments: Any, **named: Any) -> dict[str, Any]:
        """Read a Lightning checkpoint, or a native one in Lightning's form.

        Raises:
            CheckpointError: it is not there, damaged, or holds more than tensors and plain data; or it is
                not the same to all ranks.
        """
        if not self._reads_together:
            return self._read(path, *arguments, **named)
        if isinstance(path, NewestOf):
            found = None
            with collectives.raise_on_all_ranks():
                found = newest_in(Path(path)) if collectives.rank() == 0 else None
            path = collectives.gather(found)[0]
        with collectives.raise_on_all_ranks():
            checkpoint = self._read(path, *arguments, **named)
        states = collectives.gather(_told_by(checkpoint))
        for rank, state in enumerate(states):
            if state != states[0]:
                raise CheckpointError(
                    f"{str(path)!r} is not the same to all ranks: to rank 0 it is that of step "
                    f"{states[0][0]}, and rank {rank} sees another one, of step {state[0]}. Do the nodes "
                    "have directories of their own, with checkpoints of different runs?"
                )
        return checkpoint

    def _read(self, path: Any, *arguments: Any, **named: Any) -> dict[str, Any]:
        folder = Path(path)
        if layout.is_checkpoint(folder):
            # With as many ranks as before each needs its own states alone.
            is_as_before = len(layout.random_files_in(folder)) == collectives.count()
            rank = collectives.rank() if self._reads_together and is_as_before else None
            read = to_lightning(read_checkpoint(folder, rank=rank))
            return {**read, layout.PARTS_KEY: str(folder)} if layout.has_parts(folder) else read
        if "://" not in str(path) and not Path(path).exists():
            raise CheckpointError(f"There is no checkpoint {str(path)!r}.")
        if folder.suffix == ".safetensors":
            raise CheckpointError(weights_alone(folder))
        named["weights_only"] = True
        try:
            found: dict[str, Any] = super().load_checkpoint(path, *arguments, **named)
        except Exception as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError(
                f"{str(path)!r} is damaged, or holds more than tensors and plain data, which is not run: "
                f"{first}"
            ) from error
        if self._reads_together and "pytorch-lightning_version" not in found:
            raise CheckpointError(weights_alone(folder))
        return found


def _told_by(checkpoint: dict[str, Any]) -> tuple[Any, int]:
    """Sum up a checkpoint: its step, and what was logged but for times, which are each node's own."""
    text = checkpoint.get(layout.STATE_KEY)
    rows = [] if text is None else state_from(text).log_history
    logged = [[row.get(name) for name in ("step", "loss", "grad_norm", "learning_rate")] for row in rows]
    return checkpoint.get("global_step"), zlib.crc32(repr(logged).encode())


def newest_in(folder: Path) -> Path:
    """Find the newest whole checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    found = find_last(folder)
    if found is None:
        raise CheckpointError(
            f'ckpt_path="last": there is no checkpoint in output_dir={str(folder)!r}. Leave it out to begin '
            "a new run, or name the checkpoint."
        )
    return found

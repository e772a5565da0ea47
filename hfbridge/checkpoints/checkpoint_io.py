"""A Lightning CheckpointIO that also reads `checkpoint-N` directories."""

import zlib
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from hfbridge.checkpoints import layout
from hfbridge.checkpoints.lightning_format import to_lightning
from hfbridge.checkpoints.reader import find_last, read_checkpoint, state_from, unreadable, weights_alone
from hfbridge.distributed import collectives
from hfbridge.errors import CheckpointError


class NewestOf(str):
    """A run's directory, standing for its newest complete checkpoint until the ranks are connected."""

    __slots__ = ()


def read_directories(strategy: Strategy) -> None:
    """Have a strategy with Lightning's default CheckpointIO read `checkpoint-N` directories, too."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = NativeCheckpointIO(reads_together=True)


class NativeCheckpointIO(TorchCheckpointIO):
    """Lightning's TorchCheckpointIO, which reads `checkpoint-N` directories, too.

    Only tensors and plain data are unpickled, whatever `weights_only` is passed.

    Args:
        reads_together: all ranks of a run call it: all raise if one fails, and rank 0 chooses the newest
            checkpoint.

    Proved by: tests/distributed/test_checkpoints.py
    """

    def __init__(self, *, reads_together: bool = False) -> None:
        super().__init__()
        self._reads_together = reads_together

    def load_checkpoint(self, path: Any, *arguments: Any, **named: Any) -> dict[str, Any]:
        """Read a Lightning checkpoint, or a `checkpoint-N` directory in Lightning's form.

        Raises:
            CheckpointError: it is missing, damaged, holds more than tensors and plain data, or differs
                between ranks.
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
        states = collectives.gather(_summarize(checkpoint))
        for rank, state in enumerate(states):
            if state != states[0]:
                raise CheckpointError(
                    f"{str(path)!r} must be the same on all ranks: rank 0 reads step {states[0][0]}, and "
                    f"rank {rank} another checkpoint, of step {state[0]}. Put output_dir where all nodes "
                    "read the same files."
                )
        return checkpoint

    def _read(self, path: Any, *arguments: Any, **named: Any) -> dict[str, Any]:
        folder = Path(path)
        if folder.is_dir():
            # With as many ranks as before each needs its own states alone.
            is_as_before = len(layout.random_files_in(folder)) == collectives.count()
            rank = collectives.rank() if self._reads_together and is_as_before else None
            read = to_lightning(read_checkpoint(folder, rank=rank))
            return {**read, layout.PARTS_KEY: str(folder)} if layout.has_parts(folder) else read
        if "://" not in str(path) and not folder.exists():
            raise CheckpointError(f"There is no checkpoint {str(path)!r}.")
        if folder.suffix == ".safetensors":
            raise CheckpointError(weights_alone(folder))
        named["weights_only"] = True
        try:
            found: dict[str, Any] = super().load_checkpoint(path, *arguments, **named)
        except Exception as error:
            raise unreadable(repr(str(path)), error) from error
        if self._reads_together and "pytorch-lightning_version" not in found:
            raise CheckpointError(weights_alone(folder))
        return found


def _summarize(checkpoint: dict[str, Any]) -> tuple[Any, int]:
    """Return a checkpoint's step, and a checksum of its log without times, which differ by node."""
    text = checkpoint.get(layout.STATE_KEY)
    history = [] if text is None else state_from(text).log_history
    names = ("step", "loss", "grad_norm", "learning_rate")
    logged = [[entry.get(name) for name in names] for entry in history]
    return checkpoint.get("global_step"), zlib.crc32(repr(logged).encode())


def newest_in(folder: Path) -> Path:
    """Find the newest complete checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    found = find_last(folder)
    if found is None:
        raise CheckpointError(
            f'ckpt_path="last": there is no checkpoint in output_dir={str(folder)!r}. Leave ckpt_path out '
            "for a new run, or pass a checkpoint."
        )
    return found

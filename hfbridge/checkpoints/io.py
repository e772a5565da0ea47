"""Lightning reads `checkpoint-N` directories; knows both worlds."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from hfbridge.checkpoints import layout
from hfbridge.checkpoints.convert import to_lightning
from hfbridge.checkpoints.read import read_checkpoint
from hfbridge.errors import CheckpointError


def read_directories(strategy: Strategy) -> None:
    """Have a strategy that reads files in Lightning's own way read `checkpoint-N` directories, too."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = NativeCheckpointIO()


class NativeCheckpointIO(TorchCheckpointIO):
    """Lightning's own reading and writing of files, which takes a native directory for one, too.

    Nothing but tensors and plain data is unpickled, whatever Lightning is told.
    """

    def load_checkpoint(self, path: Any, *arguments: Any, **named: Any) -> dict[str, Any]:
        """Read a Lightning checkpoint, or a native one in Lightning's form.

        Raises:
            CheckpointError: it is not there, damaged, or holds more than tensors and plain data.
        """
        if layout.is_checkpoint(Path(path)):
            return to_lightning(read_checkpoint(Path(path)))
        if "://" not in str(path) and not Path(path).exists():
            raise CheckpointError(f"There is no checkpoint {str(path)!r}.")
        named["weights_only"] = True
        try:
            found: dict[str, Any] = super().load_checkpoint(path, *arguments, **named)
        except Exception as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError(
                f"{str(path)!r} is damaged, or holds more than tensors and plain data, which is not run: "
                f"{first}"
            ) from error
        return found

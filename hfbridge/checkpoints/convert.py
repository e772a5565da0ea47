"""Conversion between checkpoint formats, and export of a module.

convert("out/checkpoint-500", "run.ckpt")    for lightning.Trainer.fit(ckpt_path=...)
convert("run.ckpt", "out/checkpoint-500")    for transformers.Trainer.train(resume_from_checkpoint=...)
module.save_pretrained("final")              for AutoModelFor....from_pretrained
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfbridge.checkpoints import layout
from hfbridge.checkpoints.atomic_write import replaced, save_model, write_read_checkpoint
from hfbridge.checkpoints.checkpoint_io import NativeCheckpointIO
from hfbridge.checkpoints.lightning_format import from_lightning, to_lightning
from hfbridge.checkpoints.reader import read_all_weights, read_checkpoint
from hfbridge.checkpoints.weights import adapter_files, complete_weights, outline_of, writes_adapters
from hfbridge.errors import CheckpointError


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Convert a `checkpoint-N` directory to a Lightning `.ckpt`, or back, with everything needed to resume.

    Args:
        source: a directory, or a `.ckpt` that a run of HFModule has written.
        target: a file for a directory, a directory for a file; it must not exist.

    Returns:
        The path of the target.

    Raises:
        CheckpointError: the source is missing, damaged or of another module, or the target exists or cannot
            be written.

    Proved by: tests/unit/checkpoints/test_lightning_format.py
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise CheckpointError(f"{str(target)!r} exists. Choose another target, or delete it first.")
    if source.is_dir():
        checkpoint = read_checkpoint(source, keeps_files=True)
        with replaced(target) as unfinished:
            unfinished.rmdir()
            torch.save(to_lightning(checkpoint), unfinished)
    else:
        found = NativeCheckpointIO().load_checkpoint(source)
        write_read_checkpoint(target, from_lightning(found, source=repr(str(source))))
    return target


def save_pretrained(
    model: nn.Module, folder: Path, processing_class: Any, *, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model for `from_pretrained`, and read it back to check it.

    Args:
        model: the Hugging Face model.
        folder: made if missing; files of the same names are replaced, others stay.
        processing_class: tokenizer or processor, written beside it; `None` writes none.
        weights: the full `state_dict` of a sharded model.

    Raises:
        CheckpointError: it cannot be written, or what was written is not the model.

    Proved by: tests/unit/checkpoints/test_convert.py
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=layout.UNFINISHED, dir=folder.parent) as beside:
            written = Path(beside) / "model"
            with replaced(written) as unfinished:
                save_model(model, unfinished, processing_class, weights=weights)
                _check_is_saved(model, unfinished, model.state_dict() if weights is None else weights)
            for name, path in layout.files_in(written).items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, folder / name)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"The model could not be written to {str(folder)!r}: {error}.") from error


def _check_is_saved(model: nn.Module, folder: Path, weights: Mapping[str, Tensor]) -> None:
    name, read = layout.weights_in(folder).name, read_all_weights(folder)
    is_below: set[int] = set()
    if writes_adapters(model):
        if adapter_files(model).made:
            return  # there is nothing in the model that the prompts in the file could be compared with
        # The base model below an adapter is not in the file.
        is_below = {id(tensor) for tensor in outline_of(model).values()}
    found = complete_weights(model, read, source=name)
    for key, tensor in weights.items():
        if id(found[key]) not in is_below and not torch.equal(tensor.cpu(), found[key].cpu()):
            raise CheckpointError(
                f"{name} does not hold what the model has: {key} differs. Nothing was kept."
            )

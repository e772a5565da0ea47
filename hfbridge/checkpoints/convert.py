"""From one format to the other, and out of a module; knows both worlds.

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
    """Turn a `checkpoint-N` directory into a Lightning `.ckpt`, or back, with all that a run goes on from.

    Args:
        source: a native directory, or a `.ckpt` that a run of HFModule has written.
        target: a file for a directory, a directory for a file; it must not exist.

    Returns:
        The path of the target.

    Raises:
        CheckpointError: the source is missing, damaged or of another module, or the target is there or cannot
            be written.

    Proved by: tests/unit/checkpoints/test_lightning_format.py
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise CheckpointError(f"{str(target)!r} exists. Choose another target, or delete it first.")
    if not source.exists():
        raise CheckpointError(f"There is no checkpoint {str(source)!r}.")
    if layout.is_checkpoint(source):
        checkpoint = read_checkpoint(source, keeps_files=True)
        with replaced(target) as unfinished:
            unfinished.rmdir()
            torch.save(to_lightning(checkpoint), unfinished)
        return target
    found = NativeCheckpointIO().load_checkpoint(source)
    write_read_checkpoint(target, from_lightning(found, source=repr(str(source))))
    return target


def save_pretrained(
    model: nn.Module, folder: Path, processing_class: Any, *, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model for `from_pretrained`, and read it again to see that it is all there.

    Args:
        model: the Hugging Face model.
        folder: made if it is not there; files of the same names are replaced, others stay.
        processing_class: tokenizer or processor, written beside it; `None` is not.
        weights: the whole `state_dict` of a model of which this process holds a part.

    Raises:
        CheckpointError: it cannot be written, or what was written is not the model.

    Proved by: tests/unit/checkpoints/test_convert.py
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=layout.UNFINISHED, dir=folder.parent) as beside:
            with replaced(Path(beside) / "model") as unfinished:
                save_model(model, unfinished, processing_class, weights=weights)
                _check_is_saved(model, unfinished, model.state_dict() if weights is None else weights)
            written = Path(beside) / "model"
            for path in sorted(written.rglob("*")):
                place = folder / path.relative_to(written)
                if path.is_dir():
                    place.mkdir(exist_ok=True)
                else:
                    os.replace(path, place)
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
        # Below an adapter the model is as it was; there is nothing of it in the file.
        is_below = {id(tensor) for tensor in outline_of(model).values()}
    found = complete_weights(model, read, source=name)
    wrong = [
        key
        for key, tensor in weights.items()
        if id(found[key]) not in is_below and not torch.equal(tensor.cpu(), found[key].cpu())
    ]
    if wrong:
        raise CheckpointError(
            f"{name} does not hold what the model has: {wrong[0]} differs. Nothing was kept."
        )

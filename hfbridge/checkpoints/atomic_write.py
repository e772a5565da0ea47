"""Atomic writing of a `checkpoint-N`: beside its place, flushed, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils.import_utils import is_peft_available

from hfbridge.checkpoints import layout
from hfbridge.checkpoints.manifest import make_manifest
from hfbridge.checkpoints.reader import Checkpoint, RankState
from hfbridge.checkpoints.weights import is_peft_model, prompts_of
from hfbridge.distributed import collectives
from hfbridge.errors import CheckpointError


@dataclass
class Content:
    """What is written into a `checkpoint-N`.

    Attributes:
        model: the Hugging Face model.
        weights: its full `state_dict`, or a copy of it.
        args: pickled for the HF Trainer.
        processing_class: tokenizer or processor; `None` is not written.
        step: optimizer steps of the run.
        state_text: `TrainerState` as JSON.
        optimizer: its full `state_dict`; `None` with `save_only_model`.
        schedule: its `state_dict`; `None` with `save_only_model`.
        ranks: states of all ranks; none with `save_only_model`.
        parts: a directory on the same disk, all of which moves into the checkpoint.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    args: TrainingArguments
    processing_class: Any
    step: int
    state_text: str
    optimizer: dict[str, Any] | None = None
    schedule: dict[str, Any] | None = None
    ranks: Sequence[RankState | None] = ()
    parts: Path | None = None


def write_checkpoint(folder: Path, content: Content) -> Callable[[], None]:
    """Write the files of a checkpoint beside its place.

    Returns:
        A function that flushes them to the disk and renames the directory.

    Raises:
        CheckpointError: it cannot be written, by this or by what is returned.

    Mirrors: transformers.Trainer._save_checkpoint
    Proved by: tests/parity/test_checkpoints.py
    """
    with ExitStack() as stack:
        unfinished = stack.enter_context(replaced(folder))
        save_model(content.model, unfinished, content.processing_class, weights=content.weights)
        torch.save(content.args, unfinished / layout.TRAINING_ARGS_NAME)
        if content.parts is not None:
            for path in content.parts.iterdir():
                os.replace(path, unfinished / path.name)
            content.parts.rmdir()
        _write_run(unfinished, content, step=content.step)
        return stack.pop_all().close
    raise AssertionError  # pragma: no cover


def write_read_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write what was read from another checkpoint, of either format.

    Raises:
        CheckpointError: it cannot be written.
    """
    with replaced(folder) as unfinished:
        for name, content in checkpoint.files.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        file = layout.ADAPTER_SAFE_WEIGHTS_NAME if checkpoint.has_adapter else layout.SAFE_WEIGHTS_NAME
        in_folders: dict[str, dict[str, Tensor]] = {}
        for name, tensor in checkpoint.weights.items():
            folder_name, _, name_in_file = name.rpartition("/") if checkpoint.has_adapter else ("", "", name)
            in_folders.setdefault(folder_name, {})[name_in_file] = tensor
        for folder_name, weights in in_folders.items():
            path = unfinished / folder_name / file
            path.parent.mkdir(exist_ok=True)
            _save_tensors(weights, path)
        _write_run(unfinished, checkpoint, step=checkpoint.state.global_step)


def _write_run(folder: Path, content: Content | Checkpoint, *, step: int) -> None:
    """Write the state of a run and, last, in rank 0's states, the manifest of all other files."""
    (folder / layout.TRAINER_STATE_NAME).write_text(content.state_text, encoding="utf-8")
    if content.optimizer is not None:
        torch.save(content.optimizer, folder / layout.OPTIMIZER_NAME)
    if content.schedule is not None:
        torch.save(content.schedule, folder / layout.SCHEDULER_NAME)
    names = [layout.random_name(rank, len(content.ranks)) for rank in range(len(content.ranks))]
    for rank, (name, found) in reversed([*enumerate(zip(names, content.ranks, strict=True))]):
        assert found is not None
        states = dict(found.random_states)
        if found.position is not None:  # else it is a checkpoint of the HF Trainer
            states[layout.OWN] = {"step": step, "rank": rank, "position": found.position}
            if rank == 0:
                states[layout.OWN]["files"] = make_manifest(folder)
        torch.save(states, folder / name)


def save_model(
    model: nn.Module, folder: Path, processing_class: Any, *, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write weights, configurations, and tokenizer or processor.

    Args:
        model: a Hugging Face model; of any other only the weights are written.
        folder: an existing directory.
        processing_class: tokenizer or processor; `None` is not written.
        weights: written instead of the model's.

    Mirrors: transformers.Trainer._save
    """
    if _saves_itself(model):
        given = {} if weights is None else {"state_dict": dict(weights)}
        with _saving_on_any_rank(model), prompts_of(model, weights or {}):
            model.save_pretrained(folder, **given)  # type: ignore[operator]
    else:
        _save_tensors(model.state_dict() if weights is None else weights, folder / layout.SAFE_WEIGHTS_NAME)
    if processing_class is not None:
        processing_class.save_pretrained(folder)


def _save_tensors(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by all their names, copied where they share memory, which safetensors does not save."""
    apart, seen = dict[str, Tensor](), set[int]()
    for name, tensor in weights.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = (tensor.clone() if memory in seen else tensor).contiguous()
        seen.add(memory)
    safetensors.torch.save_file(apart, path, metadata={"format": "pt"})


def other_files(model: nn.Module, args: TrainingArguments, processing_class: Any) -> dict[str, bytes]:
    """Return the files of a checkpoint that hold neither weights nor state, by name."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        if _saves_itself(model):
            # PEFT looks up the weights of full layers by their names.
            names = model.state_dict() if hasattr(model, "peft_config") else {}
            save_model(model, folder, processing_class, weights={name: torch.empty(1) for name in names})
        elif processing_class is not None:
            processing_class.save_pretrained(folder)
        torch.save(args, folder / layout.TRAINING_ARGS_NAME)
        return {
            name: path.read_bytes()
            for name, path in layout.files_in(folder).items()
            if path.suffix != ".safetensors" and path.name != layout.SAFE_WEIGHTS_INDEX_NAME
        }


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yield a new directory that is flushed and then replaces `folder`; it may be exchanged for a file.

    Raises:
        CheckpointError: it could not be written; nothing of it is left, and `folder` is as it was.
    """
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{layout.UNFINISHED}{folder.name}-", dir=folder.parent))
        yield unfinished
        mask = os.umask(0)  # which can be read only by setting it
        os.umask(mask)
        unfinished.chmod((0o777 if unfinished.is_dir() else 0o666) & ~mask)
        _flush(unfinished)
        _put_in_place(unfinished, folder)
    except BaseException as error:
        if unfinished is not None and unfinished.is_file():
            unfinished.unlink()
        elif unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        if not _is_about_writing(error):
            raise
        raise CheckpointError(
            f"{str(folder)!r} could not be written: {error}. Nothing of it is left; checkpoints written "
            "before are complete. Make room, or choose another output_dir, and resume from the last one."
        ) from error


def forget_pages(folder: Path) -> None:
    """Drop files from the page cache, so that the memory is free for the files written next.

    A virtual machine would otherwise return it to its host, and be slow to get it again.
    """
    if not hasattr(os, "posix_fadvise"):  # pragma: no cover
        return
    for path in folder.rglob("*"):
        with suppress(OSError), path.open("rb") as file:  # a directory, or deleted meanwhile
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _is_about_writing(error: BaseException) -> bool:
    """Whether an error is the disk's; torch and safetensors have errors of their own for a full one."""
    return isinstance(error, OSError | safetensors.SafetensorError) or (
        isinstance(error, RuntimeError)
        and ("PytorchStreamWriter" in str(error) or "unexpected pos" in str(error))
    )


def _put_in_place(unfinished: Path, folder: Path) -> None:
    """Rename, then delete a directory that had the name before."""
    before = None
    if folder.exists():
        before = Path(tempfile.mkdtemp(prefix=f"{layout.UNFINISHED}{folder.name}-", dir=folder.parent))
        os.replace(folder, before)
    os.replace(unfinished, folder)
    _flush_entry(folder.parent)
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Wait until all of a directory is on the disk; files are flushed in parallel."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(_flush_entry, layout.files_in(folder).values()))
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _saving_on_any_rank(model: nn.Module) -> Iterator[None]:
    """Have a model write its files on a rank other than 0 (`save_on_each_node`)."""
    name = "should_save_on_this_rank"
    if collectives.rank() == 0 or not hasattr(model, name):
        yield
        return
    setattr(model, name, lambda is_main_process: True)
    try:
        yield
    finally:
        delattr(model, name)


def _saves_itself(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) or (is_peft_available() and is_peft_model(model))

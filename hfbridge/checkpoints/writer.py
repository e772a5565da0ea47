"""CheckpointWriter: the checkpoints of one run, from its first step to its best model.

HF Trainer                                    here
_save_checkpoint, best_model_checkpoint       CheckpointWriter.save
rotate_checkpoints                            called after the new checkpoint is renamed
_load_best_model, _finalize_training          CheckpointWriter.load_best
(two runs may write into one directory)       an error while both run
each rank writes its random states            the first rank writes those of all, so that one rename ends it
"""

import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from hfbridge.checkpoints import layout
from hfbridge.checkpoints.atomic_write import Content, forget_pages, write_checkpoint
from hfbridge.checkpoints.reader import RankState, read_all_weights
from hfbridge.checkpoints.weights import complete_weights
from hfbridge.distributed import collectives
from hfbridge.errors import BridgeWarning, CheckpointError
from hfbridge.utilities import rng

try:  # not on Windows
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

_T = TypeVar("_T")
_HELD: set[int] = set()  # descriptors of the directories that this process holds


class CheckpointWriter:
    """Write the checkpoints of a run, keep `save_total_limit` of them, and load the best at the end.

    All ranks call the same methods; rank 0 writes, or with `save_on_each_node` the first of each node. An
    error on one rank is raised on all.

    Args:
        args: settings of the run.
        asynchronous: write during training. Weights and states are copied while the next step computes its
            gradients; the memory of the copies is reused by the next save.

    Raises:
        CheckpointError: the directory cannot be written, or another run is writing into it.

    Proved by: tests/parity/test_checkpoints.py, tests/faults/test_saving.py
    """

    def __init__(self, args: TrainingArguments, *, asynchronous: bool = False) -> None:
        self.folder = Path(str(args.output_dir))
        self._args = args
        self._asynchronous = asynchronous
        self._copies = Copies()
        self._thread: threading.Thread | None = None
        self._copied: threading.Event | None = None
        self._error: BaseException | None = None
        self._written: Path | None = None  # by the thread
        self._writes: bool = args.should_save
        self._lock: int | None = None
        try:
            with collectives.raise_on_all_ranks():
                self._lock = _claim(self.folder) if self._writes else None
        except CheckpointError:
            self._release()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Leave lock, thread and copies out of the pickled state."""
        of_run = dict.fromkeys(("_lock", "_thread", "_copied"))
        return {**self.__dict__, **of_run, "_copies": Copies()}

    def warn_existing_checkpoints(self, *, is_resumed: bool) -> None:
        """Warn of checkpoints of an earlier run, unless it is resumed, and of unfinished ones."""
        if not self._writes:
            return
        for path in layout.unfinished_in(self.folder):
            warnings.warn(
                f"{str(path)!r} was left by a run that stopped while writing it; it is not used, and may be "
                "deleted.",
                BridgeWarning,
                stacklevel=2,
            )
        found = layout.checkpoints_in(self.folder)
        if found and not is_resumed:
            warnings.warn(
                f"{str(self.folder)!r} holds checkpoints of an earlier run, up to {found[0].name}. They "
                'stay, those of the same steps are overwritten, and ckpt_path="last" takes the highest step. '
                "Resume from it, delete them, or choose another output_dir.",
                BridgeWarning,
                stacklevel=2,
            )

    def save(
        self,
        model: nn.Module,
        state: TrainerState,
        *,
        weights: Mapping[str, Tensor] | None,
        optimizer: dict[str, Any] | None,
        schedule: dict[str, Any] | None,
        processing_class: Any,
        exports: Iterable[ExportableState],
        position: dict[str, Any],
        waits: bool,
        is_live: bool,
        save_parts: Callable[[Path], None] | None = None,
    ) -> None:
        """Write the checkpoint of the current step.

        The files are flushed and the checkpoint is renamed during training, unless `waits`. `before_step` has
        to be called before weights or optimizer change.

        Args:
            model: the Hugging Face model.
            state: gains `best_model_checkpoint`, and the state of `exports`.
            weights: the full `state_dict` of the model; not read on ranks that do not write.
            optimizer: its full `state_dict`; not read on such ranks, nor with `save_only_model`.
            schedule: its `state_dict`; not read on such ranks, nor with `save_only_model`.
            processing_class: tokenizer or processor; `None` is not written.
            exports: callbacks whose state is saved, and the run's `TrainerControl`.
            position: what the HF Trainer does not save of this rank, for an exact resume.
            waits: return when the checkpoint is complete, if saving is not asynchronous.
            is_live: weights and optimizer's state are those that training changes, not gathered ones.
            save_parts: writes each rank's shards into a directory; not called with `save_only_model`.

        Raises:
            CheckpointError: it cannot be written, or the one before could not.

        Mirrors: transformers.Trainer._save_checkpoint
        """
        with collectives.raise_on_all_ranks():
            self.wait()
        args = self._args
        folder = self.folder / layout.checkpoint_name(state.global_step)
        best = layout.checkpoint_name(state.best_global_step or 0)
        has_best = bool(state.best_global_step) and (best == folder.name or (self.folder / best).exists())
        own = [] if args.save_only_model else [RankState(rng.capture(), position)]
        gathered = collectives.gather((own, has_best, waits))
        if gathered[0][1]:  # as rank 0 sees the directory
            state.best_model_checkpoint = os.path.join(str(args.output_dir), best)
        parts = None
        if save_parts is not None and not args.save_only_model:
            parts = self.folder / f"{layout.UNFINISHED}{folder.name}-parts"
            with collectives.raise_on_all_ranks():
                shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed
            with collectives.raise_on_all_ranks():
                save_parts(parts)
        with collectives.raise_on_all_ranks():
            if self._writes:
                export(state, exports)
                if weights is None:  # the first rank of a further node
                    raise CheckpointError(
                        f"save_on_each_node={args.save_on_each_node}: this rank is to write a checkpoint, "
                        "and the strategy gathers sharded weights on rank 0 alone. Set "
                        "save_on_each_node=False, and choose an output_dir that all nodes share."
                    )
                content = Content(
                    model,
                    weights,
                    args,
                    processing_class,
                    state.global_step,
                    as_json(state),
                    ranks=[found for states, _, _ in gathered for found in states],
                    parts=parts,
                )
                if not args.save_only_model:
                    content.optimizer, content.schedule = optimizer, schedule
                self._write(folder, content, state.best_model_checkpoint, is_live=is_live)
                if any(waits for _, _, waits in gathered) and not self._asynchronous:
                    self.wait()

    def _write(self, folder: Path, content: Content, best: str | None, *, is_live: bool) -> None:
        if not self._asynchronous:
            self._in_background(folder, best, write_checkpoint(folder, content))
        elif not is_live:
            self._in_background(folder, best, lambda: write_checkpoint(folder, content)())
        else:
            # What the next forward changes is copied now; all else before the next optimizer step.
            names = (name for name, _ in content.model.named_buffers(remove_duplicate=False))
            buffers = {name: content.weights[name] for name in names if name in content.weights}
            content.weights = {**content.weights, **self._copies.of(buffers, "buffers")}
            self._copied = threading.Event()
            self._in_background(folder, best, lambda: self._write_copies(folder, content))

    def before_step(self) -> None:
        """Wait for copies that are being made of what the optimizer is about to change.

        Raises:
            CheckpointError: the last checkpoint could not be written; with several ranks, the next `save` or
                `load_best` raises it on all.
        """
        if self._copied is not None:
            self._copied.wait()
            self._copied = None
        if self._thread is None or self._thread.is_alive():
            return
        if self._error is not None and collectives.count() > 1:
            return
        self.wait()
        assert self._written is not None
        forget_pages(self._written)

    def wait(self) -> None:
        """Wait for a checkpoint that is being written.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def load_best(self, state: TrainerState, *, load: Callable[[Path], None]) -> None:
        """Load the best checkpoint's weights; with `save_total_limit=1`, delete the others.

        Args:
            state: has the name of the best checkpoint.
            load: loads the weights of a checkpoint into the model; called by all ranks.

        Raises:
            CheckpointError: the last checkpoint could not be written.

        Mirrors: transformers.Trainer._finalize_training
        """
        with collectives.raise_on_all_ranks():
            self.wait()
        best = state.best_model_checkpoint
        if best is None:
            return
        if self._args.load_best_model_at_end:
            load(Path(best))
        if self._writes and self._args.save_total_limit == 1:
            for checkpoint in sort_checkpoints(str(self.folder), best_model_checkpoint=best):
                if not os.path.samefile(checkpoint, best):
                    shutil.rmtree(checkpoint, ignore_errors=True)

    def read_best(self, model: nn.Module, best: Path) -> dict[str, Tensor]:
        """Read the weights of the best checkpoint; called by all ranks.

        Raises:
            CheckpointError: this rank cannot read it.

        Mirrors: transformers.Trainer._load_best_model
        """
        if not best.exists() and not self._writes:
            raise CheckpointError(
                f"The best checkpoint, {str(best)!r}, is not accessible from this node, and "
                "load_best_model_at_end=True loads it on all ranks. Choose an output_dir that all nodes "
                "share, or set save_on_each_node=True."
            )
        return complete_weights(model, read_all_weights(best), source=str(layout.weights_in(best)))

    def close(self) -> None:
        """Finish writing, and release the directory.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        try:
            self.wait()
        finally:
            self._copies = Copies()
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            _HELD.discard(self._lock)
            os.close(self._lock)
            self._lock = None

    def _write_copies(self, folder: Path, content: Content) -> None:
        assert self._copied is not None
        try:
            content.weights = self._copies.of(content.weights, "weights")
            content.optimizer = self._copies.of(content.optimizer, "optimizer")
            content.schedule = self._copies.of(content.schedule, "schedule")
        finally:
            self._copied.set()
        write_checkpoint(folder, content)()

    def _in_background(self, folder: Path, best: str | None, write: Callable[[], None]) -> None:
        """Write, then rotate, in a thread."""

        def attempt() -> None:
            try:
                write()
                rotate_checkpoints(
                    output_dir=str(self.folder),
                    save_total_limit=self._args.save_total_limit,
                    best_model_checkpoint=best,
                    use_mtime=True,
                )
            except BaseException as error:
                self._error = error  # raised by wait()

        self._written = folder
        self._thread = threading.Thread(target=attempt, name="hfbridge checkpoint")
        self._thread.start()


class Copies:
    """Copies of nested tensors on the CPU, whose memory is reused; shared memory stays shared."""

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}

    def of(self, tree: _T, name: str) -> _T:
        """Copy all tensors in nested dicts, lists and tuples; what one object is stays one object."""
        found: Any = self._copy(tree, (name,), {}, {})
        copied: _T = found
        return copied

    def _copy(
        self, tree: Any, place: tuple[Any, ...], tensors: dict[Any, Tensor], containers: dict[int, Any]
    ) -> Any:
        if isinstance(tree, Tensor):
            key = (tree.data_ptr(), tree.shape, tree.stride(), tree.dtype) if tree.numel() else place
            if key not in tensors:
                tensors[key] = self._kept_for(tree, place).copy_(tree.detach())
            return tensors[key]
        if type(tree) not in (dict, list, tuple):
            return tree
        if id(tree) not in containers:
            pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
            parts = {key: self._copy(value, (*place, key), tensors, containers) for key, value in pairs}
            is_same = isinstance(tree, tuple) and all(
                a is b for a, b in zip(parts.values(), tree, strict=True)
            )
            made = parts if isinstance(tree, dict) else type(tree)(parts.values())
            containers[id(tree)] = tree if is_same else made
        return containers[id(tree)]

    def _kept_for(self, tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
        kept = self._kept.get(place)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._kept[place] = torch.empty_like(tensor, device="cpu", requires_grad=False)
        return kept


def export(state: TrainerState, exports: Iterable[ExportableState]) -> None:
    """Store the callbacks' states in the `TrainerState`.

    Mirrors: transformers.Trainer._save_checkpoint
    """
    for callback in exports:
        kept: Any = state.stateful_callbacks
        name = type(callback).__name__
        if isinstance(kept.get(name), list):
            kept[name].append(callback.state())
        else:
            kept[name] = callback.state()


def as_json(state: TrainerState) -> str:
    """Return a state as `TrainerState.save_to_json` writes it.

    Raises:
        CheckpointError: a log entry has a value that JSON does not hold.
    """
    try:
        return json.dumps(asdict(state), indent=2, sort_keys=True) + "\n"
    except TypeError as error:
        raise CheckpointError(
            f"Log entries must be JSON: {error}. Have compute_metrics and callbacks log numbers, texts or "
            "lists, such as array.tolist()."
        ) from error


def _claim(folder: Path) -> int | None:
    """Check that a directory can be written, and lock it for this run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(
            f"output_dir={str(folder)!r} cannot be written: {error}. Choose another output_dir, or set "
            'save_strategy="no". Nothing was trained.'
        ) from error
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise CheckpointError(
            f"output_dir={str(folder)!r}: another run is writing its checkpoints there. Wait for it, or "
            "choose another output_dir. Nothing was trained."
        ) from error
    except OSError:  # a file system without locks
        pass
    _HELD.add(descriptor)
    return descriptor


def _release_in_child() -> None:
    """Close the parent's locks: workers may outlive a run that was killed."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)

"""Reading of a `checkpoint-N`, each file checked by itself.

Only tensors, numbers, strings and their containers are unpickled; `training_args.bin`, the pickle of a class,
is not opened.
"""

import json
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from hfbridge.checkpoints import layout
from hfbridge.checkpoints.manifest import Manifest, find_damage
from hfbridge.errors import BridgeWarning, CheckpointError

_RESUMING = (layout.OPTIMIZER_NAME, layout.SCHEDULER_NAME)


@dataclass
class RankState:
    """What a checkpoint holds of one rank.

    Attributes:
        random_states: of Python's, numpy's and torch's generators.
        position: what hfbridge stores beside them; `None` in a checkpoint of the HF Trainer.
    """

    random_states: dict[str, Any]
    position: dict[str, Any] | None = None


@dataclass
class Checkpoint:
    """What a checkpoint holds, in either format.

    Attributes:
        weights: by their names in the model without a prefix; tied ones once. Those of an adapter in a folder
            of its own have its name and a slash in front.
        state_text: `TrainerState` as JSON.
        optimizer: `state_dict` of the optimizer; `None` if it was not saved.
        schedule: `state_dict` of the schedule; `None` if it was not saved.
        ranks: of each rank that wrote it; empty if they were not saved, `None` for one that was not read.
        files: the other files, by name.
        has_adapter: the weights are those of a PEFT adapter.
    """

    weights: dict[str, Tensor]
    state_text: str
    optimizer: dict[str, Any] | None = None
    schedule: dict[str, Any] | None = None
    ranks: list[RankState | None] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    has_adapter: bool = False

    @property
    def state(self) -> TrainerState:
        """A new `TrainerState`, read from `state_text`."""
        return state_from(self.state_text)


def read_checkpoint(folder: Path, *, keeps_files: bool = False, rank: int | None = None) -> Checkpoint:
    """Read a `checkpoint-N` completely, before anything is changed by it.

    Args:
        folder: written by either engine, by any number of ranks.
        keeps_files: read the files that training does not need, too.
        rank: read the random states of this rank and rank 0 only; `None` reads all.

    Raises:
        CheckpointError: the directory is missing, or files are missing, damaged or of another kind; all are
            named.

    Mirrors: transformers.Trainer._load_from_checkpoint
    Proved by: tests/faults/test_broken_checkpoints.py
    """
    _check_is_of_run(folder)
    problems: list[str] = []

    def attempt(read: Callable[[Path], Any], name: str) -> Any:
        try:
            return read(folder / name)
        except CheckpointError as error:
            problems.append(str(error))
            return None

    has_parts = layout.has_parts(folder)
    has_weights = not has_parts or any(folder.glob("*.safetensors"))
    weights = attempt(read_all_weights, ".") if has_weights else {}
    state = attempt(_read_state, layout.TRAINER_STATE_NAME)
    optimizer = schedule = None
    ranks: list[RankState | None] = []
    first: dict[str, Any] = {}
    random_files = layout.random_files_in(folder)
    unread = {name for number, name in enumerate(random_files) if rank not in (None, number) and number}
    if any((folder / name).exists() for name in (*_RESUMING, *random_files)):  # else: save_only_model
        optimizer = None if has_parts else attempt(_read_optimizer, layout.OPTIMIZER_NAME)
        if not has_parts or (folder / layout.SCHEDULER_NAME).exists():
            schedule = attempt(_read_schedule, layout.SCHEDULER_NAME)
        for number, name in enumerate(random_files):
            states = (None if name in unread else attempt(_read_random_states, name)) or {}
            own = states.pop(layout.OWN, None) or {}
            first = first or own
            ranks.append(RankState(states, own.get("position")) if states else None)
            if own and state is not None and state_from(state).global_step != own["step"]:
                problems.append(f"{name} is that of step {own['step']}.")
            elif own and own.get("rank", 0) != number:
                problems.append(f"{name} is that of rank {own['rank']}.")
    named = {problem.partition(" ")[0] for problem in problems}
    damage = _check_folder(folder, {k: v for k, v in first.get("files", {}).items() if k not in unread})
    problems += [problem for problem in damage if problem.partition(" ")[0] not in named]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} cannot be read:\n{listed}\nResume from another one; "
            'ckpt_path="last" takes the newest complete one.'
        )
    return Checkpoint(
        weights=weights,
        state_text=state,
        optimizer=optimizer,
        schedule=schedule,
        ranks=ranks,
        files=_read_other_files(folder) if keeps_files else {},
        has_adapter=layout.has_adapter(folder),
    )


def weights_alone(path: Path) -> str:
    """Return the message for a folder or file of weights, from which no run can be resumed."""
    return (
        f"{str(path)!r} holds weights alone, from which no run can be resumed. Begin a new run with them: "
        "HFModule(folder, auto_class) reads a folder of save_pretrained, PeftModel.from_pretrained(model, "
        "folder, is_trainable=True) an adapter, HFModule.load_from_checkpoint a file of Lightning's, and "
        "model.load_state_dict what torch.load returns."
    )


def unreadable(name: str, error: Exception) -> CheckpointError:
    """Return the error for a file that `torch.load(weights_only=True)` does not load."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return CheckpointError(f"{name} is damaged, or holds more than tensors and plain data: {first}")


def _check_is_of_run(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint {str(folder)!r}: no such directory.")
    of_run = (layout.TRAINER_STATE_NAME, *_RESUMING, *layout.random_files_in(folder))
    has_weights = any(folder.glob("*.safetensors")) or bool(layout.adapters_in(folder))
    is_named = layout.step_of(folder) is not None  # its other files are missing
    if has_weights and not is_named and not any((folder / name).exists() for name in of_run):
        raise CheckpointError(weights_alone(folder))


def find_last(folder: Path) -> Path | None:
    """Find the newest complete checkpoint of a run, and warn of newer damaged ones.

    Returns:
        Its directory; `None` if there is no checkpoint at all.

    Raises:
        CheckpointError: all are damaged.
    """
    for path in layout.unfinished_in(folder):
        warnings.warn(
            f"{str(path)!r} was left by a run that stopped while writing it; it is not used.",
            BridgeWarning,
            stacklevel=2,
        )
    found = layout.checkpoints_in(folder)
    for path in found:
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            if path == found[-1]:
                raise
            warnings.warn(f"{error}\nGoing back to an earlier one.", BridgeWarning, stacklevel=2)
        else:
            return path
    return None


def state_from(text: str) -> TrainerState:
    """Make a `TrainerState` of its JSON.

    Raises:
        CheckpointError: it is not that of a state.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{layout.TRAINER_STATE_NAME} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{layout.TRAINER_STATE_NAME} holds no dictionary.")
    unknown = values.keys() - {entry.name for entry in fields(TrainerState)}
    if unknown or not isinstance(values.get("global_step"), int):
        what = f"the unknown entries {sorted(unknown)}" if unknown else "no global_step"
        raise CheckpointError(
            f"{layout.TRAINER_STATE_NAME} has {what}; it is no state of this version of transformers."
        )
    return TrainerState(**values)


def read_all_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, and those of adapters in folders of their own.

    Raises:
        CheckpointError: a file is missing or is no safetensors file.
    """
    root, adapters = layout.weights_in(folder), layout.adapters_in(folder)
    weights = _read_weights(root) if root.exists() or not adapters else {}
    for adapter in adapters:
        found = _read_weights(folder / adapter / layout.ADAPTER_SAFE_WEIGHTS_NAME)
        weights |= {f"{adapter}/{name}": tensor for name, tensor in found.items()}
    return weights


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or the shards that the index beside it lists."""
    index = path.with_name(layout.SAFE_WEIGHTS_INDEX_NAME)
    if path.exists() or not index.exists():
        return _read_shard(path)
    listed = _as_dict(index, _parse_json(index)).get("weight_map")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{index.name} has no weight_map.")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(map(str, listed.values()))):
        if Path(name).name != name:
            raise CheckpointError(f"{index.name} lists {name!r}, which is no file beside it.")
        weights |= _read_shard(path.with_name(name))
    if missing := listed.keys() - weights.keys():
        raise CheckpointError(f"{index.name} lists {sorted(missing)[0]}, which is in none of its shards.")
    return weights


def _read_tensors(path: Path) -> dict[str, Any]:
    """Read a dictionary of tensors and plain data, which `torch.save` has written."""
    _check_there(path)
    try:
        with safe_globals():
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise unreadable(path.name, error) from error
    return _as_dict(path, found)


def _as_dict(path: Path, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} must hold a dictionary, and holds a {type(found).__name__}.")
    return found


def _read_state(path: Path) -> str:
    _as_dict(path, _parse_json(path))
    text = path.read_text(encoding="utf-8")
    state, step = state_from(text), layout.step_of(path.parent)
    if step is not None and state.global_step != step:
        raise CheckpointError(f"{path.name} is that of step {state.global_step}, not {step}.")
    return text


def _read_optimizer(path: Path) -> dict[str, Any]:
    found = _read_tensors(path)
    if not {"state", "param_groups"} <= found.keys():
        raise CheckpointError(f"{path.name} is no optimizer's state; it has {sorted(map(str, found))[:5]}.")
    return found


def _read_schedule(path: Path) -> dict[str, Any]:
    found = _read_tensors(path)
    is_of_torch = bool({"last_epoch", "_last_lr"} & found.keys())  # a user's own may have any keys
    has_tensors = any(isinstance(value, Tensor) for value in found.values())
    if "param_groups" in found or (has_tensors and not is_of_torch):
        raise CheckpointError(f"{path.name} is no schedule's state; it has {sorted(map(str, found))[:5]}.")
    return found


def _read_random_states(path: Path) -> dict[str, Any]:
    found = _read_tensors(path)
    with zipfile.ZipFile(path) as file:  # whose checksums torch does not compare
        if (part := file.testzip()) is not None:
            raise CheckpointError(f"{path.name} is damaged: {part} in it is not as it was written.")
    if not {"python", "numpy", "cpu"} <= found.keys():
        raise CheckpointError(f"{path.name} holds no random states; it has {sorted(map(str, found))[:5]}.")
    return found


def _read_shard(path: Path) -> dict[str, Tensor]:
    _check_there(path)
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path.name} is damaged: {error}") from error


def _parse_json(path: Path) -> Any:
    _check_there(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path.name} is damaged: {error}") from error


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path.name} is empty.")


def _check_folder(folder: Path, manifest: Manifest) -> list[str]:
    """Compare all files with the manifest; without one, check those that training does not read."""
    if manifest:
        is_split = (folder / layout.SAFE_WEIGHTS_INDEX_NAME).exists()
        is_split &= layout.SAFE_WEIGHTS_INDEX_NAME not in manifest
        # Weights that the user has split into shards since are no damage.
        full = layout.SAFE_WEIGHTS_NAME if is_split else ""
        return find_damage(folder, {name: print_ for name, print_ in manifest.items() if name != full})
    both = [layout.random_name(0, ranks) for ranks in (1, 2)]
    if all((folder / name).exists() for name in both):
        return [f"{both[0]} and {both[1]} are both there: it was written by one rank, and by several."]
    problems = []
    arguments = folder / layout.TRAINING_ARGS_NAME
    for path in [*sorted(folder.glob("*.json")), arguments]:
        try:
            if path != arguments:
                _parse_json(path)
                continue
            _check_there(path)
            if not zipfile.is_zipfile(path):
                problems.append(f"{path.name} is damaged.")
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def _read_other_files(folder: Path) -> dict[str, bytes]:
    """Read what is neither weights nor read by itself."""
    states = {layout.random_name(0, 1), *layout.random_files_in(folder)}
    read = {*_RESUMING, *states, layout.TRAINER_STATE_NAME, layout.SAFE_WEIGHTS_INDEX_NAME}
    return {
        name: path.read_bytes()
        for name, path in layout.files_in(folder).items()
        if path.name not in read and path.suffix != ".safetensors"
    }

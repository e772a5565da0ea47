"""Conversion of a checkpoint to Lightning's form and back, by the table in checkpoints/layout.py.

What depends on the data, above all loop counters, is filled in when a run is resumed: checkpoints/resume.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hfbridge.checkpoints import layout
from hfbridge.checkpoints.reader import Checkpoint, RankState
from hfbridge.errors import CheckpointError
from hfbridge.utilities import rng

_LIGHTNING_VERSION = "2.6.0"  # of the form of these dictionaries


def to_lightning(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint in Lightning's form, which `torch.load(weights_only=True)` reads."""
    found: dict[str, Any] = {
        "pytorch-lightning_version": _LIGHTNING_VERSION,
        "epoch": 0,
        "global_step": checkpoint.state.global_step,
        "loops": {},
        "callbacks": {},
        "state_dict": {f"{layout.PREFIX}{name}": tensor for name, tensor in checkpoint.weights.items()},
        "optimizer_states": [] if checkpoint.optimizer is None else [checkpoint.optimizer],
        "lr_schedulers": [] if checkpoint.schedule is None else [checkpoint.schedule],
        layout.STATE_KEY: checkpoint.state_text,
        layout.WEIGHTS_KEY: {"names": list(checkpoint.weights), "adapter": checkpoint.has_adapter},
    }
    if checkpoint.ranks:
        found |= plain_ranks(checkpoint.ranks)
    if checkpoint.files:
        found[layout.FILES_KEY] = pack(checkpoint.files)
    return found


def from_lightning(found: Mapping[str, Any], *, source: str) -> Checkpoint:
    """Read a Lightning checkpoint that a run of HFModule has written.

    Args:
        found: what the file holds.
        source: the file, for messages.

    Raises:
        CheckpointError: another LightningModule has written it.
    """
    if reason := found.get(layout.REASON_KEY):
        raise CheckpointError(f"{source} holds no state of a run: {reason}. Load its weights by themselves.")
    if missing := [key for key in ("state_dict", layout.STATE_KEY) if key not in found]:
        raise CheckpointError(
            f"{source} was not written by a run of HFModule: it has no {missing[0]!r}. Load its weights into "
            "a new run."
        )
    weights = without_prefix(found["state_dict"])
    kept = found.get(layout.WEIGHTS_KEY) or {"names": list(weights), "adapter": False}
    names = kept["names"] if isinstance(kept["names"], dict) else {name: name for name in kept["names"]}
    optimizer, schedule = found.get("optimizer_states"), found.get("lr_schedulers")
    return Checkpoint(
        weights={saved: weights[name] for saved, name in names.items() if name in weights}
        | kept.get("made", {}),
        state_text=found[layout.STATE_KEY],
        optimizer=optimizer[0] if optimizer else None,
        schedule=schedule[0] if schedule else None,
        ranks=native_ranks(found),
        files={name: packed.numpy().tobytes() for name, packed in found.get(layout.FILES_KEY, {}).items()},
        has_adapter=kept["adapter"],
    )


def without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's weights out of an HFModule's, by their names in the model."""
    return {
        name.removeprefix(layout.PREFIX): tensor
        for name, tensor in state_dict.items()
        if name.startswith(layout.PREFIX)
    }


def pack(files: Mapping[str, bytes]) -> dict[str, Tensor]:
    """Put the bytes of files into tensors, which `weights_only=True` reads."""
    return {
        name: torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0)
        for name, content in files.items()
    }


def plain_ranks(ranks: Sequence[RankState | None]) -> dict[str, Any]:
    """Make the entries of the ranks' states, as tensors and plain data."""
    positions = [None if state is None else state.position for state in ranks]
    found: dict[str, Any] = {
        layout.RNG_KEY: [None if state is None else rng.to_plain(state.random_states) for state in ranks]
    }
    if any(positions):
        found[layout.POSITION_KEY] = [p if p is None else _map_states(p, rng.to_plain) for p in positions]
    return found


def native_ranks(found: Mapping[str, Any]) -> list[RankState | None]:
    """Read the ranks' states of a Lightning checkpoint; there may be none."""
    states = found.get(layout.RNG_KEY) or []
    positions = found.get(layout.POSITION_KEY) or [None] * len(states)
    return [
        None
        if state is None
        else RankState(rng.from_plain(state), position and _map_states(position, rng.from_plain))
        for state, position in zip(states, positions, strict=True)
    ]


def _map_states(position: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    states = {name: position.get(name) for name in ("pass_states", "in_hand")}
    return {**position, **{name: change(state) for name, state in states.items() if state is not None}}

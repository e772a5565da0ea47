"""A checkpoint in Lightning's form and back, without a model and without a run; knows Hugging Face.

checkpoints/layout.py has the table. What Lightning wants beside it (loop counters, above all) depends on the
data, and is filled in when a run is resumed: checkpoints/resume.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hfbridge.checkpoints import layout
from hfbridge.checkpoints.reader import Checkpoint, RankState
from hfbridge.errors import CheckpointError
from hfbridge.utilities import rng

_LIGHTNING_VERSION = "2.6.0"  # of the form of these dictionaries


def to_lightning(checkpoint: Checkpoint) -> dict[str, Any]:
    """Put a native checkpoint into the form of a Lightning one.

    Returns:
        A dictionary of tensors and plain data, which `torch.load(weights_only=True)` reads.
    """
    has_states = checkpoint.optimizer is not None
    found: dict[str, Any] = {
        "pytorch-lightning_version": _LIGHTNING_VERSION,
        "epoch": 0,
        "global_step": checkpoint.state.global_step,
        "loops": {},
        "callbacks": {},
        "state_dict": {f"{layout.PREFIX}{name}": tensor for name, tensor in checkpoint.weights.items()},
        "optimizer_states": [checkpoint.optimizer] if has_states else [],
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
    """Take a native checkpoint out of a Lightning one that a run of HFModule has written.

    Args:
        found: what the file holds.
        source: the file, for messages.

    Raises:
        CheckpointError: another LightningModule has written it.
    """
    missing = [key for key in ("state_dict", layout.STATE_KEY) if key not in found]
    if reason := found.get(layout.REASON_KEY):
        raise CheckpointError(f"{source} holds no state of a run: {reason}. Load its weights by themselves.")
    if missing:
        raise CheckpointError(
            f"{source} was not written by a run of HFModule: it has no {missing[0]!r}. Load its weights by "
            "themselves, and begin a new run."
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
        files={name: _unpacked(packed) for name, packed in found.get(layout.FILES_KEY, {}).items()},
        has_adapter=kept["adapter"],
    )


def without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the model's weights, by their names in the model, out of an HFModule's."""
    return {
        name.removeprefix(layout.PREFIX): tensor
        for name, tensor in state_dict.items()
        if name.startswith(layout.PREFIX)
    }


def pack(files: Mapping[str, bytes]) -> dict[str, Tensor]:
    """Put the bytes of files into tensors, which are read without trust."""
    return {
        name: torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0)
        for name, content in files.items()
    }


def _unpacked(packed: Tensor) -> bytes:
    return packed.numpy().tobytes()


def plain_ranks(ranks: Sequence[RankState | None]) -> dict[str, Any]:
    """Make the entries of the ranks' states; they are read without trust in anything but tensors."""
    plain = rng.to_plain
    states = [None if state is None else plain(state.random_states) for state in ranks]
    positions = [None if state is None else state.position for state in ranks]
    found: dict[str, Any] = {layout.RNG_KEY: states}
    if any(positions):
        found[layout.POSITION_KEY] = [p if p is None else _with_states(p, plain) for p in positions]
    return found


def native_ranks(found: Mapping[str, Any]) -> list[RankState | None]:
    """Take the ranks' states out of a Lightning checkpoint; there may be none."""
    native = rng.from_plain
    states = found.get(layout.RNG_KEY) or []
    positions = found.get(layout.POSITION_KEY) or [None] * len(states)
    return [
        None
        if state is None
        else RankState(native(state), None if position is None else _with_states(position, native))
        for state, position in zip(states, positions, strict=True)
    ]


def _with_states(position: Mapping[str, Any], change: Any) -> dict[str, Any]:
    changed = dict(position)
    for name in ("pass_states", "in_hand"):
        if changed.get(name) is not None:
            changed[name] = change(changed[name])
    return changed

"""A checkpoint in Lightning's form and back, without a model and without a run; knows Hugging Face.

checkpoints/layout.py has the table. What Lightning wants beside it (loop counters, above all) depends on the
data, and is filled in when a run goes on: hfbridge/resume.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hfbridge import generators
from hfbridge.checkpoints import layout
from hfbridge.checkpoints.read import Checkpoint
from hfbridge.errors import CheckpointError

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
        "lr_schedulers": [checkpoint.schedule] if has_states else [],
        layout.STATE_KEY: checkpoint.state_text,
        layout.WEIGHTS_KEY: {"names": list(checkpoint.weights), "adapter": checkpoint.has_adapter},
    }
    if checkpoint.random_states is not None:
        found[layout.RNG_KEY] = [generators.as_plain(checkpoint.random_states)]
    if checkpoint.position is not None:
        found[layout.POSITION_KEY] = plain_position(checkpoint.position)
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
    if missing:
        raise CheckpointError(
            f"{source} was not written by a run of HFModule: it has no {missing[0]!r}. Load its weights by "
            "themselves, and begin a new run."
        )
    weights = without_prefix(found["state_dict"])
    kept = found.get(layout.WEIGHTS_KEY) or {"names": list(weights), "adapter": False}
    states, position = found.get(layout.RNG_KEY), found.get(layout.POSITION_KEY)
    optimizer, schedule = found.get("optimizer_states"), found.get("lr_schedulers")
    return Checkpoint(
        weights={name: weights[name] for name in kept["names"] if name in weights},
        state_text=found[layout.STATE_KEY],
        optimizer=optimizer[0] if optimizer else None,
        schedule=schedule[0] if schedule else None,
        random_states=None if states is None else generators.as_native(states[0]),
        position=None if position is None else native_position(position),
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


def plain_position(position: Mapping[str, Any]) -> dict[str, Any]:
    """Make a position readable without trust in anything but tensors."""
    return _with_states(position, generators.as_plain)


def native_position(position: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `plain_position`."""
    return _with_states(position, generators.as_native)


def _with_states(position: Mapping[str, Any], change: Any) -> dict[str, Any]:
    changed = dict(position)
    for name in ("pass_states", "in_hand"):
        if changed.get(name) is not None:
            changed[name] = change(changed[name])
    return changed

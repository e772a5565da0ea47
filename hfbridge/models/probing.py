"""Asking a model something, by a few forwards that leave no trace."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size

Inputs = Mapping[str, Any]
# A mean in float32 is right to some 1e-6; autocast to bfloat16 to some 1e-2.
_NOISE = {torch.float64: 1e-7, torch.float32: 1e-5}
_COARSE = 3e-2


@contextmanager
def probe_mode(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode; random generators and modes are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()  # a forward may draw of these, too
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            for module, mode in modes:
                if type(module).__name__ == "Linear4bit":  # bitsandbytes packs weights anew for evaluations
                    module.training = mode
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, mode in modes:
            module.training = mode


def halves(inputs: Inputs) -> tuple[Inputs, Inputs] | None:
    """Cut a micro-batch into two by its rows; `None` for one that has no rows to be cut by."""
    rows = find_batch_size(inputs) or 0
    cut = {name: value for name, value in inputs.items() if _has_rows(value)}
    if rows < 2 or any(len(value) != rows for value in cut.values()):
        return None
    first = {name: value[: rows // 2] for name, value in cut.items()}
    second = {name: value[rows // 2 :] for name, value in cut.items()}
    return {**inputs, **first}, {**inputs, **second}


def _has_rows(value: Any) -> bool:
    return value.dim() > 0 if isinstance(value, Tensor) else isinstance(value, (list, tuple))


def noise_of(model: nn.Module) -> float:
    """Say by how much two ways to one loss may differ, relatively, by the dtype a model computes in."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled("cpu") or "forward" in vars(model):
        return _COARSE
    return max((_NOISE.get(dtype, _COARSE) for dtype in dtypes), default=_COARSE)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU for a model without any."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device

"""Short texts that differ as soon as any bit of what they stand for does.

digest of          is made of
a micro-batch      names, shapes and values of its tensors; floats as bfloat16, since an engine that computes
                   in less than float32 may have cast them before they are seen
parameters         the bytes of all of them in the order of the model, full ones where ranks shard them
random states      torch's, numpy's and Python's generators of this process
"""

import hashlib
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_LENGTH = 16


def short(data: bytes) -> str:
    """Digest bytes."""
    return hashlib.sha256(data).hexdigest()[:_LENGTH]


def joined(digests: Iterable[str]) -> str:
    """Digest digests, in their order; one alone stays as it is."""
    found = list(digests)
    return found[0] if len(found) == 1 else short("|".join(found).encode())


def of_micro_batch(inputs: Any) -> str:
    """Digest what is given to a model."""
    found = hashlib.sha256()
    _add(found, inputs)
    return found.hexdigest()[:_LENGTH]


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            found.update(f"<{name}>".encode())
            _add(found, value[name])
    elif isinstance(value, (list, tuple)):
        found.update(f"[{len(value)}]".encode())
        for part in value:
            _add(found, part)
    elif isinstance(value, Tensor):
        tensor = value.detach()
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        found.update(f"{tuple(tensor.shape)}".encode())
        found.update(_bytes_of(tensor))
    else:
        found.update(repr(value).encode())


def of_parameters(parameters: Iterable[tuple[str, Tensor]], *, is_first: bool) -> tuple[str, float] | None:
    """Digest parameters, and measure the 2-norm of all of them together.

    Args:
        parameters: names and tensors, full ones, or shards that all ranks gather in the same order.
        is_first: this is the first rank; the others only take part in the gathering.

    Returns:
        Digest and norm; `None` on other ranks.
    """
    found, squares = hashlib.sha256(), 0.0
    for name, parameter in parameters:
        tensor = parameter.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if is_first:
            found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            found.update(_bytes_of(tensor))
            squares += torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2
    return (found.hexdigest()[:_LENGTH], squares**0.5) if is_first else None


def of_random_states() -> str:
    """Digest the states of torch's, numpy's and Python's generators."""
    found = hashlib.sha256(_bytes_of(torch.get_rng_state()))
    if torch.cuda.is_available():  # pragma: no cover
        found.update(_bytes_of(torch.cuda.get_rng_state()))
    keys = np.random.get_state(legacy=False)["state"]
    found.update(keys["key"].tobytes() + str(keys["pos"]).encode())
    found.update(repr(random.getstate()).encode())
    return found.hexdigest()[:_LENGTH]


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data

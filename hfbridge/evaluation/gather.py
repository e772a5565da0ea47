"""Gather the batches of an evaluation from all ranks.

loss_normalization    gathered                               samples that pad the last round
"native"              a round at once, padded with -100      cut off by accelerate; their losses count
"exact"               each rank's batch in its own shape     dropped
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import operations
from torch import Tensor

from hfbridge.distributed.collectives import gather as gather_objects

_PADDING = -100


def gather(data: Any, *, ranks: int, is_last: bool, remainder: int, as_objects: bool) -> Any:
    """Gather a round as accelerate does: the last one is cut to the remaining samples of the set.

    Args:
        data: of this rank: tensors or tuples of them, or any object.
        ranks: that share the set.
        is_last: whether this is the last round.
        remainder: samples of the set modulo those of a round; 0 if short rounds are dropped.
        as_objects: `eval_use_gather_object`.

    Mirrors: accelerate.Accelerator.gather_for_metrics
    Proved by: tests/distributed/test_evaluation.py
    """
    state: Any = SimpleNamespace(
        gather=operations.gather if ranks > 1 else lambda tensors: tensors,
        gradient_state=SimpleNamespace(end_of_dataloader=is_last, remainder=remainder),
    )
    return Accelerator.gather_for_metrics(state, data, use_gather_object=as_objects)


def pad(data: Any, *, ranks: int) -> Any:
    """Pad the second dimension to the longest of all ranks with -100, as accelerate does.

    Mirrors: accelerate.utils.operations.pad_across_processes
    """
    if ranks == 1 or data is None:
        return data
    return operations.pad_across_processes(data, dim=1, pad_index=_PADDING)


def gather_per_rank(data: Any, *, ranks: int) -> list[Any]:
    """Gather the data of each rank, without padding, joining or cutting.

    Args:
        data: of this rank: tensors of any shapes, tuples, lists and dicts of them, or any object.
        ranks: that share the set.

    Proved by: tests/distributed/test_evaluation.py
    """
    if ranks == 1 or data is None:
        return [data] * ranks
    if isinstance(data, Tensor):
        return _gather_tensors(data)
    if type(data) in (tuple, list):
        parts = [gather_per_rank(part, ranks=ranks) for part in data]
        return [type(data)(part[rank] for part in parts) for rank in range(ranks)]
    if isinstance(data, Mapping) and all(isinstance(value, Tensor) for value in data.values()):
        named = {name: gather_per_rank(value, ranks=ranks) for name, value in data.items()}
        return [{name: values[rank] for name, values in named.items()} for rank in range(ranks)]
    return gather_objects(data)


def _gather_tensors(tensor: Tensor) -> list[Tensor]:
    """Gather tensors with equally many dimensions, padded to one shape for the transfer."""
    if tensor.ndim == 0:
        return list(operations.gather(tensor[None]).unbind())
    shapes = operations.gather(torch.tensor([tensor.shape], device=tensor.device)).tolist()
    filled = tensor.new_zeros([max(sizes) for sizes in zip(*shapes, strict=True)])
    filled[tuple(map(slice, tensor.shape))] = tensor
    return [
        found[tuple(map(slice, shape))]
        for found, shape in zip(operations.gather(filled[None]), shapes, strict=True)
    ]


def intersect_across_ranks(names: frozenset[str] | None) -> frozenset[str] | None:
    """Return the names that all ranks have; `None` if a rank has `None`."""
    found: list[frozenset[str] | None] = gather_objects(names)
    known = [one for one in found if one is not None]
    return frozenset.intersection(*known) if len(known) == len(found) else None

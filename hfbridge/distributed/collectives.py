"""Collectives over the open process group: all ranks call them in the same order."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from hfbridge.errors import BridgeError, RankError

_T = TypeVar("_T")


def count() -> int:
    """Count the ranks of the run."""
    return dist.get_world_size() if _are_connected() else 1


def rank() -> int:
    """Number this rank among those of the run."""
    return dist.get_rank() if _are_connected() else 0


def gather(value: _T) -> list[_T]:
    """Collect a value of each rank on all ranks."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Do what may fail on some ranks only; if it does, all raise, and none waits for the others in vain.

    An error of hfbridge's, on whichever rank, goes before any other: it says what to do.

    Raises:
        BridgeError: another rank failed, with an error of hfbridge's; of the same class.
        RankError: another rank failed with any other error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    is_ours = isinstance(error, BridgeError)
    found = gather(None if error is None else (is_ours, type(error), str(error)))
    failures = [(number, *failure) for number, failure in enumerate(found) if failure is not None]
    if not failures:
        return
    number, is_bridge_error, kind, text = next((failure for failure in failures if failure[1]), failures[0])
    if error is not None and is_ours == is_bridge_error:
        raise error
    if is_bridge_error:
        raise kind(f"On rank {number}: {text}") from error
    raise RankError(f"On rank {number}: {kind.__name__}: {text}")


def _are_connected() -> bool:
    return dist.is_available() and dist.is_initialized()

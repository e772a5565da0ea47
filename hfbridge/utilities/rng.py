"""The random generators of a process, Python's, numpy's and torch's, as one state."""

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from hfbridge.distributed import collectives

RandomStates = dict[str, Any]
"""The generators' states by the names in the HF Trainer's rng_state.pth."""


def capture() -> RandomStates:
    """Take the states of all generators.

    Mirrors: transformers.Trainer._save_rng_state
    """
    states: RandomStates = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = _of_gpus()
    return states


def _of_gpus() -> Any:
    is_alone = collectives.count() == 1
    return torch.cuda.random.get_rng_state() if is_alone else torch.cuda.random.get_rng_state_all()


_of_numpy: Callable[[], Any] = np.random.get_bit_generator  # type: ignore[attr-defined]


class Recorder:
    """Take the states of all generators at every step, for the price of torch's alone.

    Python's and numpy's take sixty microseconds to read. They are read again only where a byte of them has
    changed, which is found in their memory.

    Proved by: tests/unit/utilities/test_rng.py
    """

    def __init__(self) -> None:
        python: Any = random.getstate.__self__  # type: ignore[attr-defined]  # the generator of `random`
        head, size = object.__basicsize__, random.Random.__base__.__basicsize__  # type: ignore[union-attr]
        self._python, self._numpy = python, _of_numpy()
        self._of_python = (ctypes.c_char * (size - head)).from_address(id(python) + head)
        address = self._numpy.ctypes.state_address  # 624 words and the position in them
        self._of_numpy = (ctypes.c_char * (625 * 4)).from_address(address)
        self._can_watch = isinstance(self._numpy, np.random.MT19937)
        self._has_gpu = torch.cuda.is_available()
        self._seen: Any = None
        self._states: RandomStates = {}

    def capture(self) -> RandomStates:
        """Take the states of all generators."""
        seen = self._of_python.raw, self._of_numpy.raw, self._python.gauss_next
        if seen != self._seen or _of_numpy() is not self._numpy:
            self._states = capture()
            # A second normal number, which numpy has at hand, is taken without a trace in these bytes.
            has_normal = self._states["numpy"][3]
            self._seen = seen if self._can_watch and not has_normal else None
            return self._states
        states = {**self._states, "cpu": torch.default_generator.get_state()}
        if self._has_gpu:
            states["cuda"] = _of_gpus()
        return states


def seeded(seed: int) -> RandomStates:
    """Make the states of generators that were all seeded with a number; those of this process stay."""
    before = capture()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    states = capture()
    restore(before)
    return states


def restore(states: RandomStates) -> None:
    """Put all generators into the states taken before; states of devices that are not here are left out.

    Mirrors: transformers.Trainer._load_rng_state
    """
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    torch.random.set_rng_state(states["cpu"])
    on_gpu = states.get("cuda")
    if torch.cuda.is_available() and on_gpu is not None:
        if isinstance(on_gpu, list):
            torch.cuda.random.set_rng_state_all(on_gpu)
        else:
            torch.cuda.random.set_rng_state(on_gpu)


@contextmanager
def preserve_generators(owner: object) -> Iterator[None]:
    """Have an object of the user's, and the generators it holds, be afterwards as they were.

    A collator that has a seed of its own makes its generator when it is first called.
    """
    held = dict(getattr(owner, "__dict__", {}))
    rewind = [_rewinder(value) for value in held.values()]
    try:
        yield
    finally:
        if held:
            vars(owner).clear()
            vars(owner).update(held)
        for back in rewind:
            back()


def _rewinder(held: object) -> Callable[[], object]:
    """Make what puts a generator back into its present state; nothing is done to what is none."""
    if isinstance(held, torch.Generator):
        return partial(held.set_state, held.get_state())
    if isinstance(held, random.Random):
        return partial(held.setstate, held.getstate())
    if isinstance(held, np.random.RandomState):
        return partial(held.set_state, held.get_state())
    if isinstance(held, np.random.Generator):
        return partial(setattr, held.bit_generator, "state", held.bit_generator.state)
    return bool


def to_plain(states: RandomStates) -> RandomStates:
    """Put numpy's array into a tensor: then a file of the states is read without trusting anything else."""
    kind, keys, *rest = states["numpy"]
    return {**states, "numpy": (kind, torch.tensor(np.asarray(keys, dtype=np.int64)), *rest)}


def from_plain(states: RandomStates) -> RandomStates:
    """Undo `to_plain`."""
    kind, keys, *rest = states["numpy"]
    return {**states, "numpy": (kind, np.asarray(keys, dtype=np.uint32), *rest)}


def are_equal(one: RandomStates, other: RandomStates) -> bool:
    """Whether nothing was drawn between two captures."""
    return (
        torch.equal(one["cpu"], other["cpu"])
        and one["python"] == other["python"]
        and all(np.array_equal(a, b) for a, b in zip(one["numpy"], other["numpy"], strict=True))
    )

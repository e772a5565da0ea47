"""The random generators of a process: Python's, numpy's and torch's, as one state; knows neither engine."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from hfbridge import ranks

RandomStates = dict[str, Any]
"""The generators' states by the names that the native Trainer's rng_state.pth has for them."""


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
        is_alone = ranks.count() == 1
        states["cuda"] = (
            torch.cuda.random.get_rng_state() if is_alone else torch.cuda.random.get_rng_state_all()
        )
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
def keeping(owner: object) -> Iterator[None]:
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


def as_plain(states: RandomStates) -> RandomStates:
    """Put numpy's array into a tensor: then a file of the states is read without trusting anything else."""
    kind, keys, *rest = states["numpy"]
    return {**states, "numpy": (kind, torch.tensor(np.asarray(keys, dtype=np.int64)), *rest)}


def as_native(states: RandomStates) -> RandomStates:
    """Undo `as_plain`."""
    kind, keys, *rest = states["numpy"]
    return {**states, "numpy": (kind, np.asarray(keys, dtype=np.uint32), *rest)}


def are_equal(one: RandomStates, other: RandomStates) -> bool:
    """Whether nothing was drawn between two captures."""
    return (
        torch.equal(one["cpu"], other["cpu"])
        and one["python"] == other["python"]
        and all(np.array_equal(a, b) for a, b in zip(one["numpy"], other["numpy"], strict=True))
    )

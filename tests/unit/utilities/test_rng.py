"""Generators that an object of the user's holds are afterwards as they were."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hfbridge.utilities import rng
from hfbridge.utilities.rng import preserve_generators


class Owner:
    def __init__(self, generator: Any) -> None:
        self.generator, self.calls = generator, 0


DRAWS = {
    "torch": (torch.Generator().manual_seed(3), lambda g: torch.rand((), generator=g).item()),
    "numpy": (np.random.default_rng(3), lambda g: g.random()),
    "numpy's old": (np.random.RandomState(3), lambda g: g.rand()),
    "python": (random.Random(3), lambda g: g.random()),
}


@pytest.mark.parametrize("kind", list(DRAWS))
def test_what_is_drawn_within_is_drawn_again(kind: str) -> None:
    generator, draw = DRAWS[kind]
    owner, drawn = Owner(generator), []
    with preserve_generators(owner):
        drawn += [draw(owner.generator), draw(owner.generator)]
        owner.calls += 1
    assert owner.generator is generator
    assert owner.calls == 0
    assert [draw(generator), draw(generator)] == drawn


def test_a_generator_that_was_not_there_is_made_again() -> None:
    owner: Any = Owner(None)
    with preserve_generators(owner):
        owner.generator, owner.late = random.Random(3), 1
    assert vars(owner) == {"generator": None, "calls": 0}


@pytest.mark.parametrize("owner", [None, len, torch.stack])
def test_functions_hold_nothing(owner: Any) -> None:
    with preserve_generators(owner):
        pass


@pytest.mark.parametrize(
    "draw",
    [
        random.random,
        lambda: random.gauss(0, 1),
        np.random.rand,
        np.random.randn,
        lambda: torch.rand(1),
        lambda: random.seed(3),
        lambda: np.random.seed(3),
        lambda: None,
    ],
)
def test_a_recorder_sees_every_draw(draw: Callable[[], object]) -> None:
    recorder = rng.Recorder()
    for _ in range(3):  # every other normal number of numpy's leaves its words as they are
        draw()
        for found in (recorder.capture(), recorder.capture()):
            states = rng.capture()
            assert rng.are_equal(found, states)
            assert found["numpy"][3:] == states["numpy"][3:]

"""`lightning.seed_everything` beside the seed of the settings."""

import re
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.lightning.plain_callbacks import ENGINES, make_run, messages
from tests.tiny import make_model

BRIDGED = ENGINES[1:]


def fit_seeded(engine: str, everywhere: int, **settings: Any) -> tuple[Any, list[str]]:
    """Train with dropout and shuffled rows, after `seed_everything`."""
    with messages() as logged:
        model = make_model("distilbert")
        pl.seed_everything(everywhere, verbose=False)  # noqa: TID251 - what a user calls
        shuffled = {"train_sampling_strategy": "random", **settings}
        run = make_run(engine, model=model, epochs=1, evaluation="no", settings=shuffled).fit()
    return run.weights, [message for message in logged if "seed" in message]


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("engine", BRIDGED)
def test_the_seed_that_was_set_counts(engine: str) -> None:
    (of_seven, notes), (of_eight, _) = fit_seeded(engine, 7), fit_seeded(engine, 8)
    assert not are_equal(of_seven, of_eight)
    assert are_equal(of_seven, fit_seeded(engine, 7)[0])
    assert are_equal(of_seven, fit_seeded(engine, 7, seed=7)[0])
    assert not [note for note in notes if note.startswith("hfbridge")]


@pytest.mark.parametrize("engine", BRIDGED)
def test_two_different_seeds_are_a_note(engine: str) -> None:
    weights, notes = fit_seeded(engine, 7, seed=3)
    (note,) = (note for note in notes if note.startswith("hfbridge"))
    assert "seed_everything" in note
    assert {"7", "3"} <= set(re.findall(r"\d+", note))
    assert are_equal(weights, fit_seeded(engine, 3)[0])  # of the settings
    assert not [note for note in fit_seeded(engine, 3, seed=3)[1] if note.startswith("hfbridge")]

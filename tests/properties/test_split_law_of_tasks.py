"""The split law for every task: in "exact" the gradient does not depend on the cut, or a note says it does.

The table is that of tests/auto_models.py; dropout is off and weights are float64.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfbridge.losses.item_counts import count_items, read_traits
from hfbridge.losses.normalization import Normalization
from hfbridge.models.probing import halves
from tests.auto_models import TABLE
from tests.tiny import make_model

HELD = [name for name, tiny in TABLE.items() if not tiny.refused and not tiny.not_exact]
NOT_HELD = [name for name, tiny in TABLE.items() if not tiny.refused and tiny.not_exact]
# Sums in another order, in float64; in float32 shares of micro-batches and some losses. Masked image modeling
# has 1e-5 beside the number of masked pixels.
LAW = 1e-6


def doubled(value: Any) -> Any:
    """Make floats float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return {name: doubled(v) for name, v in value.items()} if isinstance(value, dict) else value


def gradient_of(model: nn.Module, window: Sequence[Any]) -> Tensor:
    """Accumulate a window's gradient as HFModule does, [parameters]."""
    loss_of = Normalization("exact", read_traits(model)).loss_for(model, window)
    items = loss_of.count(window, torch.device("cpu"))
    model.zero_grad()
    model.eval()
    for index, inputs in enumerate(window):
        loss_of.train(model, inputs, items, index, len(window)).backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


@pytest.mark.parametrize("name", HELD)
def test_the_cut_does_not_matter(name: str) -> None:
    tiny = TABLE[name]
    model, rows = tiny.model(name).double(), tiny.rows(8)
    batch = gradient_of(model, [doubled(tiny.collator(rows))])
    cut = gradient_of(model, [doubled(tiny.collator(part)) for part in (rows[:3], rows[3:7], rows[7:])])
    assert float((batch - cut).norm() / batch.norm()) < LAW
    normalization = Normalization("exact", read_traits(model))
    window = [doubled(tiny.collator(part)) for part in (rows[:4], rows[4:])]
    normalization.loss_for(model, window)
    assert "not the mean" not in normalization.compare(window)


@pytest.mark.parametrize("name", [name for name in NOT_HELD if "Spectrogram" not in name])
def test_where_it_matters_a_note_says_so(name: str) -> None:
    tiny = TABLE[name]
    model, rows = tiny.model(name), tiny.rows(8)
    normalization = Normalization("exact", read_traits(model))
    window = [tiny.collator(part) for part in (rows[:4], rows[4:])]
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    normalization.loss_for(model, window)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    note = normalization.compare(window)
    assert f"The loss of {type(model).__name__} over a batch is not the mean" in note
    assert "gradient_accumulation_steps=1" in note
    alone = Normalization("exact", read_traits(model))
    alone.loss_for(model, window[:1])
    assert "not the mean" not in alone.compare(window[:1])  # one micro-batch is not cut


def test_answers_beyond_the_batch_are_not_counted() -> None:
    """The mean of BERT's two cross-entropies is taken over the answers that lie in the batch."""
    model = make_model("bert-qa", dropout=0.0, dtype=torch.float64)
    rows = [
        {
            "input_ids": torch.full((6,), 4 + index),
            "start_positions": torch.tensor(position),
            "end_positions": torch.tensor(position),
        }
        for index, position in enumerate([1, 99, 2, 99, 5, 3])
    ]

    def batch(of: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([row[name] for row in of]) for name in of[0]}

    assert count_items(batch(rows), read_traits(model)) == 4
    whole = gradient_of(model, [batch(rows)])
    cut = gradient_of(model, [batch(rows[:2]), batch(rows[2:])])
    assert float((whole - cut).norm() / whole.norm()) < LAW


def test_what_has_no_rows_is_not_cut() -> None:
    assert halves({"input_ids": torch.zeros(1, 5)}) is None
    assert halves({"input_ids": torch.zeros(2, 5), "patches": torch.zeros(7, 3)}) is None
    first, second = halves({"input_ids": torch.arange(3), "labels": [1, 2, 3], "return_loss": True}) or (
        {},
        {},
    )
    assert (first["labels"], second["labels"], second["return_loss"]) == ([1], [2, 3], True)
    assert torch.equal(second["input_ids"], torch.tensor([1, 2]))

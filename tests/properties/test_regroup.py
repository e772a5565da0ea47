"""Regrouped steps: the rows of each optimizer step are those of accelerate's own dealing, on all ranks."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from hfbridge.data.length_grouping import Regrouped, assign_micro_batches
from hfbridge.data.samplers import batches_from
from tests.properties.test_split_law import (
    LAW,
    LAW_KINDS,
    batch_of,
    count_items,
    exact_model,
    gradient_of,
    read_traits,
    relative,
    rows_of,
)

LONGEST = 40


def windows_of(batches: Sequence[list[int]], sizes: Any) -> list[list[list[int]]]:
    """Cut the micro-batches of a pass into its steps."""
    rest = list(batches)
    found = []
    while rest:
        size = next(sizes)
        found.append(rest[:size])
        rest = rest[size:]
    return found


@st.composite
def passes(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the rows of a pass and how they are cut."""
    rows = draw(st.integers(1, 70), label="rows")
    ranks, splits = draw(st.integers(1, 3), label="ranks"), draw(st.booleans(), label="split_batches")
    size = draw(st.integers(1, 6), label="batch size") * (ranks if splits else 1)
    drop_last = draw(st.booleans(), label="drop_last")
    assume(not drop_last or rows >= size * ranks)
    lengths = draw(st.lists(st.integers(0, LONGEST), min_size=rows, max_size=rows), label="lengths")
    return {
        "whole": BatchSampler(draw(st.permutations(range(rows))), size, drop_last),
        "ranks": ranks,
        "splits": splits,
        "lengths": lengths,
        "accumulation": draw(st.integers(1, 5), label="accumulation"),
        "max_tokens": draw(st.none() | st.integers(1, 4 * LONGEST), label="max_tokens"),
    }


def shares_of(given_: dict[str, Any], *, max_tokens: int | None) -> tuple[list[Any], list[Regrouped]]:
    """Make what each rank reads without regrouping, and with it."""
    ranks, whole, lengths = given_["ranks"], given_["whole"], given_["lengths"]
    plain = [
        BatchSamplerShard(whole, num_processes=ranks, process_index=rank, split_batches=given_["splits"])
        if ranks > 1
        else whole
        for rank in range(ranks)
    ]
    regrouped = [
        Regrouped(
            share,
            lambda rows: [lengths[row] for row in rows],
            accumulation=given_["accumulation"],
            max_tokens=max_tokens,
        )
        for share in plain
    ]
    return plain, regrouped


@settings(deadline=None)
@given(given_=passes())
def test_each_step_has_the_rows_it_would_have(given_: dict[str, Any]) -> None:
    plain, regrouped = shares_of(given_, max_tokens=given_["max_tokens"])
    accumulation, lengths = given_["accumulation"], given_["lengths"]
    before = [list(share) for share in plain]
    steps = range(0, len(before[0]), accumulation)
    expected = [Counter(r for of in before for b in of[i : i + accumulation] for r in b) for i in steps]
    found = [windows_of(list(share), share.sizes()) for share in regrouped]
    for window, rows in zip(zip(*found, strict=True), expected, strict=True):
        assert Counter(r for of_rank in window for batch in of_rank for r in batch) == rows
        assert len({len(of_rank) for of_rank in window}) == 1, "a rank would wait for the others"
        assert all(batch for of_rank in window for batch in of_rank)
        for batch in (batch for of_rank in window for batch in of_rank):
            if given_["max_tokens"] is not None and len(batch) > 1:
                assert len(batch) * max(lengths[row] for row in batch) <= given_["max_tokens"]
    if given_["max_tokens"] is None:
        assert [len(share) for share in regrouped] == [len(list(share)) for share in regrouped]
    assert [len(share) for share in regrouped] == [len(share) for share in plain]


@settings(deadline=None)
@given(given_=passes(), data=st.data())
def test_steps_behind_are_left_out_as_if_they_had_been_read(
    given_: dict[str, Any], data: st.DataObject
) -> None:
    _, regrouped = shares_of(given_, max_tokens=given_["max_tokens"])
    first_row = data.draw(st.integers(0, len(given_["lengths"])), label="first row")
    for share in regrouped:
        loader: DataLoader[Any] = DataLoader(range(len(given_["lengths"])), batch_sampler=share)  # type: ignore[arg-type]
        asked: list[list[int]] = []
        lengths_of = share._lengths
        share._lengths = lambda rows, asked=asked, of=lengths_of: asked.append(rows) or of(rows)  # type: ignore[misc]
        whole = windows_of(list(batches_from(loader, first_row)), share.sizes())
        asked_of_all = list(asked)
        behind = data.draw(st.integers(0, len(whole)), label="behind")
        asked.clear()
        accumulation = given_["accumulation"]
        rest = list(batches_from(loader, first_row, steps=behind, accumulation=accumulation))
        assert windows_of(rest, share.sizes()) == whole[behind:]
        assert asked == asked_of_all[behind:], "lengths of rows that are behind were read"


@given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=24, max_size=24),
    ranks=st.sampled_from([1, 2, 3, 4]),
)
def test_padding_never_grows_and_ranks_carry_alike(lengths: list[int], ranks: int) -> None:
    def padded(batches: Sequence[Sequence[int]]) -> int:
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)

    size, micro_batches = 2, 12 // ranks
    as_drawn = [list(range(i, i + size)) for i in range(0, 24, size)]
    dealt = assign_micro_batches(
        range(24), lengths, ranks=ranks, micro_batches=micro_batches, max_tokens=None
    )
    assert padded([batch for of_rank in dealt for batch in of_rank]) <= padded(as_drawn)
    loads = [padded(of_rank) for of_rank in dealt]
    assert max(loads) - min(loads) <= size * LONGEST


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7), budget=st.integers(1, 40))
def test_a_budget_is_kept_with_the_fewest_micro_batches_and_then_the_least_padding(
    lengths: list[int], budget: int
) -> None:
    """Every way of cutting the sorted rows is tried."""
    order = sorted(lengths, reverse=True)
    ways = []
    for cuts in range(2 ** (len(order) - 1)):
        parts, part = [], [order[0]]
        for place, length in enumerate(order[1:]):
            if cuts >> place & 1:
                parts.append(part)
                part = []
            part.append(length)
        parts.append(part)
        if all(len(part) == 1 or len(part) * part[0] <= budget for part in parts):
            ways.append((len(parts), sum(len(part) * part[0] for part in parts)))
    (dealt,) = assign_micro_batches(range(len(lengths)), lengths, ranks=1, micro_batches=1, max_tokens=budget)
    found = [[lengths[row] for row in batch] for batch in dealt]
    assert (len(found), sum(len(batch) * max(batch) for batch in found)) == min(ways)


@pytest.mark.parametrize("kind", [kind for kind in LAW_KINDS if kind != "bert-qa"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_gradient_of_a_step_stays_the_same(kind: str, data: st.DataObject) -> None:
    """On one rank; what several sum is the same sum."""
    count = data.draw(st.integers(4, 16), label="rows")
    rows = rows_of(kind, count, seed=data.draw(st.integers(0, 50), label="seed"))
    size = data.draw(st.integers(1, 4), label="batch size")
    budget = data.draw(st.none() | st.integers(1, 60), label="max_tokens")
    model = exact_model(kind)
    assume(count_items(batch_of(rows), read_traits(model)))
    as_drawn = [rows[i : i + size] for i in range(0, count, size)]
    lengths = [len(row["input_ids"]) for row in rows]
    (dealt,) = assign_micro_batches(
        range(count), lengths, ranks=1, micro_batches=len(as_drawn), max_tokens=budget
    )
    expected, loss = gradient_of(model, [batch_of(part) for part in as_drawn])
    found, losses = gradient_of(model, [batch_of([rows[i] for i in part]) for part in dealt])
    assert relative(found, expected) < LAW
    assert losses == pytest.approx(loss, rel=LAW)

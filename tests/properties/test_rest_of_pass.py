"""What is left of a pass: the batches that come behind some optimizer steps, as if all had been read."""

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from hfbridge.checkpoints.resume import position_of
from hfbridge.data.accumulation import BatchLayout, DataPosition
from hfbridge.data.dataloaders import Start, TrainLoader
from hfbridge.data.samplers import batches_from

ROWS, SIZE = 1_000_000, 8


def share_of(order: Any, dealing: dict[str, Any]) -> Any:
    """Make what one rank reads of an order."""
    whole = BatchSampler(order, dealing["size"], dealing["drop_last"])
    if dealing["ranks"] == 1:
        return whole
    return BatchSamplerShard(
        whole,
        num_processes=dealing["ranks"],
        process_index=dealing["rank"],
        split_batches=dealing["splits"],
    )


@st.composite
def dealings(draw: st.DrawFn) -> dict[str, Any]:
    """Draw how the rows of a pass are dealt."""
    ranks, splits = draw(st.integers(1, 3), label="ranks"), draw(st.booleans(), label="split_batches")
    return {
        "ranks": ranks,
        "rank": draw(st.integers(0, ranks - 1), label="rank"),
        "splits": splits,
        "size": draw(st.integers(1, 4), label="batch size") * (ranks if splits else 1),
        "drop_last": draw(st.booleans(), label="drop_last"),
    }


@settings(deadline=None, max_examples=300)
@given(dealing=dealings(), data=st.data())
def test_it_is_the_end_of_the_whole_pass(dealing: dict[str, Any], data: st.DataObject) -> None:
    rows, accumulation = data.draw(st.integers(1, 60), label="rows"), data.draw(st.integers(1, 4))
    order = data.draw(st.permutations(range(rows)), label="order")
    first_row = data.draw(st.just(0) | st.integers(0, rows - 1), label="first row")
    whole = list(share_of(order[first_row:], dealing))
    assume(whole)
    full = len(whole) // accumulation
    behind = data.draw(st.integers(0, full), label="windows behind")
    loader: DataLoader[Any] = DataLoader(range(rows), batch_sampler=share_of(order, dealing))  # type: ignore[arg-type]
    rest = list(batches_from(loader, first_row, steps=behind, accumulation=accumulation))
    assert rest == whole[behind * accumulation :]


class Order:
    """Rows in their order, drawn without a Python function being called for each."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._rows))

    def __len__(self) -> int:
        return self._rows


def calls_until_the_first(rows: int, *, ranks: int) -> int:
    """Count the Python functions that are called until the first batch of the second half is there."""
    dealing = {"ranks": ranks, "rank": 0, "splits": False, "size": SIZE, "drop_last": False}
    loader: DataLoader[Any] = DataLoader(range(rows), batch_sampler=share_of(Order(rows), dealing))  # type: ignore[arg-type]
    behind = rows // (2 * SIZE * ranks)
    calls = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(note)
    try:
        first = next(batches_from(loader, 0, steps=behind))
    finally:
        sys.setprofile(None)
    assert first == list(range(behind * SIZE * ranks, behind * SIZE * ranks + SIZE))
    return calls


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_batches_are_made_of_the_rows_that_are_behind(ranks: int) -> None:
    assert calls_until_the_first(ROWS, ranks=ranks) == calls_until_the_first(1_600, ranks=ranks)


class Rows(torch.utils.data.Dataset[dict[str, int]]):
    """Some rows that are nowhere."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, number: int) -> dict[str, int]:
        return {"x": number}


def loader_of(rows: int) -> TrainLoader:
    """Make a loader of micro-batches in random order."""
    sampler = SeedableRandomSampler(Rows(rows), data_seed=3)
    return TrainLoader(DataLoader(Rows(rows), sampler=sampler, batch_size=SIZE), accumulation=2)


def kept_of(loader: TrainLoader, place: DataPosition) -> bytes:
    """Write what a checkpoint keeps of the place in the data."""
    file = io.BytesIO()
    torch.save(position_of(loader.start_from(place), {"sum": torch.zeros(())}, BatchLayout(1, SIZE, 2)), file)
    return file.getvalue()


def test_the_order_of_a_million_rows_is_kept_as_the_state_it_was_drawn_from() -> None:
    sizes = []
    for rows in (1_000, ROWS):
        loader = loader_of(rows)
        place = next(iter(loader)).step.position
        sizes.append(len(kept_of(loader, place)))
    assert sizes[1] == sizes[0] < 30_000


def test_the_middle_of_a_million_rows_goes_on_with_the_rows_that_follow() -> None:
    order = list(SeedableRandomSampler(Rows(ROWS), data_seed=3))
    torch.manual_seed(5)
    begun = loader_of(ROWS)
    next(iter(begun))
    assert begun.record is not None
    behind = ROWS // (4 * SIZE)
    loader = loader_of(ROWS)
    place = DataPosition(windows=behind)
    states = begun.record.states
    loader.start_at(Start(place, done=2 * behind, states=states, record=begun.record))
    step = next(iter(loader)).step
    found = [row for micro_batch in step for row in micro_batch["x"].tolist()]
    assert found == order[2 * behind * SIZE : 2 * (behind + 1) * SIZE]


def test_no_second_order_is_drawn_to_see_whether_workers_collate_randomly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[int] = []
    draw = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **more: drawn.append(n) or draw(n, **more))
    loader = loader_of(1_000)
    inner = loader.batches
    loader.batches = DataLoader(inner.dataset, sampler=inner.sampler, batch_size=SIZE, num_workers=1)
    begun = loader_of(1_000)
    next(iter(begun))
    assert begun.record is not None
    drawn.clear()
    loader.start_at(Start(DataPosition(windows=3), done=6, states=begun.record.states, record=begun.record))
    next(iter(loader))
    assert [n for n in drawn if n == 1_000] == [1_000]

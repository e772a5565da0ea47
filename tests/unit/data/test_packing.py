"""Packing examples into rows: none lost, none cut, the same each time; what cannot be packed is named."""

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfbridge import DataError, HFDataModule
from hfbridge.data.packing import IGNORED, PackCollator, Packed, pack_rows, pack_set, plan_packs
from tests.tiny import make_rows

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=40)


def examples_in(row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Take a pack apart where its positions begin anew: ids and labels."""
    starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
    parts = [slice(s, e) for s, e in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True)]
    return [(row["input_ids"][part], row["labels"][part]) for part in parts]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, room=st.integers(0, 20))
def test_no_example_is_lost_or_cut(lengths: list[int], room: int) -> None:
    capacity = max(lengths) + room
    given_ = [{"input_ids": [i + 3] * length} for i, length in enumerate(lengths)]
    packed = Packed(given_, capacity)
    rows = [packed[i] for i in range(len(packed))]
    assert max(len(row["input_ids"]) for row in rows) <= capacity
    found = sorted((ids for row in rows for ids, _ in examples_in(row)), key=lambda ids: ids[0])
    assert found == [row["input_ids"] for row in given_]
    for row in rows:
        for ids, labels in examples_in(row):
            assert labels == [IGNORED, *ids[1:]]
    # Best fit leaves at most one pack half empty.
    assert sum(2 * len(row["input_ids"]) <= capacity for row in rows) <= 1
    assert [Packed(given_, capacity)[i] for i in range(len(packed))] == rows


def test_packs_are_filled_best_first_and_keep_the_order_of_the_set() -> None:
    lengths = np.array([2, 5, 3, 7, 4, 1, 8])
    assert plan_packs(lengths, 10) == [[0, 6], [1, 4, 5], [2, 3]]


def test_labels_of_the_set_are_kept_but_for_the_first() -> None:
    packed = Packed(
        [{"input_ids": [5, 6, 7], "labels": [5, IGNORED, 9]}, {"input_ids": [8], "labels": [8]}], 4
    )
    assert packed[0] == {
        "input_ids": [5, 6, 7, 8],
        "labels": [IGNORED, IGNORED, 9, IGNORED],
        "position_ids": [0, 1, 2, 0],
    }


@pytest.mark.parametrize("kind", ["dataset", "formatted", "list", "stream"])
def test_every_kind_of_set_is_packed_alike(kind: str) -> None:
    rows = make_rows("llama", 30)
    stored = datasets.Dataset.from_list([{**row, "text": "words"} for row in rows])
    sets = {
        "dataset": stored,
        "formatted": stored.with_format("torch"),
        "list": rows,
        "stream": stored.to_iterable_dataset(),
    }
    packed = pack_set(sets[kind], 24)
    found = list(packed) if kind == "stream" else [packed[i] for i in range(len(packed))]
    expected = Packed(stored, 24)
    assert found == [expected[i] for i in range(len(expected))]
    assert len(found) < 12


def test_a_batch_of_examples_is_packed_for_map() -> None:
    rows = datasets.Dataset.from_list(make_rows("llama", 30))
    mapped = rows.map(pack_rows, batched=True, remove_columns=rows.column_names, fn_kwargs={"max_tokens": 24})
    expected = Packed(rows, 24)
    assert list(mapped) == [expected[i] for i in range(len(expected))]


def test_padding_stands_for_itself() -> None:
    batch = PackCollator(9)([pack for pack in Packed([{"input_ids": [5] * n} for n in (4, 2, 1)], 4)])
    assert batch["input_ids"].tolist() == [[5, 5, 5, 5], [5, 5, 5, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 5, 5, 5], [IGNORED, 5, IGNORED, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_lengths_are_counted_without_reading_the_tokens() -> None:
    class Counted(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            raise AssertionError(f"row {index} is read")

    rows = datasets.Dataset.from_dict({"input_ids": [[1] * 3] * 5_000})
    packed = Packed(rows, 6)
    assert len(packed) == 2_500
    with pytest.raises(AssertionError, match="row 0 is read"):
        Packed(Counted([{"input_ids": [1]}]), 6)


def wrong(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"input_ids": [5, 6], **{name: [1, 1] for name in row if name != "input_ids"}}, row]


@pytest.mark.parametrize(
    ("rows", "max_tokens", "told"),
    [
        (wrong({"input_ids": [5] * 9}), 8, r"Row 1 of the train set has 9 tokens, more than packing=8"),
        (wrong({"input_ids": []}), 8, r"Row 1 of the train set has no tokens"),
        (wrong({"input_ids": [5, 6], "labels": [5]}), 8, r"has 2 tokens in 'input_ids' and 1 in 'labels'"),
        (wrong({"input_ids": [5, 0], "attention_mask": [1, 0]}), 8, r"Row 1 of the train set is padded"),
        ([{"text": "words"}], 8, r"no column 'input_ids' to pack"),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
def test_what_cannot_be_packed_is_named(
    rows: list[dict[str, Any]], max_tokens: int, told: str, *, stored: bool
) -> None:
    with pytest.raises(DataError, match=told):
        Packed(datasets.Dataset.from_list(rows) if stored else rows, max_tokens)


def test_a_transform_is_refused() -> None:
    rows = datasets.Dataset.from_dict({"text": ["words"]}).with_transform(lambda r: {"input_ids": [[1]]})
    with pytest.raises(DataError, match="has a transform"):
        Packed(rows, 8)


def test_a_stream_that_does_not_tell_its_columns_is_refused() -> None:
    def rows() -> Any:
        yield {"input_ids": [1, 2]}

    with pytest.raises(DataError, match="with known columns"):
        pack_set(datasets.IterableDataset.from_generator(rows), 8)


@pytest.mark.parametrize("packing", [0, -1, True, 2.5, "512"])
def test_packing_is_a_number_of_tokens(packing: Any) -> None:
    with pytest.raises(DataError, match="it must be the most tokens"):
        HFDataModule(make_rows("llama", 4), packing=packing)

"""Foreign modules, foreign loaders and HFDataModule on two ranks, under both Trainers: who has which row."""

import pytest
import torch

from tests.distributed.lightning_jobs import (
    names_of_rows,
    predict_alone,
    predict_rows,
    train_by,
    train_rows,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

for_both = pytest.mark.parametrize("side", ["hfbridge", "lightning"])


@for_both
@pytest.mark.parametrize("module", ["PlainModule", "HFModule"])
@pytest.mark.parametrize("source", ["loader", "HFDataModule"])
@pytest.mark.parametrize("count", [7, 5])  # with 5 the second rank has one batch less
def test_each_row_is_predicted_once_with_its_index(ranks, side, module, source, count):
    first, second = ranks(2).run(predict_rows, side, source, module, count)
    assert first
    assert second
    found = dict(first + second)
    assert sorted(index for index, _ in first + second) == list(range(count))
    for index, logits in enumerate(predict_alone(count)):
        # The rows of a batch are padded to its longest: the sums of attention have other zeros in them.
        assert found[index] == pytest.approx(logits, abs=1e-6)


@for_both
def test_our_data_module_splits_rows_between_ranks_under_any_module(ranks, side):
    first, second = ranks(2).run(train_rows, side, "HFDataModule")
    for epoch in range(2):
        ours, theirs = (rows[6 * epoch : 6 * epoch + 6] for rows in (first[0], second[0]))
        assert sorted(ours + theirs) == sorted(names_of_rows(12))
    assert first[0][:6] != first[0][6:]  # shuffled anew
    for epoch in range(2):
        ours, theirs = (rows[4 * epoch : 4 * epoch + 4] for rows in (first[1], second[1]))
        assert sorted(ours + theirs) == sorted(names_of_rows(8))
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])


@for_both
def test_a_foreign_loader_is_split_between_ranks(ranks, side):
    first, second = ranks(2).run(train_rows, side, "loader")
    assert len(first[0]) == len(second[0]) == 12
    for epoch in range(2):
        ours, theirs = (rows[6 * epoch : 6 * epoch + 6] for rows in (first[0], second[0]))
        assert sorted(ours + theirs) == sorted(names_of_rows(12))
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])


@for_both
@pytest.mark.parametrize("strategy", ["ddp", "hfbridge's ddp", "ddp that finds unused"])
def test_a_foreign_module_is_trained_by_our_ddp_as_by_lightnings(ranks, side, strategy):
    pool = ranks(2)
    first, second = pool.run(train_by, side, strategy)
    expected, _ = pool.run(train_by, "lightning", "Lightning's ddp")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], expected[name]) for name in expected)


@for_both
def test_hfmodule_is_trained_by_lightnings_ddp_as_by_ours(ranks, side):
    pool = ranks(2)
    first, second = pool.run(train_by, side, "Lightning's ddp", "HFModule")
    expected, _ = pool.run(train_by, side, "hfbridge's ddp", "HFModule")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], expected[name]) for name in expected)

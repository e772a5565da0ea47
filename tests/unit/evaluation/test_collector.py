"""What the batches of an evaluation gave, joined."""

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import EvalLoopContainer

from hfbridge.evaluation.collector import Collector, EvalSet, Part

MOVES = pytest.mark.parametrize("move_every", [None, 1, 2, 5])


def collect(batches, move_every=None, **options):
    """Collect batches of loss, rows, logits, labels and inputs."""
    collector = Collector(move_every=move_every, **options)
    for loss, rows, logits, labels, *inputs in batches:
        repeated = None if loss is None else loss.repeat(rows)
        given = inputs[0] if inputs else None
        collector.add(Part(repeated, logits, labels, given, mean=loss, items=10 * rows))
    return collector.finish()


def three_batches():
    rows = torch.arange(10.0).reshape(5, 2)
    return rows, [
        (
            torch.tensor(float(i)),
            2 - (i == 2),
            rows[2 * i : 2 * i + 2],
            torch.tensor([i, i])[: 2 - (i == 2)],
            rows[2 * i : 2 * i + 2, :1],
        )
        for i in range(3)
    ]


@MOVES
def test_batches_are_joined_in_their_order(move_every):
    rows, batches = three_batches()
    collected = collect(batches, move_every)
    np.testing.assert_array_equal(collected.predictions, rows.numpy())
    np.testing.assert_array_equal(collected.label_ids, [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(collected.inputs, rows[:, :1].numpy())
    np.testing.assert_array_equal(collected.losses, [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(collected.means, [0, 1, 2])
    np.testing.assert_array_equal(collected.items, [20, 20, 10])


@MOVES
def test_batches_may_stay_apart(move_every):
    _, batches = three_batches()
    collected = collect(batches, move_every, joins=False)
    assert [part.tolist() for part in collected.label_ids] == [[0, 0], [1, 1], [2]]
    assert [part.shape for part in collected.predictions] == [(2, 2), (2, 2), (1, 2)]


@MOVES
def test_losses_stay_apart_too(move_every):
    collected = collect(three_batches()[1], move_every, joins=False)
    assert [part.tolist() for part in collected.losses] == [[0, 0], [1, 1], [2]]


def test_what_is_not_asked_for_is_not_kept():
    collected = collect(three_batches()[1], keeps=("losses", "labels"))
    assert collected.predictions is None
    assert collected.inputs is None
    assert len(collected.losses) == len(collected.label_ids) == 5


@MOVES
def test_ragged_lengths_are_padded_with_minus_100(move_every):
    short, long = torch.ones(1, 2, 3), torch.ones(2, 4, 3)
    collected = collect(
        [(None, 0, short, short[..., 0].long()), (None, 0, long, long[..., 0].long())], move_every
    )
    assert collected.predictions.shape == (3, 4, 3)
    assert (collected.predictions[0, 2:] == -100).all()
    assert (collected.predictions[1:] == 1).all()
    np.testing.assert_array_equal(collected.label_ids[0], [1, 1, -100, -100])


@MOVES
def test_tuples_stay_tuples(move_every):
    one = (torch.ones(2, 3), torch.zeros(2, 1))
    collected = collect([(None, 0, one, one)] * 2, move_every)
    assert [part.shape for part in collected.predictions] == [(4, 3), (4, 1)]
    assert isinstance(collected.label_ids, tuple)


def test_losses_alone():
    collected = collect([(torch.tensor(0.5), 3, None, None)])
    assert collected.predictions is None
    assert collected.label_ids is None
    assert collected.losses.dtype == collected.means.dtype == np.float32
    assert collected.items.dtype == np.int64


def test_without_labels_there_are_no_losses():
    collected = collect([(None, 0, torch.ones(2, 2), None)])
    assert collected.losses is None
    assert collected.means is None
    assert collected.predictions.shape == (2, 2)


def test_nothing_at_all():
    collected = collect([])
    assert (collected.predictions, collected.label_ids, collected.inputs, collected.losses) == (None,) * 4


def test_move_every_leaves_no_tensors_behind():
    collector = Collector(move_every=2)
    for i in range(2):
        collector.add(Part(None, torch.ones(1, 1), torch.ones(1), None))
        assert isinstance(collector._kept["logits"].tensors, torch.Tensor) == (i == 0)
    assert isinstance(collector._kept["logits"].arrays, np.ndarray)


def test_it_is_the_native_container():
    rows = [torch.rand(2, 3), torch.rand(1, 5)]
    theirs = EvalLoopContainer(True, padding_index=-100)
    for row in rows:
        theirs.add(row)
    ours = collect([(None, 0, row, None) for row in rows])
    np.testing.assert_array_equal(ours.predictions, theirs.get_arrays())


def test_bf16_logits_become_fp32_arrays():
    collected = collect(
        [(torch.tensor(0.5, dtype=torch.bfloat16), 1, torch.ones(1, 1, dtype=torch.bfloat16), None)]
    )
    assert collected.predictions.dtype == np.float32
    assert collected.losses.dtype == np.float32


def test_a_set_knows_its_last_batch_and_the_rows_of_each():
    kept = EvalSet("eval", samples=11, batches=3, batch_size=4)
    assert [kept.rows_of(i) for i in range(3)] == [4, 4, 3]
    assert [kept.is_last(i) for i in range(3)] == [False, False, True]
    dropped = EvalSet("eval", samples=11, batches=2, batch_size=4)
    assert [dropped.rows_of(i) for i in range(2)] == [4, 4]
    assert dropped.is_last(1)


@pytest.mark.parametrize(
    ("samples", "ranks", "splits", "rows"),
    [
        (22, 2, False, [(4, 4), (4, 4), (4, 2)]),
        (20, 3, False, [(4, 4, 4), (4, 4)]),
        (24, 3, False, [(4, 4, 4), (4, 4, 4)]),
        (13, 3, False, [(4, 4, 4), (1,)]),
        (3, 3, False, [(3,)]),
        (11, 2, True, [(2, 2), (2, 2), (2, 1)]),
        (9, 2, True, [(2, 2), (2, 2), (1,)]),
        (9, 1, True, [(4,), (4,), (1,)]),
    ],
)
def test_rounds_of_several_ranks(samples, ranks, splits, rows):
    of = EvalSet("eval", samples, len(rows), batch_size=4, ranks=ranks, splits=splits)
    assert [of.rows_by_rank(i) for i in range(of.batches)] == rows
    assert sum(of.rows_of(i) for i in range(of.batches)) == samples
    full = 4 if splits else 4 * ranks
    assert of.remainder_of(of.batches - 1) == samples % full
    assert all(of.remainder_of(i) == 0 for i in range(of.batches - 1))
    assert of.steps == -(-samples // (4 * ranks))


def test_a_dropped_round_leaves_no_remainder():
    of = EvalSet("eval", samples=22, batches=2, batch_size=4, ranks=2)
    assert of.remainder_of(1) == 0
    assert of.steps == 3

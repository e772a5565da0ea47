"""What the batches of an evaluation gave, joined."""

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import EvalLoopContainer

from hfbridge.evaluation.gather import Collector

MOVES = pytest.mark.parametrize("move_every", [None, 1, 2, 5])


def collect(batches, move_every=None):
    collector = Collector(move_every=move_every)
    for batch in batches:
        collector.add(*batch)
    return collector.finish()


@MOVES
def test_batches_are_joined_in_their_order(move_every):
    rows = torch.arange(10.0).reshape(5, 2)
    batches = [
        (torch.tensor(float(i)), 2, rows[2 * i : 2 * i + 2], torch.tensor([i, i])[: 2 - (i == 2)])
        for i in range(3)
    ]
    collected = collect(batches, move_every)
    np.testing.assert_array_equal(collected.predictions, rows.numpy())
    np.testing.assert_array_equal(collected.label_ids, [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(collected.losses, [0, 1, 2])
    np.testing.assert_array_equal(collected.weights, [2, 2, 2])


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
    assert collected.losses.dtype == np.float32
    assert collected.weights.dtype == np.int64


def test_without_labels_there_are_no_losses():
    collected = collect([(None, 0, torch.ones(2, 2), None)])
    assert collected.losses is None
    assert collected.weights is None
    assert collected.predictions.shape == (2, 2)


def test_nothing_at_all():
    collected = collect([])
    assert (collected.predictions, collected.label_ids, collected.losses) == (None, None, None)


def test_move_every_leaves_no_tensors_behind():
    collector = Collector(move_every=2)
    for i in range(2):
        collector.add(None, 0, torch.ones(1, 1), torch.ones(1))
        assert isinstance(collector._predictions.tensors, torch.Tensor) == (i == 0)
    assert isinstance(collector._predictions.arrays, np.ndarray)


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

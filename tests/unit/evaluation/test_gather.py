"""What one rank makes of being alone; several ranks: tests/distributed/test_evaluation.py."""

import pytest
import torch

from hfbridge.evaluation.gather import gather, gather_per_rank, intersect_across_ranks, pad

# accelerate's rule for the last batch.

PAIR = (torch.arange(3), torch.arange(4))


@pytest.mark.parametrize(
    ("data", "named", "expected"),
    [
        (torch.arange(3), {}, [0, 1, 2]),
        (torch.arange(3), {"is_last": True}, [0, 1, 2]),
        (torch.arange(3), {"is_last": True, "remainder": 1}, [0]),
        (torch.arange(3), {"remainder": 1}, [0, 1, 2]),
        (PAIR, {"is_last": True, "remainder": 1}, [[0], [0]]),
        (PAIR, {"is_last": True, "remainder": 1, "as_objects": True}, [[0, 1, 2]]),
        (torch.tensor(3), {"is_last": True, "remainder": 1}, 3),
    ],
    ids=str,
)
def test_the_last_batch_is_cut(data, named, expected):
    options = {"ranks": 1, "is_last": False, "remainder": 0, "as_objects": False, **named}
    found = gather(data, **options)
    listed = [part.tolist() for part in found] if isinstance(found, tuple) else found.tolist()
    assert listed == expected


@pytest.mark.parametrize("data", [None, torch.arange(3), PAIR, {"a": "text"}, 3], ids=str)
def test_one_rank_has_what_it_has(data):
    (found,) = gather_per_rank(data, ranks=1)
    assert found is data
    assert pad(data, ranks=1) is data


@pytest.mark.parametrize("names", [None, frozenset(), frozenset({"eval_loss"})])
def test_one_process_knows_what_it_knows(names):
    assert intersect_across_ranks(names) == names

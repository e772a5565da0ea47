"""Rows dealt by length to several ranks: the steps and metrics of those dealt in order."""

import numpy as np
import pytest

from tests.distributed.by_length import evaluate_both_ways, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TOLERANCE = 2e-6  # that of tests/distributed/test_matrix.py


@pytest.mark.parametrize(
    ("strategy", "regroup"),
    [
        ("ddp", True),
        ("ddp", 24),
        ("fsdp2", 24),
        ("deepspeed_stage_3", 24),
        pytest.param("fsdp", 24, marks=pytest.mark.long),
        pytest.param("deepspeed_stage_2", 24, marks=pytest.mark.long),
        pytest.param("deepspeed_stage_3", True, marks=pytest.mark.long),
    ],
)
def test_regrouped_steps_are_those_of_the_plain_run(ranks, strategy, regroup):
    expected, _ = ranks(2).run(train, "ddp", False)
    first, second = ranks(2).run(train, strategy, regroup)
    assert len(first[0]) == 4
    np.testing.assert_allclose(first[0], expected[0], rtol=TOLERANCE)
    assert first[0] == second[0]
    plain = sum(tokens for _, tokens in ranks(2).run(train, "ddp", False))
    assert first[1] + second[1] < 0.9 * plain
    assert abs(first[1] - second[1]) < 0.2 * first[1], "one rank has much more to do"


def test_evaluations_by_length_are_those_in_order(ranks):
    for plain, sorted_ in ranks(2).run(evaluate_both_ways):
        assert sorted_[0] == pytest.approx(plain[0], rel=TOLERANCE)
        np.testing.assert_allclose(sorted_[1], plain[1], rtol=1e-5, atol=1e-6)  # padding, in float32
        assert sorted_[2] == plain[2]

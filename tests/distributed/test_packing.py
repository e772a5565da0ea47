"""Packed rows on several ranks."""

import pytest

from tests.distributed.packed import refuse, run_on_both, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TOLERANCE = 2e-6  # that of tests/distributed/test_matrix.py


def test_ddp_equals_native(ranks):
    first, second = ranks(2).run(run_on_both)
    assert first == second
    assert len(first) < 20


@pytest.mark.parametrize(
    "strategy", ["fsdp2", "deepspeed_stage_3", pytest.param("fsdp", marks=pytest.mark.long)]
)
def test_shared_weights_go_the_way_of_ddp(ranks, strategy):
    expected, _ = ranks(2).run(train, "ddp")
    found, _ = ranks(2).run(train, strategy)
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_stage_3"])
def test_a_leak_is_seen_on_every_rank(ranks, strategy):
    told = ranks(2).run(refuse, strategy)
    assert all("LlamaForCausalLM: a sample's logits change by" in one for one in told), told

"""A loss in chunks on several ranks."""

import pytest

from tests.distributed.in_chunks import refuse, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TOLERANCE = 1e-5  # of tests/distributed/test_matrix.py, and chunks sum in another order


@pytest.mark.parametrize(
    "strategy",
    ["ddp", "fsdp2", *(pytest.param(name, marks=pytest.mark.long) for name in ("fsdp", "deepspeed_stage_2"))],
)
def test_the_run_with_logits(ranks, strategy):
    expected, _ = ranks(2).run(train, "ddp", False)
    found, _ = ranks(2).run(train, strategy, True)
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("strategy", "settings", "reason"),
    [
        pytest.param(
            "deepspeed_stage_3", {}, "under DeepSpeed's stage 3 the weights", marks=pytest.mark.long
        ),
        (
            "fsdp2",
            {"fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 100}},
            "the strategy holds the weights of the head as a unit of their own",
        ),
    ],
)
def test_refused_on_every_rank(ranks, strategy, settings, reason):
    told = ranks(2).run(refuse, strategy, settings)
    assert all(f"chunked_loss=True cannot be used with LlamaForCausalLM: {reason}" in t for t in told), told

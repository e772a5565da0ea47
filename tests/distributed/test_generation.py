"""Generation on several ranks: native's numbers, and in "exact" those of one process.

Grade: exact. What is compared with native stands in tests/parity/engines.py.
"""

import numpy as np
import pytest
from transformers import GenerationConfig

from tests.distributed.generating import ENDS_AT, generate_by, generate_on_both, job, uneven_prompts
from tests.distributed.test_deepspeed import zero

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning"),
]
STRATEGIES = ["ddp", "fsdp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]


@pytest.fixture(scope="module")
def alone():
    """What one process generates and measures."""
    found = {}

    def of(kind):
        if kind not in found:
            found[kind] = generate_by("auto", kind)
        return found[kind]

    return of


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("t5", {}),
        ("t5", {"generation_num_beams": 2}),
        (
            "t5",
            {
                "generation_config": GenerationConfig(
                    decoder_start_token_id=0, pad_token_id=0, do_sample=True, max_new_tokens=5
                )
            },
        ),
        ("llama", {"generation_max_length": 20}),
    ],
    ids=str,
)
def test_ddp_equals_native(ranks, kind, settings):
    """The rows that fill up the last round are among the predictions, as natively."""
    first, second = ranks(2).run(generate_on_both, job(kind, settings))
    assert first["rows"] == second["rows"]


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3]
)
def test_zero_equals_native(ranks, stage):
    ranks(2).run(generate_on_both, job("t5", {"deepspeed": zero(stage)}))


@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", [pytest.param("t5", marks=pytest.mark.long), "uneven"])
def test_exact_is_that_of_one_process(ranks, alone, strategy, kind):
    """Also where the rows of one rank end at once, and the other's never do."""
    expected = alone(kind)
    for found in ranks(2).run(generate_by, strategy, kind):
        np.testing.assert_array_equal(found["predictions"], expected["predictions"])
        np.testing.assert_array_equal(found["labels"], expected["labels"])
        assert found["metrics"] == expected["metrics"]
        assert found["trained"] == expected["trained"]


def test_the_rows_of_one_rank_do_end_at_once(alone):
    predictions = alone("uneven")["predictions"]
    for row, prompt in zip(predictions, uneven_prompts(13), strict=True):
        is_short = prompt["input_ids"][-1] == ENDS_AT
        assert (row[2] == ENDS_AT) == is_short
        assert (row[2:12] == prompt["input_ids"][-1]).all() != is_short

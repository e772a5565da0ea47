"""PEFT's adapters by configuration, on several ranks."""

import pytest

from tests.distributed.adapters import run_by_strategy, run_on_both
from tests.distributed.matrix import deviation
from tests.distributed.test_matrix import TOLERANCE

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    # peft asks by a name of transformers 4.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

SHORT = {"gradient_accumulation_steps": 2, "max_steps": 3, "max_grad_norm": 0.3}


def test_ddp_equals_native(ranks):
    first, second = ranks(2).run(run_on_both, "lora", SHORT)
    assert first["collated"] != second["collated"]


def test_fsdp2_goes_the_way_of_one_process(ranks):
    alone, counts = run_by_strategy("auto", 1)
    (first, counted), _ = ranks(2).run(run_by_strategy, "fsdp2", 2)
    apart = deviation(alone, first)
    assert all(value < TOLERANCE for value in apart.values()), apart
    assert counted == counts

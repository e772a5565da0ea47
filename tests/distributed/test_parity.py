"""Several ranks: the same job on the native Trainer and on hfbridge, both live under torchrun."""

import pytest

from tests.distributed.jobs import run_job_on_both
from tests.parity.engines import Job

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("kind", ["llama", "distilbert", "bert-qa", "gpt2", "t5"])
def test_ddp_equals_native(ranks, kind):
    job = Job(
        kind,
        {"gradient_accumulation_steps": 3, "num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 3},
    )
    found = ranks(2).run(run_job_on_both, job)
    assert found[0]["collated"] != found[1]["collated"]

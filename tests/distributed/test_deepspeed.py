"""DeepSpeed on several ranks: the same job on the native Trainer and on hfbridge, both live under torchrun."""

import pytest

from tests.distributed.jobs import run_zero_job
from tests.parity.engines import Job

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed, pytest.mark.slow]

SETTINGS = {"gradient_accumulation_steps": 4, "num_train_epochs": 2, "max_grad_norm": 0.5}


def zero(stage: int, **more: object) -> dict[str, object]:
    return {
        "zero_optimization": {"stage": stage, **more},
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", ["llama", "distilbert", "bert-qa", "gpt2", "t5"])
def test_zero_equals_native(ranks, kind, stage):
    job = Job(kind, {**SETTINGS, "deepspeed": zero(stage)}, eval_rows=0)
    found = ranks(2).run(run_zero_job, job)
    assert found[0]["collated"] != found[1]["collated"]
    assert found[0]["rows"][0]["grad_norm"] > 0.5  # clipping was at work

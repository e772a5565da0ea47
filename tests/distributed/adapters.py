"""What the ranks of a pool run for tests/distributed/test_adapters.py."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

import hfbridge
from tests.distributed.jobs import run_job_on_both
from tests.distributed.matrix import Trajectory, train
from tests.parity.test_adapters import KINDS, job_of
from tests.tiny import make_model


def run_on_both(name: str, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train adapters by configuration, on a model that is written already, on both engines."""
    return run_job_on_both(job_of(KINDS[name], model, **settings))


def write_llama(folder: Path) -> str:
    """Write a model; returns where."""
    torch.manual_seed(1)
    make_model("llama", dropout=0.0).save_pretrained(folder)
    return str(folder)


def run_by_strategy(model: str, strategy: str, ranks: int) -> tuple[Trajectory, dict[str, Any]]:
    """Train adapters by configuration on this rank; tell the figures of the summary, too."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    module = hfbridge.HFModule(model, "AutoModelForCausalLM", peft_config=config)
    found = train(module, "llama", strategy, ranks)
    module.save_pretrained("adapter")
    counts = module.run.parameters
    return found, {"trained": counts.trained, "total": counts.total}

"""What the ranks of a pool run: the jobs of tests/parity/engines.py on both engines."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

from tests.parity.engines import Job, Record, run_both, run_theirs
from tests.tiny import VOCABULARY

WRAPPER = ("find_unused_parameters", "broadcast_buffers", "static_graph", "bucket_bytes_cap")


def run_job_on_both(job: Job) -> dict[str, Any]:
    """Run a job on both engines and see that this rank did the same in both, to the bit."""
    theirs, ours = run_both(job)
    return {
        "rows": theirs.log_history,
        "steps": theirs.steps,
        "collated": theirs.collated,
        "wrappers": [wrapper_of(record) for record in (theirs, ours)],
    }


def run_native(job: Job) -> list[dict[str, Any]]:
    """Run a job on the native Trainer alone; returns its steps."""
    return run_theirs(job).steps


def wrapper_of(record: Record) -> dict[str, Any] | None:
    """Read off DDP how it was made."""
    engine = record.engine
    found = engine.model_wrapped if hasattr(engine, "model_wrapped") else engine.strategy.model
    if not isinstance(found, DistributedDataParallel):
        return None
    return {name: getattr(found, name) for name in WRAPPER}


def group_timeout(job: Job) -> timedelta:
    """Train, in a group of hfbridge's own; returns what its collectives wait for others."""
    from tests.parity.engines import run_ours

    if dist.is_initialized():
        dist.destroy_process_group()
    run_ours(job)
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    found: timedelta = backend.options._timeout
    dist.destroy_process_group()
    return found


def several_buckets() -> nn.Module:
    """Two million parameters: more than DDP's first bucket holds."""
    set_seed(5)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            attention_dropout=0.1,
            pad_token_id=0,
        )
    )


class StopsAt(TrainerCallback):
    """Stop in the middle of an epoch, on all ranks alike."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            control.should_training_stop = True


def stops_early() -> list[TrainerCallback]:
    """Make the callbacks of a job."""
    return [StopsAt()]

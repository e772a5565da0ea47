"""What the ranks of a pool run: the jobs of tests/parity/engines.py on both engines."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

from tests.parity.engines import Job, run_both, run_ours, run_theirs
from tests.tiny import VOCABULARY

WRAPPER = (
    "find_unused_parameters",
    "broadcast_buffers",
    "static_graph",
    "bucket_bytes_cap",
    "bucket_bytes_cap_default",
)


def run_job_on_both(job: Job) -> dict[str, Any]:
    """Run a job on both engines and see that this rank did the same in both, to the bit."""
    with noting_wrappers() as wrappers:
        theirs, _ = run_both(job)
    return {
        "rows": theirs.log_history,
        "steps": theirs.steps,
        "collated": theirs.collated,
        "wrappers": wrappers,
    }


@contextmanager
def noting_wrappers() -> Iterator[list[dict[str, Any]]]:
    """Note of each DDP how it was made."""
    made: list[dict[str, Any]] = []
    init = DistributedDataParallel.__init__

    def noting(self: DistributedDataParallel, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **named)
        made.append({name: getattr(self, name) for name in WRAPPER})

    DistributedDataParallel.__init__ = noting  # type: ignore[method-assign]
    try:
        yield made
    finally:
        DistributedDataParallel.__init__ = init  # type: ignore[method-assign]


def run_native(job: Job) -> list[dict[str, Any]]:
    """Run a job on the native Trainer alone; returns its steps."""
    return run_theirs(job).steps


def group_timeout(job: Job) -> timedelta:
    """Train, in a group of hfbridge's own; returns what its collectives wait for others."""
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

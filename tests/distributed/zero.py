"""What the ranks of a pool run under DeepSpeed."""

from typing import Any

import deepspeed

from tests.distributed.jobs import run_job_on_both
from tests.parity.engines import Job


def run_zero_job(job: Job) -> dict[str, Any]:
    """Run a job on both engines."""
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)  # which native leaves to the first model
    return run_job_on_both(job)

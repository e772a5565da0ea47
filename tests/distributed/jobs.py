"""What the ranks of a pool run: the jobs of tests/parity/engines.py on both engines."""

from typing import Any

from tests.parity.engines import Job, run_both


def run_job_on_both(job: Job) -> dict[str, Any]:
    """Run a job on both engines and see that this rank did the same in both, to the bit."""
    theirs, _ = run_both(job)
    return {"rows": theirs.log_history, "steps": len(theirs.steps), "collated": theirs.collated}

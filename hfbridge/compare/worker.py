"""One rank of one engine, in a process of its own: `python -m hfbridge.compare.worker`.

It writes to the engine's folder, of each rank: rank-<n>.jsonl, result-<n>.json, error-<n>.txt if it fails; of
the first: begun.json, metrics.jsonl, and job-error.txt if it is the job that is wrong.
"""

import argparse
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers import set_seed

from hfbridge.compare.engines import Engine
from hfbridge.compare.files import JOB_ERROR, StepWriter, write_json, write_lines
from hfbridge.compare.job import build_job, folder_on_path, load_build, sources_of
from hfbridge.compare.record import Metrics, Recorder, merge_metrics
from hfbridge.compare.training import check_world_size, closing_group, make_native, silence, train
from hfbridge.distributed import collectives
from hfbridge.errors import BridgeError, JobError

SEED = 42
"""Of the random states in which `build()` is called, so that what it draws is the same for all engines."""


def main(arguments: Sequence[str]) -> int:
    """Train on this rank; returns the exit code."""
    given = _parse(arguments)
    _end_with(given.parent)
    engine, folder, rank = Engine.parse(given.engine), given.folder, int(os.environ.get("RANK", "0"))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    try:
        with folder_on_path(given.job), closing_group():
            result = _run(engine, given.job, folder, rank=rank, last_step=given.steps)
        write_json(
            folder / f"result-{rank}.json", {**result, "seconds_startup": result["started"] - given.began}
        )
    except BridgeError as error:
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
        return 1
    except Exception:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return 1
    return 0


def _run(engine: Engine, job: Path, folder: Path, *, rank: int, last_step: int | None) -> dict[str, Any]:
    with _recording_job_errors(folder):
        build = load_build(job)
        set_seed(SEED)
        built = build_job(job, build)
    trainer = make_native(engine, built)
    if engine.kind != "lightning":
        with _recording_job_errors(folder):
            check_world_size(trainer.args, ranks=int(os.environ.get("WORLD_SIZE", "1")))
    silence(trainer, folder / "saved")
    metrics = list[Metrics]()

    def begin(total: int) -> None:
        if rank == 0:
            write_json(folder / "begun.json", {"steps": total})

    with closing(StepWriter(folder / f"rank-{rank}.jsonl")) as steps:
        recorder = Recorder(steps.write, keep_metrics=metrics.append, on_begin=begin, last_step=last_step)
        trained = train(engine, trainer, recorder)
    if collectives.rank() == 0:
        write_lines(folder / "metrics.jsonl", merge_metrics(metrics))
    return {
        **trained,
        "started": recorder.started,
        "seconds_training": recorder.seconds,
        "peak_memory_bytes": _peak_bytes(),
        "first_parameters": recorder.first_parameters,
        "sources": sources_of(job),
    }


@contextmanager
def _recording_job_errors(folder: Path) -> Iterator[None]:
    """Write down that the job is wrong, so that no other engine is tried."""
    try:
        yield
    except JobError as error:
        (folder / JOB_ERROR).write_text(str(error), encoding="utf-8")
        raise


def _parse(arguments: Sequence[str]) -> Any:
    parser = argparse.ArgumentParser(prog="hfbridge.compare.worker")
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--began", type=float, default=time.time())
    parser.add_argument("--parent", type=int, default=os.getppid())
    return parser.parse_args(arguments)


def _end_with(parent: int) -> None:
    """End this process soon after the comparison's has ended, however it did."""

    def look() -> None:
        while psutil.pid_exists(parent):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=look, name="hfbridge-parent", daemon=True).start()


def _peak_bytes() -> int:
    """Return the most memory that this process had: of its GPU, or of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():  # pragma: no cover
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):  # pragma: no cover
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Kill a run of two ranks at random moments, resume it, and compare its end with an uninterrupted run's.

python -m tests.distributed.kills --kills 20 --seed 0 --output kills.json

Each rank is forked by a process that has imported everything, and is connected to the other by the variables
that torchrun sets. Both are killed by SIGKILL, one of them a little later than the other.
"""

import os
import random
import signal
import socket
import sys
import time
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hfbridge.checkpoints.layout import checkpoints_in, unfinished_in
from tests.faults.kills import Ended, Killed, Moment, train, wait_for_checkpoint, write_result

RANKS = 2
APART_S = 0.05


def fork(folder: Path) -> list[int]:
    """Train on two ranks, each in a process of its own; returns their numbers."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [_fork_rank(folder, rank, port) for rank in range(RANKS)]


def _fork_rank(folder: Path, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        with Path(f"run-{rank}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        warnings.simplefilter("ignore")
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            GROUP_RANK="0",
            WORLD_SIZE=str(RANKS),
            LOCAL_WORLD_SIZE=str(RANKS),
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
            TORCHELASTIC_RUN_ID="kills",
        )
        train(f"weights-{rank}.txt")
        dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_to_end(folder: Path) -> Ended:
    """Train to the end."""
    began = time.monotonic()
    children = fork(folder)
    wait_for_checkpoint(folder, children)
    saved_s = time.monotonic() - began
    if any([os.waitpid(child, 0)[1] for child in children]):
        logs = "".join(path.read_text(encoding="utf-8")[-3000:] for path in folder.glob("run-*.log"))
        sys.exit(f"a run failed:\n{logs}")
    first, second = ((folder / f"weights-{rank}.txt").read_text(encoding="utf-8") for rank in range(RANKS))
    assert first == second
    return Ended(first, saved_s, time.monotonic() - began)


def kill_once(folder: Path, moment: Moment, draw: random.Random) -> Killed:
    """Kill both ranks of a run at some moment, resume it, and say what was found."""
    children = fork(folder)
    moment.wait(folder, children)
    draw.shuffle(children)
    for child in children:
        os.kill(child, signal.SIGKILL)
        time.sleep(draw.uniform(0, APART_S))
    were_running = [os.WIFSIGNALED(os.waitpid(child, 0)[1]) for child in children]
    found: dict[str, Any] = {
        **asdict(moment),
        "was_running": any(were_running),
        "checkpoints": [path.name for path in checkpoints_in(folder / "out")],
        "unfinished": len(unfinished_in(folder / "out")),
    }
    return {**found, "weights": run_to_end(folder).weights}


if __name__ == "__main__":
    write_result(__doc__, run_to_end, kill_once)

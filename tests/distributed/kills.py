"""Kill a run of two ranks at random moments, resume it, and compare its end with an uninterrupted run's.

python -m tests.distributed.kills --kills 20 --seed 0 --output kills.json

Each rank is forked by a process that has imported everything, and is connected to the other by the variables
that torchrun sets. Both are killed by SIGKILL, one of them a little later than the other.
"""

import os
import socket
import sys
import traceback
import warnings
from pathlib import Path

import torch.distributed as dist

from tests.faults.kills import train, write_result

RANKS = 2


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


if __name__ == "__main__":
    write_result(__doc__, fork)

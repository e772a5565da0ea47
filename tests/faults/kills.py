"""Kill a run at random moments, resume it, and compare its end with that of a run never interrupted.

python -m tests.faults.kills --kills 50 --seed 0 --output kills.json

One process imports everything and forks each run, so that a run takes about a second. A run trains three
epochs with dropout and accumulation, evaluates, and saves at every step; it is killed by SIGKILL at a moment
drawn from all of its duration. At least a third of the kills come after a checkpoint.
"""

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hfbridge.checkpoints.layout import checkpoints_in, unfinished_in
from tests.parity.engines import Job, make_ours, weights_digest

JOB = Job(
    settings={
        "output_dir": "out",
        "num_train_epochs": 3,
        "gradient_accumulation_steps": 2,
        "save_steps": 1,
        "save_strategy": "steps",
        "save_total_limit": 3,
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
)


Killed = dict[str, Any]
"""What was found of a run that was killed and resumed."""


def train(output: str) -> None:
    """Train from the last checkpoint, if there is one, to the end, and write down the weights."""
    trainer, module, data, *_ = make_ours(JOB)
    last = "last" if checkpoints_in(Path("out")) else None
    trainer.fit(module, data, ckpt_path=last)
    Path(output).write_text(weights_digest(module.model), encoding="utf-8")


def fork(folder: Path) -> int:
    """Train in a process of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        with Path("run.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        warnings.simplefilter("ignore")
        train("weights.txt")
        code = 0
    finally:
        os._exit(code)


def run_to_end(folder: Path) -> tuple[str, float]:
    """Train to the end; returns the digest of the weights, and seconds."""
    began = time.monotonic()
    _, status = os.waitpid(fork(folder), 0)
    if status:
        sys.exit(f"a run failed:\n{(folder / 'run.log').read_text(encoding='utf-8')[-3000:]}")
    return (folder / "weights.txt").read_text(encoding="utf-8"), time.monotonic() - began


def kill_once(folder: Path, after_s: float, draw: random.Random) -> Killed:
    """Kill a run after some seconds, resume it, and say what was found."""
    child = fork(folder)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    found = {
        "killed_after_s": round(after_s, 3),
        "was_running": os.WIFSIGNALED(status),
        "checkpoints": [path.name for path in checkpoints_in(folder / "out")],
        "unfinished": len(unfinished_in(folder / "out")),
    }
    digest, _ = run_to_end(folder)
    return {**found, "weights": digest}


def write_result(
    description: str | None,
    run_to_end: Callable[[Path], tuple[str, float]],
    kill_once: Callable[[Path, float, random.Random], Killed],
) -> None:
    """Kill as often as asked on the command line, and write the result."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folders = (_made(Path(name) / str(i)) for i in itertools.count())
        run_to_end(next(folders))  # warms up
        expected, duration_s = run_to_end(next(folders))
        kills: list[dict[str, Any]] = []
        while len(kills) < options.kills or 3 * sum(bool(kill["checkpoints"]) for kill in kills) < len(kills):
            found = kill_once(next(folders), draw.uniform(0, 1.2 * duration_s), draw)
            if found.pop("was_running"):  # else it came too late, and was none
                kills.append(found)
    result = {
        "duration_s": round(duration_s, 3),
        "kills": len(kills),
        "while_saving": sum(kill["unfinished"] > 0 for kill in kills),
        "resumed_from_a_checkpoint": sum(bool(kill["checkpoints"]) for kill in kills),
        "ended_with_the_same_weights": sum(kill["weights"] == expected for kill in kills),
        "each": kills,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    write_result(__doc__, run_to_end, kill_once)

"""Kill a run at random moments, resume it, and compare its end with that of a run never interrupted.

python -m tests.faults.kills --kills 50 --seed 0 --output kills.json

One process imports everything and forks each run, so that a run takes about a second. A run trains three
epochs with dropout and accumulation, evaluates, and saves at every step. Every other run is killed by SIGKILL
at a moment drawn from all of its duration, the rest at one drawn from the time after its first checkpoint.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

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

Fork = Callable[[Path], list[int]]
"""Starts a run in a folder, in processes of its own; returns their numbers."""

POLL_S = 0.005
APART_S = 0.05


@dataclass(frozen=True)
class Ended:
    """An undisturbed run: digest of its weights, seconds to its first checkpoint, seconds to its end."""

    weights: str
    saved_s: float
    duration_s: float


@dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds after the start, or after the first checkpoint."""

    seconds: float
    saved: bool

    def wait(self, folder: Path, children: list[int]) -> None:
        """Sleep until the moment has come, or a run has ended before its first checkpoint."""
        if self.saved:
            wait_for_checkpoint(folder, children)
        time.sleep(self.seconds)


def wait_for_checkpoint(folder: Path, children: list[int]) -> None:
    """Wait until a run's first checkpoint is there, or one of its processes has ended."""
    while not checkpoints_in(folder / "out") and not any(map(_has_ended, children)):
        time.sleep(POLL_S)


def _has_ended(child: int) -> bool:
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # its status stays to be read
    return ended is not None


def train(output: str) -> None:
    """Train from the last checkpoint, if there is one, to the end, and write down the weights."""
    trainer, module, data, *_ = make_ours(JOB)
    last = "last" if checkpoints_in(Path("out")) else None
    trainer.fit(module, data, ckpt_path=last)
    Path(output).write_text(weights_digest(module.model), encoding="utf-8")


def enter(folder: Path) -> None:
    """Have a process that was forked run in a folder, and write what it says into a log there."""
    os.chdir(folder)
    with Path("run.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    warnings.simplefilter("ignore")


def fork(folder: Path) -> list[int]:
    """Train in a process of its own; returns its number."""
    child = os.fork()
    if child:
        return [child]
    code = 1
    try:
        enter(folder)
        train("weights.txt")
        code = 0
    finally:
        os._exit(code)


def run_to_end(folder: Path, fork: Fork) -> Ended:
    """Train to the end, in all processes with the same weights."""
    began = time.monotonic()
    children = fork(folder)
    wait_for_checkpoint(folder, children)
    saved_s = time.monotonic() - began
    if any([os.waitpid(child, 0)[1] for child in children]):
        logs = "".join(path.read_text(encoding="utf-8")[-3000:] for path in folder.glob("run*.log"))
        sys.exit(f"a run failed:\n{logs}")
    found = [path.read_text(encoding="utf-8") for path in folder.glob("weights*.txt")]
    assert len(found) == len(children)
    assert len(set(found)) == 1
    return Ended(found[0], saved_s, time.monotonic() - began)


def kill_once(folder: Path, moment: Moment, draw: random.Random, fork: Fork) -> Killed:
    """Kill a run at some moment, one process a little after the other, resume it, and say what was found."""
    children = fork(folder)
    moment.wait(folder, children)
    draw.shuffle(children)
    for number, child in enumerate(children):
        time.sleep(draw.uniform(0, APART_S) if number else 0)
        os.kill(child, signal.SIGKILL)
    were_running = [os.WIFSIGNALED(os.waitpid(child, 0)[1]) for child in children]
    found: dict[str, Any] = {
        **asdict(moment),
        "was_running": any(were_running),
        "checkpoints": [path.name for path in checkpoints_in(folder / "out")],
        "unfinished": len(unfinished_in(folder / "out")),
    }
    return {**found, "weights": run_to_end(folder, fork).weights}


def write_result(description: str | None, fork: Fork) -> None:
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
        run_to_end(next(folders), fork)  # warms up
        whole = run_to_end(next(folders), fork)
        kills: list[dict[str, Any]] = []
        with tqdm(total=options.kills, unit="kill") as bar:
            while len(kills) < options.kills:
                found = kill_once(next(folders), _moment(whole, len(kills), draw), draw, fork)
                if found.pop("was_running"):  # else it came too late, and was none
                    kills.append(found)
                    bar.update()
    result = {
        "duration_s": round(whole.duration_s, 3),
        "first_checkpoint_s": round(whole.saved_s, 3),
        "kills": len(kills),
        "while_saving": sum(kill["unfinished"] > 0 for kill in kills),
        "resumed_from_a_checkpoint": sum(bool(kill["checkpoints"]) for kill in kills),
        "ended_with_the_same_weights": sum(kill["weights"] == whole.weights for kill in kills),
        "each": kills,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _moment(whole: Ended, number: int, draw: random.Random) -> Moment:
    saved = number % 2 == 1
    rest_s = whole.duration_s - whole.saved_s if saved else whole.duration_s
    return Moment(round(draw.uniform(0, rest_s), 3), saved)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    write_result(__doc__, fork)

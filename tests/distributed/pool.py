"""Ranks that live as long as the tests: torchrun starts them once, since importing takes longer than a test.

A job is a function of a module with arguments that pickle. It runs on all ranks at the same time, each in a
directory of its own, with the process group that an earlier job has left open, or none.
"""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


class RankError(AssertionError):
    """A rank failed; the message holds its traceback."""


class Pool:
    """Some ranks, started by torchrun.

    Args:
        world_size: how many.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._process: subprocess.Popen[str] | None = None
        self._folder = Path()
        self._number = 0

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 420) -> list[Any]:
        """Run a function of a module on all ranks.

        Returns:
            What each rank returned.

        Raises:
            RankError: a rank raised, ended, or took too long.
        """
        if self._process is None:
            self._start()
        job = (function.__module__, function.__name__, arguments)
        unfinished = self._folder / "unfinished-job"
        unfinished.write_bytes(pickle.dumps(job))
        unfinished.rename(self._folder / f"job-{self._number}")
        paths = [self._folder / f"result-{self._number}-{rank}" for rank in range(self.world_size)]
        self._number += 1
        try:
            results = self._wait(paths, timeout_s)
        except RankError:
            self.close()
            raise
        failed = [f"rank {rank}:\n{told}" for rank, (is_well, told) in enumerate(results) if not is_well]
        if failed:
            self.close()  # the group may be out of step
            raise RankError("\n".join(failed))
        return [returned for _, returned in results]

    def largest_bytes(self) -> tuple[int, int]:
        """Return how much memory the largest rank has, and how much it has reserved."""
        if self._process is None or self._process.poll() is not None:
            return 0, 0
        ranks = psutil.Process(self._process.pid).children(recursive=True)
        found = [rank.memory_info() for rank in ranks if rank.is_running()]
        return max((one.rss for one in found), default=0), max((one.vms for one in found), default=0)

    def close(self) -> None:
        """End the ranks."""
        if self._process is None:
            return
        (self._folder / "end").touch()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.terminate()  # torchrun ends its ranks, by SIGKILL in the end
            try:
                self._process.wait(40)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        self._folder, self._number = Path(tempfile.mkdtemp(prefix="ranks-")), 0
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            f"--nproc-per-node={self.world_size}",
            "-m",
            "tests.distributed.worker",
            str(self._folder),
        ]
        with (self._folder / "output").open("w") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                    "HF_HUB_OFFLINE": "1",
                    "DS_ACCELERATOR": "cpu",
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def _wait(self, paths: list[Path], timeout_s: float) -> list[tuple[bool, Any]]:
        assert self._process is not None
        end = time.monotonic() + timeout_s
        results: dict[Path, tuple[bool, Any]] = {}
        grace_end = end
        while len(results) < len(paths):
            for path in paths:
                if path not in results and path.exists():
                    results[path] = pickle.loads(path.read_bytes())
                    if not results[path][0]:  # the others may wait for it for ever
                        grace_end = min(grace_end, time.monotonic() + 10)
            failed = [result for result in results.values() if not result[0]]
            if self._process.poll() is not None or time.monotonic() > min(end, grace_end):
                if failed and len(results) < len(paths):
                    raise RankError("\n".join(str(told) for _, told in failed))
                if len(results) < len(paths):
                    raise RankError(f"a rank ended, or took more than {timeout_s} s:\n{self._output()}")
            time.sleep(0.01)
        return [results[path] for path in paths]

    def _output(self) -> str:
        return (self._folder / "output").read_text(errors="replace")[-4000:]

"""Starting the script that users write, by every launcher, in sessions that leave nothing behind."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run")
# Variables that a test run under a launcher of its own would hand on.
FOREIGN = ("TORCHELASTIC", "SLURM_", "ACCELERATE_", "MASTER_", "GROUP_", "ROLE_")
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Started:
    """A command in a session of its own.

    Args:
        arguments: of Python.
        folder: where it runs; its output goes to a file there.
        variables: of its environment.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, variables: Mapping[str, str]) -> None:
        number = len(list(folder.glob("output-*")))
        self._output = folder / f"output-{number}"
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in OF_RANKS and not name.startswith(FOREIGN)
        }
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it and its children have written."""
        return self._output.read_text(errors="replace")

    def wait(self, timeout_s: float = 240) -> int:
        """Wait for its end; returns the exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {timeout_s} s:\n{self.output[-3000:]}") from None

    def members(self) -> list[int]:
        """Processes of its session that are alive."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                    if int(session) == self.process.pid and state != "Z":
                        found.append(int(entry.name))
        return found

    def left(self, grace_s: float = 15) -> list[int]:
        """Processes that are there some time after it has ended."""
        end = time.monotonic() + grace_s
        while self.members() and time.monotonic() < end:
            time.sleep(0.1)
        return self.members()

    def kill(self) -> None:
        """End it and all of its children."""
        for process in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait(30)


class Launcher:
    """Starts scripts in a folder; those which are left are killed in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Started] = []
        shutil.copy(Path(__file__).with_name("train_script.py"), folder / "train.py")

    def start(
        self, *arguments: str, variables: Mapping[str, str] | None = None, script: bool = True, **job: Any
    ) -> Started:
        """Start the script.

        Args:
            *arguments: of Python, before the script.
            variables: of the environment.
            script: whether the script and its job are appended.
            **job: what tests/distributed/train_script.py is to do.
        """
        appended = ["train.py", json.dumps(job)] if script else []
        self.started.append(Started([*arguments, *appended], self.folder, variables or {}))
        return self.started[-1]

    def results(self) -> dict[int, dict[str, Any]]:
        """What each rank has written, by rank."""
        found = {}
        for path in self.folder.glob("result-*.json"):
            result = json.loads(path.read_text())
            found[result["rank"]] = result
            path.unlink()
        return dict(sorted(found.items()))

    def wait_for(self, name: str, timeout_s: float = 180) -> None:
        """Wait until a file is there."""
        end = time.monotonic() + timeout_s
        while not (self.folder / name).exists():
            if time.monotonic() > end or any(one.process.poll() for one in self.started):
                outputs = "\n".join(one.output[-3000:] for one in self.started)
                raise AssertionError(f"{name} has not come:\n{outputs}")
            time.sleep(0.05)

    def kill(self) -> None:
        """End everything."""
        for one in self.started:
            one.kill()


@contextlib.contextmanager
def launcher_in(folder: Path) -> Iterator[Launcher]:
    """Give a launcher, and end what it has left."""
    found = Launcher(folder)
    try:
        yield found
    finally:
        found.kill()

"""The processes of one engine: started, followed, and ended with all their children."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]

from hfbridge.compare.engines import Engine
from hfbridge.compare.files import read_json

# Of a launcher that runs the comparison itself.
_FOREIGN = ("TORCHELASTIC_", "SLURM_", "MASTER_", "GROUP_", "ROLE_", "ACCELERATE_", "FSDP_")
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
_LOOK_EVERY_S = 0.1
_GRACE_S = 10.0
_MOST_LINES = 40


class Processes:
    """The ranks of an engine, which torchrun starts if there are several or a strategy is set.

    As a context it ends whatever is left when it is closed.

    Args:
        engine: which.
        job: the script.
        folder: of the engine; it is there, and empty.
        ranks: how many.
        steps: the last one; `None` lets the job end by itself.
    """

    def __init__(self, engine: Engine, job: Path, folder: Path, *, ranks: int, steps: int | None) -> None:
        self._folder = folder
        self._read_to, self._done = 0, 0
        with (folder / "output.txt").open("wb") as output:
            self._process = subprocess.Popen(
                _command(engine, job, folder, ranks=ranks, steps=steps),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the comparison, which ends them itself
            )

    @property
    def pid(self) -> int:
        """Number of the process that has started the others, or that is the only one."""
        return self._process.pid

    def __enter__(self) -> "Processes":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what is left."""
        self.end()

    def follow(self, show: Callable[[int, int | None], None]) -> bool:
        """Wait until all have ended.

        Args:
            show: called with the completed steps, and the total once it is known.

        Returns:
            Whether they have ended well.
        """
        total: int | None = None
        while True:
            has_ended = self._process.poll() is not None
            if total is None and (self._folder / "begun.json").exists():
                total = int(read_json(self._folder / "begun.json")["steps"])
            show(self._steps_done(), total)
            if has_ended:
                return self._process.returncode == 0
            time.sleep(_LOOK_EVERY_S)

    def end(self) -> None:
        """End the processes and all that they have started."""
        try:
            main = psutil.Process(self._process.pid)
            found = [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            found = []
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, left = psutil.wait_procs(found, timeout=_GRACE_S)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _steps_done(self) -> int:
        """Count the lines written so far; only the new ones are read."""
        path = self._folder / "rank-0.jsonl"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._read_to)
                new = file.read()
            self._read_to += len(new)
            self._done += new.count(b"\n")
        return self._done


def _command(engine: Engine, job: Path, folder: Path, *, ranks: int, steps: int | None) -> list[str]:
    command = [sys.executable]
    if ranks > 1 or engine.strategy is not None:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "hfbridge.compare.worker", f"--job={job.resolve()}", f"--engine={engine.name}"]
    command += [f"--folder={folder.resolve()}", f"--began={time.time()}", f"--parent={os.getpid()}"]
    return command if steps is None else [*command, f"--steps={steps}"]


def last_lines(folder: Path) -> str:
    """Return why an engine has failed: the error that came first, or the end of its output."""
    errors = sorted(folder.glob("error-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    path = errors[0] if errors else folder / "output.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join(lines[-_MOST_LINES:]) or "It has ended without any output."


def _environment() -> Mapping[str, Any]:
    """Make the environment of fresh processes, the same for all engines."""
    kept = {n: v for n, v in os.environ.items() if n not in _OF_RANKS and not n.startswith(_FOREIGN)}
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package, *filter(None, [kept.get("PYTHONPATH")])])
    return {"PYTHONHASHSEED": "0", **kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

"""Scripts of libraries that subclass transformers' Trainer: as python runs them, and as `hfbridge run` does.

Each side has a process that lives as long as the tests of a module: importing takes longer than a script.
"""

import runpy
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent / "scripts"


def save_models(folder: Path) -> Path:
    """Write the models that the scripts load; returns the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        from local import save_model

    for kind in ("llama", "llama-reward", "bert", "bert-rank"):
        save_model(kind, folder / kind)
    return folder


def run_natively(name: str, arguments: list[str]) -> None:
    """Run a script as python does."""
    path = SCRIPTS / f"{name}.py"
    argv, folders = sys.argv, sys.path
    sys.argv, sys.path = [str(path), *arguments], [str(path.parent), *folders]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path = argv, folders


def run_bridged(name: str, arguments: list[str]) -> None:
    """Run a script as `hfbridge run` does."""
    from hfbridge.dropin import run

    assert run(SCRIPTS / f"{name}.py", arguments) == 0


def _run(side: Any, folder: Path, name: str, arguments: list[str]) -> None:
    with chdir(folder):
        side(name, arguments)


class TwoProcesses:
    """A process for each side.

    Attributes:
        folder: where the scripts run, each side in a folder of its own.
    """

    def __init__(self, theirs: ProcessPoolExecutor, ours: ProcessPoolExecutor) -> None:
        self._sides = {"theirs": (theirs, run_natively), "ours": (ours, run_bridged)}

    def run(self, folder: Path, name: str, arguments: list[str]) -> None:
        """Run a script on both sides, in `folder/theirs` and `folder/ours`."""
        for side in self._sides:
            self.run_one(side, folder, name, arguments)

    def run_one(self, side: str, folder: Path, name: str, arguments: list[str]) -> None:
        """Run a script on one side; its exceptions pass."""
        executor, runs = self._sides[side]
        (folder / side).mkdir(exist_ok=True)
        executor.submit(_run, runs, folder / side, name, arguments).result()


@contextmanager
def two_processes() -> Iterator[TwoProcesses]:
    """Start the processes at the first script, and end them."""
    spawn: Any = {"max_workers": 1, "mp_context": get_context("spawn")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "0")  # model cards and adapters list sets
        with ProcessPoolExecutor(**spawn) as theirs, ProcessPoolExecutor(**spawn) as ours:
            yield TwoProcesses(theirs, ours)

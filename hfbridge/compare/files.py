"""The files of a comparison, in its folder.

    file                    what is in it
    comparison.json         schema, job, engines, ranks, steps, environment, settings, verdicts
    <slug>/begun.json       how many steps the engine is going to take
    <slug>/rank-<n>.jsonl   steps of a rank while it trains; removed at the end
    <slug>/steps.jsonl      a line an optimizer step; record.py has the table
    <slug>/metrics.jsonl    a line an evaluation
    <slug>/done.json        engine, seconds_training, _startup and _in_all, samples_per_second,
                            peak_memory_bytes, settings, notes, first_ and final_parameters; ranks, steps,
                            versions, sources
    <slug>/failed.txt       last lines of an engine that failed, instead
    <slug>/output.txt       everything that its processes have written

A JSON file is written beside its place and renamed: one that is there is whole.
"""

import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hfbridge.compare.record import Metrics, Step
from hfbridge.errors import JobError

SCHEMA = 1
COMPARISON = "comparison.json"
JOB_ERROR = "job-error.txt"  # of a rank, if it is the job that is wrong
_PACKAGES = ("hfbridge", "torch", "transformers", "accelerate", "lightning", "datasets", "deepspeed")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    _write(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        JobError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"{path}: cannot be read ({error}). Delete it, and compare again.") from error
    if not isinstance(found, dict):
        raise JobError(f"{path}: holds no object. Delete it, and compare again.")
    return found


def read_done(folder: Path) -> dict[str, Any] | None:
    """Read the results of an engine; `None` if it did not finish."""
    return read_json(folder / "done.json") if (folder / "done.json").exists() else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; of a file that is not there, none.

    Raises:
        JobError: a line is damaged.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise JobError(
                f"{path}, line {number}: {error}. Delete its folder, and compare again."
            ) from error
    return found


class StepWriter:
    """Write the steps of a rank line by line, each at once, to a new file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, step: Step) -> None:
        """Write one."""
        self._file.write(json.dumps(step.as_row()) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_steps(folder: Path) -> list[Step]:
    """Read what an engine has recorded."""
    return [Step(**row) for row in read_lines(folder / "steps.jsonl")]


def read_metrics(folder: Path) -> list[Metrics]:
    """Read the evaluations of an engine."""
    return read_lines(folder / "metrics.jsonl")


def versions() -> dict[str, str]:
    """Return the versions that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Describe machine and versions, without paths or the name of the machine."""
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())

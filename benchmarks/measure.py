"""What the benchmarks share: fresh processes, spreads, the environment, results as JSON."""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "accelerate", "lightning", "datasets")


def command_of(arguments: list[str]) -> str:
    """Write the command of a measurement so that it can be repeated from the root of any checkout."""
    root = RESULTS.parents[1]
    script, *others = arguments

    def plain(argument: str) -> str:
        """Name a path from the root; one that is neither in it nor beside it by its last part."""
        if not os.path.isabs(argument):
            return argument
        path = os.path.relpath(argument, root)
        return Path(argument).name if path.startswith("../../") else path

    return " ".join(["python", os.path.relpath(script, root), *map(plain, others)])


def run_fresh(script: Path | str, *arguments: object) -> dict[str, Any]:
    """Run a script in a process of its own, one thread, and read the last line it prints as JSON."""
    one_thread = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **one_thread})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """Median, quartiles and extremes."""
    ordered = sorted(values)
    first, median, third = (
        statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    )
    return {
        "median": median,
        "quartiles": [first, third],
        "min": ordered[0],
        "max": ordered[-1],
        "repeats": len(ordered),
        "values": values,
    }


def write(name: str, results: dict[str, Any], arguments: argparse.Namespace) -> Path:
    """Write results with what is needed to read them later."""
    about = {
        "command": command_of(sys.argv),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
        "versions": {package: version(package) for package in PACKAGES},
    }
    path: Path = arguments.out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, **results}, indent=1) + "\n")
    return path


def commit() -> str | None:
    """Say what was measured; `None` outside a repository."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return found.stdout.strip() or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )

"""Check hfbridge on a GPU beside the HF Trainer: one command, one JSON file, written after each measurement.

    parity        loss, gradient norm, learning rate of each step, and the final weights
    strategies    ddp, fsdp2, DeepSpeed, and Lightning's own: train, save, resume to the bit
    speed         samples or tokens per second, MFU, memory, beside a hand-written loop
    host          what the host waits for; saving; workers and pinned memory
    tests         the tests that carry the mark `gpu`

`--tiny` runs all of it with tiny models on a CPU. Exits with 1 if a measurement failed, or was left out
because the time was up.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import host  # noqa: E402
import parity  # noqa: E402
import speed  # noqa: E402
import strategies  # noqa: E402
from measure import RESULTS, write  # noqa: E402
from plan import Measurement, measure, measure_all  # noqa: E402

# Their measurements, and how many run at once: one where times are measured.
PARTS = {
    "parity": (parity.measurements, 4),
    "strategies": (strategies.measurements, 4),
    "speed": (speed.measurements, 1),
    "host": (host.measurements, 1),
    "tests": (None, 1),
}


def describe_device() -> dict[str, Any]:
    """Say on what this runs."""
    import torch

    if not torch.cuda.is_available():
        return {"device": "cpu"}
    memory = torch.cuda.get_device_properties(0).total_memory
    return {"device": torch.cuda.get_device_name(), "memory_bytes": memory, "cuda": torch.version.cuda}


def run_tests(*, tiny: bool, limit_s: float) -> dict[str, Any]:
    """Run the tests marked `gpu`; tiny, only collect them."""
    tests = HERE.parents[1] / "tests"
    files = sorted(str(path) for path in tests.rglob("test_*.py") if "mark.gpu" in path.read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--timeout=120"]
    command += files
    command += ["--collect-only"] if tiny else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        return {"error": f"not finished within {limit_s:.0f} s", "output": str(error.stdout or "")[-2000:]}
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    found: dict[str, Any] = {"summary": lines[-1] if lines else "", "failed": failed}
    if tiny:
        found["collected"] = [line for line in lines if "::" in line]
    return found if done.returncode == 0 else {**found, "error": (done.stdout + done.stderr)[-4000:]}


def measurements_of(part: str, only: str | None, *, tiny: bool) -> Iterator[Measurement]:
    make, _ = PARTS[part]
    assert make is not None
    return (one for one in make(tiny=tiny) if only is None or only in one.name)


def failures(results: dict[str, Any]) -> list[str]:
    """Name each measurement that has an error, and the error."""
    return [
        f"{part}: {name}: {found['error']}"
        for part in PARTS
        for name, found in results.get(part, {}).items()
        if "error" in found
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU, to try the script")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", help="only measurements whose name contains this")
    parser.add_argument("--minutes", type=float, default=8.0, help="no measurement begins later; default 8")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/gpu.json")
    given = parser.parse_args()
    given.out = given.out or RESULTS / "gpu.json"
    end = time.monotonic() + given.minutes * 60
    # cuBLAS reads it when it starts: torch's deterministic algorithms need it.
    os.environ |= {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    about = measure(Measurement("device", describe_device))
    if not given.tiny and about.get("device") == "cpu":
        raise SystemExit("No GPU is available to torch. Try the script on a CPU with --tiny.")
    results: dict[str, Any] = {"device": about, "is_tiny": given.tiny}
    for part in given.parts:
        kept = results.setdefault(part, {})

        def keep(name: str, found: dict[str, Any], part: str = part, kept: dict[str, Any] = kept) -> None:
            kept[name] = found
            if part == "speed":
                results["summary"] = speed.summarize(kept)
            write("gpu", results, given)
            told = found.get("error") or ", ".join(
                f"{k} {v}" for k, v in found.items() if not isinstance(v, list)
            )
            print(f"{part}: {name}: {told}"[:300], flush=True)

        if part == "tests":
            limit_s = max(60.0, end - time.monotonic())
            keep("pytest -m gpu", run_tests(tiny=given.tiny, limit_s=limit_s))
        else:
            at_once = 1 if given.tiny else PARTS[part][1]
            measure_all(
                measurements_of(part, given.only, tiny=given.tiny), at_once=at_once, end=end, keep=keep
            )
    failed = failures(results)
    print(f"written to {given.out}; {len(failed)} failed", *failed, sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

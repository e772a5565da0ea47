"""The demo's job in samples per second: MiniLM on film reviews, native Trainer and hfbridge taking turns.

Each measurement is a fresh process with one thread; the first two steps are warm-up. The median step counts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import spread, write

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"
SIDES = {"native": "native", "hfbridge": "bridge"}
SAMPLES_PER_STEP = 64


def measure_one(side: str, precision: str, steps: int, *, tiny: bool) -> dict[str, float]:
    """Run one side in a fresh process; samples per second of its median step, and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        command = [
            sys.executable,
            str(DEMO),
            "--engine",
            SIDES[side],
            "--record",
            str(record),
            "--threads",
            "1",
        ]
        command += ["--steps", str(steps), "--eval-steps", str(steps + 1), "--logging-steps", "2"]
        command += ["--precision", precision]
        done = subprocess.run([*command, *(["--tiny"] if tiny else [])], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        lines: list[dict[str, Any]] = [json.loads(line) for line in record.read_text().splitlines()]
    times = [line["time_s"] for line in lines if "step" in line][1:]
    lengths = sorted(later - earlier for earlier, later in pairwise(times))
    peak = next(line["outcome"]["peak_memory_mib"] for line in lines if "outcome" in line)
    return {"samples_per_second": SAMPLES_PER_STEP / lengths[len(lengths) // 2], "peak_memory_mib": peak}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=7, help="optimizer steps, the first two not counted")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model on a few reviews, to try the script"
    )
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/finetune.json")
    parser.add_argument("--check", action="store_true", help="exit 1 if hfbridge is slower than native")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for repeat in range(arguments.repeats):
            for side in SIDES:
                found[side].append(measure_one(side, precision, arguments.steps, tiny=arguments.tiny))
            print(f"{precision}: repeat {repeat + 1} of {arguments.repeats}", file=sys.stderr)
        theirs = [one["samples_per_second"] for one in found["native"]]
        results[precision] = {}
        for side, measured in found.items():
            speeds = [one["samples_per_second"] for one in measured]
            results[precision][side] = {
                "samples_per_second": spread(speeds),
                "of_native": spread([ours / native for ours, native in zip(speeds, theirs, strict=True)]),
                "peak_memory_mib": spread([one["peak_memory_mib"] for one in measured]),
            }
    print(
        f"{'':16} {'precision':>9} {'samples/s':>10} {'of native':>10} {'min':>6} {'max':>6} {'peak MiB':>9}"
    )
    for precision, sides in results.items():
        for side, row in sides.items():
            ratio = row["of_native"]
            speed, peak = row["samples_per_second"]["median"], row["peak_memory_mib"]["median"]
            print(
                f"{side:16} {precision:>9} {speed:>10.2f} {ratio['median']:>10.3f} "
                f"{ratio['min']:>6.3f} {ratio['max']:>6.3f} {peak:>9.0f}"
            )
    print(f"written to {write('finetune', results, arguments)}")
    slower = [p for p in results if results[p]["hfbridge"]["of_native"]["quartiles"][1] < 1.0]
    return int(arguments.check and bool(slower))


if __name__ == "__main__":
    sys.exit(main())

"""Samples per second on one rank and on two, one thread each: hfbridge and the native Trainer taking turns.

Each measurement is a fresh torchrun; a repeat measures both engines one after the other, in an order that
changes. Time is that of the median step, between the ends of steps.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from measure import spread, write
from ranks import run

ENGINES = ("native", "hfbridge")
LEAST = 0.97  # of native's samples per second: "not below", as well as it can be told


def measure_all(repeats: int, steps: int, rows: int, length: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for ranks in (1, 2):
        speeds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
        for repeat in range(repeats):
            for engine in ENGINES if repeat % 2 else ENGINES[::-1]:
                found = run("small", engine, "ddp", ranks, steps=steps, rows=rows, length=length)
                speeds[engine].append(ranks * rows / max(rank["step_s"] for rank in found))
            print(f"{ranks} ranks, repeat {repeat + 1} of {repeats}", file=sys.stderr)
        shares = [ours / native for ours, native in zip(speeds["hfbridge"], speeds["native"], strict=True)]
        result[f"ranks_{ranks}"] = {
            **{engine: {"samples_per_second": spread(found)} for engine, found in speeds.items()},
            "of_native": spread(shares),
        }
    for engine in ENGINES:
        one, two = (result[f"ranks_{n}"][engine]["samples_per_second"]["median"] for n in (1, 2))
        result[f"two_ranks_of_one_{engine}"] = two / one
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/scaling.json")
    parser.add_argument("--check", action="store_true", help="exit 1 if hfbridge is slower")
    given = parser.parse_args()
    results = measure_all(given.repeats, given.steps, given.rows, given.length)
    for ranks in (1, 2):
        row = results[f"ranks_{ranks}"]
        speeds = ", ".join(f"{e} {row[e]['samples_per_second']['median']:.1f}/s" for e in ENGINES)
        print(f"{ranks} ranks: {speeds}; {row['of_native']['median']:.3f} of native")
    print(f"written to {write('scaling', results, given)}")
    slow = any(results[f"ranks_{n}"]["of_native"]["median"] < LEAST for n in (1, 2))
    return int(given.check and slow)


if __name__ == "__main__":
    sys.exit(main())

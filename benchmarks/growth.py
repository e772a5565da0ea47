"""Whether anything grows with hfbridge that does not grow with the native Trainer.

Time of an optimizer step and the most memory, one thread a process, against accumulation, callbacks, loggers,
length of rows, rows of the set, and ranks; growth_jobs.py and ranks.py say how each is measured. A repeat has
fresh processes for each engine: one trains the sizes of all axes but two, the smallest first, one those of
rows, and ranks have a torchrun for each number. The engines take turns. Beside them:

    resume    seconds from `fit` or `train` to the end of the first step: from scratch, and in mid-pass
    start     seconds to the end of the first step of a job whose map is cached: from the call, from before
              the engine is made, from the start of the process

Memory is that of the process alone, without pages of files, beyond what there was before the first run; on
ranks it is the most of any. With --check the rule is: what the largest size takes more than the smallest is,
of hfbridge, no more than of the native Trainer. Each repeat gives the difference of the two; it is a fault if
the lower quartile of these is above `ALLOWED`, and for a start if it is above 0. Ratios would mislead: where
a step of hfbridge costs less by a fixed amount, its share of native's grows towards 1 with everything that
both do.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ranks
from measure import RESULTS, commit, run_fresh, spread, write
from rows_memory import write_rows

JOBS = Path(__file__).parent / "growth_jobs.py"
ENGINES = ("native", "hfbridge")
SIZES = {
    "accumulation": [1, 4, 16, 64],
    "callbacks": [0, 4, 16],
    "lightning_callbacks": [0, 4, 16],
    "loggers": [0, 4, 16],
    "length": [32, 128, 512],
    "rows": [10_000, 100_000, 1_000_000, 10_000_000],
    "ranks": [1, 2, 4],
    "resume": [1_000_000, 10_000_000],
    "start": [100_000],
}
ALLOWED = {
    # Of native's value at the largest size, and absolutely: what repeats of one engine differ by.
    "cpu_us": (0.05, 0.0),
    "wall_us": (0.10, 0.0),
    "memory_bytes": (0.05, 2 * 2**20),
}
RESUME_S = 1.0  # more than a start from scratch
ROW_LENGTH, STEPS_OF_RANKS = 4, 200

# Axes that are measured in the same processes, whose imports take most of the time.
TOGETHER = (
    ("accumulation", "callbacks", "lightning_callbacks", "loggers", "length"),
    ("rows",),
    ("ranks",),
    ("resume",),
    ("start",),
)

Sizes = dict[str, list[int]]
Found = dict[str, dict[str, list[dict[str, float]]]]  # of engine and size, one for each repeat


def measure_once(engine: str, jobs: Sizes, folder: Path, scale: float) -> dict[str, dict[str, Any]]:
    """Measure all sizes of some axes once, with one engine."""
    if "ranks" in jobs:
        return {"ranks": {str(count): of_ranks(engine, count, folder, scale) for count in jobs["ranks"]}}
    given = ("--engine", engine, "--jobs", json.dumps(jobs), "--folder", folder, "--scale", scale)
    return run_fresh(JOBS, *given, "--since", time.time())


def of_ranks(engine: str, count: int, folder: Path, scale: float) -> dict[str, float]:
    """Train under DDP; the slowest rank counts, and the largest."""
    steps = max(int(STEPS_OF_RANKS * scale), 2 * ranks.WARM_UP)
    sizes = {"steps": steps, "rows": 4, "length": 16}
    found = ranks.run("tiny", engine, "ddp", count, **sizes, model=folder / "model")
    return {
        "cpu_us": max(rank["step_cpu_s"] for rank in found) * 1e6,
        "wall_us": max(rank["step_s"] for rank in found) * 1e6,
        "memory_bytes": max(rank["training_bytes"] for rank in found),
    }


def prepare(jobs: Sizes, folder: Path) -> None:
    """Write what the processes of some axes read, and let them have read it."""
    for axis in jobs.keys() & {"rows", "resume", "start"}:
        for rows in jobs[axis]:
            if not (folder / f"{rows}.arrow").exists():
                write_rows(folder / f"{rows}.arrow", rows, length=ROW_LENGTH)
    if "resume" in jobs:
        run_fresh(JOBS, "--jobs", json.dumps({"middles": jobs["resume"]}), "--folder", folder)
    if "start" in jobs:
        for engine in ENGINES:  # fills the cache
            measure_once(engine, jobs, folder, 1.0)
    if "ranks" in jobs:
        ranks.make_in_a_process("tiny", folder / "model")


def measure_together(jobs: Sizes, repeats: int, folder: Path, scale: float) -> dict[str, Any]:
    """Measure some axes in the same processes; the engines take turns, in an order that changes."""
    prepare(jobs, folder)
    found: dict[str, Found] = {
        axis: {engine: {str(size): [] for size in sizes} for engine in ENGINES}
        for axis, sizes in jobs.items()
    }
    for repeat in range(repeats):
        for engine in ENGINES if repeat % 2 else ENGINES[::-1]:
            for axis, values_of in measure_once(engine, jobs, folder, scale).items():
                for size, values in values_of.items():
                    found[axis][engine][size].append(values)
        print(f"{', '.join(jobs)}: repeat {repeat + 1} of {repeats}", file=sys.stderr)
    return {axis: summed_up(of_axis) for axis, of_axis in found.items()}


def summed_up(found: Found) -> dict[str, Any]:
    """Make medians and quartiles of each size, ratios to native, and what grows more than natively."""
    sizes = list(found["native"])
    result: dict[str, Any] = {"sizes": {}}
    for size in sizes:
        runs = {engine: found[engine][size] for engine in ENGINES}
        result["sizes"][size] = {
            **{
                engine: {name: spread([run[name] for run in of]) for name in of[0]}
                for engine, of in runs.items()
            },
            "of_native": {
                name: spread(
                    [
                        ours[name] / max(native[name], 1e-9)
                        for native, ours in zip(*runs.values(), strict=True)
                    ]
                )
                for name in runs["native"][0]
                if name in ALLOWED and name != "memory_bytes"
            },
        }
    smallest, largest = sizes[0], sizes[-1]
    if smallest != largest:
        result["more_than_native"] = {
            name: spread(
                [
                    (ours[1][name] - ours[0][name]) - (native[1][name] - native[0][name])
                    for native, ours in zip(
                        *(zip(found[e][smallest], found[e][largest], strict=True) for e in ENGINES),
                        strict=True,
                    )
                ]
            )
            for name in ALLOWED
            if name in found["native"][smallest][0]
        }
    return result


def complaints(results: dict[str, Any]) -> list[str]:
    """Name what is beyond the limits.

    Args:
        results: by axis.
    """
    wrong = []
    for axis, found in results.items():
        sizes = list(found["sizes"])
        for name, more in found.get("more_than_native", {}).items():
            share, absolute = ALLOWED[name]
            allowed = share * found["sizes"][sizes[-1]]["native"][name]["median"] + absolute
            if more["quartiles"][0] > allowed:
                text = (
                    f"from {sizes[0]} to {sizes[-1]} {name} grows by {more['median']:.0f} more than natively"
                )
                wrong.append(
                    f"{axis}: {text} (lower quartile {more['quartiles'][0]:.0f}, {allowed:.0f} allowed)"
                )
    for rows, row in results.get("resume", {"sizes": {}})["sizes"].items():
        ours = row["hfbridge"]
        more_s = ours["resume_s"]["median"] - ours["scratch_s"]["median"]
        if more_s > RESUME_S:
            wrong.append(f"resume: {rows} rows take {more_s:.2f} s more than a start from scratch")
    for row in results.get("start", {"sizes": {}})["sizes"].values():
        for name in ("from_imports_s", "from_process_s"):
            ours, native = (row[engine][name] for engine in ("hfbridge", "native"))
            later = spread([one - other for one, other in zip(ours["values"], native["values"], strict=True)])
            if later["quartiles"][0] > 0:
                text = f"{name} is {ours['median']:.2f} s, natively {native['median']:.2f} s"
                wrong.append(
                    f"start: {text} (lower quartile of the differences {later['quartiles'][0]:.2f} s)"
                )
    return wrong


def others(given: argparse.Namespace) -> dict[str, Any]:
    """Read what earlier runs have measured of the axes that this one leaves out."""
    path = given.out or RESULTS / "growth.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return {axis: known[axis] for axis in SIZES if axis in known and axis not in given.axes}


def show(axis: str, found: dict[str, Any]) -> None:
    """Print an axis."""
    for size, row in found["sizes"].items():
        cells = [
            f"{name} {row['native'][name]['median']:.3g} {row['hfbridge'][name]['median']:.3g}"
            for name in row["native"]
        ]
        print(f"{axis:>20} {size:>10}  (native, hfbridge)  {'; '.join(cells)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--axes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--sizes", type=int, nargs="+", help="of one axis, in place of its own")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/growth.json")
    parser.add_argument("--check", action="store_true", help="exit 1 if something grows, or starts late")
    given = parser.parse_args()
    if given.sizes is not None and len(given.axes) != 1:
        parser.error("--sizes are those of one axis: name it by --axes")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for group in TOGETHER:
            jobs = {axis: sorted(given.sizes or SIZES[axis]) for axis in group if axis in given.axes}
            if jobs:
                results |= measure_together(jobs, given.repeats, Path(name), given.scale)
    for axis, found in results.items():
        show(axis, found)
        found["commit"] = commit()
    results = {**others(given), **results}
    print(f"written to {write('growth', results, given)}")
    wrong = complaints(results)
    print("\n".join(wrong) or "nothing grows that does not grow natively")
    return int(given.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

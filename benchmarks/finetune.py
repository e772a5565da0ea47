"""The demo's job in samples per second: MiniLM on film reviews, native Trainer and hfbridge taking turns.

Each measurement is a fresh process with one thread. Both live at once and take turns step by step, since a
shared machine is faster in one minute than in the next: while one computes a step, the other waits. The first
two steps are warm-up. Both take the same samples, so that each step of one is compared with the same of the
other: a repeat's ratio is the median over its steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from measure import spread, write

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"
SIDES = {"native": "native", "hfbridge": "bridge"}
SAMPLES_PER_STEP, WARM_UP = 64, 2


class Side:
    """One engine in a fresh process, which stops after every step until it is its turn again."""

    def __init__(self, engine: str, options: list[str], stderr: IO[str]) -> None:
        reading, writing = os.pipe()
        command = [sys.executable, str(DEMO), "--engine", engine, "--record", f"/dev/fd/{writing}"]
        self.stderr, self.peak_mib = stderr, 0.0
        self.process = subprocess.Popen(
            [*command, "--turns", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
            pass_fds=[writing],
        )
        os.close(writing)
        self._lines = os.fdopen(reading)
        self._start_s = 0.0

    def run_to_next_step(self) -> float:
        """Wait for the end of the step, or of the run; seconds since the turn began."""
        for line in self._lines:
            found: dict[str, Any] = json.loads(line)
            if "resumed_s" in found:
                self._start_s = found["resumed_s"]
            elif "outcome" in found:
                self.peak_mib = found["outcome"]["peak_memory_mib"]
            elif "step" in found:
                return float(found["time_s"] - self._start_s)
        if self.process.wait():
            self.stderr.seek(0)
            raise SystemExit(f"{self.process.args} failed:\n{self.stderr.read()[-3000:]}")
        return 0.0

    def take_turn(self) -> float:
        """Run one step; its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.run_to_next_step()


def measure_both(options: list[str], steps: int) -> dict[str, tuple[list[float], float]]:
    """Run both sides once; each one's seconds a step, without warm-up, and its peak memory in MiB."""
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    with tempfile.TemporaryFile("w+") as theirs, tempfile.TemporaryFile("w+") as ours:
        sides = {
            name: Side(engine, options, stderr)
            for (name, engine), stderr in zip(SIDES.items(), (theirs, ours), strict=True)
        }
        try:
            for side in sides.values():
                side.run_to_next_step()
            for step in range(2, steps + 1):
                order = list(sides) if step % 2 else list(sides)[::-1]
                for name in order:
                    times[name].append(sides[name].take_turn())
            for side in sides.values():
                side.take_turn()
        finally:
            for side in sides.values():
                side.process.kill()
                side.process.wait()
    return {name: (times[name][WARM_UP - 1 :], sides[name].peak_mib) for name in SIDES}


def measure_all(precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Repeat, and put speeds, ratios and memory together."""
    steps = str(arguments.steps)
    options = ["--threads", "1", "--precision", precision, "--steps", steps, "--logging-steps", "2"]
    options += ["--eval-steps", str(arguments.steps + 1), *(["--tiny"] if arguments.tiny else [])]
    speeds: dict[str, list[float]] = {name: [] for name in SIDES}
    peaks: dict[str, list[float]] = {name: [] for name in SIDES}
    ratios: list[float] = []
    for repeat in range(arguments.repeats):
        found = measure_both(options, arguments.steps)
        for name, (times, peak) in found.items():
            speeds[name].append(SAMPLES_PER_STEP / statistics.median(times))
            peaks[name].append(peak)
        pairs = zip(found["native"][0], found["hfbridge"][0], strict=True)
        ratios.append(statistics.median(theirs / ours for theirs, ours in pairs))
        print(f"{precision}: repeat {repeat + 1} of {arguments.repeats}, {ratios[-1]:.3f}", file=sys.stderr)
    of_native = {"native": [1.0] * len(ratios), "hfbridge": ratios}
    return {
        name: {
            "samples_per_second": spread(speeds[name]),
            "of_native": spread(of_native[name]),
            "peak_memory_mib": spread(peaks[name]),
        }
        for name in SIDES
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps, the first two not counted")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model on a few reviews, to try the script"
    )
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/finetune.json")
    parser.add_argument("--check", action="store_true", help="exit 1 if hfbridge is slower than native")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.steps = 6  # what the demo's own --tiny runs
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}, the warm-up")
    results: dict[str, Any] = {p: measure_all(p, arguments) for p in ("fp32", "bf16")}
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

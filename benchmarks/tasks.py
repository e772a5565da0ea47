"""Scores of every pair of examples: fine-tuned in full by the native Trainer and by hfbridge, on real data.

Each script runs in a fresh process with one thread. `--data` is the folder of all; tests/examples/pairs.py
says which folder of it a pair reads. Results of single tasks are merged into the file, each with the commit
it was measured at.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import RESULTS, run_fresh, write
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.examples.pairs import EXAMPLES, PAIRS, arguments_of  # noqa: E402

SIDES = {"native": "native", "hfbridge": "bridge"}


def measure(task: str, data: Path, *, tiny: bool) -> dict[str, Any]:
    """Run both scripts of a task."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    pair = PAIRS[task]
    found: dict[str, Any] = {"title": pair.title, "metric": pair.metrics[0]}
    found["commit"] = commit.stdout.strip() or None
    options = [*arguments_of(task, data), *(["--tiny"] if tiny else [])]
    with tempfile.TemporaryDirectory() as folder:
        for side, script in SIDES.items():
            out = Path(folder) / f"{side}.json"
            run_fresh(EXAMPLES / task / f"{script}.py", *options, "--out", out)
            found[side] = {"scores": json.loads(out.read_text())}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of all data")
    parser.add_argument("--tasks", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="TASK")
    parser.add_argument("--tiny", action="store_true", help="a few steps each, to try the script")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/tasks.json")
    given = parser.parse_args()
    path = given.out or RESULTS / "tasks.json"
    with tqdm(given.tasks) as bar:
        for task in bar:
            bar.set_description(task)
            found = measure(task, given.data, tiny=given.tiny)
            before = json.loads(path.read_text())["tasks"] if path.is_file() else {}
            merged = {**before, task: found}
            write("tasks", {"tasks": {name: merged[name] for name in PAIRS if name in merged}}, given)
    for task in given.tasks:
        row = json.loads(path.read_text())["tasks"][task]
        theirs, ours = (row[side]["scores"][row["metric"]] for side in SIDES)
        told = "equal" if row["native"]["scores"] == row["hfbridge"]["scores"] else "different"
        print(f"{task}: {row['metric']} {theirs} natively, {ours} bridged; all scores are {told}")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

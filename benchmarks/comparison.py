"""The comparison that the README shows: the job of examples/comparing on several engines, two ranks.

It is what `hfbridge compare` does; the verdicts and a figure of the report are kept. Times and memory stand
in the report alone: each engine runs once.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from measure import write

from hfbridge.compare import compare
from hfbridge.compare.report import write_report

ROOT = Path(__file__).parents[1]
JOB = ROOT / "examples" / "comparing" / "job.py"
ENGINES = (
    "native",
    "accelerate",
    "lightning",
    "native:deepspeed_stage_2",
    "lightning:deepspeed_stage_2",
    "lightning:fsdp2@exact",
)
FIGURE = ROOT / "docs" / "figures" / "comparison.png"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="of the whole comparison; one that was interrupted goes on"
    )
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/comparison.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary) / "report"
        comparison = compare(JOB, engines=ENGINES, ranks=2, out=folder)
        print(comparison)
        write_report(folder)
        found = {
            "job": JOB.relative_to(ROOT).as_posix(),
            "ranks": 2,
            "steps": {name: result["steps_done"] for name, result in comparison.results.items()},
            "verdicts": [verdict.as_row() for verdict in comparison.verdicts],
        }
        print(f"written to {write('comparison', found, given)}")
        if given.out is None:
            FIGURE.parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / "loss.png", FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

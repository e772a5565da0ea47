"""`hfbridge compare`."""

import argparse
from pathlib import Path

from hfbridge.compare import compare
from hfbridge.compare.report import write_report


def run(arguments: argparse.Namespace) -> int:
    """Run one job on several engines, print the verdicts, and write the report.

    Returns:
        1 if an engine's trajectory is not that of the first.

    Raises:
        BridgeError: the job or an engine cannot be run.
    """
    out = Path(arguments.out)
    comparison = compare(
        Path(arguments.job),
        engines=arguments.engines,
        ranks=arguments.ranks,
        out=out,
        steps=arguments.steps,
        resume=not arguments.no_resume,
        show_progress=not arguments.no_progress,
    )
    print(comparison)
    if not arguments.no_report:
        print(f"{write_report(out)} is written.")
    return int(not comparison.agrees)

"""`hfbridge compare`."""

import argparse
from pathlib import Path

from hfbridge.compare import compare
from hfbridge.compare.report import write_report
from hfbridge.utilities.imports import require


def run(arguments: argparse.Namespace) -> int:
    """Run one job on several engines, print the verdicts, and write the report.

    Returns:
        1 if an engine's trajectory is not that of the first.

    Raises:
        BridgeError: the job or an engine cannot be run.
        MissingDependencyError: the report needs a package that is not installed.
    """
    if not arguments.no_report:
        for package in ("jinja2", "matplotlib"):
            require(package, extra="report", for_="the report of a comparison (--no-report leaves it out)")
    out = Path(arguments.out)
    comparison = compare(
        Path(arguments.job),
        engines=arguments.engines,
        ranks=arguments.ranks,
        out=out,
        steps=arguments.steps,
        resume=not arguments.no_resume,
        overwrite=arguments.overwrite,
        show_progress=not arguments.no_progress,
    )
    print(comparison)
    if not arguments.no_report:
        print(f"{write_report(out)} is written.")
    return int(not comparison.agrees)

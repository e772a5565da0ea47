"""`hfbridge run`."""

import argparse
import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only

from hfbridge.dropin import dry_run
from hfbridge.dropin import run as run_script


def run(arguments: argparse.Namespace) -> int:
    """Run an unmodified script on Lightning, or print the plan of its run.

    Returns:
        What the script ends with; of a plan 1 if something is refused.

    Raises:
        BridgeError: the script, or something in it, cannot be run so; or there is no run to plan.
    """
    script, given = Path(arguments.script), arguments.script_arguments
    ranks: dict[str, Any] = {"strategy": arguments.strategy, "devices": arguments.devices}
    if not arguments.dry_run:
        return run_script(script, given, **ranks)
    with redirect_stdout(sys.stderr) if arguments.json else nullcontext():
        explanation = dry_run(script, given, **ranks)
    if getattr(rank_zero_only, "rank", 0) == 0:
        print(json.dumps(explanation.as_dict(), indent=2) if arguments.json else explanation)
    return int(bool(explanation.refused))

"""`hfbridge run`."""

import argparse
from pathlib import Path

from hfbridge.dropin import run as run_script


def run(arguments: argparse.Namespace) -> int:
    """Run an unmodified script on Lightning.

    Returns:
        What the script ends with.

    Raises:
        BridgeError: the script, or something in it, cannot be run so.
    """
    return run_script(
        Path(arguments.script),
        arguments.script_arguments,
        strategy=arguments.strategy,
        devices=arguments.devices,
    )

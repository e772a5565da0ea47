"""`hfbridge convert`."""

import argparse

from hfbridge.checkpoints.convert import convert


def run(arguments: argparse.Namespace) -> int:
    """Convert a checkpoint.

    Raises:
        CheckpointError: it cannot be read or written.
    """
    convert(arguments.source, arguments.target)
    print(f"{arguments.target} is written.")
    return 0

"""The command line: `hfbridge fit`, `validate`, `predict`, `explain`, `compare`, `convert` and `run`."""

from hfbridge.cli.command import main

__all__ = ["main"]

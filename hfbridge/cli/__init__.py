"""The command line: `hfbridge fit`, `validate`, `test`, `predict`, `explain`, `compare`, `convert`, `run`."""

from hfbridge.cli.command import main

__all__ = ["main"]

"""The command `hfbridge run`, as these tests call it: python command.py STRATEGY DEVICES SCRIPT ARGUMENTS."""

import sys
from pathlib import Path

from hfbridge.dropin import run

if __name__ == "__main__":
    strategy, devices, script, *arguments = sys.argv[1:]
    code = run(
        Path(script),
        arguments,
        strategy=None if strategy == "-" else strategy,
        devices=None if devices == "-" else int(devices),
    )
    sys.exit(code)

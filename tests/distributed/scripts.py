"""What the ranks of a pool do with a user's script: as it is, and by hfbridge.dropin.run."""

import json
import os
import runpy
import sys
import warnings
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hfbridge.dropin import run
from hfbridge.errors import BridgeWarning

SCRIPT = Path(__file__).parents[1] / "dropin" / "user_script.py"


def run_natively(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the script as python does; returns what it has written."""
    argv, path = sys.argv, sys.path
    sys.argv, sys.path = [str(SCRIPT), "--out", "theirs", *arguments], [str(SCRIPT.parent), *path]
    try:
        with chdir(folder), suppress(SystemExit):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv, sys.path = argv, path
    return facts_in(folder / "theirs")


def run_bridged(folder: Path, strategy: str | None, *arguments: str) -> dict[str, Any]:
    """Run the script by hfbridge, on the ranks that are there; returns what it has written."""
    out = strategy or "ours"
    with chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", BridgeWarning)  # this process has imported transformers.Trainer
        assert run(SCRIPT, ["--out", out, *arguments], strategy=strategy) == 0
    assert "LOCAL_RANK" in os.environ
    return facts_in(folder / out)


def facts_in(folder: Path) -> dict[str, Any]:
    """Read what the first rank has written, when it is there."""
    if dist.is_initialized():
        dist.barrier()
    found: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    return found


def names_in(folder: Path) -> list[str]:
    """List the files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

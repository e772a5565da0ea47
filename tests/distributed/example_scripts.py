"""What the ranks of a pool run of examples/."""

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.examples.pairs import EXAMPLES, run_script


def score_sides(task: str, model: Path | None, *arguments: str) -> dict[str, dict[str, Any]]:
    """Run both sides of a pair in their shortest form; the first rank returns their scores.

    Args:
        task: the pair.
        model: a folder that the scripts find in the place of MiniLM's; `None` leaves MiniLM.
        *arguments: of their command line.
    """
    found = {}
    for side in ("native", "bridge"):
        out = Path(f"{side}.json").absolute()
        run_script(EXAMPLES / task / f"{side}.py", ["--tiny", "--out", str(out), *arguments], model=model)
        dist.barrier()
        if os.environ["RANK"] == "0":
            found[side] = json.loads(out.read_text())
    return found

"""What the pairs of examples have in common: their command line, and how they tell their scores.

Each script takes `--data FOLDER`, where its task reads files; `--tiny` for a few steps on a few rows; and
`--out` for the scores as JSON. What the files are, and where they can be had, is said when they are missing.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SPEEDS = ("runtime", "per_second", "preparation_time", "epoch")  # of metrics that no two runs have in common


def parse(
    description: str | None,
    *,
    files: Sequence[str] = (),
    expected: str = "",
    model: str = "",
    other_model: str = "",
    switches: Mapping[str, str] | None = None,
) -> argparse.Namespace:
    """Read the command line of an example; a task without files has no `--data`.

    Args:
        description: the docstring of the task.
        files: what has to be in the folder.
        expected: what these files are, and where such can be had.
        model: what `--model` has to be, where the user brings it.
        other_model: what `--model` may be, where the example has one of its own.
        switches: further options without a value, and what they do.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few steps on a few rows")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the scores there, too")
    if files:
        parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help=expected)
    if model:
        parser.add_argument("--model", required=True, metavar="NAME_OR_FOLDER", help=model)
    if other_model:
        parser.add_argument("--model", metavar="NAME_OR_FOLDER", help=other_model)
    for switch, does in (switches or {}).items():
        parser.add_argument(f"--{switch}", action="store_true", help=does)
    given = parser.parse_args()
    missing = [name for name in files if not (given.data / name).is_file()]
    if missing:
        parser.error(f"the folder {given.data} has no {' and no '.join(missing)}. It should hold {expected}")
    return given


def report(metrics: Mapping[str, Any], given: argparse.Namespace) -> None:
    """Print the scores of an evaluation, and write them to `--out`."""
    scores = {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if isinstance(value, int | float) and not name.endswith(SPEEDS)
    }
    print(json.dumps(scores))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(scores, indent=1) + "\n")

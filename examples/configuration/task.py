"""Every kind of setting at once: schedule, accumulation, bf16, evaluations, checkpoints, TensorBoard."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report
from reviews import read

__all__ = ["accuracy", "arguments", "read", "report"]


def arguments():
    return parse(__doc__)


def accuracy(result):
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()}

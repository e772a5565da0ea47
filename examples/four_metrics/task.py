"""Accuracy, F1, precision and recall of evaluate, at every evaluation."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report
from reviews import read

__all__ = ["SETTINGS", "arguments", "read", "report"]

SETTINGS = {
    "output_dir": "out/four_metrics",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 5e-5,
    "warmup_steps": 0.1,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 16,
    "report_to": "none",
    "seed": 42,
}


def arguments():
    return parse(__doc__)

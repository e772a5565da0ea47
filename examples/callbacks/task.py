"""Two TrainerCallbacks: one tells the learning rate, one ends the run when accuracy no longer rises."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report
from reviews import read

__all__ = ["SETTINGS", "accuracy", "arguments", "read", "report"]

SETTINGS = {
    "output_dir": f"out/callbacks/{Path(sys.argv[0]).stem}",  # each side has its own
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 5e-5,
    "eval_strategy": "steps",
    "eval_steps": 16,
    "save_strategy": "steps",
    "save_steps": 16,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "logging_steps": 8,
    "report_to": "none",
    "seed": 42,
}
IN_SHORT = {"eval_steps": 1, "save_steps": 1, "logging_steps": 1, "learning_rate": 1e-6}


def arguments():
    given = parse(__doc__)
    given.settings = {**SETTINGS, **(IN_SHORT if given.tiny else {})}
    return given


def accuracy(result):
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()}

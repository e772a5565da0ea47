"""A run that is stopped between two checkpoints, and another that goes on from the last one."""

import shutil
import sys
from pathlib import Path

from transformers import TrainerCallback

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report
from reviews import read

__all__ = ["SETTINGS", "accuracy", "arguments", "read", "report", "stops"]

SETTINGS = {
    "output_dir": f"out/resuming/{Path(sys.argv[0]).stem}",  # each side has its own
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-5,
    "warmup_steps": 0.1,
    "eval_strategy": "epoch",
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 1,
    "report_to": "none",
    "seed": 42,
}


class Stops(TrainerCallback):
    """End a run after an optimizer step, as the end of a machine's lease would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def stops():
    return Stops(3)


def arguments():
    given = parse(__doc__, switches={"whole": "do not stop: what the other two runs together have to equal"})
    shutil.rmtree(SETTINGS["output_dir"], ignore_errors=True)  # "last" would be an earlier try's
    return given


def accuracy(result):
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()}

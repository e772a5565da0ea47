"""Two processes share the reviews (DDP) or, with --deepspeed, the optimizer's state, too (ds_config.json)."""

import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
import command
from reviews import read

__all__ = ["SETTINGS", "accuracy", "arguments", "read", "report"]

SETTINGS = {
    "output_dir": "out/two_processes",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "gradient_accumulation_steps": 8,
    "learning_rate": 5e-5,
    "bf16": True,
    "use_cpu": not torch.cuda.is_available(),  # natively, bf16 on a CPU asks for it
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "seed": 42,
}
CONFIGURATION = Path(__file__).with_name("ds_config.json")


def arguments():
    given = command.parse(__doc__, switches={"deepspeed": f"as {CONFIGURATION.name} says"})
    given.settings = {**SETTINGS, **({"deepspeed": str(CONFIGURATION)} if given.deepspeed else {})}
    return given


def accuracy(result):
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()}


def report(metrics, given):
    """Tell the scores, which all ranks have, once."""
    if os.environ.get("RANK", "0") == "0":
        command.report(metrics, given)

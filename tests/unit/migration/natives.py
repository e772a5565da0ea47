"""Native Trainers that could train, for the tests of moving them."""

from typing import Any

from transformers import Trainer, TrainingArguments

from tests.tiny import PadRows, make_dataset, make_model


def make_native(kind: type[Trainer] = Trainer, args: Any = None, **given: Any) -> Any:
    """Make a native Trainer over a few rows."""
    given = {"data_collator": PadRows(), "train_dataset": make_dataset("distilbert", 8), **given}
    model = None if "model_init" in given else make_model("distilbert")
    return kind(model, args or make_arguments(), **given)


def make_arguments(kind: type[TrainingArguments] = TrainingArguments, **settings: Any) -> Any:
    """Make arguments for one silent step on the CPU."""
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return kind(**{"output_dir": "out", "max_steps": 1, **quiet, **settings})


def make_with(callbacks: Any = (), **settings: Any) -> Any:
    """Make a native Trainer with callbacks and settings."""
    return make_native(args=make_arguments(**settings), callbacks=list(callbacks))

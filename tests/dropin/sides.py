"""A user's code on transformers' Trainers and on hfbridge's, live; what it leaves is compared to the bit."""

import os
from collections.abc import Callable
from contextlib import chdir
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from transformers import DataCollatorWithPadding, TrainingArguments, set_seed

import hfbridge.dropin
from tests.parity.engines import Recorder, digest_metrics, innermost, optimizer_state, same, without_times
from tests.tiny import make_dataset, make_model, make_tokenizer

BASE: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 2,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
}
OF_TIME = ("runtime", "per_second", "step_time", " seconds")
LOGGED: dict[str, Any] = {
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "load_best_model_at_end": True,
    "include_num_input_tokens_seen": "all",
    "weight_decay": 0.1,
}
ROWS, EVAL_ROWS = 30, 10  # 8 micro-batches and 4 steps a pass, the last ones short


class Side(NamedTuple):
    """The classes that a user's code is run with."""

    trainer: Any
    seq2seq: Any


THEIRS = Side(transformers.Trainer, transformers.Seq2SeqTrainer)
OURS = Side(hfbridge.dropin.Trainer, hfbridge.dropin.Seq2SeqTrainer)


def make(trainer_class: Any, *, arguments: dict[str, Any] | None = None, **given: Any) -> Any:
    """Make a Trainer as a user would; `arguments` are those of TrainingArguments beside BASE."""
    tokenizer = make_tokenizer()
    if "model" not in given and "model_init" not in given:
        given["model"] = make_model("distilbert")
    given = {
        "train_dataset": make_dataset("distilbert", ROWS),
        "eval_dataset": make_dataset("distilbert", EVAL_ROWS, seed=5),
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": digest_metrics,
        **given,
    }
    given.setdefault("args", TrainingArguments(**{**BASE, **(arguments or {})}))
    return trainer_class(**given)


def look(trainer: Any, output: Any = None) -> dict[str, Any]:
    """Note all that a Trainer shows of its last run."""
    found: dict[str, Any] = {}
    if output is not None:
        found["output"] = [output.global_step, output.training_loss, without_times(output.metrics)]
    state = asdict(trainer.state)
    found["history"] = [without_times(row) for row in state.pop("log_history")]
    return {
        **found,
        "state": state,
        "control": vars(trainer.control),
        "weights": trainer.model.state_dict(),
        "grads": [p.grad is None for p in trainer.model.parameters()],
        "training": trainer.model.training,
        "forward": "forward" in vars(trainer.model),
        "optimizer": None if trainer.optimizer is None else optimizer_state(innermost(trainer.optimizer)),
        "optimizer is": type(trainer.optimizer).__name__,
        "schedule": None if trainer.lr_scheduler is None else trainer.lr_scheduler.state_dict(),
        "callbacks": [type(cb).__name__ for cb in trainer.callback_handler.callbacks],
        "told of": [
            getattr(trainer.callback_handler, name) is getattr(trainer, name)
            for name in ("model", "optimizer", "lr_scheduler", "processing_class")
        ],
        "is_in_train": trainer.is_in_train,
        "batch size": trainer._train_batch_size,
        "rng": torch.get_rng_state(),
    }


def files_in(folder: Path) -> dict[str, Any]:
    """Read all files below a folder, by name; of times and random states what is comparable."""
    return {
        str(path.relative_to(folder)): _read(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.name == "training_args.bin":
        arguments = torch.load(path, weights_only=False)
        return [type(arguments).__name__, arguments.to_dict()]
    if path.name.startswith("rng_state"):
        states = torch.load(path, weights_only=False)
        return [
            states["python"],
            states["cpu"],
            *(getattr(v, "tolist", lambda v=v: v)() for v in states["numpy"]),
        ]
    if path.suffix == ".pkl":
        return path.read_bytes()
    if path.suffix == ".pt":
        return torch.load(path, weights_only=False)
    text = path.read_text()
    if path.name in ("trainer_state.json", "train_results.json", "all_results.json", "README.md"):
        return [line for line in text.splitlines() if not any(word in line for word in OF_TIME)]
    return text


def compare(user_code: Callable[[Side], Any]) -> Any:
    """Run a user's code on both sides, and see that it gives and writes the same.

    Args:
        user_code: given the classes; its result is compared.

    Returns:
        The result.
    """
    results = []
    for name, side in (("theirs", THEIRS), ("ours", OURS)):
        os.mkdir(name)
        with chdir(name):
            set_seed(1)
            results.append(user_code(side))
    same("the result", *results)
    same("the files", files_in(Path("theirs")), files_in(Path("ours")))
    return results[0]


def events_of(recorder: Recorder) -> list[Any]:
    """What a recording callback has heard, with what it was given."""
    return [list(event) for event in recorder.events]

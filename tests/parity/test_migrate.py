"""A native Trainer that is moved over trains as it would have itself, to the bit."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    GenerationConfig,
    TrainerCallback,
    set_seed,
)

import hfbridge
from tests.parity.engines import (
    Job,
    Record,
    assert_identical,
    make_theirs,
    record_ours,
    run_theirs,
)
from tests.tiny import make_model, make_tokenizer


def run_moved(job: Job, **arguments: Any) -> Record:
    """Make the native Trainer of a job, move it over, and train."""
    native, recorder, collator = make_theirs(job)
    trainer, module, data = hfbridge.from_trainer(native, enable_model_summary=False, **arguments)
    trainer.fit(module, data)
    return record_ours(trainer, module, recorder, collator)


def run_both(job: Job, folder: Path) -> tuple[Record, Record]:
    """Train a job natively, and moved over, each in a folder of its own, and see that both did the same."""
    for name in ("theirs", "ours"):
        (folder / name).mkdir()
    set_seed(1)
    with contextlib.chdir(folder / "theirs"):
        theirs = run_theirs(job)
    set_seed(2)
    with contextlib.chdir(folder / "ours"):
        ours = run_moved(job)
    assert_identical(theirs, ours)
    return theirs, ours


class Counting(TrainerCallback):
    """Count what it hears, and keep the count where checkpoints would."""

    def __init__(self) -> None:
        self.heard: dict[str, int] = {}

    def on_init_end(self, *arguments: Any, **named: Any) -> None:
        self.heard["on_init_end"] = self.heard.get("on_init_end", 0) + 1

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        self.heard["on_step_end"] = self.heard.get("on_step_end", 0) + 1


def give_half(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits / 2


JOBS = {
    "several evaluation sets, metrics, accumulation with a short last window": Job(
        settings={"gradient_accumulation_steps": 5, "eval_strategy": "steps", "eval_steps": 1},
        eval_keys=("a", "b"),
        preprocess_logits_for_metrics=give_half,
    ),
    "model_init": Job(
        model_init=lambda: make_model_unseeded("distilbert"),
        settings={"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
    ),
    "label smoothing, bf16, noise on embeddings": Job(
        settings={"label_smoothing_factor": 0.1, "bf16": True, "neftune_noise_alpha": 3.0},
    ),
    "no collator, a tokenizer": Job(
        collator=None,
        has_ids=False,
        processing_class=make_tokenizer(),
        settings={"remove_unused_columns": True, "max_steps": 5},
    ),
    "a collator of the user's": Job(
        collator=lambda: DataCollatorWithPadding(make_tokenizer(), pad_to_multiple_of=8),
        processing_class=make_tokenizer(),
        settings={"max_steps": 5},
    ),
    "optimizer and schedule": Job(optimizers=lambda model: make_optimizer(model)),
    "a class of optimizers": Job(
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        settings={"lr_scheduler_type": "cosine"},
    ),
    "a loss function": Job(
        kind="llama",
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: (
            outputs.logits.float().logsumexp(-1).sum() / (num_items_in_batch or 1)
        ),
        settings={"gradient_accumulation_steps": 2, "max_steps": 4},
    ),
    "stopping early": Job(
        callbacks=lambda: [EarlyStoppingCallback(2, 10.0), Counting],
        settings={
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "mean",
        },
    ),
    "Seq2SeqTrainer": Job(
        kind="t5",
        settings={
            "predict_with_generate": True,
            "generation_config": GenerationConfig(
                max_length=6, num_beams=2, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
            ),
            "eval_strategy": "steps",
            "eval_steps": 4,
            "max_steps": 8,
        },
    ),
    "the native Trainer does not read what Seq2SeqTrainer does": Job(
        kind="t5", settings={"max_steps": 3, "eval_strategy": "epoch"}
    ),
}


def make_model_unseeded(kind: str) -> Any:
    """Make a model of the random state that is there, as a user's model_init does."""
    made = make_model(kind)
    return type(made)(made.config)


def make_optimizer(model: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


@pytest.mark.parametrize("name", JOBS)
def test_a_moved_trainer_trains_as_the_native_one(name: str, tmp_path: Path) -> None:
    run_both(JOBS[name], tmp_path)

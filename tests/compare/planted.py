"""Native runs recorded in this process, some of them with a fault planted."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer as NativeTrainer
from transformers import TrainerCallback, TrainingArguments, set_seed

from hfbridge.compare.causes import Run
from hfbridge.compare.engines import Engine
from hfbridge.compare.record import Metrics, Recorder, Step
from hfbridge.compare.training import silence, train
from tests.tiny import PadRows, make_model, make_rows

SETTINGS: Mapping[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "num_train_epochs": 2,
    "max_grad_norm": 0.5,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "logging_steps": 4,
    "save_strategy": "no",
    "report_to": "none",
}
"""12 micro-batches of 46 rows, the last one short: 4 steps a pass."""


def make_trainer(
    settings: Mapping[str, Any] | None = None,
    *,
    kind: str = "distilbert",
    rows: list[dict[str, Any]] | None = None,
    callbacks: Any = (),
    compute_metrics: Any = None,
    **model: Any,
) -> NativeTrainer:
    """Make a native Trainer of a tiny job."""
    return NativeTrainer(
        model=make_model(kind, **model),
        args=TrainingArguments(**{**SETTINGS, **(settings or {})}),
        train_dataset=make_rows(kind, 46) if rows is None else rows,
        eval_dataset=make_rows(kind, 11, seed=5),
        data_collator=PadRows(),
        callbacks=list(callbacks),
        compute_metrics=compute_metrics,
    )


def recorded(
    trainer: NativeTrainer,
    *,
    engine: str = "native",
    change: Callable[[Any], None] | None = None,
    last_step: int | None = None,
) -> Run:
    """Train on one engine and return what is recorded.

    Args:
        trainer: holds the job.
        engine: which.
        change: plants a fault in the trainer.
        last_step: the run ends after it.
    """
    set_seed(trainer.args.seed)  # as the Trainer has, before the model of a later one was drawn
    steps, metrics = list[Step](), list[Metrics]()
    recorder = Recorder(
        steps.append, keep_metrics=metrics.append, on_begin=lambda total: None, last_step=last_step
    )
    silence(trainer, Path("saved"))
    if change is not None:
        change(trainer)
    told = train(Engine.parse(engine), trainer, recorder)
    return Run(engine, steps, metrics, recorder.first_parameters, told["settings"])


def as_if_set_like(run: Run, other: Run, engine: str = "ours") -> Run:
    """Take the settings of another run, so that only numbers can tell what is wrong."""
    return replace(run, engine=engine, settings=other.settings)


class At(TrainerCallback):
    """Do something at an event, in one step or in all."""

    def __init__(self, event: str, act: Callable[..., None], *, step: int | None = None) -> None:
        def hear(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if step is None or state.global_step == step:
                act(**kwargs)

        setattr(self, event, hear)


def reseed(**kwargs: Any) -> None:
    """Set the random state to another one."""
    torch.manual_seed(12345)

"""What the ranks of a pool run to evaluate with running metrics."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAUROC
from torchmetrics.text import Perplexity

import hfbridge
from hfbridge.distributed.collectives import rank
from tests.parity.engines import Job, without_times
from tests.parity.test_running_metrics import CLASSES, made, metrics_for, run_both
from tests.tiny import IGNORED


class Listed(Metric):
    """Keep a list that torchmetrics joins tensor by tensor, one a row."""

    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx=None)

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Take in a batch."""
        self.rows += list(outputs[:, 0])

    def compute(self) -> Tensor:
        """Average the rows."""
        return torch.stack(list(self.rows)).mean()


def more_metrics_for(kind: str) -> dict[str, Metric]:
    """Make metrics that count, that keep all scores, and that sum numbers which round."""
    if kind == "bert-regression":
        return {"mse": MeanSquaredError()}
    found: dict[str, Metric] = {
        **metrics_for(kind),
        "auroc": MulticlassAUROC(CLASSES[kind], ignore_index=IGNORED, validate_args=False),
    }
    return {**found, "perplexity": Perplexity(ignore_index=IGNORED)} if kind == "llama" else found


def evaluate(jobs: list[Job], normalization: str) -> list[dict[str, float]]:
    """Evaluate and predict with running metrics; returns their numbers, and in "exact" the loss."""
    found = []
    for asked in jobs:
        given = more_metrics_for(asked.kind)
        trainer, module, data, *_ = made(asked, given, loss_normalization=normalization)
        asking = hfbridge.HFDataModule(predict_dataset=data._raw["eval"], data_collator=data.data_collator)
        numbers = without_times(trainer.validate(module, data, verbose=False)[0])
        numbers |= without_times(trainer.predict_dataset(module, asking).metrics)
        if normalization == "native":  # there the loss of repeated rows counts
            del numbers["eval_loss"], numbers["test_loss"]
        found.append(numbers)
    return found


def train_on_both(asked: Job) -> list[dict[str, Any]]:
    """Run a job on both engines, here with running metrics; returns the rows."""
    theirs, _ = run_both(asked, asked.kind)
    return theirs.log_history


def error_of(asked: Job, what: str) -> tuple[str, str]:
    """Evaluate with metrics whose states cannot be joined; returns the error."""
    given: dict[str, Metric] = {"listed": Listed()}
    if what == "others" and rank() == 1:
        given |= {"more": Listed()}
    if what == "unfit" and rank() == 1:
        given = {"mse": MeanSquaredError()}
    trainer, module, data, *_ = made(asked, given, loss_normalization="exact")
    try:
        trainer.validate(module, data, verbose=False)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        dist.barrier()
    return "", ""


def load_and_compute(folder: str, waits_in_file: bool) -> tuple[float, float]:
    """Compute accuracy of this rank's rows, and of all ranks' rows together; the latter on the first rank."""
    number, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rows: dict[str, Any] = {"predictions": [1, 0, 1, 1], "references": [1, number, 1, 1 - number]}
    own = hfbridge.load_metric("accuracy", keep_in_memory=not waits_in_file, cache_dir=folder)
    shared = {"num_process": world_size, "process_id": number, "experiment_id": "job"}
    together = hfbridge.load_metric("accuracy", cache_dir=folder, **shared)
    return own.compute(**rows)["accuracy"], (together.compute(**rows) or {}).get("accuracy", -1.0)

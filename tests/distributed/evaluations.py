"""What the ranks of a pool run to evaluate and predict."""

import warnings
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

import hfbridge
from tests.parity.engines import (
    Job,
    assert_identical,
    digest,
    make_ours,
    run_both,
    run_ours,
    run_theirs,
    without_times,
)
from tests.parity.test_evaluation_options import ByBatch, _tensors_in, act
from tests.tiny import make_rows

STEPS = {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2}


def job(kind: str = "distilbert", settings: dict[str, Any] | None = None, **given: Any) -> Job:
    """Make a job with evaluations while it trains, and few steps."""
    return Job(kind, {**STEPS, "max_steps": 2, **(settings or {})}, **{"rows": 30, **given})


def rows_of_many_lengths(kind: str, count: int) -> list[dict[str, Any]]:
    """Make rows that are longer from one to the next, so that no two ranks pad to the same."""
    rows = make_rows(kind, count, seed=5)
    for index, row in enumerate(rows):
        row["input_ids"] = (row["input_ids"] * 12)[: 3 + 2 * index]
        row["attention_mask"] = [1] * len(row["input_ids"])
        if kind == "t5":
            row["labels"] = (row["labels"] * 12)[: 2 + index]
        elif "labels" in row:
            row["labels"] = (row["labels"] * 12)[: len(row["input_ids"])]
    return rows


# Functions of a user.


def classes(logits: Any, labels: Any) -> Tensor:
    """Keep the class of each row or token; labels are padded like logits."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    assert labels is None or logits.shape[: labels.ndim] == labels.shape
    return logits.argmax(-1)


def with_sum(logits: Any, labels: Any) -> Any:
    """Make two predictions of one; the second has no rows."""
    return logits, logits.sum()


class DigestsByBatch:
    """A `compute_metrics` that is called for every batch and tells what it was given each time."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        self.seen += [float(int(digest(*_tensors_in(part)), 16)) for part in prediction]
        if not compute_result:
            return {}
        seen, self.seen = self.seen, []
        return {f"seen_{index}": value for index, value in enumerate(seen)}


class ByRank:
    """A `compute_metrics`, or a `preprocess_logits_for_metrics`, that is another on the second rank.

    Args:
        elsewhere: what it returns there; an exception is raised.
    """

    def __init__(self, elsewhere: Any) -> None:
        self.elsewhere = elsewhere

    def __call__(self, given: Any, *labels: Any) -> Any:
        if dist.get_rank() != 1:
            return given if labels else {"f1": 0.5}
        if isinstance(self.elsewhere, Exception):
            raise self.elsewhere
        return self.elsewhere


def names_its_rows(prediction: Any) -> dict[str, float]:
    """Name a metric after the number of rows: a few rows do not show it."""
    return {f"of_{len(prediction.label_ids)}": float(np.mean(prediction.predictions))}


# Jobs.


def evaluate_on_both(asked: Job) -> list[dict[str, Any]]:
    """Run a job on both engines; returns the rows of its evaluations."""
    theirs, _ = run_both(asked)
    return [row for row in theirs.log_history if any(name.startswith("eval_") for name in row)]


def evaluate_by_batch_on_both(asked: Job) -> list[dict[str, Any]]:
    """Likewise, with one `compute_metrics` for each engine."""
    given = {name: getattr(asked, name) for name in Job.__annotations__}
    theirs = run_theirs(Job(**{**given, "compute_metrics": ByBatch()}))
    ours = run_ours(Job(**{**given, "compute_metrics": ByBatch()}))
    assert_identical(theirs, ours)
    return theirs.log_history


def act_on_both(asked: Job, *acts: Any, **options: Any) -> list[Any]:
    """Train, evaluate and predict on both engines; returns what native returned, without times."""
    expected, _ = act(asked, *acts, **options)
    return [
        without_times(found) if isinstance(found, dict) else (found.predictions, found.label_ids)
        for found, name in zip(expected, acts, strict=True)
        if name != "train"
    ]


def act_without_labels(asked: Job, rows: list[dict[str, Any]]) -> list[Any]:
    """Predict rows on both engines."""
    return act_on_both(asked, "predict", rows=rows)


def errors_on_both(asked: Job) -> list[str]:
    """Run a job on which both engines fail; returns their errors."""
    found = []
    for run in (run_theirs, run_ours):
        try:
            run(asked)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def error_of_fit(asked: Job) -> tuple[str, str, int]:
    """Train under hfbridge; returns the error, and how many steps went before it."""
    trainer, module, data, recorder, _ = make_ours(asked, loss_normalization="exact")
    try:
        trainer.fit(module, data)
    except Exception as error:
        return type(error).__name__, str(error), len(recorder.steps)
    return "", "", len(recorder.steps)


def unheard_of(prediction: Any) -> dict[str, float]:
    """Compute a metric that no other job has: Lightning warns of each name once."""
    return {"unheard_of": 0.5}


def warnings_of_fit(asked: Job) -> tuple[list[str], float]:
    """Train under hfbridge; returns the warnings, and what Lightning's callbacks see of `unheard_of`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record = run_ours(asked)
    shown = float(record.engine.callback_metrics["eval_unheard_of"])
    return [str(warning.message) for warning in caught], shown


def evaluate_exactly(jobs: list[Job]) -> list[list[Any]]:
    """Evaluate and predict in "exact"; returns the metrics of both, and the shapes of the predictions."""
    found = []
    for asked in jobs:
        trainer, module, data, _, _ = make_ours(asked, loss_normalization="exact")
        asking = hfbridge.HFDataModule(predict_dataset=data._raw["eval"], data_collator=data.data_collator)
        metrics = without_times(trainer.validate(module, data, verbose=False)[0])
        output = trainer.predict_dataset(module, asking)
        kept = [] if output.predictions is None else _tensors_in(output.predictions)
        shapes = [tensor.shape for tensor in kept]
        found.append([metrics, without_times(output.metrics), shapes])
    return found


def logits_by_batch(asked: Job) -> list[Any]:
    """Predict as Lightning does; returns the logits of each batch of this rank."""
    trainer, module, data, _, _ = make_ours(asked)
    asking = hfbridge.HFDataModule(predict_dataset=data._raw["eval"], data_collator=data.data_collator)
    return [batch.tolist() for batch in trainer.predict(module, asking)]

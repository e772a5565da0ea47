"""What the ranks of a pool run to evaluate and predict."""

from typing import Any

from torch import Tensor

from tests.parity.engines import (
    Job,
    assert_identical,
    run_both,
    run_ours,
    run_theirs,
    without_times,
)
from tests.parity.test_evaluation_options import ByBatch, act
from tests.tiny import make_rows

STEPS = {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2}
LONG = 40


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


class SumsByBatch:
    """A `compute_metrics` that is called for every batch and keeps what it has seen; both engines get one."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.sizes: list[int] = []

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, Any]:
        self.seen.append(float(prediction.predictions.double().sum() + prediction.label_ids.double().sum()))
        self.sizes.append(len(prediction.label_ids))
        if not compute_result:
            return {}
        seen, sizes, self.seen, self.sizes = self.seen, self.sizes, [], []
        return {"seen": seen, "sizes": sizes}


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

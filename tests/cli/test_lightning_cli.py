"""A project of three files with a LightningCLI of its own, as users of Lightning write it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfbridge import HFDataModule, HFModule, Trainer
from tests.tiny import make_dataset, make_model

ROOT = Path(__file__).parents[2]

MAIN = """\
from lightning.pytorch.cli import LightningCLI

import hfbridge

if __name__ == "__main__":
    LightningCLI(hfbridge.HFModule, hfbridge.HFDataModule, trainer_class=hfbridge.Trainer)
"""
PARTS = """\
from tests.tiny import PadRows, make_dataset, make_model


def model():
    return make_model("llama")


def train(count: int):
    return make_dataset("llama", count)


class Collator(PadRows):
    pass
"""
CONFIG = """\
seed_everything: false
trainer:
  settings:
    output_dir: out
    max_steps: 3
    per_device_train_batch_size: 2
    learning_rate: 1e-3
    logging_steps: 1
    save_strategy: "no"
    use_cpu: true
    report_to: none
    disable_tqdm: true
  callbacks:
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {dirpath: kept, save_last: true}
  - class_path: transformers.ProgressCallback
model:
  model: parts.model
data:
  train_dataset:
    class_path: parts.train
    init_args: {count: 8}
  data_collator:
    class_path: parts.Collator
    init_args: {length: 12}
"""


@pytest.mark.slow
def test_a_project_of_lightning_cli_trains_as_the_same_in_python() -> None:
    Path("main.py").write_text(MAIN)
    Path("parts.py").write_text(PARTS)
    Path("config.yaml").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "main.py", "fit", "--config", "config.yaml", "--trainer.settings.max_steps=2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path("out/config.yaml").is_file()
    assert Path("kept/last.ckpt").is_file()
    rows = _rows(Path("kept/last.ckpt"))
    assert [row["step"] for row in rows] == [1, 2]

    from tests.tiny import PadRows

    trainer = Trainer(
        {"output_dir": "here", "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
        | {
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        }
    )
    data = HFDataModule(train_dataset=make_dataset("llama", 8), data_collator=PadRows(12))
    trainer.fit(HFModule(lambda: make_model("llama")), data)
    expected = [row for row in trainer.log_history if "loss" in row]
    assert rows == expected


def _rows(path: Path) -> list[dict[str, float]]:
    """The rows of training in a Lightning checkpoint."""
    from hfbridge import convert

    convert(path, "native")
    state = json.loads(Path("native/trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]

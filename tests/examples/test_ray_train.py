"""Ray Train: HFModule on two workers gives the weights of one process with twice the batch."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from hfbridge import HFDataModule, HFModule
from tests.examples.pairs import EXAMPLES
from tests.examples.test_examples import load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.long,  # a cluster starts slowly on two busy cores
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray"),
]


@pytest.fixture
def short_folder() -> Iterator[str]:
    """Where Ray writes: the paths of its sockets must be short."""
    folder = tempfile.mkdtemp(prefix="ray")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def model_without_dropout(small_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    AutoConfig.from_pretrained(folder, **none).save_pretrained(folder)
    return folder


def test_two_workers_of_a_ray_cluster_give_the_weights_of_one_process(
    model_without_dropout: Path, short_folder: str
) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "ray_train" / "bridge.py", "--tiny", "--model", model_without_dropout],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": short_folder},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    reported = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"metrics"')))
    assert reported["metrics"]["step"] == 4  # 64 rows, 2 workers, 8 rows each
    kept = torch.load(Path(reported["checkpoint"]) / "checkpoint.ckpt", weights_only=False)

    tokenizer = AutoTokenizer.from_pretrained(model_without_dropout)
    module = HFModule(
        str(model_without_dropout),
        "AutoModelForSequenceClassification",
        model_kwargs={"num_labels": 2},
        processing_class=tokenizer,
    )
    data = HFDataModule(
        load("reviews").read(train=64, validation=32),
        map_function=lambda rows: tokenizer(rows["text"], truncation=True, max_length=64),
        batch_size=16,
    )
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, data)
    assert trainer.global_step == 4
    weights = module.state_dict()
    assert weights.keys() == kept["state_dict"].keys()
    before = HFModule(
        str(model_without_dropout), "AutoModelForSequenceClassification", model_kwargs={"num_labels": 2}
    )
    before.configure_model()
    name = "model.bert.encoder.layer.0.output.dense.weight"
    moved = (weights[name] - before.state_dict()[name]).abs().max()
    assert moved > 1e-5
    for name, weight in weights.items():
        torch.testing.assert_close(kept["state_dict"][name], weight, rtol=0, atol=1e-6, msg=name)
    assert reported["metrics"]["eval_loss"] == pytest.approx(
        float(trainer.callback_metrics["eval_loss"]), abs=1e-5
    )

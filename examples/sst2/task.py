"""Good film reviews and bad: sentences of the Stanford Sentiment Treebank, two classes, accuracy and F1."""

import csv
import sys
from pathlib import Path

import numpy as np
from datasets import DatasetDict, load_dataset

from hfbridge import load_metric

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report

__all__ = ["SETTINGS", "arguments", "compute_metrics", "read", "report"]

FILES = ("train.tsv", "dev.tsv")
EXPECTED = (
    "train.tsv and dev.tsv: lines of a sentence, a tab, and 0 (bad) or 1 (good), without a header. The "
    "repository clairett/pytorch-sentiment-classification on GitHub has them in data/SST2."
)
SETTINGS = {
    "output_dir": "out/sst2",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 5e-5,
    "weight_decay": 0.01,
    "warmup_steps": 0.1,
    "save_strategy": "no",
    "logging_steps": 10,
    "report_to": "none",
    "seed": 42,
}
ACCURACY, F1 = load_metric("accuracy"), load_metric("f1")


def arguments():
    return parse(__doc__, files=FILES, expected=EXPECTED)


def read(given):
    """Read the rows: "sentence" and "label"."""
    files = {split: str(given.data / f"{split}.tsv") for split in ("train", "dev")}
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "column_names": ["sentence", "label"]}
    dataset = load_dataset("csv", data_files=files, **form)
    sizes = {"train": 32, "dev": 16} if given.tiny else {"train": 2400, "dev": 872}
    return DatasetDict(
        {split: dataset[split].shuffle(seed=42).select(range(n)) for split, n in sizes.items()}
    )


def compute_metrics(result):
    rows = {"predictions": np.argmax(result.predictions, axis=-1), "references": result.label_ids}
    return {**ACCURACY.compute(**rows), **F1.compute(**rows)}

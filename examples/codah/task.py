"""Which of four endings a sentence has (CODAH): multiple choice, accuracy."""

import csv
import sys
from pathlib import Path

import numpy as np
from datasets import DatasetDict, load_dataset

from hfbridge import load_metric

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report

__all__ = ["SETTINGS", "arguments", "compute_metrics", "pair_with_endings", "read", "report"]

FILES = ("train.tsv", "dev.tsv")
EXPECTED = (
    "train.tsv and dev.tsv: tab-separated without a header: category, beginning, four endings, and the "
    "number of the right one (0 to 3). The repository Websail-NU/CODAH on GitHub has them in "
    "data/cv_split/fold_0."
)
ENDINGS = [f"ending{number}" for number in range(4)]
SETTINGS = {
    "output_dir": "out/codah",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "learning_rate": 5e-5,
    "warmup_steps": 0.1,
    "save_strategy": "no",
    "logging_steps": 10,
    "report_to": "none",
    "seed": 42,
}
ACCURACY = load_metric("accuracy")


def arguments():
    return parse(__doc__, files=FILES, expected=EXPECTED)


def read(given):
    """Read the rows: "prompt", "ending0" to "ending3", "label"."""
    files = {split: str(given.data / f"{split}.tsv") for split in ("train", "dev")}
    names = ["category", "prompt", *ENDINGS, "label"]
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False, "column_names": names}
    dataset = load_dataset("csv", data_files=files, **form)
    sizes = {"train": 16, "dev": 8} if given.tiny else {"train": 800, "dev": 300}
    return DatasetDict(
        {split: dataset[split].shuffle(seed=42).select(range(n)) for split, n in sizes.items()}
    )


def pair_with_endings(tokenizer, rows):
    """Encode each beginning with each of its endings: columns of four sequences a row."""
    beginnings = [prompt for prompt in rows["prompt"] for _ in ENDINGS]
    endings = [ending for four in zip(*(rows[name] for name in ENDINGS), strict=True) for ending in four]
    encoded = tokenizer(beginnings, endings, truncation=True, max_length=64)
    return {name: [values[i : i + 4] for i in range(0, len(values), 4)] for name, values in encoded.items()}


def compute_metrics(result):
    return ACCURACY.compute(predictions=np.argmax(result.predictions, axis=-1), references=result.label_ids)

"""How alike two picture captions are, 0 to 5: regression on pairs, correlations with human scores."""

import csv
import sys
from pathlib import Path

from datasets import DatasetDict, load_dataset

from hfbridge import load_metric

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report

__all__ = ["SETTINGS", "arguments", "compute_metrics", "read", "report"]

FILES = ("train.tsv", "dev.tsv")
EXPECTED = (
    "train.tsv and dev.tsv: tab-separated with a header and columns sentence1, sentence2, score (0 to 5), "
    "as the STS benchmark of GLUE (https://gluebenchmark.com/tasks, STS-B) has them."
)
SETTINGS = {
    "output_dir": "out/stsb",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 5e-5,
    "warmup_steps": 0.1,
    "save_strategy": "no",
    "logging_steps": 10,
    "report_to": "none",
    "seed": 42,
}
PEARSON, SPEARMAN = load_metric("pearsonr"), load_metric("spearmanr")


def arguments():
    return parse(__doc__, files=FILES, expected=EXPECTED)


def read(given):
    """Read the rows: "sentence1", "sentence2", and the score as "label"."""
    files = {split: str(given.data / f"{split}.tsv") for split in ("train", "dev")}
    dataset = load_dataset("csv", data_files=files, delimiter="\t", quoting=csv.QUOTE_NONE)
    dataset = dataset.select_columns(["sentence1", "sentence2", "score"]).rename_column("score", "label")
    sizes = {"train": 32, "dev": 16} if given.tiny else {"train": 1000, "dev": 375}
    shuffled = {split: dataset[split].shuffle(seed=42) for split in sizes}
    return DatasetDict(
        {split: rows.select(range(min(sizes[split], len(rows)))) for split, rows in shuffled.items()}
    )


def compute_metrics(result):
    rows = {"predictions": result.predictions.squeeze(-1), "references": result.label_ids}
    return {**PEARSON.compute(**rows), **SPEARMAN.compute(**rows)}

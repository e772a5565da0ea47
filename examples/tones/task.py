"""Rising, falling and steady tones in noise, made here: audio classification, accuracy and macro F1."""

import sys
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict

from hfbridge import load_metric

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report

__all__ = ["RATE", "SETTINGS", "SIZES", "arguments", "compute_metrics", "read", "report"]

RATE = 2000  # samples a second
SETTINGS = {
    "output_dir": "out/tones",
    "num_train_epochs": 6,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 0.1,
    "save_strategy": "no",
    "logging_steps": 20,
    "report_to": "none",
    "seed": 42,
}
SIZES = {
    "num_labels": 3,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (32, 32, 64),
    "conv_kernel": (10, 8, 4),
    "conv_stride": (5, 4, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 64,
    "mask_time_length": 2,
}
ACCURACY, F1 = load_metric("accuracy"), load_metric("f1")


def arguments():
    return parse(__doc__)


def tone(kind, random):
    """Make half a second or so of a tone that rises (0), falls (1) or stays (2), with noise."""
    length = random.integers(RATE // 3, RATE // 2)
    low = random.uniform(150, 300)
    ends = {0: (low, 2 * low), 1: (2 * low, low), 2: (1.5 * low, 1.5 * low)}[kind]
    phase = 2 * np.pi * np.cumsum(np.linspace(*ends, length)) / RATE
    return (np.sin(phase) + random.normal(0, 0.3, length)).astype("float32")


def read(given):
    """Make the rows: "audio", samples at `RATE`, and its "label"."""
    random = np.random.default_rng(42)
    parts = {}
    for split, count in ({"train": 48, "test": 24} if given.tiny else {"train": 900, "test": 300}).items():
        labels = [number % 3 for number in range(count)]
        parts[split] = Dataset.from_dict({"audio": [tone(kind, random) for kind in labels], "label": labels})
    return DatasetDict(parts)


def compute_metrics(result):
    rows = {"predictions": np.argmax(result.predictions, axis=-1), "references": result.label_ids}
    return {**ACCURACY.compute(**rows), **F1.compute(**rows, average="macro")}

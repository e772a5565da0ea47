"""Handwritten digits of scikit-learn, 8 x 8 pixels: image classification, accuracy and macro F1."""

import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from sklearn.datasets import load_digits

from hfbridge import load_metric

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report

__all__ = ["SETTINGS", "SIZES", "arguments", "compute_metrics", "read", "report"]

SETTINGS = {
    "output_dir": "out/digits",
    "num_train_epochs": 10,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
    "save_strategy": "no",
    "logging_steps": 50,
    "report_to": "none",
    "seed": 42,
}
SIZES = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_labels": 10,
}
ACCURACY, F1 = load_metric("accuracy"), load_metric("f1")


def arguments():
    return parse(__doc__)


def read(given):
    """Read the rows: an "image" of 8 rows of 8 pixels, 0 to 16, and its "label"."""
    images, labels = load_digits(return_X_y=True)
    rows = Dataset.from_dict({"image": images.reshape(-1, 8, 8).astype("float32"), "label": labels})
    rows = rows.select(range(200)) if given.tiny else rows
    return rows.train_test_split(test_size=0.2, seed=42)


def compute_metrics(result):
    rows = {"predictions": np.argmax(result.predictions, axis=-1), "references": result.label_ids}
    return {**ACCURACY.compute(**rows), **F1.compute(**rows, average="macro")}

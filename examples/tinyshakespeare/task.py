"""Plays of Shakespeare, continued by a small model of stories: causal language modelling, perplexity."""

import sys
from itertools import chain
from pathlib import Path

from datasets import load_dataset

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report

__all__ = ["SETTINGS", "arguments", "block", "read", "report"]

FILES = ("input.txt",)
EXPECTED = (
    "input.txt: plain text. The repository karpathy/char-rnn on GitHub has that of Shakespeare in "
    "data/tinyshakespeare."
)
SETTINGS = {
    "output_dir": "out/tinyshakespeare",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 2e-3,
    "warmup_steps": 0.1,
    "save_strategy": "no",
    "logging_steps": 20,
    "report_to": "none",
    "seed": 42,
}
LENGTH = 128


def arguments():
    return parse(__doc__, files=FILES, expected=EXPECTED, model="a causal language model with its tokenizer")


def read(given):
    """Read the lines; the last tenth is for the test."""
    lines = load_dataset("text", data_files=str(given.data / FILES[0]), split="train")
    lines = lines.select(range(1500 if given.tiny else min(20_000, len(lines))))
    return lines.train_test_split(test_size=0.1, shuffle=False)


def block(ids_of_lines):
    """Cut a text into pieces of one length; what is left over is dropped."""
    ids = list(chain.from_iterable(ids_of_lines))
    pieces = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
    return {"input_ids": pieces, "labels": pieces}

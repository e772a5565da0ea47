"""Articles of Wikipedia with masked words (WikiText-2): masked language modelling, perplexity."""

import sys
from itertools import chain
from pathlib import Path

from datasets import load_dataset

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report

__all__ = ["SETTINGS", "arguments", "block", "read", "report"]

FILES = ("valid.txt", "test.txt")
EXPECTED = (
    "valid.txt and test.txt: plain text; the first is trained on, the second is for the test. The repository "
    "pytorch/examples on GitHub has those of WikiText-2 in word_language_model/data/wikitext-2."
)
SETTINGS = {
    "output_dir": "out/wikitext2",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "learning_rate": 5e-4,
    "warmup_steps": 0.1,
    "save_strategy": "no",
    "logging_steps": 10,
    "report_to": "none",
    "seed": 42,
}
LENGTH = 64


def arguments():
    return parse(__doc__, files=FILES, expected=EXPECTED)


def read(given):
    """Read the first lines of each file."""
    files = {"train": str(given.data / "valid.txt"), "test": str(given.data / "test.txt")}
    lines = load_dataset("text", data_files=files)
    for split, count in ({"train": 20, "test": 10} if given.tiny else {"train": 900, "test": 120}).items():
        lines[split] = lines[split].select(range(count))
    return lines


def block(ids_of_lines, tokenizer):
    """Cut a text into pieces of one length, and put the special tokens around each; the rest is dropped."""
    ids, inner = list(chain.from_iterable(ids_of_lines)), LENGTH - 2
    pieces = [ids[i : i + inner] for i in range(0, len(ids) - inner + 1, inner)]
    return {"input_ids": [[tokenizer.cls_token_id, *piece, tokenizer.sep_token_id] for piece in pieces]}

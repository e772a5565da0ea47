"""Train a reranker with sentence-transformers."""

import argparse

from datasets import Dataset
from local import make_rows
from sentence_transformers.cross_encoder import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, MultipleNegativesRankingLoss

parser = argparse.ArgumentParser()
parser.add_argument("--model_name_or_path", required=True)
parser.add_argument("--output_dir", default="out")
parser.add_argument("--losses", default="one")
given = parser.parse_args()

model = CrossEncoder(given.model_name_or_path, device="cpu")
scored = Dataset.from_list(make_rows("scored", 14)), Dataset.from_list(make_rows("scored", 6, seed=1))
pairs = Dataset.from_list(make_rows("pair", 9)), Dataset.from_list(make_rows("pair", 5, seed=1))
if given.losses == "one":
    train, evaluation, loss = *scored, BinaryCrossEntropyLoss(model)
else:
    train, evaluation = ({"pairs": one, "scored": two} for one, two in zip(pairs, scored, strict=True))
    loss = {"pairs": MultipleNegativesRankingLoss(model), "scored": BinaryCrossEntropyLoss(model)}
trainer = CrossEncoderTrainer(
    model,
    CrossEncoderTrainingArguments(
        output_dir=given.output_dir,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    ),
    train_dataset=train,
    eval_dataset=evaluation,
    loss=loss,
)
trainer.train()
model.save_pretrained(f"{given.output_dir}/final")

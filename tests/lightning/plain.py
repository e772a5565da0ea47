"""A run on three sides: HFModule under hfbridge.Trainer and under lightning.Trainer, and one written by hand.

The hand-written `PlainModule` has the optimizer and the schedule of the HF Trainer, so that under the same
arguments of `lightning.Trainer` its batches, learning rates and weights are those that HFModule must have.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer as HFTrainer
from transformers import get_linear_schedule_with_warmup

import hfbridge
from tests.tiny import PadRows, make_dataset, make_model

ROWS, EVAL_ROWS, BATCH_SIZE, MICRO_BATCHES = 24, 11, 4, 6
RATE, DEFAULT_RATE = 1e-2, 5e-5

SETTINGS: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "num_train_epochs": 2,
    "per_device_train_batch_size": BATCH_SIZE,
    "per_device_eval_batch_size": BATCH_SIZE,
    "train_sampling_strategy": "sequential",
    "learning_rate": RATE,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
}
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
# Arguments after which Lightning validates, although the settings do not evaluate.
VALIDATING = ("val_check_interval", "check_val_every_n_epoch", "fast_dev_run")

both_trainers = pytest.mark.parametrize("side", ["hfbridge", "lightning"])


class PlainModule(pl.LightningModule):
    """A LightningModule around a Hugging Face model, with AdamW and the linear schedule of the HF Trainer."""

    def __init__(self, model: Any, *, learning_rate: float = RATE, warmup: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"])
        self.model, self.learning_rate, self.warmup = model, learning_rate, warmup

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("eval_loss", self.model(**batch).loss, batch_size=len(batch["labels"]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.model(**batch).loss, batch_size=len(batch["labels"]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits: Tensor = self.model(**batch).logits
        return logits

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = make_optimizer(
            self.model, steps=steps, learning_rate=self.learning_rate, warmup=self.warmup
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class PlainData(pl.LightningDataModule):
    """The same examples in DataLoaders."""

    def __init__(self, *, train: Sequence[Any] | None = None, shuffle: bool = False) -> None:
        super().__init__()
        self.train, self.shuffle = train, shuffle

    def train_dataloader(self) -> Any:
        if self.train is not None:
            return DataLoader(self.train, batch_size=None)  # type: ignore[arg-type]
        return make_loader(ROWS, shuffle=self.shuffle)

    def val_dataloader(self) -> Any:
        return make_loader(EVAL_ROWS, seed=5)

    def test_dataloader(self) -> Any:
        return make_loader(EVAL_ROWS, seed=6)

    def predict_dataloader(self) -> Any:
        return make_loader(EVAL_ROWS, seed=7)


class Trace(pl.Callback):
    """Note what a run does, seen from a callback.

    Attributes:
        batches: training micro-batches.
        trained: their examples, by the sums of their tokens.
        rates: the learning rate of each optimizer step.
        epochs: the optimizer steps completed at the end of each epoch.
        validated: for each validation, the optimizer steps before it and its batches.
        sanity, tested, predicted: batches of these loops.
    """

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.rates: list[float] = []
        self.epochs: list[int] = []
        self.validated: list[list[int]] = []
        self.sanity = self.tested = self.predicted = 0

    @property
    def trained(self) -> list[list[int]]:
        return [batch["input_ids"].sum(1).tolist() for batch in self.batches]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append({name: value.clone() for name, value in batch.items()})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append(trainer.global_step)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append([trainer.global_step, 0])

    def on_validation_batch_end(self, trainer: Any, *hook: Any) -> None:
        if trainer.sanity_checking:
            self.sanity += 1
        else:
            self.validated[-1][1] += 1

    def on_test_batch_end(self, *hook: Any) -> None:
        self.tested += 1

    def on_predict_batch_end(self, *hook: Any) -> None:
        self.predicted += 1


class MemoryLogger(Logger):
    """Keep what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[dict[str, float]] = []
        self.hparams: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.entries.append(dict(metrics))

    def log_hyperparams(self, params: Any, *further: Any) -> None:
        self.hparams.update(params)

    def values(self, name: str) -> list[float]:
        """List what was logged under a name."""
        return [float(entry[name]) for entry in self.entries if name in entry]


@dataclass
class Run:
    """A Trainer, what it trains, and what it did."""

    trainer: Any
    module: Any
    data: Any
    trace: Trace

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.module.model.state_dict().items()}

    @property
    def summary(self) -> dict[str, Any]:
        """What must be equal on all sides."""
        return {
            "global_step": self.trainer.global_step,
            "epochs": self.trace.epochs,
            "validated": self.trace.validated,
            "sanity": self.trace.sanity,
            "trained": self.trace.trained,
        }


def make_parts(
    side: str,
    settings: dict[str, Any] | None = None,
    *,
    has_settings: bool = True,
    quiet: bool = True,
    model: Any = None,
    data_class: Callable[[Any], Any] = lambda base: base,
    plain_data: dict[str, Any] | None = None,
    callbacks: Iterable[Any] = (),
    warmup: float = 0.0,
    **arguments: Any,
) -> Run:
    """Make Trainer, module and data of a side.

    Args:
        side: "hfbridge", "lightning", or "reference" for what is written by hand.
        settings: instead of some of `SETTINGS`; `None` as a value removes one.
        has_settings: whether there are settings at all.
        quiet: whether `QUIET` arguments are added.
        model: another than the usual one.
        data_class: makes a data module class from `HFDataModule` or `PlainData`.
        plain_data: arguments of `PlainData`.
        callbacks: further ones.
        warmup: steps of the warm-up in the reference.
        **arguments: of the Trainer.
    """
    given = {**SETTINGS, **(settings or {})} if has_settings else {}
    given = {name: value for name, value in given.items() if value is not None}
    model = make_model("distilbert", dropout=0.0) if model is None else model
    trace = Trace()
    arguments = {**(QUIET if quiet else {}), **arguments, "callbacks": [trace, *callbacks]}
    if not has_settings:
        arguments.setdefault("accelerator", "cpu")
    if side == "hfbridge":
        trainer: Any = hfbridge.Trainer(given, **arguments) if has_settings else hfbridge.Trainer(**arguments)
        return Run(trainer, hfbridge.HFModule(model), make_data(data_class, batch_size=not given), trace)
    trainer = pl.Trainer(**_with_arguments_for(side, given, arguments))
    if side == "lightning":
        module: Any = hfbridge.HFModule(model, **({"settings": given} if has_settings else {}))
        return Run(trainer, module, make_data(data_class, batch_size=not given), trace)
    module = PlainModule(model, learning_rate=given.get("learning_rate", DEFAULT_RATE), warmup=warmup)
    return Run(trainer, module, data_class(PlainData)(**(plain_data or {})), trace)


def _with_arguments_for(side: str, given: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Add the arguments that stand for settings, without which Lightning has defaults of its own."""
    found: dict[str, Any] = {"devices": 1, **arguments}
    if given.get("use_cpu"):
        found.setdefault("accelerator", "cpu")
    if not given:
        return found
    if not {"max_epochs", "max_steps", "fast_dev_run"} & arguments.keys():
        found["max_epochs"] = given["num_train_epochs"]
    if "gradient_accumulation_steps" in given:
        found.setdefault("accumulate_grad_batches", given["gradient_accumulation_steps"])
    if not arguments.get("barebones"):
        found.setdefault("num_sanity_val_steps", 0)
        found.setdefault("log_every_n_steps", given.get("logging_steps"))
    if side == "reference" and not any(name in arguments for name in VALIDATING):
        found.setdefault("limit_val_batches", 0)
    return found


def make_data(data_class: Callable[[Any], Any] = lambda base: base, *, batch_size: bool = False) -> Any:
    """Make an HFDataModule of the examples of `PlainData`."""
    return data_class(hfbridge.HFDataModule)(
        train_dataset=make_dataset("distilbert", ROWS),
        eval_dataset=make_dataset("distilbert", EVAL_ROWS, seed=5),
        test_dataset=make_dataset("distilbert", EVAL_ROWS, seed=6),
        predict_dataset=make_dataset("distilbert", EVAL_ROWS, seed=7),
        data_collator=PadRows(),
        **({"batch_size": BATCH_SIZE} if batch_size else {}),
    )


def make_loader(rows: int, *, seed: int = 3, **options: Any) -> DataLoader[Any]:
    """Make a DataLoader of micro-batches of four examples."""
    dataset: Any = make_dataset("distilbert", rows, seed=seed)
    return DataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=PadRows(), **options)


def make_optimizer(
    model: Any, *, steps: int, learning_rate: float = RATE, warmup: float = 0.0
) -> tuple[Any, Any]:
    """Make AdamW with the HF Trainer's two groups of parameters, and its linear schedule."""
    decayed = HFTrainer.get_decay_parameter_names(SimpleNamespace(), model)  # type: ignore[arg-type]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if name in decayed]},
        {"params": [p for name, p in named if name not in decayed]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0, fused=True)
    return optimizer, get_linear_schedule_with_warmup(optimizer, math.ceil(warmup), steps)


def train_by_hand(
    model: Any, steps: Sequence[Sequence[Any]], count: Callable[[Any], int], *, warmup: float = 0.0
) -> None:
    """Train on the mean over everything that counts in an optimizer step.

    Args:
        model: trained in place.
        steps: the micro-batches of each optimizer step.
        count: what the model's own mean over a micro-batch is taken over.
        warmup: steps of the warm-up.
    """
    optimizer, schedule = make_optimizer(model, steps=len(steps), warmup=warmup)
    model.train()
    for step in steps:
        total = sum(map(count, step))
        for batch in step:
            (model(**batch).loss * count(batch) / total).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def run(side: str, settings: dict[str, Any] | None = None, **options: Any) -> Run:
    """Fit on a side; `make_parts` has the arguments."""
    parts = make_parts(side, settings, **options)
    parts.trainer.fit(parts.module, datamodule=parts.data)
    return parts


def logged_steps(parts: Run, name: str) -> list[int]:
    """List the steps at which the log history has a name."""
    return [entry["step"] for entry in parts.module.log_history if name in entry]


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, exactly: bool = True) -> None:
    """Compare weights, to the bit or but for the order in which sums are taken.

    The bias of a key has no gradient but rounding errors, which AdamW blows up.
    """
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if exactly:
            assert torch.equal(ours[name], value), name
        elif not name.endswith("k_lin.bias"):
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-5, msg=name)


def assert_same_run(ours: Run, theirs: Run, *, exactly: bool = True, weights: bool = True) -> None:
    """Compare batches, steps, learning rates, epochs, validations and weights of two runs."""
    found, expected = ours.summary, theirs.summary
    for name, value in expected.items():
        assert found[name] == value, f"{name}: {found[name]}, expected {value}"
    assert ours.trace.rates == pytest.approx(theirs.trace.rates, rel=1e-9), ours.trace.rates
    if weights and "eval_loss" in theirs.trainer.callback_metrics:
        loss = float(theirs.trainer.callback_metrics["eval_loss"])
        found_loss = float(ours.trainer.callback_metrics["eval_loss"])
        assert found_loss == pytest.approx(loss, rel=1e-5 if exactly else 1e-3), (found_loss, loss)
    if weights:
        assert_same_weights(ours.weights, theirs.weights, exactly=exactly)


def compare(
    side: str,
    settings: dict[str, Any] | None = None,
    *,
    exactly: bool = True,
    weights: bool = True,
    **options: Any,
) -> tuple[Run, Run]:
    """Run a side and the reference with the same arguments, and compare them."""
    ours, theirs = run(side, settings, **options), run("reference", settings, **options)
    assert_same_run(ours, theirs, exactly=exactly, weights=weights)
    return ours, theirs

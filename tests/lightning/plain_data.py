"""The hand-written Lightning side of tests/lightning: a LightningModule, its loaders, and what runs it.

A test runs one thing on several sides: "reference" is `PlainModule` under `lightning.Trainer`; "hfbridge" and
"lightning" are `HFModule` under `hfbridge.Trainer` and under `lightning.Trainer`. The settings are those with
which nothing but the test's subject is left: SGD, a constant learning rate, no clipping, no dropout.
"""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import hfbridge
from tests.tiny import PadRows, make_model, make_rows

RATE = 0.5
SETTINGS: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "optim": "sgd",
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}

for_both = pytest.mark.parametrize("side", ["hfbridge", "lightning"])


class PlainModule(pl.LightningModule):
    """What one writes without hfbridge."""

    def __init__(self, model: Any = None) -> None:
        super().__init__()
        self.model = make_model("distilbert", dropout=0.0) if model is None else model

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("eval_loss", self.model(**batch).loss, batch_size=len(batch["labels"]))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", self.model(**batch).loss, batch_size=len(batch["labels"]))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.model(**batch).logits

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=RATE)


MakeClass = Callable[[type[Any]], type[Any]]


def unchanged(base: type[Any]) -> type[Any]:
    """Override nothing."""
    return base


def make_loader(
    count: int = 16, *, seed: int = 3, kind: str = "distilbert", **options: Any
) -> DataLoader[Any]:
    """Make a DataLoader of batches of 4 rows."""
    return DataLoader(
        make_rows(kind, count, seed=seed),  # type: ignore[arg-type]
        **{"batch_size": 4, "collate_fn": PadRows(), **options},
    )


def make_module(
    side: str, make_class: MakeClass = unchanged, *, settings: Any = None, epochs: int = 2, **given: Any
) -> Any:
    """Make the module of a side; `make_class` subclasses it."""
    given.setdefault("model", make_model("distilbert", dropout=0.0))
    if side == "reference":
        return make_class(PlainModule)(**given)
    if side == "lightning":
        given["settings"] = {"num_train_epochs": epochs, **SETTINGS, **(settings or {})}
    return make_class(hfbridge.HFModule)(**given)


def make_trainer(side: str, *, settings: Any = None, epochs: int = 2, **arguments: Any) -> Any:
    """Make the Trainer of a side for some settings, which a plain one gets as its arguments."""
    said = {"num_train_epochs": epochs, **SETTINGS, **(settings or {})}
    if side == "hfbridge":
        return hfbridge.Trainer(said, **{**QUIET, **arguments})
    callbacks = arguments.get("callbacks") or []
    max_steps = said.get("max_steps", -1)
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": -1 if max_steps > 0 else epochs,
            "max_steps": max_steps,
            "accumulate_grad_batches": said.get("gradient_accumulation_steps", 1),
            "log_every_n_steps": said["logging_steps"],
            "num_sanity_val_steps": 0,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            **QUIET,
            **arguments,
        }
    )


def fit(
    side: str,
    *data: Any,
    make_class: MakeClass = unchanged,
    settings: Any = None,
    epochs: int = 2,
    given: Any = None,
    named: Any = None,
    **arguments: Any,
) -> tuple[Any, Any]:
    """Train on a side; returns module and Trainer.

    Args:
        side: "reference", "hfbridge" or "lightning".
        *data: positional arguments of `fit` after the module.
        make_class: subclasses the module.
        settings: beside `SETTINGS`.
        epochs: of the run.
        given: arguments of the module.
        named: arguments of `fit` by name.
        **arguments: of the Trainer.
    """
    module = make_module(side, make_class, settings=settings, epochs=epochs, **(given or {}))
    trainer = make_trainer(side, settings=settings, epochs=epochs, **arguments)
    trainer.fit(module, *data, **(named or {}))
    return module, trainer


def fit_both(
    side: str, make_class: MakeClass, *, loaders: int = 1, **options: Any
) -> tuple[Any, Any, Any, Any]:
    """Train on a side and on the reference; returns module and Trainer of both."""

    def run(of_side: str) -> tuple[Any, Any]:
        data = (make_loader(16), make_loader(10, seed=5))[:loaders]
        return fit(of_side, *data, make_class=make_class, **options)

    return *run(side), *run("reference")


def our_data(side: str, *, settings: Any = None, epochs: int = 2, **given: Any) -> hfbridge.HFDataModule:
    """Make an HFDataModule with the settings where a plain Trainer has none."""
    given.setdefault("data_collator", PadRows())
    if side == "lightning":
        said = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "num_train_epochs": epochs}
        given["settings"] = {**SETTINGS, **said, **(settings or {})}
    return hfbridge.HFDataModule(**given)


def our_trainer(side: str, *, settings: Any = None, epochs: int = 2, **arguments: Any) -> Any:
    """Make the Trainer of a side for batches of 4 of an HFDataModule."""
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    return make_trainer(side, settings={**sizes, **(settings or {})}, epochs=epochs, **arguments)


def weights(module: Any) -> dict[str, torch.Tensor]:
    """Copy the model's weights."""
    return {name: value.detach().clone() for name, value in module.model.state_dict().items()}


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether weights are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_same_weights(ours: Any, theirs: Any) -> None:
    """Compare two trained modules to the bit, and see that they were trained."""
    found, expected = weights(ours), weights(theirs)
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differing
    assert not is_same(found, make_model("distilbert", dropout=0.0).state_dict())


def assert_close_weights(ours: Any, theirs: Any) -> None:
    """Compare two trained modules but for the order in which sums are taken."""
    found, expected = weights(ours), weights(theirs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert not is_same(found, make_model("distilbert", dropout=0.0).state_dict())


def rows_in(batch: Any) -> list[tuple[int, ...]]:
    """Name the rows of a batch by their tokens."""
    pairs = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    return [tuple(ids[: sum(mask)]) for ids, mask in pairs]


def names_of(rows: Any) -> list[tuple[int, ...]]:
    """Name rows as `rows_in` does."""
    return [tuple(row["input_ids"]) for row in rows]


class Watch(pl.Callback):
    """Keep what the hooks were called with."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.indices: list[int] = []
        self.validated_at: list[int] = []
        self.validated: list[Any] = []
        self.rates: list[float] = []
        self.outputs: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.indices.append(batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *batch: Any) -> None:
        self.outputs.append(outputs)
        self.rates += [
            group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups[:1]
        ]

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.validated_at.append(trainer.global_step)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *i: Any
    ) -> None:
        self.validated.append(batch)

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """The rows of all training batches, in order."""
        return [row for batch in self.batches for row in rows_in(batch)]


class RowsOneByOne(torch.utils.data.IterableDataset[Any]):
    """An iterable dataset without a length."""

    def __init__(self, count: int, *, seed: int = 3) -> None:
        self.rows = make_rows("distilbert", count, seed=seed)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


class PlainData(pl.LightningDataModule):
    """A user's data module; its hooks leave their mark on the data."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.stages: list[str] = []

    def prepare_data(self) -> None:
        self.stages.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.stages.append(f"setup {stage}")

    def teardown(self, stage: str) -> None:
        self.stages.append(f"teardown {stage}")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch["input_ids"] = batch["input_ids"].clamp(max=20)
        return batch

    def train_dataloader(self) -> Any:
        return make_loader(16, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return make_loader(10, seed=5, batch_size=self.batch_size)

    def test_dataloader(self) -> Any:
        return make_loader(9, seed=6, batch_size=self.batch_size)

    def predict_dataloader(self) -> Any:
        return make_loader(7, seed=7, batch_size=self.batch_size)

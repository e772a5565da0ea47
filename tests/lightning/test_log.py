"""`self.log` of a subclass of HFModule, with all its options, against a hand-written LightningModule."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MeanMetric

from tests.lightning.plain_data import (
    MakeClass,
    fit,
    for_both,
    make_loader,
    make_module,
    make_trainer,
)

# Lightning's advice: a validation_step without a loader.
pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
EVALUATED = {"eval_strategy": "epoch"}


# self.log.


def logs(**options: Any) -> MakeClass:
    """Log a number in each hook that may, with options of `self.log`."""

    def make_class(base: type[Any]) -> type[Any]:
        class Logs(base):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("in_training", float(batch_idx + 10 * self.current_epoch), **options)
                return super().training_step(batch, batch_idx)

            def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
                super().validation_step(batch, batch_idx, dataloader_idx)
                self.log("in_validation", float(batch_idx + 5), **options)

        return Logs

    return make_class


MINE = ("in_", "mine", "metric", "epoch_end", "of_two")


def of_the_user(metrics: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if name.startswith(MINE)}


def rows_of(folder: str) -> list[tuple[str, str, str]]:
    """Read what the module logs, by step."""
    (file,) = Path(folder).rglob("metrics.csv")
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    return [
        (row["step"], name, value)
        for row in rows
        for name, value in row.items()
        if name.startswith(MINE) and value
    ]


def assert_logs_the_same(side: str, make_class: MakeClass, *, options: Any = None) -> dict[str, float]:
    """Compare all that one can see of `self.log`; returns the metrics that callbacks see."""
    settings = {"gradient_accumulation_steps": 2, **EVALUATED, **(options or {})}
    trainers = {}
    for of_side in ("reference", side):
        loaders = make_loader(18), make_loader(10, seed=5)
        _, trainers[of_side] = fit(
            of_side, *loaders, make_class=make_class, settings=settings, logger=CSVLogger(of_side)
        )
    ours, theirs = trainers[side], trainers["reference"]
    for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        assert of_the_user(getattr(ours, name)) == of_the_user(getattr(theirs, name))
    assert rows_of(side) == rows_of("reference")
    return of_the_user(ours.callback_metrics)


@for_both
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prog_bar": True},
        {"logger": False},
        {"on_step": True, "on_epoch": False},
        {"on_step": False, "on_epoch": True},
        {"on_step": True, "on_epoch": True},
        {"on_epoch": True, "reduce_fx": "max"},
        {"on_epoch": True, "reduce_fx": "sum"},
        {"on_epoch": True, "reduce_fx": torch.min},
        {"on_epoch": True, "batch_size": 1},
        {"on_epoch": True, "sync_dist": True},
        {"on_epoch": True, "rank_zero_only": True},
        {"on_epoch": True, "add_dataloader_idx": False},
        {"enable_graph": True},
    ],
    ids=lambda options: str({name: getattr(value, "__name__", value) for name, value in options.items()}),
)
def test_options_of_log(side: str, options: Any) -> None:
    found = assert_logs_the_same(side, logs(**options))
    assert found
    if options.get("on_step") and not options.get("on_epoch"):
        assert found == {"in_training": 14.0}
    if options.get("reduce_fx") == "sum":
        assert found["in_training_epoch" if "on_step" in options else "in_training"] > 14.0


@for_both
def test_log_every_n_steps(side: str) -> None:
    found = assert_logs_the_same(side, logs(on_step=True), options={"logging_steps": 2})
    assert "in_training" in found or "in_training_step" in found


@for_both
def test_log_in_hooks(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Logs(base):  # type: ignore[misc]
            def on_train_start(self) -> None:
                self.log("mine_start", 1.0)

            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                self.log("mine_loss", outputs["loss"] * 0 + batch_idx, on_epoch=True)

            def on_train_epoch_end(self) -> None:
                self.log("epoch_end", float(self.current_epoch))

            def on_validation_epoch_end(self) -> None:
                self.log_dict({"mine_one": 1.0, "mine_two": 2.0 + self.current_epoch})

        return Logs

    found = assert_logs_the_same(side, make_class)
    assert found["epoch_end"] == 1.0
    assert found["mine_two"] == 3.0


@for_both
@pytest.mark.parametrize("named", [False, True], ids=["found", "metric_attribute"])
def test_log_a_torchmetric(side: str, named: bool) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Logs(base):  # type: ignore[misc]
            def __init__(self, *arguments: Any, **more: Any) -> None:
                super().__init__(*arguments, **more)
                self.mean = MeanMetric()

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.mean(batch["labels"].float())
                attribute = {"metric_attribute": "mean"} if named else {}
                self.log("metric", self.mean, on_step=False, on_epoch=True, **attribute)
                return super().training_step(batch, batch_idx)

        return Logs

    found = assert_logs_the_same(side, make_class)
    labels = torch.cat([batch["labels"] for batch in make_loader(18)]).float()
    assert found["metric"] == pytest.approx(float(labels.mean()))


@for_both
@pytest.mark.parametrize("add", [True, False])
def test_log_of_several_loaders(side: str, add: bool) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Logs(base):  # type: ignore[misc]
            def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
                name = "of_two" if add else f"of_two_{dataloader_idx}"
                self.log(name, float(batch_idx), add_dataloader_idx=add, batch_size=1)

        return Logs

    def run(of_side: str) -> dict[str, float]:
        trainer = make_trainer(of_side)
        loaders = [make_loader(16), make_loader(8, seed=4)]
        trainer.validate(make_module(of_side, make_class), loaders)
        return of_the_user(trainer.callback_metrics)

    ours = run(side)
    assert ours == run("reference")
    suffix = "/dataloader_idx" if add else ""
    assert ours == {f"of_two{suffix}_0": 1.5, f"of_two{suffix}_1": 0.5}


@for_both
def test_a_callback_follows_what_the_module_logs(side: str) -> None:
    def run(of_side: str) -> list[float]:
        kept = ModelCheckpoint(dirpath=f"kept-{of_side}", monitor="in_validation", save_top_k=-1)
        loaders = make_loader(16), make_loader(10, seed=5)
        make_class = logs(on_epoch=True)
        fit(of_side, *loaders, make_class=make_class, settings=EVALUATED, callbacks=[kept])
        return [float(value) for value in kept.best_k_models.values()]

    assert run(side) == run("reference")

"""Loggers of Lightning, what can be monitored, and the loss that callbacks get."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch import callbacks as builtin
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from hfbridge.errors import BridgeError
from tests.lightning.plain_callbacks import (
    ENGINES,
    LEARNING_RATE,
    STEPS,
    KeptLogger,
    Recorder,
    files_in,
    make_run,
)

BRIDGED = ENGINES[1:]


@pytest.mark.parametrize("engine", BRIDGED)
def test_loggers_get_the_names_that_callbacks_monitor(engine: str) -> None:
    logger = KeptLogger()
    run = make_run(engine, logger=logger, accumulation=2, epochs=1, decays=True).fit()
    names = {name for _, logged in logger.rows for name in logged}
    assert {"loss", "grad_norm", "learning_rate", "eval_loss", "epoch"} <= names
    assert not [name for name in names if name.startswith(("train/", "eval/"))]
    assert {"loss", "grad_norm", "learning_rate", "eval_loss"} <= run.trainer.callback_metrics.keys()
    assert {"loss", "eval_loss"} <= run.trainer.logged_metrics.keys()
    steps = [step for step, logged in logger.rows if "loss" in logged]
    assert len(steps) == 3
    history = [entry for entry in run.module.log_history if "loss" in entry]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert logger.values(name) == pytest.approx([entry[name] for entry in history], rel=1e-6)


def find(tree: Any, name: str) -> list[Any]:
    """List the values that a name has in nested dicts, as they are and flattened with `/`."""
    if not isinstance(tree, dict):
        return []
    here = [value for key, value in tree.items() if str(key).split("/")[-1] == name]
    return here + [value for branch in tree.values() for value in find(branch, name)]


def use_csv() -> tuple[Any, Callable[[], Any]]:
    def read_back() -> Any:
        with Path("logs/lightning_logs/version_0/metrics.csv").open() as opened:
            rows = list(csv.DictReader(opened))
        hparams = yaml.unsafe_load(Path("logs/lightning_logs/version_0/hparams.yaml").read_text())
        return {name: [float(r[name]) for r in rows if r.get(name)] for name in rows[0]}, hparams

    return CSVLogger("logs"), read_back


def use_tensorboard() -> tuple[Any, Callable[[], Any]]:
    pytest.importorskip("tensorboard")

    def read_back() -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folder = Path("logs/lightning_logs/version_0")
        events = EventAccumulator(str(folder)).Reload()
        values = {name: [e.value for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
        return values, yaml.unsafe_load((folder / "hparams.yaml").read_text())

    return TensorBoardLogger("logs"), read_back


def use_wandb() -> tuple[Any, Callable[[], Any]]:
    wandb = pytest.importorskip("wandb")
    logger = WandbLogger(
        save_dir=".", offline=True, settings=wandb.Settings(silent=True, x_disable_stats=True)
    )

    def read_back() -> Any:
        values = {name: [value] for name, value in dict(logger.experiment.summary).items()}
        hparams = dict(logger.experiment.config)
        wandb.finish()
        wandb.teardown()
        return values, hparams

    return logger, read_back


def use_mlflow() -> tuple[Any, Callable[[], Any]]:
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(tracking_uri=Path("store").resolve().as_uri(), experiment_name="mine")

    def read_back() -> Any:
        client, run_id = logger.experiment, logger.run_id
        run = client.get_run(run_id)
        values = {n: [m.value for m in client.get_metric_history(run_id, n)] for n in run.data.metrics}
        assert run.info.status == "FINISHED"
        return values, dict(run.data.params)

    return logger, read_back


LOGGERS = {"csv": use_csv, "tensorboard": use_tensorboard, "wandb": use_wandb, "mlflow": use_mlflow}


@pytest.mark.filterwarnings("ignore::FutureWarning:mlflow", "ignore::DeprecationWarning:wandb")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k == "wandb" else k for k in LOGGERS]
)
def test_a_logger_gets_metrics_and_hyperparameters(
    kind: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "mlflow":
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger, read_back = LOGGERS[kind]()
    recorder = Recorder()
    make_run(engine, recorder, logger=logger).fit()
    values, hparams = read_back()
    if kind == "wandb":  # whose summary has the last value of each
        assert values["loss"] == pytest.approx(recorder.losses[-1:], rel=1e-4)
        assert values["eval_loss"] == pytest.approx(recorder.eval_losses[-1:], rel=1e-4)
    else:
        assert values["loss"] == pytest.approx(recorder.losses, rel=1e-4)
        assert values["eval_loss"] == pytest.approx(recorder.eval_losses, rel=1e-4)
    assert [float(rate) for rate in find(hparams, "learning_rate")] == [LEARNING_RATE]


# Monitors.


@pytest.mark.parametrize("engine", BRIDGED)
@pytest.mark.parametrize("kind", ["checkpoint", "stopping"])
@pytest.mark.parametrize(
    ("monitor", "evaluation", "there_is"),
    [("val_loss", "epoch", "eval_loss"), ("eval_loss", "no", "loss"), ("eval_lss", 2, "eval_loss")],
)
def test_a_monitor_that_is_never_logged_is_refused_before_the_first_step(
    monitor: str, evaluation: Any, there_is: str, kind: str, engine: str
) -> None:
    recorder = Recorder()
    make: Any = builtin.ModelCheckpoint if kind == "checkpoint" else builtin.EarlyStopping
    run = make_run(engine, recorder, make(monitor=monitor), evaluation=evaluation)
    with pytest.raises(BridgeError, match=rf"(?s){monitor}.*\b{there_is}\b"):
        run.fit()
    assert recorder.starts == recorder.batches == []


def logging_more(base: Any) -> Any:
    class Logs(base):  # type: ignore[misc]
        def on_train_epoch_end(self) -> None:
            self.log("mine", float(self.current_epoch))

    return Logs


class LogsToo(pl.Callback):
    """Log a metric from a callback."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.log("mine", float(trainer.current_epoch))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["module", "callback"])
def test_a_monitor_may_be_what_a_subclass_or_a_callback_logs(kind: str, engine: str) -> None:
    stopping = builtin.EarlyStopping("mine", mode="min", patience=1)
    kept = builtin.ModelCheckpoint("kept", "{epoch}", monitor="mine")
    more: dict[str, Any] = {"subclass": logging_more} if kind == "module" else {}
    others = [LogsToo()] if kind == "callback" else []
    run = make_run(engine, *others, stopping, kept, epochs=4, **more).fit()
    assert run.trainer.global_step == 2 * STEPS
    assert files_in("kept") == {"epoch=0.ckpt"}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_monitor_that_is_not_strict_is_not_refused(engine: str) -> None:
    run = make_run(engine, builtin.EarlyStopping("val_loss", strict=False)).fit()
    assert run.trainer.global_step == 2 * STEPS


# The loss that callbacks get.


@pytest.mark.parametrize("engine", BRIDGED)
def test_losses_of_micro_batches_sum_to_the_logged_loss_of_their_step(engine: str) -> None:
    recorder = Recorder()
    # Seven micro-batches, of which the last has two examples and is a step alone.
    run = make_run(engine, recorder, rows=26, accumulation=3, epochs=1).fit()
    logged = [entry["loss"] for entry in run.module.log_history if "loss" in entry]
    sums = [sum(recorder.losses[first : first + 3]) for first in (0, 3, 6)]
    assert len(recorder.losses) == 7
    assert sums == pytest.approx(logged, rel=1e-4)

"""Lightning's own callbacks, made as their documentation shows, do their work in a bridged run."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger

import hfbridge
from hfbridge.errors import SettingsError
from tests.tiny import PadRows, make_dataset, make_model

SETTINGS: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "save_strategy": "no",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "disable_tqdm": True,
}
STEPS = 6
EVALUATIONS = {
    "no evaluation": {},
    "by epochs": {"eval_strategy": "epoch"},
    "by steps": {"eval_strategy": "steps", "eval_steps": 2},
}
ENGINES = pytest.mark.parametrize("engine", ["ours", "plain"])


class Recorder:
    """Logs for a module that it is given."""

    def record(self, module: Any, value: Any) -> None:
        module.log("seen", value)


class Recorded(hfbridge.HFModule):
    """Leaves logging to another object."""

    recorder = Recorder()

    def on_validation_epoch_end(self) -> None:
        self.recorder.record(self, float(self.current_epoch))


class Silent(hfbridge.HFModule):
    """Overrides hooks, and logs nothing in them."""

    epochs = 0

    def on_validation_epoch_end(self) -> None:
        self.epochs += 1
        super().on_validation_epoch_end()


def fit(
    engine: str, settings: Any = None, kind: Any = hfbridge.HFModule, **arguments: Any
) -> tuple[hfbridge.HFModule, pl.Trainer]:
    settings = {**SETTINGS, **(settings or {})}
    own = settings if engine == "plain" else None
    module = kind(
        make_model("distilbert"), settings=own, compute_metrics=lambda p: {"m": float(p.predictions.mean())}
    )
    data = hfbridge.HFDataModule(
        train_dataset=make_dataset("distilbert", 12),
        eval_dataset=make_dataset("distilbert", 6, seed=5),
        data_collator=PadRows(),
    )
    quiet = {"logger": False, "enable_model_summary": False}
    if engine == "ours":
        trainer: pl.Trainer = hfbridge.Trainer(settings, **{**quiet, **arguments})
    else:
        plain = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "enable_progress_bar": False}
        trainer = pl.Trainer(**{**quiet, **plain, **arguments})
    trainer.fit(module, datamodule=data)
    return module, trainer


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@ENGINES
@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_a_checkpoint_of_the_end_is_kept_by_default(engine: str, evaluation: str, tmp_path: Path) -> None:
    kept = ModelCheckpoint(dirpath=tmp_path / "kept")
    fit(engine, EVALUATIONS[evaluation], callbacks=[kept])
    assert names_in(tmp_path / "kept") == {f"epoch=1-step={STEPS}.ckpt"}


@ENGINES
@pytest.mark.parametrize("evaluation", ["by epochs", "by steps"])
def test_the_best_checkpoint_is_that_of_the_best_evaluation(
    engine: str, evaluation: str, tmp_path: Path
) -> None:
    kept = ModelCheckpoint(dirpath=tmp_path / "kept", monitor="eval_loss", filename="{step}")
    module, _ = fit(engine, EVALUATIONS[evaluation], callbacks=[kept])
    rows = [row for row in module.log_history if "eval_loss" in row]
    best = min(rows, key=lambda row: row["eval_loss"])
    assert names_in(tmp_path / "kept") == {f"step={best['step']}.ckpt"}


@ENGINES
def test_checkpoints_every_few_steps(engine: str, tmp_path: Path) -> None:
    kept = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fit(engine, callbacks=[kept])
    assert names_in(tmp_path / "kept") == {f"step={step}.ckpt" for step in (2, 4, 6)}


def test_a_plain_trainers_own_checkpoint_is_kept(tmp_path: Path) -> None:
    fit("plain", logger=CSVLogger(tmp_path, name="run"), log_every_n_steps=1)
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == [f"epoch=1-step={STEPS}.ckpt"]


def test_our_trainer_keeps_no_checkpoint_that_nobody_asked_for(tmp_path: Path) -> None:
    fit("ours")
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_a_checkpoint_holds_the_weights_after_its_step(tmp_path: Path) -> None:
    kept = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=STEPS, filename="end")
    module, _ = fit("ours", callbacks=[kept])
    saved = torch.load(tmp_path / "kept" / "end.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items())


@ENGINES
@pytest.mark.parametrize("evaluation", ["no evaluation", "by epochs"])
def test_early_stopping_on_the_training_loss(engine: str, evaluation: str) -> None:
    # No improvement is as large as min_delta: patience is used up at the second look, the second epoch's end.
    stopping = EarlyStopping(monitor="loss", patience=1, min_delta=1e3)
    _, trainer = fit(engine, EVALUATIONS[evaluation], callbacks=[stopping])
    assert stopping.wait_count == 1
    assert trainer.should_stop


@ENGINES
def test_early_stopping_on_an_evaluation_by_steps(engine: str) -> None:
    stopping = EarlyStopping(monitor="eval_m", patience=1, min_delta=1e3)
    module, trainer = fit(engine, EVALUATIONS["by steps"], callbacks=[stopping])
    assert trainer.global_step == module.host.state.global_step == 4
    assert module.log_history[-1]["step"] == 4
    assert "train_loss" in module.log_history[-1]


@ENGINES
def test_a_metric_that_does_not_exist_is_answered_with_those_that_do(engine: str) -> None:
    with pytest.raises(SettingsError, match=r"val_loss.*eval_loss"):
        fit(engine, EVALUATIONS["by epochs"], callbacks=[EarlyStopping(monitor="val_loss")])


@ENGINES
def test_a_metric_that_another_object_logs(engine: str) -> None:
    stopping = EarlyStopping(monitor="seen")
    _, trainer = fit(engine, EVALUATIONS["by epochs"], Recorded, callbacks=[stopping])
    assert (trainer.global_step, float(stopping.best_score)) == (STEPS, 0.0)


@ENGINES
def test_hooks_that_log_nothing_change_nothing_in_that(engine: str) -> None:
    with pytest.raises(SettingsError, match=r"val_loss.*eval_loss"):
        fit(engine, EVALUATIONS["by steps"], Silent, callbacks=[EarlyStopping(monitor="val_loss")])


@ENGINES
def test_native_and_lightning_steps_are_the_same_number(engine: str) -> None:
    module, trainer = fit(engine, {"gradient_accumulation_steps": 2})
    assert trainer.global_step == module.host.state.global_step == 4


@pytest.mark.filterwarnings("ignore:When using `Trainer\\(accumulate_grad_batches != 1\\)` and overriding")
@ENGINES
@pytest.mark.parametrize(("length", "steps"), [({}, 5), ({"max_steps": 4}, 4), ({"num_train_epochs": 3}, 6)])
def test_the_schedule_knows_an_accumulation_that_changes(
    engine: str, length: dict[str, int], steps: int
) -> None:
    """Three micro-batches an epoch: three steps in the first, two in the second, one in the third."""
    scheduler = GradientAccumulationScheduler({1: 2, 2: 3})
    epochs = {"max_epochs": length.get("num_train_epochs", 2)} if engine == "plain" else {}
    module, trainer = fit(
        engine,
        {"num_train_epochs": 2, "lr_scheduler_type": "linear", **length},
        callbacks=[scheduler],
        **epochs,
    )
    assert trainer.global_step == module.host.state.max_steps == steps
    rates = [row["learning_rate"] for row in module.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-3 * (1 - step / steps) for step in range(steps)])


@ENGINES
def test_a_timer_runs_along(engine: str) -> None:
    timer = Timer("00:01:00:00")
    _, trainer = fit(engine, callbacks=[timer])
    assert trainer.global_step == STEPS
    assert timer.time_elapsed() > 0


@ENGINES
def test_the_learning_rate_is_logged_as_it_was_used(engine: str, tmp_path: Path) -> None:
    class Kept(CSVLogger):
        rows: list[Any]

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            self.__dict__.setdefault("rows", []).append((step, dict(metrics)))

    logger = Kept(tmp_path)
    module, _ = fit(
        engine, logger=logger, callbacks=[LearningRateMonitor("step")], enable_checkpointing=False
    )
    native = {row["step"]: row["learning_rate"] for row in module.log_history if "learning_rate" in row}
    assert {step: row["learning_rate"] for step, row in logger.rows if "learning_rate" in row} == native
    monitored = [row for _, row in logger.rows if any(name.startswith("lr-AdamW") for name in row)]
    assert monitored
    names = {name for _, row in logger.rows for name in row}
    assert {"loss", "grad_norm", "epoch", "train_loss"} <= names


@ENGINES
def test_a_row_is_in_the_files_of_loggers_when_it_is_logged(engine: str, tmp_path: Path) -> None:
    """As natively; a run that is killed leaves its rows."""
    rows_at: list[int] = []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *hook: Any) -> None:
            files = list(tmp_path.rglob("metrics.csv"))
            rows_at.append(len(files[0].read_text().splitlines()) - 1 if files else 0)

    fit(engine, logger=CSVLogger(tmp_path), callbacks=[Reads()], enable_checkpointing=False)
    # The host is heard after the callbacks of the user.
    assert rows_at == list(range(STEPS))


@ENGINES
@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_a_bar_shows_loss_and_metrics(engine: str, bar: Any) -> None:
    shown = bar()
    module, trainer = fit(
        engine,
        {**EVALUATIONS["by epochs"], "disable_tqdm": False},
        callbacks=[shown],
        enable_progress_bar=True,
        enable_checkpointing=False,
    )
    metrics = shown.get_metrics(trainer, module)
    assert {"loss", "eval_loss", "eval_m"} <= set(metrics)
    last = [row for row in module.log_history if "loss" in row][-1]
    assert float(metrics["loss"]) == pytest.approx(last["loss"], rel=1e-3)

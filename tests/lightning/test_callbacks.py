"""Lightning's own callbacks, Tuner and loggers do to an HFModule what they do to a LightningModule.

A row is a run with a callback. It asserts what the callback did, and returns what else it did to the run; an
HFModule under either Trainer must give what the hand-written module gives.
"""

import re
import sys
from collections.abc import Callable
from contextlib import chdir
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch import callbacks as builtin
from lightning.pytorch.callbacks import model_checkpoint, timer
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hfbridge.errors import BridgeError
from tests.lightning.plain_callbacks import (
    BATCH_SIZE,
    ENGINES,
    LEARNING_RATE,
    STEPS,
    KeptLogger,
    Recorder,
    assert_close,
    files_in,
    make_run,
    mean_of,
    messages,
)
from tests.tiny import make_model

BRIDGED = ENGINES[1:]

Row = Callable[[str], Any]
ROWS: dict[str, Row] = {}


def row(name: str) -> Callable[[Row], Row]:
    """Add a function of an engine to the table: the name of a callback, and what it is made to do."""

    def add(check: Row) -> Row:
        assert name not in ROWS
        ROWS[name] = check
        return check

    return add


class Clock:
    """A clock that stands still but for the ten seconds that every micro-batch takes."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


CLOCK = Clock()


class Ticks(pl.Callback):
    """Let time go by."""

    def on_train_batch_end(self, *hook: Any) -> None:
        CLOCK.now_s += 10


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    CLOCK.now_s = 0.0
    for module in (timer, model_checkpoint):
        monkeypatch.setattr(module, "time", CLOCK)


def read(path: str | Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=False)
    return checkpoint


# Callback, Checkpoint, LambdaCallback: hooks.

TRAINING_HOOKS = (
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
)
VALIDATION_HOOKS = (
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
)


def note_hooks(hooks: tuple[str, ...], base: type = pl.Callback) -> tuple[type[Any], list[str]]:
    """Make a callback class that notes which of its hooks are called."""
    heard: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *arguments: heard.append(name)

    return type("Hooks", (base,), {name: note(name) for name in hooks}), heard


@row("Callback: hooks of training")
def _(engine: str) -> Any:
    hooks, heard = note_hooks(TRAINING_HOOKS)
    make_run(engine, hooks(), accumulation=3).fit()
    assert heard.count("on_train_batch_end") == heard.count("on_before_backward") == 2 * STEPS
    assert heard.count("on_before_optimizer_step") == heard.count("on_before_zero_grad") == 4
    return heard


@row("Callback: hooks of validation")
def _(engine: str) -> Any:
    hooks, heard = note_hooks((*VALIDATION_HOOKS, "on_train_batch_end", "on_train_epoch_start"))
    make_run(engine, hooks()).fit()
    assert heard.count("on_validation_start") == 2
    assert heard.count("on_validation_batch_end") == 4
    # Between an epoch's last batch and the next epoch.
    assert heard[STEPS + 1] == "on_validation_start"
    return heard


@row("Callback: a batch is a micro-batch")
def _(engine: str) -> Any:
    class Batches(pl.Callback):
        found: Any = ()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            assert isinstance(batch, dict)
            self.found += ((batch_idx, trainer.global_step, batch["input_ids"].clone()),)

    batches = Batches()
    run = make_run(engine, batches, accumulation=2, epochs=1).fit()
    assert [index for index, _, _ in batches.found] == list(range(STEPS))
    assert [step for _, step, _ in batches.found] == [0, 0, 1, 1, 2, 2]
    assert run.trainer.global_step == 3
    return batches.found


@row("Callback: its state is in checkpoints")
def _(engine: str) -> Any:
    class Counts(pl.Callback):
        count = 0

        def on_train_batch_end(self, *hook: Any) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, state_dict: dict[str, int]) -> None:
            self.count = state_dict["count"]

    first, second = Counts(), Counts()
    make_run(engine, first, builtin.ModelCheckpoint(dirpath="kept", filename="end"), epochs=1).fit()
    run = make_run(engine, second, builtin.ModelCheckpoint("kept", "next"), epochs=2)
    run.fit(ckpt_path="kept/end.ckpt")
    assert (first.count, second.count, run.trainer.global_step) == (STEPS, 2 * STEPS, 2 * STEPS)


@row("Checkpoint")
def _(engine: str) -> Any:
    class Saves(builtin.Checkpoint):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(f"{trainer.current_epoch}.ckpt")

    saves, recorder = Saves(), Recorder()
    run = make_run(engine, saves, recorder).fit()
    assert run.trainer.callbacks[-1] is saves
    assert run.trainer.checkpoint_callback is saves
    first, last = read("0.ckpt"), read("1.ckpt")
    assert (first["global_step"], last["global_step"]) == (STEPS, 2 * STEPS)
    assert_close({n: first["state_dict"][n] for n in run.weights}, recorder.weights[STEPS - 1])
    assert_close({n: last["state_dict"][n] for n in run.weights}, run.weights)


@row("LambdaCallback")
def _(engine: str) -> Any:
    norms: list[float] = []

    def note(trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.stack(gradients).norm()))

    ends: list[int] = []
    made = builtin.LambdaCallback(
        on_before_optimizer_step=note, on_train_epoch_end=lambda trainer, _: ends.append(trainer.global_step)
    )
    make_run(engine, made, accumulation=2).fit()
    assert ends == [3, 6]
    assert all(norm > 0 for norm in norms)
    return norms  # of gradients of all micro-batches, before they are clipped


# Progress bars.


@row("ProgressBar")
def _(engine: str) -> Any:
    class Shows(builtin.ProgressBar):
        def __init__(self) -> None:
            super().__init__()
            self.shown: list[Any] = []

        def disable(self) -> None: ...

        def enable(self) -> None: ...

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *hook: Any) -> None:
            self.shown.append((self.total_train_batches, self.get_metrics(trainer, pl_module)))

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.shown.append(
                (
                    sum(
                        self.total_val_batches_current_epoch,
                    ),
                    {},
                )
            )

        @property
        def total_val_batches_current_epoch(self) -> Any:
            return self.trainer.num_val_batches

    bar, recorder = Shows(), Recorder()
    run = make_run(engine, bar, recorder, accumulation=2).fit()
    assert run.trainer.progress_bar_callback is bar
    *training, validation = bar.shown
    assert [total for total, _ in training] == [STEPS] * 2 * STEPS
    assert validation[0] == 2
    last = training[-1][1]
    assert float(last["eval_loss"]) == pytest.approx(recorder.eval_losses[0], rel=1e-3)
    assert "loss" in last


@row("TQDMProgressBar")
def _(engine: str) -> Any:
    bar = builtin.TQDMProgressBar()
    run = make_run(engine, bar, accumulation=2).fit()
    assert run.trainer.progress_bar_callback is bar
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (STEPS, STEPS)
    assert {"loss", "eval_loss"} <= bar.get_metrics(run.trainer, run.module).keys()


@row("RichProgressBar")
def _(engine: str) -> Any:
    found: list[Any] = []

    class Bar(builtin.RichProgressBar):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            task = self.train_progress_bar
            found.append((task.completed, task.total, self.get_metrics(trainer, pl_module).keys()))
            super().on_train_epoch_end(trainer, pl_module)

    make_run(engine, Bar(), accumulation=2).fit()
    assert [(done, total) for done, total, _ in found] == [(STEPS, STEPS)] * 2
    assert {"loss", "eval_loss"} <= found[-1][2]


# EarlyStopping and Timer.


@row("EarlyStopping: patience")
def _(engine: str) -> Any:
    # No improvement is as large as min_delta: patience is used up at the second evaluation.
    stopping, recorder = builtin.EarlyStopping("eval_loss", min_delta=1e3, patience=1), Recorder()
    run = make_run(engine, stopping, recorder, epochs=4).fit()
    assert (run.trainer.global_step, run.trainer.current_epoch) == (2 * STEPS, 2)
    assert (stopping.stopped_epoch, stopping.wait_count, len(recorder.eval_losses)) == (1, 1, 2)
    assert float(stopping.best_score) == pytest.approx(recorder.eval_losses[0])
    return recorder.eval_losses


@row("EarlyStopping: an evaluation every few steps")
def _(engine: str) -> Any:
    stopping = builtin.EarlyStopping("eval_loss", min_delta=1e3, patience=1)
    run = make_run(engine, stopping, evaluation=2, accumulation=2).fit()
    assert run.trainer.global_step == 4
    return float(stopping.best_score)


@row("EarlyStopping: a threshold")
def _(engine: str) -> Any:
    stopping = builtin.EarlyStopping("eval_loss", stopping_threshold=1e3)
    run = make_run(engine, stopping).fit()
    assert run.trainer.global_step == STEPS
    assert stopping.stopping_reason.name == "STOPPING_THRESHOLD"
    return stopping.stopping_reason_message.split("=")[0]


@row("EarlyStopping: the training loss, without evaluations")
def _(engine: str) -> Any:
    stopping = builtin.EarlyStopping("loss", min_delta=1e3, patience=1, check_on_train_epoch_end=True)
    run = make_run(engine, stopping, evaluation="no", epochs=4).fit()
    assert run.trainer.global_step == 2 * STEPS


@row("Timer: interval of steps")
def _(engine: str) -> Any:
    made = builtin.Timer(timedelta(seconds=25))
    run = make_run(engine, Ticks(), made).fit()
    assert run.trainer.global_step == 3
    assert made.time_elapsed() == 30


@row("Timer: interval of epochs")
def _(engine: str) -> Any:
    made = builtin.Timer({"seconds": 25}, interval="epoch")
    run = make_run(engine, Ticks(), made, accumulation=2).fit()
    assert run.trainer.global_step == 3
    assert (made.time_elapsed(), made.time_remaining(), made.time_elapsed("validate")) == (60, -35, 0)


# ModelCheckpoint and OnExceptionCheckpoint.


@row("ModelCheckpoint: by default")
def _(engine: str) -> Any:
    kept = builtin.ModelCheckpoint()
    run = make_run(engine, kept).fit()
    assert Path(kept.best_model_path).name == f"epoch=1-step={2 * STEPS}.ckpt"
    assert_close({n: read(kept.best_model_path)["state_dict"][n] for n in run.weights}, run.weights)


@row("ModelCheckpoint: every_n_train_steps")
def _(engine: str) -> Any:
    kept = builtin.ModelCheckpoint("kept", "{step}", every_n_train_steps=2, save_top_k=-1)
    recorder = Recorder()
    run = make_run(engine, recorder, kept, accumulation=2).fit()
    assert files_in("kept") == {"step=2.ckpt", "step=4.ckpt", "step=6.ckpt"}
    for step in (2, 4, 6):
        found = read(f"kept/step={step}.ckpt")
        assert found["global_step"] == step
        assert_close({n: found["state_dict"][n] for n in run.weights}, recorder.weights[step - 1])


@row("ModelCheckpoint: every_n_epochs")
def _(engine: str) -> Any:
    kept = builtin.ModelCheckpoint("kept", "{epoch}", every_n_epochs=2, save_top_k=-1)
    make_run(engine, kept, epochs=4).fit()
    assert files_in("kept") == {"epoch=1.ckpt", "epoch=3.ckpt"}


@row("ModelCheckpoint: train_time_interval")
def _(engine: str) -> Any:
    kept = builtin.ModelCheckpoint("kept", "{step}", train_time_interval=timedelta(seconds=35), save_top_k=-1)
    make_run(engine, Ticks(), kept).fit()
    assert files_in("kept") == {"step=4.ckpt", "step=8.ckpt", "step=12.ckpt"}


@row("ModelCheckpoint: save_last")
def _(engine: str) -> Any:
    kept = builtin.ModelCheckpoint("kept", "{step}", save_last=True, every_n_train_steps=5, save_top_k=0)
    make_run(engine, kept).fit()
    assert files_in("kept") == {"last.ckpt"}
    assert read("kept/last.ckpt")["global_step"] == 10


@row("ModelCheckpoint: save_last as a link")
def _(engine: str) -> Any:
    kept = builtin.ModelCheckpoint("kept", "{epoch}", save_last="link")
    make_run(engine, kept).fit()
    assert files_in("kept") == {"epoch=1.ckpt", "last.ckpt"}
    assert Path("kept/last.ckpt").readlink() == Path("epoch=1.ckpt")


@row("ModelCheckpoint: save_top_k of a monitor")
def _(engine: str) -> Any:
    kept = builtin.ModelCheckpoint("kept", "{epoch}", monitor="eval_loss", save_top_k=2)
    recorder = Recorder()
    make_run(engine, recorder, kept, epochs=4).fit()
    losses = recorder.eval_losses
    best = sorted(range(4), key=losses.__getitem__)[:2]
    assert files_in("kept") == {f"epoch={epoch}.ckpt" for epoch in best}
    assert Path(kept.best_model_path).name == f"epoch={best[0]}.ckpt"
    assert float(kept.best_model_score) == pytest.approx(losses[best[0]])
    assert all("optimizer_states" in read(f"kept/{name}") for name in files_in("kept"))
    return losses


@row("ModelCheckpoint: a monitor in the name, with the mode max")
def _(engine: str) -> Any:
    kept = builtin.ModelCheckpoint("kept", "{step}-{eval_loss:.2f}", monitor="eval_loss", mode="max")
    recorder = Recorder()
    make_run(engine, recorder, kept, evaluation=4).fit()
    losses = recorder.eval_losses
    worst = max(range(3), key=losses.__getitem__)
    assert files_in("kept") == {f"step={4 * (worst + 1)}-eval_loss={losses[worst]:.2f}.ckpt"}


@row("ModelCheckpoint: a monitor of evaluations, every few steps")
def _(engine: str) -> Any:
    kept = builtin.ModelCheckpoint(
        "kept", "{step}", monitor="eval_loss", every_n_train_steps=4, save_top_k=-1
    )
    make_run(engine, kept).fit()
    return files_in("kept")


@row("ModelCheckpoint: save_on_train_epoch_end=True")
def _(engine: str) -> Any:
    kept, recorder = builtin.ModelCheckpoint("kept", save_on_train_epoch_end=True), Recorder()
    make_run(engine, recorder, kept).fit()
    assert recorder.saved == ["train"] * 2


@row("ModelCheckpoint: save_on_train_epoch_end=False")
def _(engine: str) -> Any:
    kept, recorder = builtin.ModelCheckpoint("kept", save_on_train_epoch_end=False), Recorder()
    make_run(engine, recorder, kept).fit()
    assert recorder.saved == ["validate"] * 2
    never = builtin.ModelCheckpoint("never", save_on_train_epoch_end=False)
    make_run(engine, never, evaluation="no").fit()
    assert files_in("never") == set()


@row("ModelCheckpoint: save_weights_only")
def _(engine: str) -> Any:
    make_run(engine, builtin.ModelCheckpoint("kept", "end", save_weights_only=True)).fit()
    found = read("kept/end.ckpt")
    assert "state_dict" in found
    assert not {"optimizer_states", "lr_schedulers"} & found.keys()


class StopError(Exception):
    """What goes wrong in a run."""


class Fails(pl.Callback):
    """Fail after an optimizer step."""

    def on_train_batch_end(self, trainer: Any, *hook: Any) -> None:
        if trainer.global_step == 3:
            raise StopError("after the third step")


@row("ModelCheckpoint: save_on_exception")
def _(engine: str) -> Any:
    kept = builtin.ModelCheckpoint("kept", "{step}", save_on_exception=True)
    run = make_run(engine, Fails(), kept)
    with pytest.raises(StopError):
        run.fit()
    assert files_in("kept") == {"step=3.ckpt"}
    found = read("kept/step=3.ckpt")
    assert found["global_step"] == 3
    assert_close({n: found["state_dict"][n] for n in run.weights}, run.weights)
    return run.weights


@row("OnExceptionCheckpoint")
def _(engine: str) -> Any:
    run = make_run(engine, builtin.OnExceptionCheckpoint("kept"), Fails())
    with pytest.raises(StopError):
        run.fit()
    found = read("kept/on_exception.ckpt")
    assert (found["global_step"], files_in("kept")) == (3, {"on_exception.ckpt"})
    assert "optimizer_states" in found
    assert_close({n: found["state_dict"][n] for n in run.weights}, run.weights)
    return run.weights


@row("OnExceptionCheckpoint: resumed")
def _(engine: str) -> Any:
    class FailsOnce(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *hook: Any) -> None:
            if trainer.global_step == 8 and not Path("kept").exists():
                raise StopError("in the second epoch")

    with pytest.raises(StopError):
        make_run(engine, FailsOnce(), builtin.OnExceptionCheckpoint("kept")).fit()
    assert files_in("kept") == {"on_exception.ckpt"}
    recorder = Recorder()
    run = make_run(engine, FailsOnce(), recorder, builtin.OnExceptionCheckpoint("kept"))
    run.fit()  # from that checkpoint, without a path
    assert (len(recorder.batches), run.trainer.global_step) == (4, 12)
    assert files_in("kept") == set()


# Learning rates, devices, throughput, spikes.


@row("LearningRateMonitor")
def _(engine: str) -> Any:
    logger = KeptLogger()
    monitor = builtin.LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    run = make_run(engine, monitor, logger=logger, decays=True, accumulation=2).fit()
    expected = [LEARNING_RATE * (1 - step / 6) for step in range(6) for _ in range(2)]
    assert monitor.lrs.keys() == {"lr-AdamW/pg1", "lr-AdamW/pg2"}
    for name in monitor.lrs:
        assert monitor.lrs[name] == logger.values(name) == pytest.approx(expected)
        assert set(logger.values(f"{name}-momentum")) == {0.9}
        assert set(logger.values(f"{name}-weight_decay")) == {0.0}
    assert float(run.trainer.callback_metrics["lr-AdamW/pg1"]) == pytest.approx(expected[-1])
    return [step for step, logged in logger.rows if "lr-AdamW/pg1" in logged]


@row("LearningRateMonitor: by the interval of the schedule")
def _(engine: str) -> Any:
    logger = KeptLogger()
    make_run(engine, builtin.LearningRateMonitor(), logger=logger, decays=True).fit()
    assert logger.values("lr-AdamW/pg1") == pytest.approx([LEARNING_RATE * (1 - k / 12) for k in range(12)])


@row("DeviceStatsMonitor")
def _(engine: str) -> Any:
    logger = KeptLogger()
    make_run(engine, builtin.DeviceStatsMonitor(), logger=logger, accumulation=2).fit()
    found = {
        (hook, len(logger.values(f"DeviceStatsMonitor.{hook}/cpu_percent")))
        for hook in (
            f"on_{stage}_batch_{end}" for stage in ("train", "validation") for end in ("start", "end")
        )
    }
    assert ("on_train_batch_start", 2 * STEPS) in found
    assert ("on_validation_batch_end", 4) in found
    return sorted(found)


@row("ThroughputMonitor")
def _(engine: str) -> Any:
    logger, recorder = KeptLogger(), Recorder()
    monitor = builtin.ThroughputMonitor(
        batch_size_fn=lambda batch: len(batch["labels"]),
        length_fn=lambda batch: batch["input_ids"].numel(),
        window_size=3,
    )
    make_run(engine, monitor, recorder, logger=logger, accumulation=2).fit()
    assert logger.values("train/batches") == [2, 4, 6, 8, 10, 12]
    assert logger.values("train/samples") == [8, 16, 24, 32, 40, 48]
    assert all(value > 0 for value in logger.values("train/device/samples_per_sec"))
    assert logger.values("validate/batches") == [1, 2, 1, 2]
    return [logger.values("train/lengths"), len(logger.values("train/device/samples_per_sec"))]


def spiking(base: Any) -> Any:
    class Spiking(base):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * 1000 if batch_idx == 4 else loss

    return Spiking


@row("SpikeDetection")
def _(engine: str) -> Any:
    detection = builtin.SpikeDetection()
    run = make_run(engine, detection, subclass=spiking)
    with pytest.raises(TrainingSpikeException, match="batch 4"):
        run.fit()
    assert Path(run.trainer.default_root_dir, "skip_batches.json").read_text().split() == [
        "[",
        "3,",
        "4",
        "]",
    ]
    return float(detection.last_val)


# Averages of weights.


@row("WeightAveraging")
def _(engine: str) -> Any:
    recorder, kept = Recorder(), builtin.ModelCheckpoint("kept", "{step}", save_top_k=-1)
    run = make_run(engine, builtin.WeightAveraging(), recorder, kept, accumulation=2).fit()
    assert len(recorder.weights) == 6
    assert_close(run.weights, mean_of(recorder.weights))
    # Evaluations have the average, and training has its own weights again.
    assert_close(recorder.evaluated, [mean_of(recorder.weights[:3]), mean_of(recorder.weights)])
    assert_close(recorder.starts[1], recorder.weights[2])
    found = read("kept/step=6.ckpt")
    assert_close({n: found["state_dict"][n] for n in run.weights}, mean_of(recorder.weights))
    assert_close({n: found["current_model_state"][n] for n in run.weights}, recorder.weights[5])
    return [run.weights, recorder.eval_losses]


@row("WeightAveraging: a choice of steps")
def _(engine: str) -> Any:
    class Chosen(builtin.WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return step_idx in (2, 5) or epoch_idx == 1

    recorder = Recorder()
    run = make_run(engine, Chosen(device="cpu", use_buffers=False), recorder).fit()
    assert_close(run.weights, mean_of([recorder.weights[step] for step in (2, 5, 11)]))


@row("WeightAveraging: resumed")
def _(engine: str) -> Any:
    kept = builtin.ModelCheckpoint("kept", "end")
    make_run(engine, builtin.WeightAveraging(), kept, epochs=1).fit()
    averaging, recorder = builtin.WeightAveraging(), Recorder()
    run = make_run(engine, averaging, recorder, builtin.ModelCheckpoint("kept", "next"))
    run.fit(ckpt_path="kept/end.ckpt")
    found = read("kept/end.ckpt")
    assert_close(recorder.starts, [{n: found["current_model_state"][n] for n in run.weights}])
    before = {n: found["state_dict"][n] for n in run.weights}
    after = mean_of(recorder.weights)
    assert_close(run.weights, {n: (before[n] + after[n]) / 2 for n in before})


@row("EMAWeightAveraging")
def _(engine: str) -> Any:
    recorder = Recorder()
    averaging = builtin.EMAWeightAveraging(decay=0.8, update_every_n_steps=2, update_starting_at_step=2)
    run = make_run(engine, averaging, recorder).fit()
    chosen = [recorder.weights[step] for step in (2, 4, 6, 8, 10)]
    average = chosen[0]
    for weights in chosen[1:]:
        average = {n: 0.8 * average[n] + 0.2 * weights[n] for n in average}
    assert_close(run.weights, average)
    return run.weights


@row("StochasticWeightAveraging")
def _(engine: str) -> Any:
    recorder = Recorder()
    averaging = builtin.StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2, annealing_epochs=2)
    run = make_run(engine, averaging, recorder, epochs=4).fit()
    assert_close(run.weights, mean_of(recorder.starts[1:]))
    assert recorder.rates[STEPS - 1] == [LEARNING_RATE] * 2
    assert recorder.rates[-1] != [LEARNING_RATE] * 2
    return [recorder.rates, run.weights]


# Accumulation.


@row("GradientAccumulationScheduler")
def _(engine: str) -> Any:
    recorder = Recorder()
    scheduler = builtin.GradientAccumulationScheduler({0: 2, 1: 3, 2: 1})
    run = make_run(engine, scheduler, recorder, epochs=3).fit()
    assert recorder.steps == [3, 2, 6]
    assert run.trainer.global_step == 11
    assert recorder.batches == [BATCH_SIZE] * 3 * STEPS
    return [run.weights, recorder.losses]


@row("GradientAccumulationScheduler: a short last step")
def _(engine: str) -> Any:
    recorder = Recorder()
    scheduler = builtin.GradientAccumulationScheduler({1: 4})
    make_run(engine, scheduler, recorder).fit()
    assert recorder.steps == [6, 2]


# Finders and the Tuner.


@row("BatchSizeFinder")
def _(engine: str) -> Any:
    recorder, finder = Recorder(), builtin.BatchSizeFinder(steps_per_trial=1, max_trials=3)
    run = make_run(engine, recorder, finder).fit()
    assert finder.optimal_batch_size == run.data.batch_size == 8
    assert recorder.batches == [8] * 6
    assert run.trainer.global_step == 6
    return [recorder.losses, run.weights]  # nothing is left of the trials


@row("BatchSizeFinder: a size below the setting's")
def _(engine: str) -> Any:
    recorder, finder = Recorder(), builtin.BatchSizeFinder(steps_per_trial=1, max_trials=1)
    run = make_run(engine, recorder, finder).fit()
    assert finder.optimal_batch_size == run.data.batch_size == 2
    assert recorder.batches == [2] * 24
    assert run.trainer.current_epoch == 2
    return run.weights


def small(base: Any) -> Any:
    class Small(base):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if len(batch["labels"]) > 6:
                raise RuntimeError("CUDA error: out of memory")
            return super().training_step(batch, batch_idx)

    return Small


@row("BatchSizeFinder: out of memory")
def _(engine: str) -> Any:
    recorder = Recorder()
    finder = builtin.BatchSizeFinder("binsearch", steps_per_trial=1, init_val=2, margin=0.0)
    run = make_run(engine, recorder, finder, subclass=small, epochs=1).fit()
    assert finder.optimal_batch_size == run.data.batch_size == 6
    assert recorder.batches == [6] * 4
    return run.weights


@row("BatchSizeFinder: validate")
def _(engine: str) -> Any:
    class Counts(pl.Callback):
        count = 0

        def on_validation_batch_end(self, *hook: Any) -> None:
            self.count += 1

    finder, counts = builtin.BatchSizeFinder(steps_per_trial=1, max_trials=1), Counts()
    run = make_run(engine, finder, counts)
    (metrics,) = run.trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert finder.optimal_batch_size == run.data.batch_size == 2
    assert counts.count == 4
    return metrics["eval_loss"]


FINDS = {"min_lr": 1e-6, "max_lr": 0.5}


@row("LearningRateFinder")
def _(engine: str) -> Any:
    recorder = Recorder()
    finder = builtin.LearningRateFinder(num_training_steps=20, early_stop_threshold=None, **FINDS)
    run = make_run(engine, recorder, finder, epochs=4).fit()
    found = finder.optimal_lr
    assert found is not None
    assert len(found.results["loss"]) == 20
    assert found.results["lr"][-1] == pytest.approx(0.5)
    assert run.module.learning_rate == found.suggestion() != LEARNING_RATE
    assert recorder.rates == [[found.suggestion()] * 2] * 4 * STEPS
    assert run.trainer.global_step == 4 * STEPS
    return [found.results, run.weights]


@row("Tuner: lr_find")
def _(engine: str) -> Any:
    recorder = Recorder()
    run = make_run(engine, recorder, epochs=4)
    before = run.weights
    found = Tuner(run.trainer).lr_find(
        run.module, datamodule=run.data, num_training=20, early_stop_threshold=None, **FINDS
    )
    assert found is not None
    assert_close(run.weights, before)
    assert recorder.rates == []
    assert run.module.learning_rate == found.suggestion()
    run.fit()
    assert recorder.rates == [[found.suggestion()] * 2] * 4 * STEPS
    return [found.results, run.weights]


@row("Tuner: lr_find with loaders, linear, without an update")
def _(engine: str) -> Any:
    run = make_run(engine, epochs=4)
    other = make_run("reference").data
    found = Tuner(run.trainer).lr_find(
        run.module,
        other.train_dataloader(),
        other.val_dataloader(),
        num_training=15,
        mode="linear",
        update_attr=False,
        **FINDS,
    )
    assert found is not None
    assert run.module.learning_rate == LEARNING_RATE
    return found.results


@row("Tuner: scale_batch_size")
def _(engine: str) -> Any:
    recorder = Recorder()
    run = make_run(engine, recorder)
    found = Tuner(run.trainer).scale_batch_size(
        run.module, datamodule=run.data, steps_per_trial=1, max_trials=3
    )
    assert found == run.data.batch_size == 8
    assert recorder.batches == []
    run.fit()
    assert recorder.batches == [8] * 6
    return run.weights


@row("Tuner: scale_batch_size of predict")
def _(engine: str) -> Any:
    run = make_run(engine)
    found = Tuner(run.trainer).scale_batch_size(
        run.module, datamodule=run.data, method="predict", steps_per_trial=1, max_trials=2
    )
    assert found == run.data.batch_size == 4
    return [batch for batch in run.trainer.predict(run.module, datamodule=run.data)]


# Fine-tuning and pruning.


class Unfreezes(builtin.BaseFinetuning):
    """Train the head for an epoch, and all after it."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model.distilbert)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.distilbert, optimizer)
        elif epoch > 1:  # after a resume, too, before which `setup` has frozen it
            self.make_trainable(pl_module.model.distilbert)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Name the parts of the model whose weights differ."""
    return {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}


HEAD = {"pre_classifier", "classifier"}


@row("BaseFinetuning")
def _(engine: str) -> Any:
    recorder = Recorder()
    run = make_run(engine, Unfreezes(), recorder).fit()
    assert moved(recorder.starts[0], recorder.starts[1]) == HEAD
    assert moved(recorder.starts[1], run.weights) == {*HEAD, "distilbert"}
    assert recorder.rates[:STEPS] == [[LEARNING_RATE] * 2] * STEPS
    assert recorder.rates[STEPS:] == [[LEARNING_RATE] * 2 + [LEARNING_RATE / 10]] * STEPS
    return run.weights


@row("BaseFinetuning: resumed")
def _(engine: str) -> Any:
    make_run(engine, Unfreezes(), builtin.ModelCheckpoint("kept", "end")).fit()
    whole, recorder = make_run(engine, Unfreezes(), epochs=3).fit(), Recorder()
    run = make_run(engine, Unfreezes(), recorder, builtin.ModelCheckpoint("kept", "next"), epochs=3)
    run.fit(ckpt_path="kept/end.ckpt")
    assert recorder.rates == [[LEARNING_RATE] * 2 + [LEARNING_RATE / 10]] * STEPS
    assert_close(run.weights, whole.weights)


@row("BackboneFinetuning")
def _(engine: str) -> Any:
    recorder = Recorder()
    run = make_run(engine, builtin.BackboneFinetuning(1, verbose=True), recorder, epochs=3).fit()
    assert moved(recorder.starts[0], recorder.starts[1]) == HEAD
    assert moved(recorder.starts[1], recorder.starts[2]) == {*HEAD, "distilbert"}
    assert [len(rates) for rates in recorder.rates] == [2] * STEPS + [3] * 2 * STEPS
    backbone = [rates[-1] for rates in recorder.rates[STEPS:]]
    assert backbone == pytest.approx([LEARNING_RATE * 0.1] * STEPS + [LEARNING_RATE * 0.2] * STEPS)
    return run.weights


@row("ModelPruning")
def _(engine: str) -> Any:
    kept = builtin.ModelCheckpoint("kept", "end")
    recorder = Recorder()
    run = make_run(engine, builtin.ModelPruning("l1_unstructured", amount=0.5), recorder, kept).fit()
    zeros = sum(int((value == 0).sum()) for value in run.weights.values())
    total = sum(value.numel() for value in run.weights.values())
    assert zeros / total == pytest.approx(0.75, abs=0.01)  # half, and half of what was left
    assert not any(name.endswith(("_orig", "_mask")) for name in run.module.state_dict())
    saved = read("kept/end.ckpt")["state_dict"]
    assert saved.keys() == run.module.state_dict().keys()
    assert_close({name: saved[name] for name in run.weights}, run.weights)
    return [zeros, recorder.losses]


# Summaries.


def summarize(engine: str, base: Any) -> Any:
    found: list[Any] = []

    class Summary(base):  # type: ignore[misc]
        @staticmethod
        def summarize(
            summary_data: Any, total_parameters: int, trainable_parameters: int, *others: Any, **more: Any
        ) -> None:
            found.append((dict(summary_data)["Name"], total_parameters, trainable_parameters))
            base.summarize(summary_data, total_parameters, trainable_parameters, *others, **more)

    model = make_model("distilbert", dropout=0.0)
    model.classifier.bias.requires_grad = False
    count = sum(parameter.numel() for parameter in model.parameters())
    make_run(engine, Summary(max_depth=2), model=model).fit()
    ((names, total, trainable),) = found
    assert (total, trainable) == (count, count - 2)
    assert [name for name in names if name in ("model", "model.distilbert", "model.classifier")]
    return names


@row("ModelSummary")
def _(engine: str) -> Any:
    with messages() as logged:
        names = summarize(engine, builtin.ModelSummary)
    (table,) = (message for message in logged if "Trainable params" in message)
    assert "model.distilbert" in table
    return names


@row("RichModelSummary")
def _(engine: str) -> Any:
    return summarize(engine, builtin.RichModelSummary)


# Predictions.


def written(engine: str, interval: Any) -> tuple[list[Any], list[Any]]:
    """Predict with a writer: what it is given for each batch, and at the end."""
    batches, epochs = [], []

    class Writer(builtin.BasePredictionWriter):
        def write_on_batch_end(
            self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, *rest: Any
        ) -> None:
            batch, batch_idx, dataloader_idx = rest
            batches.append((prediction, list(batch_indices), len(batch["labels"]), batch_idx, dataloader_idx))

        def write_on_epoch_end(
            self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any
        ) -> None:
            epochs.append((predictions, [[list(part) for part in loader] for loader in batch_indices]))

    run = make_run(engine, Writer(interval))
    run.trainer.predict(run.module, datamodule=run.data, return_predictions=False)
    return batches, epochs


INDICES = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


@row("BasePredictionWriter: batch")
def _(engine: str) -> Any:
    batches, epochs = written(engine, "batch")
    assert epochs == []
    assert [indices for _, indices, *_ in batches] == INDICES
    assert [tuple(rest) for _, _, *rest in batches] == [(4, 0, 0), (4, 1, 0), (3, 2, 0)]
    return batches


@row("BasePredictionWriter: epoch")
def _(engine: str) -> Any:
    batches, ((predictions, indices),) = written(engine, "epoch")
    assert batches == []
    assert indices == [INDICES]
    assert [tuple(prediction.shape) for prediction in predictions] == [(4, 2), (4, 2), (3, 2)]
    return predictions


@row("BasePredictionWriter: batch_and_epoch")
def _(engine: str) -> Any:
    batches, ((predictions, indices),) = written(engine, "batch_and_epoch")
    assert_close([prediction for prediction, *_ in batches], predictions)
    assert [[found for _, found, *_ in batches]] == indices == [INDICES]


# The table.

QUIET = (
    # Only plain LightningModules, and only where they say so, know their operations.
    "ignore:When using the `ThroughputMonitor`",
    # HFModule builds named models there.
    "ignore:You're using the WeightAveraging callback with a model that overrides",
    # The schedule of transformers counts steps.
    "ignore:SWA is currently only supported every epoch",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:When using `Trainer\\(accumulate_grad_batches != 1\\)` and overriding",
    # A DataLoader begins again at its first row.
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    # What OnExceptionCheckpoint is for.
    "ignore:`.fit.ckpt_path=None.` was called without a model",
    "ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint available",
)


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ROWS)
def test_a_callback_has_its_effect(name: str, engine: str, tmp_path: Path) -> None:
    found = {}
    for one in dict.fromkeys((engine, "reference")):
        (tmp_path / one).mkdir()
        CLOCK.now_s = 0.0
        with chdir(tmp_path / one):
            found[one] = ROWS[name](one)
    assert_close(found[engine], found["reference"])


def test_every_callback_of_lightning_has_a_row() -> None:
    assert {name.split(":")[0] for name in ROWS} == {*builtin.__all__, "Tuner"}


# Models that HFModule builds.


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("engine", BRIDGED)
@pytest.mark.parametrize("kind", ["finetuning", "pruning", "swa", "averaging"])
def test_a_callback_finds_a_model_that_is_built_in_the_run(engine: str, kind: str) -> None:
    """Lightning sets callbacks up before it calls `configure_model`."""
    made: dict[str, Any] = {
        "finetuning": Unfreezes(),
        "pruning": builtin.ModelPruning("l1_unstructured", amount=0.5),
        "swa": builtin.StochasticWeightAveraging(1e-3, swa_epoch_start=1),
        "averaging": builtin.WeightAveraging(),
    }
    recorder = Recorder()
    run = make_run(engine, made[kind], recorder, model=lambda: make_model("distilbert", dropout=0.0)).fit()
    if kind == "finetuning":
        assert moved(recorder.starts[0], recorder.starts[1]) == HEAD
    elif kind == "pruning":
        zeros = sum(int((value == 0).sum()) for value in run.weights.values())
        assert zeros > 0.7 * sum(value.numel() for value in run.weights.values())
    else:
        assert_close(run.weights, mean_of(recorder.starts if kind == "swa" else recorder.weights))


@pytest.mark.parametrize("engine", BRIDGED)
def test_a_prediction_writer_gets_the_rows_of_the_set_where_they_are_sorted_by_length(engine: str) -> None:
    found: list[Any] = []

    class Writer(builtin.BasePredictionWriter):
        def write_on_batch_end(
            self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, *rest: Any
        ) -> None:
            found.extend(zip(batch_indices, prediction, strict=True))

    run = make_run(engine, Writer())
    run.data.eval_by_length = True
    run.trainer.predict(run.module, datamodule=run.data)
    one = make_run("reference")  # the same untrained model
    with torch.no_grad():
        logits = torch.cat([one.module.eval().predict_step(b, 0) for b in one.data.predict_dataloader()])
    assert sorted(index for index, _ in found) == list(range(11))
    for index, prediction in found:
        torch.testing.assert_close(prediction, logits[index], rtol=1e-4, atol=1e-5)


# Trainers of the user's data: finders need a data module, and say so themselves.


@pytest.mark.parametrize("engine", ENGINES)
def test_the_batch_size_finder_refuses_loaders(engine: str) -> None:
    run = make_run(engine, builtin.BatchSizeFinder())
    other = make_run("reference").data
    with pytest.raises(MisconfigurationException, match="cannot be used with dataloaders passed directly"):
        run.trainer.fit(run.module, other.train_dataloader(), other.val_dataloader())


# A Trainer after another.


@pytest.mark.parametrize("engine", BRIDGED)
def test_a_second_trainer_of_a_module_does_not_tell_of_overridden_callbacks(engine: str) -> None:
    first, second = make_run(engine, epochs=1), make_run(engine, epochs=1)
    with messages() as logged:
        first.fit()
        second.trainer.fit(first.module, datamodule=first.data)
        second.trainer.validate(first.module, datamodule=first.data, verbose=False)
        first.trainer.fit(first.module, datamodule=first.data)
    assert logged  # of devices, for one
    assert not [message for message in logged if "override" in message]
    assert first.module.log_history


@pytest.mark.parametrize("engine", ENGINES)
def test_callbacks_of_the_module_run_beside_those_of_the_trainer(engine: str) -> None:
    mine, other = Recorder(), builtin.EarlyStopping("eval_loss", min_delta=1e3, patience=1)

    def with_callbacks(base: Any) -> Any:
        class Brings(base):  # type: ignore[misc]
            def configure_callbacks(self) -> Any:
                own = super().configure_callbacks()
                return [*([own] if isinstance(own, pl.Callback) else own), mine]

        return Brings

    run = make_run(engine, other, subclass=with_callbacks, epochs=4).fit()
    assert mine.steps == [STEPS, STEPS]
    assert len(mine.eval_losses) == 2
    assert run.trainer.global_step == 2 * STEPS


# The other package.


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """The `Callback` of `pytorch_lightning`, which has the hooks but is no class of `lightning`."""
    heard: list[str] = []

    def on_train_batch_end(self: Any, trainer: Any, pl_module: Any, *hook: Any) -> None:
        heard.append("on_train_batch_end")

    def note_nothing(self: Any, *hook: Any, **more: Any) -> None: ...

    names = [name for name in vars(pl.Callback) if name.startswith("on_") or name in ("setup", "teardown")]
    members: dict[str, Any] = dict.fromkeys(names, note_nothing)
    members |= {
        "state_dict": lambda self: {},
        "load_state_dict": note_nothing,
        "state_key": property(lambda self: type(self).__qualname__),
        "__module__": "pytorch_lightning.callbacks.callback",
    }
    base = type("Callback", (), members)
    package, module = ModuleType("pytorch_lightning"), ModuleType("pytorch_lightning.callbacks")
    vars(module)["Callback"] = base
    vars(package)["callbacks"] = module
    for name, value in {"pytorch_lightning": package, "pytorch_lightning.callbacks": module}.items():
        monkeypatch.setitem(sys.modules, name, value)
    return type("Mine", (base,), {"on_train_batch_end": on_train_batch_end, "heard": heard})


@pytest.mark.parametrize("engine", ENGINES)
def test_a_callback_of_the_other_package_works_or_is_refused(engine: str, foreign: type[Any]) -> None:
    try:
        make_run(engine, foreign(), epochs=1).fit()
    except BridgeError as error:
        message = str(error)
    else:
        assert foreign.heard == ["on_train_batch_end"] * STEPS
        return
    assert engine != "reference"
    assert foreign.heard == []
    assert {"pytorch_lightning", "lightning.pytorch"} <= set(re.findall(r"[\w.]*\w", message))
    assert ". " not in message

"""Checkpoints of Lightning, whenever they are written: resumed, a run ends as if it had never stopped."""

import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint, Timer
from torch import nn
from transformers import TrainerCallback, set_seed

import hfbridge
from hfbridge import CheckpointError
from tests.faults.kills import enter
from tests.parity.engines import BASE, weights_digest
from tests.parity.test_resume import Dropping
from tests.tiny import PadRows, make_model, make_rows

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "The checkpoint is of step 12",
        "Be aware that when using `ckpt_path`",
        "`max_epochs` was not set",
        "Checkpoint directory",
        r"`\.fit\(ckpt_path=None\)` was called without a model",
        r".fit\(ckpt_path=.last.\) is set",
    )
]

# 12 micro-batches an epoch, 6 steps, 12 in all; dropout is on.
SETTINGS: dict[str, Any] = {
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "logging_steps": 3,
}
ENGINES = ("hfbridge", "lightning")
Made = tuple[Any, hfbridge.HFModule, hfbridge.HFDataModule]


def make(
    engine: str,
    *callbacks: Any,
    kind: type[hfbridge.HFModule] = hfbridge.HFModule,
    model: Callable[[], nn.Module] = lambda: make_model("distilbert"),
    collator: Any = PadRows,
    plugins: Any = (),
    trainer_callbacks: Any = (),
    **settings: Any,
) -> Made:
    """Make a Trainer, hfbridge's or Lightning's own, module and data, in another random state each time."""
    set_seed(random.SystemRandom().randrange(1000))
    settings = {**BASE, **SETTINGS, **settings}
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    rows = [make_rows("distilbert", count, seed=seed) for count, seed in ((46, 3), (11, 5))]
    data = hfbridge.HFDataModule(
        train_dataset=rows[0],
        eval_dataset=rows[1],
        test_dataset=rows[1],
        predict_dataset=rows[1],
        data_collator=collator(),
    )
    if engine == "hfbridge":
        trainer: Any = hfbridge.Trainer(
            settings, callbacks=[*callbacks, *trainer_callbacks], plugins=list(plugins), **quiet
        )
        return trainer, kind(model()), data
    quiet |= {"enable_checkpointing": any(isinstance(cb, Checkpoint) for cb in callbacks)}
    trainer = pl.Trainer(callbacks=list(callbacks), accelerator="cpu", plugins=list(plugins), **quiet)
    return trainer, kind(model(), settings=settings), data


def end_of(engine: str = "hfbridge", ckpt_path: Any = None, **made: Any) -> str:
    """Train to the end, and digest the weights."""
    trainer, module, data = make(engine, **made)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return weights_digest(module.model)


@pytest.fixture(scope="module")
def whole() -> str:
    """Digest of the weights at the end of an undisturbed run."""
    return end_of()


def saver(hook: str, base: type = pl.Callback, **arguments: Any) -> Any:
    """Make a callback, or a subclass of HFModule, that saves whenever one of its hooks is called."""
    count = iter(range(10**6))

    def save(self: Any, *given: Any, **named: Any) -> Any:
        result = None if base is pl.Callback else getattr(base, hook)(self, *given, **named)
        trainer = given[0] if base is pl.Callback else self.trainer
        trainer.save_checkpoint(f"saved/{next(count)}.ckpt")
        return result

    kind = type("Saves", (base,), {hook: save})
    return kind() if base is pl.Callback else kind


def some(count: int) -> list[str]:
    """Return the files that were saved, at most so many: the first, the last, and some between."""
    files = sorted(Path("saved").iterdir(), key=lambda path: int(path.stem))
    picked = {round(i * (len(files) - 1) / max(count - 1, 1)) for i in range(count)}
    return [str(files[number]) for number in sorted(picked)]


def assert_resumes(whole: str, engine: str = "hfbridge", count: int = 4, **made: Any) -> None:
    """See that what was saved resumes exactly."""
    files = some(count)
    assert {path: end_of(engine, path, **made) for path in files} == dict.fromkeys(files, whole)


HOOKS = {
    "on_fit_start": 1,
    "on_train_start": 1,
    "on_train_epoch_start": 2,
    "on_train_batch_start": 24,
    "on_before_zero_grad": 12,
    "on_before_backward": 24,
    "on_after_backward": 24,
    "on_before_optimizer_step": 12,
    "on_train_batch_end": 24,
    "on_validation_start": 3,
    "on_validation_batch_end": 9,
    "on_validation_epoch_end": 3,
    "on_validation_end": 3,
    "on_train_epoch_end": 2,
    "on_train_end": 1,
    "on_fit_end": 1,
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("hook", HOOKS)
def test_saved_in_any_hook_of_a_callback(hook: str, engine: str, whole: str) -> None:
    trainer, module, data = make(engine, saver(hook))
    trainer.fit(module, data)
    assert weights_digest(module.model) == whole  # a save disturbs nothing
    assert len(list(Path("saved").iterdir())) == HOOKS[hook]
    assert_resumes(whole, engine)


@pytest.mark.parametrize(
    "hook",
    ["training_step", "compute_loss", "configure_gradient_clipping", "optimizer_step", "lr_scheduler_step"],
)
def test_saved_in_any_method_of_a_module(hook: str, whole: str) -> None:
    trainer, module, data = make("hfbridge", kind=saver(hook, hfbridge.HFModule))
    trainer.fit(module, data)
    assert weights_digest(module.model) == whole
    assert_resumes(whole)


@pytest.mark.parametrize(
    "event",
    ["on_train_begin", "on_step_begin", "on_substep_end", "on_optimizer_step", "on_step_end", "on_log"],
)
def test_saved_in_any_event_of_a_trainer_callback(event: str, whole: str) -> None:
    holder: list[Any] = []
    count = iter(range(10**6))

    def save(*given: Any, **named: Any) -> None:
        holder[0].save_checkpoint(f"saved/{next(count)}.ckpt")

    callback = type("Saves", (TrainerCallback,), {event: save})()
    trainer, module, data = make("hfbridge", trainer_callbacks=[callback])
    holder.append(trainer)
    trainer.fit(module, data)
    assert_resumes(whole, count=5)


@pytest.mark.parametrize("strategy", ["epoch", "no"])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_start", "on_train_epoch_end"])
def test_an_evaluation_that_was_due_is_made(hook: str, strategy: str) -> None:
    made = {"eval_strategy": strategy}
    trainer, module, data = make("hfbridge", saver(hook), **made)
    trainer.fit(module, data)
    if strategy == "no" and hook == "on_validation_batch_start":
        assert not Path("saved").exists()
        return
    kept = ("step", "loss", "eval_loss", "grad_norm", "learning_rate")
    entries = [[row.get(name) for name in kept] for row in trainer.log_history]
    for path in some(6):
        if torch.load(path)["global_step"] == 12:  # after the last step Lightning runs nothing
            continue
        again, other, data = make("hfbridge", **made)
        again.fit(other, data, ckpt_path=path)
        assert weights_digest(other.model) == weights_digest(module.model)
        assert [[row.get(name) for name in kept] for row in again.log_history] == entries


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_after_backward", "on_train_batch_end"])
def test_saved_where_collating_draws(hook: str) -> None:
    trainer, module, data = make("hfbridge", saver(hook), collator=Dropping)
    trainer.fit(module, data)
    assert_resumes(weights_digest(module.model), count=5, collator=Dropping)


class Normalized(nn.Module):
    """A classifier whose forward changes running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.norm, self.drop, self.head = nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None) -> Any:
        """Classify."""
        logits = self.head(self.drop(self.norm(self.embed(input_ids).mean(1))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def seeded() -> nn.Module:
    set_seed(5)
    return Normalized()


@pytest.mark.parametrize("hook", ["on_after_backward", "on_train_batch_end"])
def test_running_statistics_are_those_of_the_moment(hook: str) -> None:
    trainer, module, data = make("hfbridge", saver(hook), model=seeded)
    trainer.fit(module, data)
    state = module.model.state_dict()
    for path in some(4):
        again, other, data = make("hfbridge", model=seeded)
        again.fit(other, data, ckpt_path=path)
        assert all(torch.equal(state[n], t) for n, t in other.model.state_dict().items())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_saved_after_another_run_of_the_trainer(stage: str, engine: str) -> None:
    made = {"lr_scheduler_type": "constant"}  # the learning rate does not depend on how long the run is
    wanted = end_of(engine, max_steps=12, **made)
    trainer, module, data = make(engine, max_steps=8, **made)
    trainer.fit(module, data)
    getattr(trainer, stage)(module, data)
    trainer.save_checkpoint("after.ckpt")
    assert end_of(engine, "after.ckpt", max_steps=12, **made) == wanted


class StopError(Exception):
    """What goes wrong in a run."""


class FailingAdamW(torch.optim.AdamW):
    """Fail within some step, when weights have changed."""

    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        self.steps = getattr(self, "steps", 0) + 1
        result = super().step(closure)
        if self.steps == 5:
            raise StopError("within the fifth step")
        return result


def fail_at(hook: str, call: int) -> pl.Callback:
    """Make a callback that fails in a hook."""
    calls = iter(range(1, 10**6))

    def fail(self: Any, *given: Any) -> None:
        if next(calls) == call:
            raise StopError(hook)

    return type("Fails", (pl.Callback,), {hook: fail})()  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("keeper", ["ModelCheckpoint", "OnExceptionCheckpoint", "afterwards"])
@pytest.mark.parametrize(
    ("hook", "call"),
    [
        ("on_train_batch_start", 9),
        ("on_after_backward", 10),
        ("on_train_batch_end", 8),
        ("on_train_batch_end", 12),
        ("on_validation_batch_end", 2),
        ("on_train_epoch_end", 1),
    ],
)
def test_saved_on_an_exception(hook: str, call: int, keeper: str, engine: str, whole: str) -> None:
    keepers = {
        "ModelCheckpoint": [ModelCheckpoint("kept", "failed", save_on_exception=True, save_top_k=0)],
        "OnExceptionCheckpoint": [OnExceptionCheckpoint("kept", "failed")],
        "afterwards": [],
    }
    trainer, module, data = make(engine, fail_at(hook, call), *keepers[keeper])
    with pytest.raises(StopError):
        trainer.fit(module, data)
    if keeper == "afterwards":
        trainer.save_checkpoint("kept/failed.ckpt")
    assert end_of(engine, "kept/failed.ckpt") == whole


@pytest.mark.parametrize("engine", ENGINES)
def test_within_an_optimizer_step_the_file_says_what_it_is(engine: str) -> None:
    keeper = ModelCheckpoint("kept", "failed", save_on_exception=True, save_top_k=0)
    trainer, _, data = make(engine, keeper)
    given = {"optimizer_cls_and_kwargs": (FailingAdamW, {"lr": 1e-3})}
    settings = None if engine == "hfbridge" else {**BASE, **SETTINGS}
    module = hfbridge.HFModule(make_model("distilbert"), settings=settings, **given)  # type: ignore[arg-type]
    with pytest.raises(StopError):
        trainer.fit(module, data)
    with pytest.raises(CheckpointError, match=r"cannot be resumed: .*changing the weights.*load_from_checkp"):
        end_of(engine, "kept/failed.ckpt")
    trainer, module, data = make(engine)
    trainer.validate(module, data, ckpt_path="kept/failed.ckpt")


def test_the_best_weights_are_not_those_of_the_last_step() -> None:
    made = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 4, "learning_rate": 0.3}
    trainer, module, data = make("hfbridge", **made)
    trainer.fit(module, data)
    trainer.save_checkpoint("best.ckpt")
    assert trainer.state_of_run.best_global_step != 12
    with pytest.raises(CheckpointError, match=r"holds the weights of step \d, which were the best"):
        end_of("hfbridge", "best.ckpt")


class Sends(pl.Callback):
    """Send this process a signal some time after training began.

    Args:
        number: the signal.
        after_s: when; `None` is never.
    """

    def __init__(self, number: int, after_s: float | None) -> None:
        self.after_s, self._timer = after_s, threading.Timer(after_s or 0, os.kill, (os.getpid(), number))

    def on_train_start(self, *hook: Any) -> None:
        if self.after_s is not None:
            self._timer.start()

    def on_train_end(self, *hook: Any) -> None:
        self._timer.cancel()


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """Have SIGINT interrupt: a process that a shell has started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_at_any_moment(whole: str) -> None:
    timer, resumed = Timer(), 0
    trainer, module, data = make("hfbridge", timer)
    trainer.fit(module, data)
    duration = timer.time_elapsed("train")
    for number in range(60):  # on a busy machine many come too early or too late
        if resumed == 2:
            break
        keeper = ModelCheckpoint("kept", f"{number}", save_on_exception=True, save_top_k=0)
        trainer, module, data = make(
            "hfbridge", Sends(signal.SIGINT, random.uniform(0.001, duration)), keeper
        )
        try:
            trainer.fit(module, data)
        except SystemExit:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        path = Path(f"kept/{number}.ckpt")
        if not path.exists():  # the run had ended, or had not taken a step
            continue
        if "hfbridge.cannot_be_resumed" not in torch.load(path):
            assert end_of("hfbridge", str(path)) == whole
            resumed += 1
    assert resumed == 2


SCONTROL = """#!/bin/sh
echo "$@" >> requeued
kill -KILL $PPID
"""


def run_job(engine: str, folder: Path, after_s: float | None) -> int:
    """Run a job of SLURM's in a process of its own, requeued after some time; returns what has ended it."""
    child = os.fork()
    if child == 0:
        try:
            enter(folder)
            os.environ |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "job"}
            os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
            trainer, module, data = make(
                engine, Sends(signal.SIGUSR1, after_s), plugins=[SLURMEnvironment(auto_requeue=True)]
            )
            trainer.fit(module, data)
            Path("weights").write_text(weights_digest(module.model))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def requeue(engine: str, folder: Path, times: int, seed: int) -> None:
    """Requeue jobs at random moments, and see that they end as one that was not."""
    draw, found = random.Random(seed), 0
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir()
    began = time.monotonic()
    assert run_job(engine, undisturbed, None) == 0, (undisturbed / "run.log").read_text()[-3000:]
    duration = time.monotonic() - began
    wanted = (undisturbed / "weights").read_text()
    for number in range(20 * times):
        job = folder / str(number)
        job.mkdir()
        (job / "scontrol").write_text(SCONTROL)
        (job / "scontrol").chmod(0o755)
        if run_job(engine, job, draw.uniform(0.001, duration)) in (0, -signal.SIGUSR1):
            continue  # it had ended before
        assert (job / "requeued").read_text() == "requeue 7\n", (job / "run.log").read_text()[-3000:]
        assert [path.name for path in job.rglob("*.ckpt")] == ["hpc_ckpt_1.ckpt"]
        assert run_job(engine, job, None) == 0, (job / "run.log").read_text()[-3000:]
        assert (job / "weights").read_text() == wanted
        found += 1
        if found == times:
            return
    pytest.fail(f"only {found} of {times} jobs were requeued")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_requeued_job_goes_on(engine: str, tmp_path: Path) -> None:
    requeue(engine, tmp_path, 2, seed=1)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twenty_requeues(tmp_path: Path) -> None:
    requeue("hfbridge", tmp_path, 20, seed=0)


def test_hpc_in_a_first_job() -> None:
    trainer, module, data = make("hfbridge")
    with pytest.raises(CheckpointError, match=r'ckpt_path="hpc": there is no hpc_ckpt.*Leave it out'):
        trainer.fit(module, data, ckpt_path="hpc")

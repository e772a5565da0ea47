"""Saving where it cannot be done, or is interrupted: what is there stays whole, and the reason is told."""

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from hfbridge import BridgeWarning, CheckpointError
from hfbridge.checkpoints.reader import read_checkpoint
from hfbridge.checkpoints.writer import CheckpointWriter, Copies
from hfbridge.models.model_run import ModelRun
from tests.parity.engines import Job, make_ours, run_ours, same
from tests.tiny import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"output_dir": "out", "save_strategy": "steps", "save_steps": 4}
JOB = Job(settings=SETTINGS, processing_class=make_tokenizer())


class FillDisk(TrainerCallback):
    """Let no file grow beyond a size after a step."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@contextmanager
def room() -> Iterator[None]:
    """Make room again."""
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("size", [1_000, 3_000, 10_000, 40_000])
def test_full_disk(size: int, asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[ModelRun] = []
    monkeypatch.setattr(ModelRun, "close", lambda self: closed.append(self))
    # Nothing is printed: the test's own output is a file, too.
    quiet = {**SETTINGS, "logging_strategy": "no"}
    job = Job(settings=quiet, processing_class=make_tokenizer(), callbacks=lambda: [FillDisk(size)])
    trainer, module, data, *_ = make_ours(job)
    trainer.asynchronous_saving = asynchronous
    with (
        room(),
        pytest.raises(CheckpointError, match=r"out/checkpoint-8' could not be written: .*before are"),
    ):
        trainer.fit(module, data)
    assert [path.name for path in Path("out").iterdir()] == ["checkpoint-4"]
    read_checkpoint(Path("out/checkpoint-4"))
    assert closed == [module.run]  # torn down


def test_two_runs_in_one_directory() -> None:
    other = CheckpointWriter(TrainingArguments("out", use_cpu=True))
    trainer, module, data, *_ = make_ours(JOB)
    with pytest.raises(CheckpointError, match="another run is writing its checkpoints there"):
        trainer.fit(module, data)
    assert module.log_history == []
    other.close()
    run_ours(JOB)
    with pytest.warns(BridgeWarning, match="holds checkpoints of an earlier run, up to checkpoint-12"):
        run_ours(JOB)


def test_workers_that_outlive_a_run_do_not_hold_its_directory() -> None:
    writer = CheckpointWriter(TrainingArguments("out", use_cpu=True))
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writes, b"up")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(reads, 2)
        writer.close()
        CheckpointWriter(TrainingArguments("out", use_cpu=True)).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reads)
        os.close(writes)


def test_the_directory_is_free_after_a_run_that_failed() -> None:
    class Failing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("on purpose")

    trainer, module, data, *_ = make_ours(Job(settings=SETTINGS, callbacks=lambda: [Failing()]))
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(module, data)
    run_ours(JOB)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Lose the rights of root, whom no directory is read-only to."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_read_only_directory() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        trainer, module, data, *_ = make_ours(JOB.with_settings(output_dir=name))
        with as_nobody(), pytest.raises(CheckpointError, match=r"cannot be written.*Nothing was trained"):
            trainer.fit(module, data)
        assert module.log_history == []
        Path(name).chmod(0o755)
        assert list(Path(name).iterdir()) == []


def test_output_dir_is_a_file() -> None:
    Path("out").write_text("mine", encoding="utf-8")
    trainer, module, data, *_ = make_ours(JOB)
    with pytest.raises(CheckpointError, match="output_dir='out' cannot be written"):
        trainer.fit(module, data)
    assert Path("out").read_text(encoding="utf-8") == "mine"


def test_unfinished_checkpoints_are_told_of() -> None:
    Path("out/unfinished-checkpoint-4-x").mkdir(parents=True)
    with pytest.warns(BridgeWarning, match="unfinished-checkpoint-4-x"):
        run_ours(JOB)
    assert Path("out/unfinished-checkpoint-4-x").exists()


def test_a_checkpoint_has_its_name_only_when_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    save = torch.save

    def watch(*args: Any, **kwargs: Any) -> None:
        seen.append([p.name for p in Path("out").iterdir() if p.name.startswith("checkpoint-")])
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", watch)
    run_ours(JOB)
    assert seen[0] == []
    assert ["checkpoint-4"] in seen


TERMINATED = """
import sys, time
from transformers import TrainerCallback
from tests.parity.engines import Job, make_ours

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.05)
        print("step", state.global_step, flush=True)

settings = {"output_dir": "out", "enable_jit_checkpoint": True, "num_train_epochs": 30, "save_strategy": "no"}
trainer, module, data, *_ = make_ours(Job(settings=settings, callbacks=lambda: [Slow()]))
trainer.fit(module, data)
print("stopped at", trainer.state_of_run.global_step, flush=True)
"""


def test_sigterm() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", TERMINATED],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line)
        if line == "step 5\n":
            child.send_signal(signal.SIGTERM)
    child.stdout.close()
    assert child.wait() == 0, "".join(lines)[-2000:]
    (saved,) = Path("out").iterdir()
    step = int(saved.name.partition("-")[2])
    assert 5 < step < 360
    assert lines[-1] == f"stopped at {step}\n"
    job = Job(settings={"num_train_epochs": 30, "save_strategy": "no"})
    whole = run_ours(job)
    trainer, module, data, *_ = make_ours(job)
    trainer.fit(module, data, ckpt_path=str(saved))
    same("weights", whole.weights, dict(module.model.state_dict()))


def test_sigterm_is_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_ours(JOB.with_settings(enable_jit_checkpoint=True))
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_failed_checkpoint_does_not_hide_what_ended_the_run() -> None:
    trainer, module, data, *_ = make_ours(Job(settings=SETTINGS, callbacks=lambda: [FillDisk(3_000)]))
    trainer.asynchronous_saving = True

    def fail(*_: Any) -> None:  # before anybody waits for the checkpoint
        if module.host.state.global_step == 8:
            raise RuntimeError("on purpose")

    module.model.register_forward_pre_hook(fail)
    told = pytest.warns(BridgeWarning, match="checkpoint-8' could not be written")
    with room(), told, pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(module, data)


def test_an_optimizer_that_swaps_weights_is_copied_before() -> None:
    job = JOB.with_settings(optim="schedule_free_adamw", save_steps=1)
    for name, asynchronous in (("waiting", False), ("going-on", True)):
        trainer, module, data, *_ = make_ours(job.with_settings(output_dir=name))
        trainer.asynchronous_saving = asynchronous
        trainer.fit(module, data)
    for path in Path("waiting").rglob("*.safetensors"):
        assert path.read_bytes() == (Path("going-on") / path.relative_to("waiting")).read_bytes()


class ChangeWeights(pl.Callback):
    """Change all weights before some steps, and the optimizer's state after some epochs."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step in (4, 8):
            with torch.no_grad():
                torch._foreach_mul_(list(pl_module.parameters()), 0.5)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for state in trainer.optimizers[0].state.values():
            state["exp_avg"].zero_()


class ChangeWeightsNatively(TrainerCallback):
    """Change all weights before some steps."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step in (4, 8):
            with torch.no_grad():
                torch._foreach_mul_(list(model.parameters()), 0.5)


class SlowCopies(Copies):
    """Copies that take a while."""

    def of(self, tree: Any, name: str) -> Any:
        time.sleep(0.1)
        return super().of(tree, name)


@pytest.mark.parametrize("callback", [ChangeWeights, ChangeWeightsNatively])
def test_callbacks_that_change_weights_do_not_change_copies(callback: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("hfbridge.checkpoints.writer.Copies", SlowCopies)
    for name, asynchronous in (("waiting", False), ("going-on", True)):
        natively = issubclass(callback, TrainerCallback)
        job = JOB.with_settings(output_dir=name, seed=3)
        if natively:
            job = dataclasses.replace(job, callbacks=lambda: [callback()])
        trainer, module, data, *_ = make_ours(job)
        trainer.asynchronous_saving = asynchronous
        if not natively:
            trainer.callbacks.insert(0, callback())
        trainer.fit(module, data)
    for file in ("model.safetensors", "optimizer.pt"):
        for path in Path("waiting").rglob(file):
            assert path.read_bytes() == (Path("going-on") / path.relative_to("waiting")).read_bytes(), path


def test_asynchronous_saving_writes_the_same_bytes() -> None:
    for name, asynchronous in (("waiting", False), ("going-on", True)):
        trainer, module, data, *_ = make_ours(JOB.with_settings(output_dir=name))
        trainer.asynchronous_saving = asynchronous
        trainer.fit(module, data)
    assert not [t for t in threading.enumerate() if t.name.startswith("hfbridge")]
    for path in Path("waiting").rglob("*.*"):
        other = Path("going-on") / path.relative_to("waiting")
        if path.is_dir() or path.name in ("training_args.bin", "trainer_state.json", "rng_state.pth"):
            assert other.exists()  # they name the directory, or tell times
            continue
        assert path.read_bytes() == other.read_bytes(), path

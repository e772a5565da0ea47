"""Checkpoints of Lightning on two ranks, written in the middle of steps, and SLURM's requeue signal."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from tests.distributed.conftest import PoolOf
from tests.faults.test_signals import end_of, make, saver, some
from tests.parity.engines import weights_digest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@contextmanager
def within(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def save_in(hook: str, folder: Path) -> list[str]:
    """Train, and train again from what was saved in a hook; returns digests of the weights at the ends."""
    with within(folder):
        trainer, module, data = make("hfbridge", saver(hook))
        trainer.fit(module, data)
        return [weights_digest(module.model), *(end_of("hfbridge", path) for path in some(3))]


@pytest.mark.parametrize(
    "hook", ["on_before_optimizer_step", "on_train_batch_end", "on_validation_batch_end"]
)
def test_saved_in_any_hook(ranks: PoolOf, hook: str, tmp_path: Path) -> None:
    first, second = ranks(2).run(save_in, hook, tmp_path)
    assert first == second
    assert len(set(first)) == 1


class Sends(pl.Callback):
    """Send the signal to one rank, in the middle of a step."""

    def on_after_backward(self, trainer: Any, *hook: Any) -> None:
        time.sleep(0.1)  # the ranks agree within half a second
        if trainer.global_rank == 1 and trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def requeue(folder: Path) -> list[str]:
    """Train, with a signal on the second rank, and again from what it had saved; returns the digests."""
    with within(folder):
        with mock.patch.dict(os.environ, SLURM_JOB_ID="7", PATH=f"{folder}:{os.environ['PATH']}"):
            trainer, module, data = make("hfbridge", Sends())
            trainer._accelerator_connector.cluster_environment = SLURMEnvironment(auto_requeue=True)
            trainer.fit(module, data)
        (saved,) = folder.rglob("*.ckpt")
        return [weights_digest(module.model), end_of("hfbridge", str(saved))]


def test_all_ranks_save_and_the_first_one_requeues(ranks: PoolOf, tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" >> requeued\n', encoding="utf-8")
    (tmp_path / "scontrol").chmod(0o755)
    first, second = ranks(2).run(requeue, tmp_path)
    assert first == second
    assert len(set(first)) == 1
    assert (tmp_path / "requeued").read_text(encoding="utf-8") == "requeue 7\n"

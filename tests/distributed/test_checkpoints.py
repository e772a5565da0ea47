"""Checkpoints of several ranks: what is written, by whom, and what is told when a rank cannot."""

import os
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from transformers import TrainerCallback, set_seed

import hfbridge
from hfbridge import BridgeWarning, CheckpointError
from hfbridge.callbacks.jit_checkpoint import SigtermCheckpoint
from hfbridge.checkpoints.reader import read_checkpoint
from hfbridge.checkpoints.writer import CheckpointWriter
from tests.distributed.conftest import PoolOf
from tests.distributed.test_resume import BASE, ROWS, bridge
from tests.parity.engines import Job, make_ours, record_ours, run_ours, run_theirs, same
from tests.parity.test_checkpoints import assert_same_checkpoint, files_in
from tests.parity.test_resume import assert_goes_on
from tests.tiny import make_tokenizer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS: dict[str, Any] = {
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}
EVALUATED = {**STEPS, "eval_strategy": "steps", "eval_steps": 2}
STRATEGIES: dict[str, dict[str, Any]] = {
    "steps": STEPS,
    "epoch": {**STEPS, "save_strategy": "epoch"},
    "rotated-with-best": {**EVALUATED, "save_total_limit": 2},
    "only-the-model": {**STEPS, "save_only_model": True},
    "best-at-the-end": {**EVALUATED, "load_best_model_at_end": True},
    "one-and-best": {**EVALUATED, "load_best_model_at_end": True, "save_total_limit": 1},
}


def make_job(folder: str, **settings: Any) -> Job:
    return Job(settings={**settings, "output_dir": folder}, processing_class=make_tokenizer())


def run_both(folder: str, settings: dict[str, Any]) -> None:
    theirs = run_theirs(make_job(f"{folder}/native", **settings))
    ours = run_ours(make_job(f"{folder}/ours", **settings))
    for name in ("weights", "log_history", "event_names"):
        same(name, getattr(theirs, name), getattr(ours, name))
    for record in (theirs, ours):
        best = record.state["best_model_checkpoint"]
        record.state["best_model_checkpoint"] = best and Path(best).name
    same("state", theirs.state, ours.state)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_directories(ranks: PoolOf, tmp_path: Path, strategy: str) -> None:
    ranks(2).run(run_both, str(tmp_path), STRATEGIES[strategy])
    native, ours = tmp_path / "native", tmp_path / "ours"
    assert files_in(native) == files_in(ours) != []
    for checkpoint in native.iterdir():
        assert_same_checkpoint(checkpoint, ours / checkpoint.name)
    if strategy == "steps":
        for rank in (0, 1):
            assert (ours / f"checkpoint-2/rng_state_{rank}.pth").exists()


def save_in_both_ways(folder: str) -> None:
    for name, asynchronous in (("waiting", False), ("going-on", True)):
        trainer, module, data, *_ = make_ours(make_job(f"{folder}/{name}", **STEPS))
        trainer.asynchronous_saving = asynchronous
        trainer.fit(module, data)


def test_asynchronous_saving_writes_the_same(ranks: PoolOf, tmp_path: Path) -> None:
    ranks(2).run(save_in_both_ways, str(tmp_path))
    waiting, going_on = tmp_path / "waiting", tmp_path / "going-on"
    assert files_in(waiting) == files_in(going_on) != []
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_1.pth"):
        for path in waiting.rglob(name):
            assert path.read_bytes() == (going_on / path.relative_to(waiting)).read_bytes(), path


def test_from_directory_to_file_and_back(ranks: PoolOf, tmp_path: Path) -> None:
    ranks(2).run(save_in_both_ways, str(tmp_path))
    source = tmp_path / "waiting" / "checkpoint-2"
    hfbridge.convert(source, "run.ckpt")
    back = hfbridge.convert("run.ckpt", "back/checkpoint-2")
    assert files_in(source) == files_in(back)
    assert_same_checkpoint_but_for_own(source, back)


def assert_same_checkpoint_but_for_own(source: Path, back: Path) -> None:
    one, other = (read_checkpoint(path, keeps_files=True) for path in (source, back))
    assert len(one.ranks) == len(other.ranks) == 2
    for mine, yours in zip(one.ranks, other.ranks, strict=True):
        assert mine is not None
        assert yours is not None
        same("random states", mine.random_states["cpu"], yours.random_states["cpu"])
        assert mine.position is not None
        assert yours.position is not None
        same("place", mine.position["place"], yours.position["place"])
    same("weights", one.weights, dict(sorted(other.weights.items())))
    assert (one.state_text, one.files) == (other.state_text, other.files)


# What one rank alone is told or cannot do.


def on_each(function: Callable[..., Any], *arguments: Any) -> str:
    """Call a function, and tell the error that it raises."""
    try:
        function(*arguments)
    except CheckpointError as error:
        return str(error)
    return ""


class FillDisk(TrainerCallback):
    """Let no file of this process grow beyond some bytes after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and args.process_index == 0:
            while not Path(args.output_dir, "checkpoint-2").exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))


@contextmanager
def room() -> Iterator[None]:
    """Take the limit away in the end. Nothing is printed meanwhile: the output of ranks is a file, too."""
    outputs, nowhere = {fd: os.dup(fd) for fd in (1, 2)}, os.open(os.devnull, os.O_WRONLY)
    for fd in outputs:
        os.dup2(nowhere, fd)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for fd, kept in outputs.items():
            os.dup2(kept, fd)
            os.close(kept)
        os.close(nowhere)


def fill_the_disk(folder: str, asynchronous: bool) -> str:
    job = replace(make_job(folder, **STEPS, logging_strategy="no"), callbacks=lambda: [FillDisk()])
    trainer, module, data, *_ = make_ours(job)
    trainer.asynchronous_saving = asynchronous
    with room():
        return on_each(trainer.fit, module, data)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_of_the_first_rank_ends_all(ranks: PoolOf, tmp_path: Path, asynchronous: bool) -> None:
    told = ranks(2).run(fill_the_disk, str(tmp_path / "out"), asynchronous)
    assert "checkpoint-4' could not be written" in told[0]
    assert told[1] == f"On rank 0: {told[0]}"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    read_checkpoint(tmp_path / "out/checkpoint-2")


def go_on(folder: str, checkpoint: str) -> str:
    return on_each(bridge, make_job(folder, **{**STEPS, "save_strategy": "no"}), checkpoint)


def save(folder: str) -> None:
    run_ours(make_job(folder, **STEPS))


def test_a_file_that_one_rank_cannot_read(ranks: PoolOf, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ranks(2).run(save, str(out))
    path = out / "checkpoint-4/rng_state_1.pth"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    told = ranks(2).run(go_on, str(out), str(out / "checkpoint-4"))
    assert all("rng_state_1.pth is damaged" in text for text in told)
    shutil.copy(out / "checkpoint-4/rng_state_0.pth", path)
    told = ranks(2).run(go_on, str(out), str(out / "checkpoint-4"))
    assert all("rng_state_1.pth is that of rank 0" in text for text in told)
    path.unlink()
    told = ranks(2).run(go_on, str(out), str(out / "checkpoint-4"))
    assert all("rng_state_1.pth is missing" in text for text in told)


def go_on_from_last(folder: str, begins_anew: bool) -> tuple[str, list[str], int]:
    """Resume from the last checkpoint; tells error, warnings, and the step that was gone on from."""
    settings = {**STEPS, "num_train_epochs": 3}
    trainer, module, data, *_ = make_ours(make_job(folder, **settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BridgeWarning)
        error = on_each(lambda: trainer.fit(module, data, ckpt_path=None if begins_anew else "last"))
    first = 0 if module.resumption is None else module.resumption.new_state().global_step
    return error, [str(w.message) for w in caught if w.category is BridgeWarning], first


def test_the_first_rank_finds_the_last_checkpoint(ranks: PoolOf, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ranks(2).run(save, str(out))
    newest = out / "checkpoint-6"
    (out / "unfinished-checkpoint-7-abc").mkdir()
    (newest / "model.safetensors").write_bytes(b"")
    found = ranks(2).run(go_on_from_last, str(out), False)
    assert [(error, step) for error, _, step in found] == [("", 4)] * 2
    assert any("model.safetensors is empty" in text for text in found[0][1])
    assert found[1][1] == []  # only one rank warns
    found = ranks(2).run(go_on_from_last, str(out), True)
    assert any("holds checkpoints of an earlier run" in text for text in found[0][1])
    assert found[1][1] == []
    found = ranks(2).run(go_on_from_last, str(tmp_path / "none"), False)
    assert all("there is no checkpoint in output_dir" in error for error, _, _ in found)


def test_another_run_in_the_directory(ranks: PoolOf, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    other = CheckpointWriter(TrainingArguments(str(tmp_path), use_cpu=True))
    told = ranks(2).run(on_each, save, str(tmp_path))
    other.close()
    assert all("another run is writing its checkpoints there" in text for text in told)
    assert told[1].startswith("On rank 0: ")


# Nodes that share no disk: two agents with one rank each, in directories of their own.


def as_node() -> None:
    rank = os.environ["RANK"]
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=rank)


def run_on_nodes(folder: str, each: bool) -> list[str]:
    as_node()
    Path(folder, os.environ["RANK"]).mkdir(parents=True, exist_ok=True)
    os.chdir(Path(folder, os.environ["RANK"]))
    job = Job(rows=ROWS, settings={**BASE, "output_dir": "out", "save_on_each_node": each})
    whole = bridge(job)
    if not each:
        told = on_each(bridge, job.with_settings(save_strategy="no"), "last")
        return [told, *files_in("out")]
    resumed = bridge(job.with_settings(save_strategy="no"), "out/checkpoint-5")
    assert_goes_on(whole, resumed, 5)
    return files_in("out")


def test_nodes_that_share_no_disk(ranks: PoolOf, tmp_path: Path) -> None:
    first, second = ranks(2).run(run_on_nodes, str(tmp_path / "each"), True)
    assert first == second
    assert "checkpoint-9/rng_state_1.pth" in first
    first, second = ranks(2).run(run_on_nodes, str(tmp_path / "one"), False)
    assert "checkpoint-9/model.safetensors" in first
    assert len(second) == 1
    assert "On rank 1: There is no checkpoint" in first[0]
    assert "There is no checkpoint" in second[0]


def load_best_on_nodes(folder: str) -> str:
    as_node()
    Path(folder, os.environ["RANK"]).mkdir(parents=True)
    os.chdir(Path(folder, os.environ["RANK"]))
    return on_each(run_ours, make_job("out", **EVALUATED, load_best_model_at_end=True))


def test_the_best_model_is_out_of_reach(ranks: PoolOf, tmp_path: Path) -> None:
    told = ranks(2).run(load_best_on_nodes, str(tmp_path))
    assert all("is not accessible from this node" in text for text in told)


def read_different_ones(folder: str) -> str:
    as_node()
    own = Path(folder, os.environ["RANK"])
    os.chdir(own)
    return on_each(bridge, make_job("out", **{**STEPS, "save_strategy": "no"}), "out/checkpoint-2")


def test_nodes_with_different_runs(ranks: PoolOf, tmp_path: Path) -> None:
    for rank in (0, 1):
        ranks(2).run(save_other, str(tmp_path / str(rank) / "out"), rank)
    told = ranks(2).run(read_different_ones, str(tmp_path))
    assert all("must be the same on all ranks" in text for text in told)


def save_other(folder: str, seed: int) -> None:
    run_ours(make_job(folder, **STEPS, seed=seed))


# SIGTERM.


class Terminated(TrainerCallback):
    """Send SIGTERM to the last rank, which lets half a second pass at each step from then on."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index != args.world_size - 1:
            return
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if state.global_step >= 3:
            time.sleep(0.5)


def terminate(folder: str) -> tuple[int, list[str]]:
    settings = {"enable_jit_checkpoint": True, "num_train_epochs": 9, "save_strategy": "no"}
    whole = bridge(Job(settings={**settings, "output_dir": f"{folder}/whole"}))
    set_seed(8)
    job = Job(settings={**settings, "output_dir": f"{folder}/out"}, callbacks=lambda: [Terminated()])
    trainer, module, data, *made = make_ours(job)
    trainer.fit(module, data)
    stopped = record_ours(trainer, module, *made)
    saved = sorted(path.name for path in Path(folder, "out").iterdir())
    dist.barrier()
    resumed = bridge(Job(settings={**settings, "output_dir": f"{folder}/again"}), f"{folder}/out/{saved[0]}")
    same("weights", whole.weights, resumed.weights)
    return stopped.state["global_step"], saved


def test_sigterm_of_one_rank_saves_and_stops_all(ranks: PoolOf, tmp_path: Path) -> None:
    assert SigtermCheckpoint.on_step_end is not TrainerCallback.on_step_end
    first, second = ranks(2).run(terminate, str(tmp_path))
    assert first == second
    step, (saved,) = first
    assert 3 < step < 54
    assert saved in (f"checkpoint-{step}", f"checkpoint-{step - 1}")

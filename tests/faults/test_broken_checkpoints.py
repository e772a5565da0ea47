"""Damaged, exchanged and hostile files of checkpoints: reported by name, never run."""

import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hfbridge
from hfbridge import BridgeWarning, CheckpointError
from hfbridge.checkpoints.reader import find_last, read_checkpoint
from tests.parity.engines import Job, make_ours, make_theirs
from tests.tiny import make_tokenizer

SETTINGS = {"output_dir": "out", "save_strategy": "steps", "save_steps": 4}


JOB = Job(kind="gpt2", settings=SETTINGS, processing_class=make_tokenizer())
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
)
UNREAD = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints 4, 8 and 12 of a run of either engine."""
    found = {"bridge": tmp_path_factory.mktemp("bridge"), "native": tmp_path_factory.mktemp("native")}
    trainer, module, data, *_ = make_ours(JOB.with_settings(output_dir=str(found["bridge"])))
    trainer.fit(module, data)
    make_theirs(JOB.with_settings(output_dir=str(found["native"])))[0].train()
    return found


@pytest.fixture
def out(runs: dict[str, Path]) -> Path:
    """A copy of the bridge's run."""
    return Path(shutil.copytree(runs["bridge"], "out"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def exchange_with_another_step(path: Path) -> None:
    other = path.parents[1] / "checkpoint-4" / path.name
    if other.read_bytes() == path.read_bytes():
        pytest.skip("the same at every step")
    shutil.copy(other, path)


def exchange_with_another_file(path: Path) -> None:
    names = [name for name in FILES if name != path.name and Path(name).suffix == path.suffix]
    shutil.copy(path.with_name(names[0] if names else "optimizer.pt"), path)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if zipfile.is_zipfile(path):  # whose padding nobody reads
        with zipfile.ZipFile(path) as file:
            largest = max(file.infolist(), key=lambda part: part.file_size)
            middle = content.index(file.read(largest)) + largest.file_size // 2
    content[middle] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = [truncate, empty, remove, exchange_with_another_step, exchange_with_another_file, flip_a_bit]


def test_these_are_all_files(runs: dict[str, Path]) -> None:
    for folder in runs.values():
        assert sorted(p.name for p in (folder / "checkpoint-12").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_every_file_is_reported_by_name(out: Path, name: str, damage: Callable[[Path], None]) -> None:
    newest = out / "checkpoint-12"
    read_checkpoint(newest)
    damage(newest / name)
    with pytest.raises(CheckpointError, match=rf"checkpoint-12' cannot be read:\n(.*\n)*  {name} "):
        read_checkpoint(newest)
    with pytest.warns(BridgeWarning, match=name):
        assert find_last(out) == out / "checkpoint-8"


@pytest.mark.parametrize("damage", DAMAGES[:3], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_files_of_native_checkpoints(
    runs: dict[str, Path], name: str, damage: Callable[[Path], None]
) -> None:
    newest = Path(shutil.copytree(runs["native"], "out")) / "checkpoint-12"
    read_checkpoint(newest)
    damage(newest / name)
    if name in UNREAD and damage is remove:
        read_checkpoint(newest)  # natively they are there or not; nothing tells which
        return
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(newest)


def test_files_that_training_does_not_read_hold_any_json(runs: dict[str, Path]) -> None:
    newest = Path(shutil.copytree(runs["native"], "out")) / "checkpoint-12"
    (newest / "modules.json").write_text('[{"idx": 0}]')
    read_checkpoint(newest)


def test_last_goes_back_to_a_whole_one_and_trains(out: Path) -> None:
    truncate(out / "checkpoint-12" / "model.safetensors")
    (out / "unfinished-checkpoint-16-abc").mkdir()
    trainer, module, data, *_ = make_ours(JOB.with_settings(num_train_epochs=2))
    with pytest.warns(BridgeWarning) as told:
        trainer.fit(module, data, ckpt_path="last")
    texts = [str(warning.message) for warning in told]
    assert any("model.safetensors" in text and "Going back" in text for text in texts)
    assert any("unfinished-checkpoint-16-abc" in text for text in texts)
    assert module.resumption is not None
    assert module.resumption.new_state().global_step == 8


def test_nothing_whole(out: Path) -> None:
    for folder in out.iterdir():
        empty(folder / "trainer_state.json")
    trainer, module, data, *_ = make_ours(JOB)
    with pytest.warns(BridgeWarning), pytest.raises(CheckpointError, match=r"trainer_state\.json is empty"):
        trainer.fit(module, data, ckpt_path="last")
    assert module.log_history == []


@pytest.mark.parametrize("asked", ["last", True, "out/checkpoint-5", "nowhere.ckpt"])
def test_nothing_there(asked: Any) -> None:
    trainer, module, data, *_ = make_ours(JOB)
    with pytest.raises(CheckpointError, match=r"[Tt]here is no checkpoint"):
        trainer.fit(module, data, ckpt_path=asked)
    assert module.log_history == []


class Hostile:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("engine", ["bridge", "native"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_nothing_hostile_runs(runs: dict[str, Path], engine: str, name: str, form: str) -> None:
    checkpoint = Path(shutil.copytree(runs[engine], "out")) / "checkpoint-8"
    if form == "pickle":
        (checkpoint / name).write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save({"state": Hostile()}, checkpoint / name)
    trainer, module, data, *_ = make_ours(JOB)
    is_unread = engine == "native" and (name, form) == ("training_args.bin", "torch")
    if is_unread:
        trainer.fit(module, data, ckpt_path=str(checkpoint))
    else:
        with pytest.raises(CheckpointError, match=name):
            trainer.fit(module, data, ckpt_path=str(checkpoint))
    assert not Path("ran").exists()
    pickle.loads(pickle.dumps(Hostile()))
    assert Path("ran").exists()  # it would have run


@pytest.mark.parametrize("content", [pickle.dumps(Hostile()), b"", b"PK\x03\x04"])
def test_hostile_and_broken_files_of_lightning(content: bytes) -> None:
    Path("run.ckpt").write_bytes(content)
    trainer, module, data, *_ = make_ours(JOB)
    with pytest.raises(CheckpointError, match=r"run\.ckpt"):
        trainer.fit(module, data, ckpt_path="run.ckpt")
    with pytest.raises(CheckpointError, match=r"run\.ckpt"):
        hfbridge.convert("run.ckpt", "checkpoint-1")
    assert not Path("ran").exists()
    assert not Path("checkpoint-1").exists()


def test_checkpoint_of_another_model(out: Path) -> None:
    trainer, module, data, *_ = make_ours(Job(settings=SETTINGS))
    with pytest.raises(
        CheckpointError, match=r"does not hold the weights of this DistilBert\w+; \d+ missing"
    ):
        trainer.fit(module, data, ckpt_path=str(out / "checkpoint-8"))
    assert module.log_history == []


def test_checkpoint_of_another_optimizer(out: Path) -> None:
    state = torch.load(out / "checkpoint-8" / "optimizer.pt", weights_only=True)
    state["param_groups"][0]["params"].pop()
    checkpoint = read_checkpoint(out / "checkpoint-8", keeps_files=True)
    checkpoint.optimizer = state
    from hfbridge.checkpoints.atomic_write import write_read_checkpoint

    write_read_checkpoint(Path("checkpoint-8"), checkpoint)
    trainer, module, data, *_ = make_ours(JOB)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is of groups"):
        trainer.fit(module, data, ckpt_path="checkpoint-8")


def test_a_checkpoint_that_no_run_has_written() -> None:
    trainer, module, data, *_ = make_ours(JOB)
    weights = {f"model.{name}": tensor for name, tensor in module.model.state_dict().items()}
    torch.save({"state_dict": weights, "pytorch-lightning_version": "2.6.0", "loops": {}}, "plain.ckpt")
    with pytest.raises(CheckpointError, match="This checkpoint cannot be resumed: it holds weights alone"):
        trainer.fit(module, data, ckpt_path="plain.ckpt")
    with pytest.raises(CheckpointError, match=r"plain\.ckpt' was not written by a run of HFModule"):
        hfbridge.convert("plain.ckpt", "checkpoint-1")

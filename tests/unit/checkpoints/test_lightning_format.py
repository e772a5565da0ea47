"""A native directory to a Lightning file and back: nothing is lost, and either engine goes on from it."""

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import TrainerState

import hfbridge
from hfbridge import CheckpointError
from hfbridge.checkpoints.atomic_write import write_read_checkpoint
from hfbridge.checkpoints.lightning_format import from_lightning, to_lightning
from hfbridge.checkpoints.reader import Checkpoint, RankState, read_checkpoint
from hfbridge.checkpoints.writer import as_json
from tests.parity.engines import Job, make_ours, make_theirs, record_ours, record_theirs, run_ours, same
from tests.tiny import make_tokenizer

SETTINGS: dict[str, Any] = {
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 5,
    "save_strategy": "steps",
    "save_steps": 1,
}
STEP = 4
JOB = Job(kind="gpt2", settings=SETTINGS, processing_class=make_tokenizer())
AGAIN = JOB.with_settings(output_dir="again", save_strategy="no")


def assert_same_content(one: Checkpoint, other: Checkpoint) -> None:
    same("weights", dict(sorted(one.weights.items())), dict(sorted(other.weights.items())))
    for name in ("optimizer", "schedule"):
        same(name, lists(getattr(one, name)), lists(getattr(other, name)))
    same("ranks", *(lists([vars(rank) for rank in found.ranks]) for found in (one, other)))
    assert one.state_text == other.state_text
    assert one.files == other.files
    assert one.has_adapter == other.has_adapter


def lists(value: Any) -> Any:
    """Arrays as tensors, which `same` compares."""
    if isinstance(value, dict):
        return {key: lists(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(lists, value))
    return torch.from_numpy(value.astype(np.int64)) if isinstance(value, np.ndarray) else value


def test_there_and_back() -> None:
    run_ours(JOB.with_settings(output_dir="out"))
    assert hfbridge.convert(f"out/checkpoint-{STEP}", "kept/run.ckpt") == Path("kept/run.ckpt")
    assert hfbridge.convert("kept/run.ckpt", f"back/checkpoint-{STEP}") == Path(f"back/checkpoint-{STEP}")
    source, back = Path(f"out/checkpoint-{STEP}"), Path(f"back/checkpoint-{STEP}")
    assert sorted(p.name for p in source.iterdir()) == sorted(p.name for p in back.iterdir())
    assert_same_content(read_checkpoint(source, keeps_files=True), read_checkpoint(back, keeps_files=True))
    torch.load("kept/run.ckpt", weights_only=True)


def test_a_file_of_lightning_goes_on_in_the_native_trainer() -> None:
    keeper = ModelCheckpoint(dirpath="kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer, module, data, *_ = made = make_ours(JOB.with_settings(output_dir="out"))
    trainer.callbacks.append(keeper)
    trainer.fit(module, data)
    whole = record_ours(trainer, module, *made[3:])
    hfbridge.convert(f"kept/step={STEP}.ckpt", f"native/checkpoint-{STEP}")
    written = Path(f"out/checkpoint-{STEP}")
    assert sorted(p.name for p in Path(f"native/checkpoint-{STEP}").iterdir()) == sorted(
        p.name for p in written.iterdir()
    )
    theirs = make_theirs(AGAIN)
    theirs[0].train(resume_from_checkpoint=f"native/checkpoint-{STEP}")
    same("weights", whole.weights, record_theirs(*theirs).weights)


def test_a_native_checkpoint_goes_on_from_a_file_of_lightning() -> None:
    theirs = make_theirs(JOB.with_settings(output_dir="native"))
    theirs[0].train()
    hfbridge.convert(f"native/checkpoint-{STEP}", "run.ckpt")
    trainer, module, data, *_ = make_ours(AGAIN)
    trainer.fit(module, data, ckpt_path="run.ckpt")
    same("weights", record_theirs(*theirs).weights, dict(module.model.state_dict()))


def test_weights_alone_are_loaded_from_either() -> None:
    whole = run_ours(JOB.with_settings(output_dir="out"))
    hfbridge.convert("out/checkpoint-6", "run.ckpt")
    module = hfbridge.HFModule.load_from_checkpoint("run.ckpt", model=JOB.make_model())
    same("weights", whole.weights, dict(module.model.state_dict()))
    trainer, module, data, *_ = make_ours(AGAIN)
    (found,) = trainer.validate(module, data, ckpt_path="out/checkpoint-6")
    assert "eval_loss" in found
    same("weights", whole.weights, dict(module.model.state_dict()))


def test_a_run_goes_on_from_what_was_saved_after_it() -> None:
    whole = run_ours(JOB.with_settings(num_train_epochs=3, output_dir="whole", lr_scheduler_type="constant"))
    first = AGAIN.with_settings(lr_scheduler_type="constant")
    trainer, module, data, *_ = make_ours(first)
    trainer.fit(module, data)
    trainer.save_checkpoint("end.ckpt")
    trainer, module, data, *_ = make_ours(first.with_settings(num_train_epochs=3))
    trainer.fit(module, data, ckpt_path="end.ckpt")
    same("weights", whole.weights, dict(module.model.state_dict()))


def test_a_way_of_reading_that_the_user_chose_stays() -> None:
    class Mine(TorchCheckpointIO):
        pass

    mine = Mine()
    trainer, module, data, *_ = make_ours(AGAIN)
    trainer.strategy.checkpoint_io = mine
    trainer.fit(module, data)
    assert trainer.strategy.checkpoint_io is mine


def test_a_named_model_is_built_for_its_weights() -> None:
    whole = run_ours(JOB.with_settings(output_dir="out"))
    hfbridge.convert("out/checkpoint-6", "run.ckpt")
    module = hfbridge.HFModule.load_from_checkpoint("run.ckpt", model=JOB.make_model)
    same("weights", whole.weights, dict(module.model.state_dict()))


@pytest.mark.parametrize(("source", "target"), [("out", "there"), ("there", "nowhere"), ("nowhere", "new")])
def test_wrong_paths(source: str, target: str) -> None:
    Path("there").mkdir()
    with pytest.raises(CheckpointError, match=r"exists|no checkpoint|cannot be read"):
        hfbridge.convert(source, target)
    assert [path.name for path in Path().iterdir()] == ["there"]


names = st.text(string.ascii_lowercase + "._", min_size=1, max_size=12).filter(lambda name: name.strip("."))
numbers = st.floats(width=32, allow_nan=False)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64]))
    shape = draw(st.lists(st.integers(1, 3), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return (torch.rand(shape, generator=generator) * 100).to(dtype)


@st.composite
def checkpoints(draw: st.DrawFn) -> Checkpoint:
    weights = draw(st.dictionaries(names, tensors(), min_size=1, max_size=4))
    state = TrainerState(global_step=draw(st.integers(0, 10**9)), log_history=[{"loss": draw(numbers)}])
    found = Checkpoint(weights=dict(sorted(weights.items())), state_text=as_json(state))
    found.files = draw(
        st.dictionaries(names.map(lambda name: f"f{name}.txt"), st.binary(max_size=20), max_size=3)
    )
    if draw(st.booleans()):
        return found
    moments = {i: {"exp_avg": tensor, "step": torch.tensor(1.0)} for i, tensor in enumerate(weights.values())}
    found.optimizer = {"state": moments, "param_groups": [{"lr": draw(numbers), "params": [*moments]}]}
    found.schedule = {"last_epoch": draw(st.integers(0, 9)), "_last_lr": [draw(numbers)]}
    is_ours = draw(st.booleans())
    found.ranks = [draw(rank_states(is_ours)) for _ in range(draw(st.integers(1, 3)))]
    return found


@st.composite
def rank_states(draw: st.DrawFn, is_ours: bool) -> RankState:
    numpy_state = ("MT19937", np.arange(4, dtype=np.uint32), draw(st.integers(0, 9)), 0, 0.0)
    states = {"python": (3, (1, 2), None), "numpy": numpy_state, "cpu": torch.arange(5, dtype=torch.uint8)}
    if not is_ours:
        return RankState(states)
    loss = {"sum": torch.tensor(draw(numbers)), "drained": 0.5, "last_logged_step": 1, "first_step": 0}
    position = {
        "pass_states": states,
        "pass_sampler": None,
        "in_hand": draw(st.sampled_from([None, states])),
        "sampler": None,
        "loss": loss,
        "place": {"epoch": draw(st.integers(0, 9)), "ranks": 2},
    }
    return RankState(states, position)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(checkpoints())
def test_directory_to_dict_to_directory(tmp_path_factory: pytest.TempPathFactory, made: Checkpoint) -> None:
    folder = tmp_path_factory.mktemp("round")
    write_read_checkpoint(folder / "first", made)
    first = read_checkpoint_without_arguments(folder / "first")
    assert_same_content(made, first)
    torch.save(to_lightning(first), folder / "run.ckpt")
    found = torch.load(folder / "run.ckpt", weights_only=True)
    second = from_lightning(found, source="run.ckpt")
    assert_same_content(made, second)
    write_read_checkpoint(folder / "second", second)
    assert_same_content(made, read_checkpoint_without_arguments(folder / "second"))


def read_checkpoint_without_arguments(folder: Path) -> Checkpoint:
    """Read a directory; one made up has no settings, and a native one without them is broken."""
    arguments = folder / "training_args.bin"
    had = arguments.exists()
    if not had:
        torch.save({}, arguments)
    found = read_checkpoint(folder, keeps_files=True)
    if not had:
        arguments.unlink()
        found.files.pop("training_args.bin", None)
    return found

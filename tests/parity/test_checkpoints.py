"""The checkpoints of a run and those of the native Trainer: names, formats, keys, bytes of every tensor."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import safe_globals

from hfbridge import convert
from tests.parity.engines import (
    Job,
    Record,
    make_ours,
    make_theirs,
    record_ours,
    record_theirs,
    run_ours,
    run_theirs,
    same,
    without_times,
)
from tests.tiny import make_model

STEPS: dict[str, Any] = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 5}
EVALUATED = {**STEPS, "eval_strategy": "steps", "eval_steps": 5}
STRATEGIES: dict[str, dict[str, Any]] = {
    "steps": STEPS,
    "share": {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 0.3},
    "epoch": {"num_train_epochs": 3, "save_strategy": "epoch", "gradient_accumulation_steps": 5},
    "best": {**EVALUATED, "save_strategy": "best", "eval_steps": 2, "metric_for_best_model": "loss"},
    "rotated": {**EVALUATED, "save_total_limit": 2},
    "rotated-with-best": {**EVALUATED, "save_total_limit": 2, "metric_for_best_model": "mean"},
    "only-the-model": {**STEPS, "save_only_model": True},
    "best-at-the-end": {**EVALUATED, "load_best_model_at_end": True},
    "best-is-greatest": {
        **EVALUATED,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_mean",
        "greater_is_better": True,
        "save_total_limit": 2,
    },
    "one-and-best": {**EVALUATED, "load_best_model_at_end": True, "save_total_limit": 1},
    "by-epoch-and-best": {
        "num_train_epochs": 3,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "greater_is_better": True,
        "metric_for_best_model": "loss",
    },
    "bf16": {**STEPS, "bf16": True},
}


def run(job: Job) -> tuple[Record, Record]:
    """Run both; directories differ only in their parents' names."""
    return run_theirs(job.with_settings(output_dir="native")), run_ours(job.with_settings(output_dir="ours"))


def files_in(folder: str | Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def load(path: Path) -> Any:
    with safe_globals():
        return torch.load(path, weights_only=True)


def tensors_in(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def state_in(path: Path) -> dict[str, Any]:
    """Read a state without times and without the names of the two directories."""
    text = path.read_text(encoding="utf-8").replace(f'"{path.parents[1]}/', '"out/')
    state: dict[str, Any] = json.loads(text)
    assert text == json.dumps(state, indent=2, sort_keys=True) + "\n"
    return {**state, "log_history": [without_times(row) for row in state["log_history"]]}


def as_lists(value: Any) -> Any:
    """Make arrays comparable."""
    return (
        tuple(map(as_lists, value)) if isinstance(value, tuple) else getattr(value, "tolist", lambda: value)()
    )


def assert_same_checkpoint(native: Path, ours: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt"):
        if (native / name).exists():
            same(f"{native.name}/{name}", load(native / name), load(ours / name))
    for rank, path in enumerate(sorted(native.glob("rng_state*.pth"))):
        their, our = load(path), load(ours / path.name)
        own = our.pop("hfbridge")
        assert (own["step"], own["rank"]) == (int(native.name.partition("-")[2]), rank)
        if rank == 0:
            assert sorted(own["files"]) == sorted(set(files_in(native)) - {path.name})
        same(path.name, *({k: as_lists(v) for k, v in states.items()} for states in (their, our)))
    for path in native.rglob("*.safetensors"):
        same(path.name, tensors_in(path), tensors_in(ours / path.relative_to(native)))
    same("state", state_in(native / "trainer_state.json"), state_in(ours / "trainer_state.json"))
    for path in native.glob("*.json"):
        if path.name != "trainer_state.json":
            assert path.read_bytes() == (ours / path.name).read_bytes(), path.name
    # Written for the native Trainer, and the only file that needs trust.
    arguments = [torch.load(p / "training_args.bin", weights_only=False).to_dict() for p in (native, ours)]
    same("training_args.bin", *({**a, "output_dir": "", "logging_dir": ""} for a in arguments))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_directories(strategy: str) -> None:
    theirs, ours = run(Job(settings=STRATEGIES[strategy]))
    assert files_in("native") == files_in("ours") != []
    for native in sorted(Path("native").iterdir()):
        assert_same_checkpoint(native, Path("ours") / native.name)
    same("weights", theirs.weights, ours.weights)
    same("rows", theirs.log_history, ours.log_history)
    same("events", theirs.event_names, ours.event_names)
    assert "on_save" in theirs.event_names


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_kinds_of_models(kind: str) -> None:
    run(Job(kind=kind, settings=STEPS))
    assert files_in("native") == files_in("ours")
    assert_same_checkpoint(Path("native/checkpoint-5"), Path("ours/checkpoint-5"))


def with_adapter() -> Any:
    set_seed(3)
    lora = LoraConfig(r=4, target_modules=["q_lin", "v_lin"], modules_to_save=["classifier"])
    return get_peft_model(make_model("distilbert"), lora)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
def test_adapters() -> None:
    job = Job(model=with_adapter, settings=EVALUATED)
    theirs, ours = run(job.with_settings(load_best_model_at_end=True))
    assert files_in("native") == files_in("ours")
    assert_same_checkpoint(Path("native/checkpoint-10"), Path("ours/checkpoint-10"))
    same("weights", theirs.weights, ours.weights)
    again = job.with_settings(output_dir="again", save_strategy="no")
    theirs, ours = resume_both(again, "native/checkpoint-10")
    same("weights", theirs.weights, ours.weights)
    convert("native/checkpoint-10", "run.ckpt")
    trainer, module, data, *_ = make_ours(again)
    trainer.fit(module, data, ckpt_path="run.ckpt")
    same("weights from a file of Lightning's", theirs.weights, dict(module.model.state_dict()))


class Patience(TrainerCallback, ExportableState):
    """Has a state that checkpoints keep."""

    def __init__(self, seen: int = 0) -> None:
        self.seen = seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"seen": self.seen}, "attributes": {}}


def callbacks() -> list[TrainerCallback]:
    return [Patience(), EarlyStoppingCallback(50), EarlyStoppingCallback(60)]


def test_states_of_callbacks_are_kept_and_given_back() -> None:
    job = Job(
        settings={
            **EVALUATED,
            "metric_for_best_model": "loss",
            "restore_callback_states_from_checkpoint": True,
        },
        callbacks=callbacks,
    )
    run(job)
    assert_same_checkpoint(Path("native/checkpoint-10"), Path("ours/checkpoint-10"))
    again = job.with_settings(output_dir="again", save_strategy="no")
    theirs, ours = resume_both(again, "native/checkpoint-10")
    kept: Mapping[str, Any] = theirs.state["stateful_callbacks"]
    assert "Patience" in kept
    same("state", theirs.state, ours.state)
    engines = theirs.engine.callback_handler.callbacks, ours.module.host.handler.callbacks
    seen = [[cb.seen for cb in of_one if isinstance(cb, Patience)] for of_one in engines]
    assert seen[0] == seen[1] == [24]


def resume_both(job: Job, checkpoint: str) -> tuple[Record, Record]:
    made = make_theirs(job)
    made[0].train(resume_from_checkpoint=checkpoint)
    trainer, module, data, recorder, collator = make_ours(job)
    trainer.fit(module, data, ckpt_path=checkpoint)
    ours = record_ours(trainer, module, recorder, collator)
    ours.module = module
    return record_theirs(*made), ours


def test_a_callback_may_ask_for_a_checkpoint() -> None:
    class Asking(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = state.global_step == 7

    run(Job(callbacks=lambda: [Asking()]))
    assert files_in("native") == files_in("ours")
    assert_same_checkpoint(Path("native/checkpoint-7"), Path("ours/checkpoint-7"))

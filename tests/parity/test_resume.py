"""Stopped and resumed, in the same engine or the other, a run ends as if it had never been stopped."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import set_seed

from hfbridge import BridgeWarning, CheckpointError, HFModule
from tests.parity.engines import Job, Record, make_ours, make_theirs, record_ours, record_theirs, same
from tests.tiny import PadRows

# 12 micro-batches a pass, 4 steps with the last window short of... 12 = 5 + 5 + 2: 3 steps a pass, 9 in all.
BASE: dict[str, Any] = {
    "num_train_epochs": 3,
    "gradient_accumulation_steps": 5,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
}
BOUNDARY, MID, AFTER_EVALUATION = 3, 5, 4
STOPS = {"boundary": BOUNDARY, "mid-epoch": MID, "after-evaluation": AFTER_EVALUATION}


def job(**settings: Any) -> Job:
    return Job(settings={**BASE, **settings})


def native(job: Job, resumed: str | None = None) -> Record:
    set_seed(7)
    made = make_theirs(job)
    made[0].train(resume_from_checkpoint=resumed)
    return record_theirs(*made)


def bridge(job: Job, resumed: Any = None, *callbacks: Any) -> Record:
    set_seed(8)
    trainer, module, data, recorder, collator = make_ours(job)
    trainer.callbacks.extend(callbacks)
    trainer.fit(module, data, ckpt_path=resumed)
    return record_ours(trainer, module, recorder, collator)


def rows_of(record: Record) -> list[dict[str, Any]]:
    """The rows; in a checkpoint they are sorted by name."""
    return [dict(sorted(row.items())) for row in record.log_history]


def assert_goes_on(whole: Record, resumed: Record, step: int, *, final_row: bool = True) -> None:
    """See that steps, rows, weights and states after a step are those of the uninterrupted run."""
    later = [entry for entry in whole.steps if entry["step"] > step]
    same("steps", later, [entry for entry in resumed.steps if entry["step"] > step])
    rows, again = rows_of(whole), rows_of(resumed)
    same("rows", rows if final_row else rows[:-1], again if final_row else again[:-1])
    for name in ("weights", "optimizer", "scheduler"):
        same(name, getattr(whole, name), getattr(resumed, name))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", STOPS)
def test_all_routes_between_directories(stop: str, workers: int) -> None:
    step = STOPS[stop]
    settings: dict[str, Any] = {"dataloader_num_workers": workers}
    theirs = native(job(output_dir="native", **settings))
    ours = bridge(job(output_dir="bridge", **settings))
    again = {"save_strategy": "no", "output_dir": "again", **settings}
    for source in ("native", "bridge"):
        checkpoint = f"{source}/checkpoint-{step}"
        assert_goes_on(theirs, bridge(job(**again), checkpoint), step, final_row=source == "bridge")
        assert_goes_on(ours, native(job(**again), checkpoint), step, final_row=False)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", STOPS)
def test_from_files_of_lightning(stop: str, workers: int) -> None:
    step = STOPS[stop]
    settings: dict[str, Any] = {"dataloader_num_workers": workers, "save_strategy": "no"}
    theirs = native(job(**settings))
    keeper = ModelCheckpoint(dirpath="kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    after = ModelCheckpoint(dirpath="judged", filename="{step}", monitor="eval_loss", save_top_k=-1)
    bridge(job(**settings), None, keeper, after)
    for folder in ("kept", "judged") if stop == "after-evaluation" else ("kept",):
        again = [
            ModelCheckpoint(dirpath="kept", filename="{step}", every_n_train_steps=1, save_top_k=-1),
            ModelCheckpoint(dirpath="judged", filename="{step}", monitor="eval_loss", save_top_k=-1),
        ]
        assert_goes_on(theirs, bridge(job(**settings), f"{folder}/step={step}.ckpt", *again), step)


class Dropping:
    """Pad rows, and draw from all three generators to hide some tokens."""

    def __init__(self) -> None:
        self._pad = PadRows()

    def __call__(self, rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        batch = dict(self._pad(rows))
        ids = batch["input_ids"]
        hidden = torch.rand(ids.shape) < 0.3
        hidden[:, random.randrange(ids.shape[1])] = True
        batch["input_ids"] = ids.masked_fill(hidden, 1)
        return batch


DRAWING: dict[str, dict[str, Any]] = {
    "collator": {},
    "collator-in-workers": {"dataloader_num_workers": 2},
    "order-by-length": {"train_sampling_strategy": "group_by_length"},
    "order-by-length-in-workers": {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 2},
    "sampler-without-a-seed": {"accelerator_config": {"use_seedable_sampler": False}},
    "workers-that-live-on": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("drawing", DRAWING)
def test_where_collating_or_ordering_draws(drawing: str, stop: str) -> None:
    step = STOPS[stop]
    collator = Dropping if drawing.startswith("collator") else PadRows
    random_job = Job(settings={**BASE, **DRAWING[drawing]}, collator=collator)
    whole = bridge(random_job.with_settings(output_dir="whole"))
    resumed = bridge(random_job.with_settings(output_dir="again"), f"whole/checkpoint-{step}")
    assert_goes_on(whole, resumed, step)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_rows_between_two_logs_are_whole(strategy: str) -> None:
    settings = {"logging_steps": 4, "logging_strategy": strategy}
    whole = bridge(job(output_dir="whole", **settings))
    same("native", rows_of(native(job(output_dir="native", **settings))), rows_of(whole))
    resumed = bridge(job(output_dir="again", **settings), f"whole/checkpoint-{MID}")
    assert_goes_on(whole, resumed, MID)


def test_the_settings_may_say_where_to_go_on() -> None:
    theirs = native(job(output_dir="native"))
    again = {"save_strategy": "no", "output_dir": "again"}
    resumed = bridge(job(**again, resume_from_checkpoint=f"native/checkpoint-{MID}"))
    assert_goes_on(theirs, resumed, MID, final_row=False)


def test_only_the_model_was_saved(caplog: pytest.LogCaptureFixture) -> None:
    native(job(output_dir="native", save_only_model=True))
    again = job(save_strategy="no", output_dir="again")
    theirs = native(again, f"native/checkpoint-{MID}")
    set_seed(8)
    trainer, module, data, recorder, collator = make_ours(again)
    with pytest.warns(BridgeWarning, match="holds weights and state alone") as told, caplog.at_level("INFO"):
        trainer.fit(module, data, ckpt_path=f"native/checkpoint-{MID}")
    (message,) = [str(warning.message) for warning in told if "state alone" in str(warning.message)]
    assert all(name in message for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"))
    assert "Restored all states" not in caplog.text
    assert str(trainer.ckpt_path) == f"native/checkpoint-{MID}"
    ours = record_ours(trainer, module, recorder, collator)
    same(
        "steps",
        [step["micro-batches"] for step in theirs.steps[:-1]],
        [s["micro-batches"] for s in ours.steps[:-1]],
    )
    same(
        "learning rates",
        [s.get("learning rates") for s in theirs.steps],
        [s.get("learning rates") for s in ours.steps],
    )


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning")
def test_no_run_is_resumed_from_weights_alone() -> None:
    trainer, module, data, *_ = make_ours(job(output_dir="out", save_strategy="no"))
    keeper = ModelCheckpoint("kept", "{step}", every_n_train_steps=MID, save_weights_only=True)
    trainer.callbacks.append(keeper)
    trainer.fit(module, data)
    module.save_pretrained("final")
    torch.save(module.model.state_dict(), "weights.pt")
    again = job(output_dir="again", save_strategy="no")
    for path in (keeper.best_model_path, "final", "final/model.safetensors", "weights.pt"):
        trainer, module, data, *_ = make_ours(again)
        with pytest.raises(CheckpointError, match=r"holds weights alone(.|\n)*HFModule.load_from_checkpoint"):
            trainer.fit(module, data, ckpt_path=path)
    loaded = HFModule.load_from_checkpoint(keeper.best_model_path, model=again.make_model())
    stored = torch.load(keeper.best_model_path, weights_only=True)["state_dict"]
    same("weights", dict(stored), dict(loaded.state_dict()))
    trainer, module, data, *_ = make_ours(again)
    (found,) = trainer.validate(module, data, ckpt_path=keeper.best_model_path)
    assert "eval_loss" in found


def test_data_are_not_skipped_when_asked_for() -> None:
    settings = {"ignore_data_skip": True}
    native(job(output_dir="native", **settings))
    again = {"save_strategy": "no", "output_dir": "again", **settings}
    theirs = native(job(**again), f"native/checkpoint-{MID}")
    ours = bridge(job(**again), f"native/checkpoint-{MID}")
    same("steps", theirs.steps, ours.steps)
    same("rows", rows_of(theirs), rows_of(ours))
    same("events", [e[0] for e in theirs.events], [e[0] for e in ours.events])


def test_events_of_a_resumed_run() -> None:
    native(job(output_dir="native"))
    again = {"save_strategy": "no", "output_dir": "again", "eval_on_start": True}
    theirs = native(job(**again), f"native/checkpoint-{MID}")
    ours = bridge(job(**again), f"native/checkpoint-{MID}")
    for index, (their, our) in enumerate(zip(theirs.events, ours.events, strict=True)):
        same(f"event {index}", list(their), list(our))
    same("state", theirs.state, ours.state)


@pytest.mark.filterwarnings("ignore:The checkpoint is of step 9")
@pytest.mark.parametrize("epochs", [3, 2])
def test_a_run_that_was_complete(epochs: int) -> None:
    native(job(output_dir="native"))
    again = {"save_strategy": "no", "output_dir": "again", "num_train_epochs": epochs}
    theirs = native(job(**again), "native/checkpoint-9")
    ours = bridge(job(**again), "native/checkpoint-9")
    same("events", [list(event) for event in theirs.events], [list(event) for event in ours.events])
    for name in ("state", "weights", "optimizer", "scheduler"):
        same(name, getattr(theirs, name), getattr(ours, name))
    assert [event[0] for event in ours.events][-3:] == ["on_train_begin", "on_log", "on_train_end"]


def test_the_checkpoint_says_how_often_to_log_and_save() -> None:
    native(job(output_dir="native", logging_steps=2))
    again = {"output_dir": "again", "logging_steps": 3, "save_steps": 4}
    theirs = native(job(**{**again, "output_dir": "theirs"}), f"native/checkpoint-{MID}")
    ours = bridge(job(**again), f"native/checkpoint-{MID}")
    same("rows", rows_of(theirs), rows_of(ours))
    assert {p.name for p in Path("theirs").iterdir()} == {p.name for p in Path("again").iterdir()}


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_tied_weights(kind: str) -> None:
    tied = Job(kind=kind, settings=BASE)
    theirs = native(tied.with_settings(output_dir="native"))
    resumed = bridge(tied.with_settings(output_dir="again"), f"native/checkpoint-{MID}")
    assert_goes_on(theirs, resumed, MID, final_row=False)

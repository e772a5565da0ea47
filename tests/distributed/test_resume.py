"""On several ranks, too, a run that was stopped ends as if it had never been, in either engine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.distributed.conftest import PoolOf
from tests.parity import test_resume as in_one_process
from tests.parity.engines import Job, Record
from tests.parity.test_resume import Dropping, assert_goes_on
from tests.tiny import PadRows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# 18 batches, 9 micro-batches a rank, the last one filled up; windows of 4, 4 and 1: 3 steps a pass.
BASE: dict[str, Any] = {
    "num_train_epochs": 3,
    "gradient_accumulation_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
}
STOPS = {"boundary": 3, "mid-epoch": 5, "after-evaluation": 4}
ROWS = 70


def make_job(folder: str, name: str, **settings: Any) -> Job:
    return Job(rows=ROWS, settings={**BASE, "output_dir": f"{folder}/{name}", **settings})


def native(job: Job, resumed: str | None = None) -> Record:
    return without_evaluations(in_one_process.native(job, resumed))


def bridge(job: Job, resumed: Any = None, *callbacks: Any) -> Record:
    return without_evaluations(in_one_process.bridge(job, resumed, *callbacks))


def without_evaluations(record: Record) -> Record:
    """Leave out the rows of evaluations, which are another subject."""
    rows = [row for row in record.log_history if "eval_loss" not in row]
    return replace(record, log_history=rows)


def go_all_routes(folder: str, workers: int) -> None:
    """Run both engines, and go on from each checkpoint of each in both."""
    settings: dict[str, Any] = {"dataloader_num_workers": workers}
    theirs = native(make_job(folder, "native", **settings))
    ours = bridge(make_job(folder, "bridge", **settings))
    again = make_job(folder, "again", save_strategy="no", **settings)
    for step in STOPS.values():
        for source in ("native", "bridge"):
            checkpoint = f"{folder}/{source}/checkpoint-{step}"
            assert_goes_on(theirs, bridge(again, checkpoint), step, final_row=source == "bridge")
            assert_goes_on(ours, native(again, checkpoint), step, final_row=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_routes_between_directories(ranks: PoolOf, tmp_path: Path, workers: int) -> None:
    ranks(2).run(go_all_routes, str(tmp_path), workers)


def go_on_from_files(folder: str, workers: int) -> None:
    """Go on from files that ModelCheckpoint has written, by steps and inside evaluations."""
    settings: dict[str, Any] = {"dataloader_num_workers": workers, "save_strategy": "no"}
    theirs = native(make_job(folder, "native", **settings))

    def keepers() -> list[ModelCheckpoint]:
        named: dict[str, Any] = {"filename": "{step}", "save_top_k": -1}
        return [
            ModelCheckpoint(dirpath=f"{folder}/kept", every_n_train_steps=1, **named),
            ModelCheckpoint(dirpath=f"{folder}/judged", monitor="eval_loss", **named),
        ]

    bridge(make_job(folder, "bridge", **settings), None, *keepers())
    for stop, step in STOPS.items():
        for source in ("kept", "judged") if stop == "after-evaluation" else ("kept",):
            resumed = bridge(
                make_job(folder, "again", **settings), f"{folder}/{source}/step={step}.ckpt", *keepers()
            )
            assert_goes_on(theirs, resumed, step)


@pytest.mark.parametrize("workers", [0, 2])
def test_from_files_of_lightning(ranks: PoolOf, tmp_path: Path, workers: int) -> None:
    ranks(2).run(go_on_from_files, str(tmp_path), workers)


DRAWING: dict[str, dict[str, Any]] = {
    "collator": {},
    "collator-in-workers": {"dataloader_num_workers": 2},
    "sampler-without-a-seed": {"accelerator_config": {"use_seedable_sampler": False}},
    "workers-that-live-on": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
}


def go_on_drawing(folder: str, drawing: str) -> None:
    collator = Dropping if drawing.startswith("collator") else PadRows
    settings = {**BASE, **DRAWING[drawing]}
    whole = bridge(Job(rows=ROWS, settings={**settings, "output_dir": f"{folder}/whole"}, collator=collator))
    again = Job(rows=ROWS, settings={**settings, "output_dir": f"{folder}/again"}, collator=collator)
    for step in STOPS.values():
        assert_goes_on(whole, bridge(again, f"{folder}/whole/checkpoint-{step}"), step)


@pytest.mark.parametrize("drawing", DRAWING)
def test_where_collating_or_ordering_draws(ranks: PoolOf, tmp_path: Path, drawing: str) -> None:
    ranks(2).run(go_on_drawing, str(tmp_path), drawing)

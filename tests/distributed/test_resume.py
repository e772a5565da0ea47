"""On several ranks, too, a run that was stopped ends as if it had never been, in either engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from hfbridge import CheckpointError
from tests.distributed.conftest import PoolOf
from tests.parity.engines import Job, same
from tests.parity.test_resume import Dropping, assert_goes_on, bridge, native
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


@pytest.fixture(scope="module", autouse=True)
def fresh_ranks(ranks: PoolOf) -> None:
    """Take ranks that have run nothing yet: one with many groups is too large to fork workers."""
    ranks(2).close()


def make_job(folder: str, name: str, **settings: Any) -> Job:
    return Job(rows=ROWS, settings={**BASE, "output_dir": f"{folder}/{name}", **settings})


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


@pytest.mark.long
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


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
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


@pytest.mark.parametrize(
    "drawing",
    [pytest.param(name, marks=pytest.mark.long if "live-on" in name else ()) for name in DRAWING],
)
def test_where_collating_or_ordering_draws(ranks: PoolOf, tmp_path: Path, drawing: str) -> None:
    ranks(2).run(go_on_drawing, str(tmp_path), drawing)


# Another number of ranks, or other batches: rows are accounted for by their ids.


@dataclass(frozen=True)
class Run:
    """What a rank did in a run.

    Attributes:
        ids: of the rows of its micro-batches, in the order of their collation.
        steps: optimizer steps that were taken.
        max_steps: of the state.
        epoch: of the state, at the end.
        notes: what the run told.
    """

    ids: list[list[int]]
    steps: list[int]
    max_steps: int
    epoch: float | None
    notes: list[str]


def run(folder: str, name: str, settings: dict[str, Any], checkpoint: str | None = None) -> Run:
    record = bridge(make_job(folder, name, **settings), checkpoint)
    steps = [entry["step"] for entry in record.steps if "micro-batches" in entry]
    return Run(record.collated, steps, record.state["max_steps"], record.state["epoch"], record.module.notes)


def run_natively(folder: str, name: str, settings: dict[str, Any]) -> Run:
    record = native(make_job(folder, name, **settings))
    return Run(record.collated, [], record.state["max_steps"], record.state["epoch"], [])


def rows_in_order(runs: list[Run], first: int, count: int | None = None) -> list[int]:
    """Join the micro-batches of all ranks from one on, in the order of the pass."""
    rounds = zip(*(run.ids[first : None if count is None else first + count] for run in runs), strict=True)
    return [row for batches in rounds for ids in batches for row in ids]


def run_on(ranks: PoolOf, count: int, function: Any, *arguments: Any) -> list[Run]:
    found: list[Run] = ranks(count).run(function, *arguments)
    return found


CHANGES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "2-to-1": ((2, 4), (1, 4)),
    "1-to-2": ((1, 4), (2, 3)),
    "2-to-3": ((2, 2), (3, 2)),
    "other-accumulation": ((2, 4), (2, 3)),
}


@pytest.mark.parametrize("engine", ["bridge", "native"])
@pytest.mark.parametrize(
    "change", [pytest.param(name, marks=pytest.mark.long if name == "2-to-3" else ()) for name in CHANGES]
)
def test_no_row_is_repeated_or_left_out(ranks: PoolOf, tmp_path: Path, change: str, engine: str) -> None:
    (before, accumulation), (after, other) = CHANGES[change]
    settings = {"gradient_accumulation_steps": accumulation, "eval_strategy": "no"}
    started = run_natively if engine == "native" else run
    whole = run_on(ranks, before, started, str(tmp_path), "whole", settings)
    of_pass = -(-18 // before)
    step = -(-of_pass // accumulation) + 1  # one window of the second pass is behind
    checkpoint = str(tmp_path / f"whole/checkpoint-{step}")
    settings = {"gradient_accumulation_steps": other, "eval_strategy": "no"}
    resumed = run_on(ranks, after, run, str(tmp_path), "again", settings, checkpoint)
    behind = rows_in_order(whole, of_pass, accumulation)
    assert len(behind) == before * accumulation * 4
    left = -(-(ROWS - len(behind)) // (4 * after))  # micro-batches on each rank
    goes_on = rows_in_order(resumed, 0, left)
    assert sorted(behind + goes_on[: ROWS - len(behind)]) == list(range(ROWS))
    third = rows_in_order(resumed, left)
    assert sorted(third[:ROWS]) == list(range(ROWS))
    windows = sum(-(-batches // other) for batches in (left, -(-18 // after)))
    for of_rank in resumed:
        assert of_rank.steps == list(range(step + 1, step + 1 + windows))
        assert (of_rank.max_steps, of_rank.epoch) == (step + windows, 3.0)
        assert len(of_rank.ids) == left + -(-18 // after)
        told = [note for note in of_rank.notes if "is resumed after its" in note]
        assert len(told) == 1
        assert f"Epoch 2 is resumed after its {len(behind)} trained samples" in told[0]


def go_on_twice(folder: str, checkpoint: str) -> None:
    """Go on with other ranks, and then again from the middle of that pass and of the next one."""
    settings: dict[str, Any] = {"gradient_accumulation_steps": 3}
    job = Job(rows=ROWS, settings={**BASE, **settings, "output_dir": f"{folder}/once"}, collator=Dropping)
    whole = bridge(job, checkpoint)
    again = job.with_settings(save_strategy="no", output_dir=f"{folder}/twice")
    for step in (5, 9, 12):
        resumed = bridge(again, f"{folder}/once/checkpoint-{step}")
        assert_goes_on(whole, resumed, step)
        same("max_steps", whole.state["max_steps"], resumed.state["max_steps"])


def test_a_run_that_went_on_with_other_ranks_resumes_exactly(ranks: PoolOf, tmp_path: Path) -> None:
    ranks(2).run(run, str(tmp_path), "whole", {})
    go_on_twice(str(tmp_path), str(tmp_path / "whole/checkpoint-4"))


@pytest.mark.parametrize(
    "settings",
    [{"train_sampling_strategy": "group_by_length"}, {"accelerator_config": {"use_seedable_sampler": False}}],
)
def test_an_order_that_depends_on_the_cut(ranks: PoolOf, tmp_path: Path, settings: dict[str, Any]) -> None:
    ranks(2).run(run, str(tmp_path), "whole", settings)
    again = make_job(str(tmp_path), "again", **settings)
    with pytest.raises(
        CheckpointError, match=r"middle of an epoch, of a run of 2 ranks.*this one has 1 rank"
    ):
        bridge(again, str(tmp_path / "whole/checkpoint-4"))
    bridge(again, str(tmp_path / "whole/checkpoint-3"))  # the end of a pass


@pytest.mark.long
def test_a_native_checkpoint_that_has_lost_the_files_of_ranks(ranks: PoolOf, tmp_path: Path) -> None:
    ranks(3).run(run_natively, str(tmp_path), "whole", {"gradient_accumulation_steps": 1})
    newest = tmp_path / "whole/checkpoint-8"
    again = make_job(str(tmp_path), "again", save_strategy="no")
    (newest / "rng_state_2.pth").unlink()
    with pytest.raises(CheckpointError, match=r"no run has come to with 2 rank\(s\)"):
        bridge(again, str(newest))
    (newest / "rng_state_1.pth").unlink()
    with pytest.raises(CheckpointError, match=r"rng_state_1.pth is missing"):
        bridge(again, str(newest))

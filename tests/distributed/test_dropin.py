"""Unmodified scripts on two ranks, with hfbridge's Trainer in the place of transformers'."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import Started
from tests.distributed.overriding_jobs import train
from tests.distributed.scripts import SCRIPT, facts_in, names_in, run_bridged, run_natively

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

COMMAND = str(SCRIPT.parent / "command.py")
OURS = ["hfbridge.dropin.trainers"] * 2


def test_a_script_does_what_it_does_natively(ranks, tmp_path: Path) -> None:
    theirs = ranks(2).run(run_natively, tmp_path)[0]
    ours = ranks(2).run(run_bridged, tmp_path, "ddp")[0]
    assert theirs.pop("trainer") == ["transformers.trainer", "transformers.trainer_seq2seq"]
    assert ours.pop("trainer") == OURS
    assert theirs.pop("argv") == ["--out", "theirs"]
    assert ours.pop("argv") == ["--out", "ddp"]
    assert theirs == ours
    assert {row["world"] for row in ours["rows"]} == {2}
    assert names_in(tmp_path / "theirs") == names_in(tmp_path / "ddp")


def test_ranks_that_are_started_by_run_do_the_same(ranks, tmp_path: Path) -> None:
    theirs = ranks(2).run(run_natively, tmp_path)[0]
    started = Started([COMMAND, "ddp", "2", str(SCRIPT), "--out", "ours"], tmp_path, {})
    assert started.wait() == 0, started.output[-3000:]
    ours = facts_in(tmp_path / "ours")
    assert ours["trainer"] == OURS
    assert {**ours, "trainer": None, "argv": None} == {**theirs, "trainer": None, "argv": None}
    assert not started.left()


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3", "fsdp", "fsdp2"])
def test_ranks_that_share_the_model(ranks, tmp_path: Path, strategy: str) -> None:
    whole = ranks(2).run(run_bridged, tmp_path, "ddp")[0]
    shared = ranks(2).run(run_bridged, tmp_path, strategy)[0]
    assert [list(row) for row in whole["rows"]] == [list(row) for row in shared["rows"]]
    for expected, found in zip(whole["rows"], shared["rows"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    final = {"final/model.safetensors", "final/config.json", "final/training_args.bin"}
    assert final <= set(names_in(tmp_path / strategy))


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_of_the_script(ranks, tmp_path: Path, stage: int) -> None:
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    config = {"zero_optimization": {"stage": stage}, "zero_force_ds_cpu_optimizer": False, **auto}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    arguments = ("--deepspeed", str(tmp_path / "ds.json"))
    theirs = ranks(2).run(run_natively, tmp_path, *arguments)[0]
    ours = ranks(2).run(run_bridged, tmp_path, None, *arguments)[0]
    assert ours["trainer"] == OURS
    assert ours["rows"] == theirs["rows"]
    assert ours["predictions"] == theirs["predictions"]


@pytest.mark.long
def test_a_rank_that_fails_ends_the_others_with_a_code(tmp_path: Path) -> None:
    started = Started([COMMAND, "ddp", "2", str(SCRIPT), "--out", "out", "--replaces"], tmp_path, {})
    assert started.wait() == 1
    assert "Own._run_epoch" in started.output
    assert not started.left()


OVERRIDDEN = [
    "compute_loss: popped labels",
    "training_step: gradients",
    "create_optimizer",
    "get_train_dataloader",
]
AUTO = {
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
STAGES = [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)]


@pytest.mark.parametrize("case", OVERRIDDEN)
def test_an_overridden_method_under_ddp(ranks, case):
    theirs, _ = ranks(2).run(train, case, "native", {}, "auto")
    ours, _ = ranks(2).run(train, case, "hfbridge", {}, "ddp")
    assert ours == theirs


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", OVERRIDDEN)
def test_an_overridden_method_under_deepspeed(ranks, case, stage):
    settings = {"deepspeed": {**AUTO, "zero_optimization": {"stage": stage}}}
    theirs, _ = ranks(2).run(train, case, "native", settings, "auto")
    ours, _ = ranks(2).run(train, case, "hfbridge", settings, "auto")
    assert ours == theirs


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("case", OVERRIDDEN)
def test_an_overridden_method_under_fsdp(ranks, case, strategy):
    """Gradients are there once a step, and are summed in another order than by DDP."""
    settings = {"gradient_accumulation_steps": 1}
    whole, _ = ranks(2).run(train, case, "hfbridge", settings, "ddp")
    shared, _ = ranks(2).run(train, case, "hfbridge", settings, strategy)
    assert shared["first"] == pytest.approx(whole["first"], rel=1e-4, abs=1e-6)
    for found, expected in zip(shared["history"], whole["history"], strict=True):
        for row in (found, expected):
            row.pop("eval_predictions", None)  # a digest of their bits
        assert found == pytest.approx(expected, rel=1e-4)

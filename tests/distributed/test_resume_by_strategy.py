"""Checkpoints of every strategy: the same goes on to the bit, and from whole ones any other does, too."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

import hfbridge
from tests.distributed.matrix import Gather
from tests.parity.engines import BASE
from tests.tiny import PadRows, make_model, make_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, SAVED = 8, 5
WHOLE = ("ddp", "fsdp", "fsdp2")
IN_PARTS = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


def fit(
    strategy: str, folder: Path, kind: str, ckpt_path: str | None = None
) -> tuple[dict[str, Any], list[Any]]:
    """Train; returns the gathered weights, and the rows of the log."""
    gather = Gather()
    settings = {
        **BASE,
        "output_dir": str(folder),
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "save_strategy": "steps",
        "save_steps": SAVED,
    }
    trainer = hfbridge.Trainer(
        settings, strategy=strategy, callbacks=[gather], logger=False, enable_model_summary=False
    )
    data = hfbridge.HFDataModule(train_dataset=make_rows(kind, 27), data_collator=PadRows())
    trainer.fit(hfbridge.HFModule(make_model(kind)), data, ckpt_path=ckpt_path)
    return gather.weights, [
        (r["step"], r["loss"], r["grad_norm"]) for r in trainer.log_history if "loss" in r
    ]


def go_on(writer: str, reader: str, folder: str, kind: str) -> tuple[list[str], dict[str, float], list[Any]]:
    """Train with one strategy, and go on from its checkpoint with another; on each rank.

    Returns:
        The files of the checkpoint, how far each weight lies from the uninterrupted run's, relative to the
        largest of its tensor, and the log rows of both runs.
    """
    whole, rows = fit(writer, Path(folder) / "whole", kind)
    checkpoint = Path(folder) / "whole" / f"checkpoint-{SAVED}"
    resumed, later = fit(reader, Path(folder) / "resumed", kind, str(checkpoint))
    files = sorted(
        path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()
    )
    apart = {
        name: float((tensor - resumed[name]).abs().max() / tensor.abs().max().clamp(min=1e-3))
        for name, tensor in whole.items()
    }
    return files, apart, [rows, later]


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("strategy", [*WHOLE, *IN_PARTS])
def test_the_same_strategy_goes_on_to_the_bit(ranks, tmp_path, strategy, kind):
    files, apart, (rows, later) = ranks(2).run(go_on, strategy, strategy, str(tmp_path), kind)[0]
    assert "trainer_state.json" in files
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(files)
    assert apart
    assert not any(apart.values()), max(apart.items(), key=lambda item: item[1])
    assert later == rows


@pytest.mark.parametrize(("writer", "reader"), list(permutations(WHOLE, 2)))
def test_whole_checkpoints_fit_any_strategy_that_reads_them(ranks, tmp_path, writer, reader):
    files, apart, (rows, later) = ranks(2).run(go_on, writer, reader, str(tmp_path), "llama")[0]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt"} <= set(files)
    # Three steps of Adam on sums taken in another order; a weight's own size is the measure.
    assert max(apart.values()) < 2e-6
    assert [row[0] for row in later] == [row[0] for row in rows]

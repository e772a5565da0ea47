"""Part two: each strategy on one GPU trains, writes checkpoints and resumes from one to the bit."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs import (
    find_difference,
    fit_hfbridge,
    largest_difference,
    make_model,
    make_rows,
    make_settings,
    make_task,
)
from plan import Measurement

NAMES = ("ddp", "fsdp2", "deepspeed_stage_2", "deepspeed_stage_3")
LIGHTNINGS = ("lightning.DeepSpeedStrategy", "lightning.FSDPStrategy")
KEPT, STEPS = 3, 6


def measurements(*, tiny: bool) -> Iterator[Measurement]:
    environment = {"DS_ACCELERATOR": "cpu"} if tiny else {}
    for name in NAMES if tiny else (*NAMES, *LIGHTNINGS):
        yield Measurement(name, resume, {"name": name, "tiny": tiny}, environment)


def resume(*, name: str, tiny: bool) -> dict[str, Any]:
    """Train six steps, resume from the checkpoint of the third, and compare both runs.

    Args:
        name: of the strategy; one of `LIGHTNINGS` is an object of Lightning's, resumed from the file of
            Lightning's ModelCheckpoint; the others are resumed from a directory `checkpoint-3`.
        tiny: for a CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = Path(folder, "whole"), Path(folder, "resumed")
        expected, weights = _train(name, whole, tiny=tiny)
        is_lightnings = name in LIGHTNINGS
        kept = whole / (f"step={KEPT}.ckpt" if is_lightnings else f"checkpoint-{KEPT}")
        found, found_weights = _train(name, resumed, tiny=tiny, ckpt_path=str(kept))
    quantities = ("loss", "learning_rate") + (() if is_lightnings else ("grad_norm",))
    difference = find_difference(expected[KEPT:], found[-(STEPS - KEPT) :], quantities)
    apart = largest_difference(weights, found_weights)
    return {
        "losses": [row["loss"] for row in expected],
        "resumes_to_the_bit": difference is None and apart == 0.0,
        "first_difference": difference,
        "largest_difference_of_weights": apart,
    }


def _train(
    name: str, folder: Path, *, tiny: bool, ckpt_path: str | None = None
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Train six steps; returns the logged numbers of each, and the weights that `save_pretrained` writes."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from safetensors.torch import load_file

    task = make_task("classifier", tiny=tiny)
    settings = make_settings(
        folder,
        tiny=tiny,
        max_steps=STEPS,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="steps",
        save_steps=KEPT,
        per_device_train_batch_size=task.micro_batch,
        gradient_accumulation_steps=2,
        full_determinism=True,
        bf16=not tiny,
    )
    callbacks: list[Any] = []
    if name in LIGHTNINGS:
        settings["save_strategy"] = "no"
        callbacks = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=KEPT, save_top_k=-1)]
    module = fit_hfbridge(
        make_model(task.name, tiny=tiny),
        settings,
        make_rows(task, STEPS * 2 * task.micro_batch, tiny=tiny),
        callbacks,
        trainer={"strategy": _make_strategy(name), "devices": 1},
        ckpt_path=ckpt_path,
    )
    module.save_pretrained(folder / "saved")
    rows = [row for row in module.log_history if "learning_rate" in row]
    return rows, load_file(folder / "saved" / "model.safetensors")


def _make_strategy(name: str) -> Any:
    from lightning.pytorch import strategies

    if name == "lightning.DeepSpeedStrategy":
        return strategies.DeepSpeedStrategy(stage=2)
    if name == "lightning.FSDPStrategy":
        return strategies.FSDPStrategy()
    return name

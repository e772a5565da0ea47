"""Part one: the numbers of each step, and the final weights, beside those of the HF Trainer."""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs import (
    find_difference,
    fit_hfbridge,
    fit_native,
    largest_difference,
    make_model,
    make_rows,
    make_settings,
    make_task,
)
from plan import Measurement

NAMES = ("loss", "grad_norm", "learning_rate")


def measurements(*, tiny: bool) -> Iterator[Measurement]:
    precisions = ("fp32", "bf16") if tiny else ("fp32", "bf16", "fp16")
    for precision, accumulation in itertools.product(precisions, (1, 4)):
        given = {"precision": precision, "accumulation": accumulation, "deterministic": True, "tiny": tiny}
        yield Measurement(f"{precision}, accumulation {accumulation}", compare, given)
    if not tiny:
        for precision in ("fp32", "bf16"):
            given = {"precision": precision, "accumulation": 4, "deterministic": False, "tiny": tiny}
            yield Measurement(f"{precision}, accumulation 4, any algorithms", compare, given)


def compare(*, precision: str, accumulation: int, deterministic: bool, tiny: bool) -> dict[str, Any]:
    """Train the same job with both engines, dropout on.

    Args:
        precision: "fp32", or autocast in "bf16" or "fp16".
        accumulation: micro-batches of an optimizer step.
        deterministic: whether the setting `full_determinism` is on.
        tiny: for a CPU.
    """
    steps, task = 3 if tiny else 20, make_task("classifier", tiny=tiny)
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(
            folder,
            tiny=tiny,
            max_steps=steps,
            logging_strategy="steps",
            logging_steps=1,
            per_device_train_batch_size=task.micro_batch,
            gradient_accumulation_steps=accumulation,
            full_determinism=deterministic,
            **({} if precision == "fp32" else {precision: True}),
        )
        rows = make_rows(task, steps * task.micro_batch * accumulation, tiny=tiny)
        trainer = fit_native(make_model(task.name, tiny=tiny), settings, rows)
        expected = [row for row in trainer.state.log_history if "grad_norm" in row]
        settings["output_dir"] = str(Path(folder, "hfbridge"))
        module = fit_hfbridge(make_model(task.name, tiny=tiny), settings, rows)
    found = [row for row in module.log_history if "grad_norm" in row]
    difference = find_difference(expected, found, NAMES)
    weights = largest_difference(trainer.model.state_dict(), module.model.state_dict())
    return {
        "steps": len(found),
        "equal": difference is None and weights == 0.0,
        "first_difference": difference,
        "largest_difference_of_weights": weights,
        "losses": [row["loss"] for row in found],
    }

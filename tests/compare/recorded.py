"""Comparisons as `hfbridge compare` leaves them, made up: curves of a real shape, with known differences."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NATIVE, ACCELERATE, LIGHTNING, ZERO = "native", "accelerate", "lightning", "lightning:deepspeed_stage_2"
SETTINGS = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 3,
    "optim": "adamw_torch",
    "warmup_steps": 30,
    "weight_decay": 0.01,
    "seed": 42,
    "bf16": False,
    "lr_scheduler_kwargs": {},
}


def slug(engine: str) -> str:
    return engine.replace(":", "-")


def step_rows(
    steps: int, *, relative: float = 0.0, since: int | None = None, seconds: float = 0.2, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of steps.jsonl: noise `relative` at some steps, and from `since` on a gradient twice as large."""
    noise, own, rows = random.Random(0), random.Random(seed + 1), []
    for step in range(1, steps + 1):
        loss = 0.25 + 0.45 * math.exp(-3 * step / steps) + noise.gauss(0, 0.03)
        norm = 1.1 + 2 * math.exp(-4 * step / steps) + abs(noise.gauss(0, 0.25))
        rate = 5e-5 * (step / (0.1 * steps) if step < 0.1 * steps else (steps - step) / (0.9 * steps))
        weight = 41.5 + 0.002 * step
        shift = 1 + relative * own.uniform(-1, 1) * (own.random() < 0.7)
        is_late = since is not None and step >= since
        if is_late:
            norm *= 2
            late = (step - since) / steps
            loss, weight = loss * (1 + 0.25 * late + (0.001 if late else 0)), weight * (1 + 1e-3 * late)
        shift_norm = 1 + (shift - 1) * own.uniform(0.5, 2)
        rows.append(
            {
                "step": step,
                "epoch": 3 * step / steps,
                "loss": loss * shift,
                "grad_norm": norm * shift_norm,
                "learning_rate": rate,
                "samples": f"{noise.getrandbits(64):016x}",
                "parameters": f"{noise.getrandbits(64) + (shift != 1) + is_late:016x}",
                "parameter_norm": weight * (1 + (shift - 1) / 20),
                "seconds": seconds * (3 if step == 1 else 1) * math.exp(abs(own.gauss(0, 0.08))),
                "memory_bytes": int((600 + 40 * (1 - math.exp(-step / 20)) + own.random()) * 2**20),
                "rows": 32,
            }
        )
    return rows


def write_engine(
    folder: Path,
    engine: str,
    rows: Sequence[dict[str, Any]],
    *,
    settings: dict[str, Any],
    memory_mib: int = 640,
) -> None:
    """Files of an engine that reached its end."""
    home = folder / slug(engine)
    home.mkdir(parents=True)
    (home / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated = [row for row in rows if row["step"] % max(1, len(rows) // 6) == 0]
    metrics = [
        {
            "step": row["step"],
            "epoch": row["epoch"],
            "eval_loss": 0.3
            + 0.4 * math.exp(-3 * row["step"] / len(rows))
            + (row["loss"] - row["loss"] // 1) / 50,
            "eval_accuracy": round(0.9 - 0.35 * math.exp(-3 * row["step"] / len(rows)), 4),
            "eval_f1": round(0.88 - 0.4 * math.exp(-3 * row["step"] / len(rows)), 4),
            "eval_runtime": 1.25,
        }
        for row in evaluated
    ]
    (home / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    total = sum(row["seconds"] for row in rows)
    done = {
        "engine": engine,
        "seconds_training": total,
        "seconds_startup": 9.5,
        "samples_per_second": 32 * len(rows) / total,
        "peak_memory_bytes": memory_mib * 2**20,
        "settings": settings,
        "notes": [
            "The model ignores num_items_in_batch: its gradient is 8 times that of the mean over all samples."
        ]
        if engine != ACCELERATE
        else [],
        "final_parameters": rows[-1]["parameters"],
    }
    (home / "done.json").write_text(json.dumps(done))


def write_overview(
    folder: Path, engines: Sequence[str], verdicts: Sequence[dict[str, Any]], *, steps: int, **other: Any
) -> None:
    """`comparison.json`."""
    told = {engine: {**SETTINGS, "strategy": "ddp", "mixed_precision": "no"} for engine in engines}
    for engine in engines:
        if engine.startswith("lightning"):
            told[engine]["strategy"] = engine.partition(":")[2] or "auto"
        if engine == ACCELERATE:
            told[engine]["lr_scheduler_type"] = "constant_with_warmup"
    rows = [{"name": name, "values": {e: told[e][name] for e in engines}} for name in told[engines[0]]]
    content = {
        "schema": 1,
        "job": "job.py",
        "engines": list(engines),
        "ranks": 2,
        "steps": steps,
        "environment": {
            "versions": {"torch": "2.13.0+cpu", "transformers": "5.23.0", "lightning": "2.6.6"},
            "cpu": "AMD EPYC",
            "cores": 2,
            "system": "Linux",
            "python": "3.11.7",
        },
        "date": "2026-11-28",
        "settings": rows,
        "verdicts": list(verdicts),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps({**content, **other}))


def verdict(ours: str, grade: str, **other: Any) -> dict[str, Any]:
    found = {
        "theirs": NATIVE,
        "ours": ours,
        "grade": grade,
        "first_step": None,
        "quantity": None,
        "theirs_value": None,
        "ours_value": None,
        "largest": {},
        "tolerance": None,
        "why": "",
        "cause": None,
    }
    return {**found, **other}


def write_comparison(folder: Path, *, steps: int = 300) -> Path:
    """Four engines: the reference, an equal one, a close one, and one that differs from step 17 on."""
    engines = [NATIVE, LIGHTNING, ZERO, ACCELERATE]
    plain = step_rows(steps, seconds=0.2, seed=0)
    write_engine(folder, NATIVE, plain, settings=SETTINGS)
    write_engine(
        folder, LIGHTNING, step_rows(steps, seconds=0.203, seed=1), settings=SETTINGS, memory_mib=655
    )
    close = step_rows(steps, relative=2e-7, seconds=0.235, seed=2)
    write_engine(folder, ZERO, close, settings=SETTINGS, memory_mib=512)
    other = step_rows(steps, since=min(17, steps), seconds=0.192, seed=3)
    write_engine(folder, ACCELERATE, other, settings=SETTINGS, memory_mib=601)
    first = min(17, steps) - 1
    verdicts = [
        verdict(
            LIGHTNING, "exact", why="Every quantity of every step is equal to the bit.", largest={"loss": 0.0}
        ),
        verdict(
            ZERO,
            "close",
            first_step=1,
            quantity="loss",
            theirs_value=plain[0]["loss"],
            ours_value=close[0]["loss"],
            largest={"loss": 2e-7, "grad_norm": 3.9e-7},
            tolerance=1e-5,
            why="Sums over ranks are taken in another order.",
        ),
        verdict(
            ACCELERATE,
            "differs",
            first_step=first + 1,
            quantity="grad_norm",
            theirs_value=plain[first]["grad_norm"],
            ours_value=other[first]["grad_norm"],
            largest={"grad_norm": 0.5, "loss": 0.19},
            tolerance=1e-5,
            why="The gradient norm is 2.000 times native's from step 17 on.",
            cause="loss scale: a constant factor of 2",
        ),
    ]
    write_overview(folder, engines, verdicts, steps=steps)
    return folder

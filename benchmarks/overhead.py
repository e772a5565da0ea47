"""What an engine costs per optimizer step above a hand-written loop doing the same work.

The model is one linear layer, so that hardly anything but the engine is measured. All engines train on the
same rows with the same collator, clipping, optimizer and schedule, and log every 50 steps. Each measurement
is a fresh process with one thread; the engines take turns. The clock is read by the collator, so that no
engine gets a callback it would not have otherwise.
"""

import argparse
import cProfile
import importlib
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import run_fresh, spread, write

ENGINES = ("loop", "native", "plain_lightning", "hfbridge", "hfmodule_in_plain_lightning")
BATCH, WARM_UP, LOGGING, CLIP, RATE = 4, 150, 50, 1.0, 5e-5
# hfbridge's overhead as a share of the HF Trainer's, by accumulation: of time, which needs a quiet machine,
# and of counted Python calls, which no noise touches.
LIMITS, CALL_LIMIT = {1: 0.30, 4: 0.15}, 0.30


class Clock:
    """A collator that reads the clocks when warm-up is over and when the measured steps are.

    With a profile it counts the Python functions that are called in between.
    """

    def __init__(self, accumulation: int, steps: int, profile: cProfile.Profile | None = None) -> None:
        self.calls, self.profile = 0, profile
        self.first, self.last = WARM_UP * accumulation, (WARM_UP + steps) * accumulation
        self.readings: list[tuple[float, float]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        self.calls += 1
        if self.calls in (self.first, self.last):
            self.readings.append((time.process_time(), time.perf_counter()))
            if self.profile is not None:
                self.profile.enable() if self.calls == self.first else self.profile.disable()
        return {name: torch.tensor([row[name] for row in rows]) for name in ("values", "labels")}


def make_model() -> Any:
    """Build a Hugging Face model of one linear layer."""
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput

    class StubConfig(PreTrainedConfig):
        model_type = "overhead-stub"

    class Stub(PreTrainedModel):
        config_class = StubConfig
        main_input_name = "values"

        def __init__(self, config: StubConfig) -> None:
            super().__init__(config)
            self.head = nn.Linear(8, 2)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

        def forward(self, values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
            logits = self.head(values)
            return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)

    torch.manual_seed(0)
    return Stub(StubConfig())


def make_optimizer(model: Any) -> Any:
    """Make the optimizer of the native Trainer: weights that decay in one group, biases in the other."""
    import torch

    groups = [
        {"params": [p for name, p in model.named_parameters() if ("bias" in name) == is_bias]}
        for is_bias in (False, True)
    ]
    return torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0, fused=True)


def run_loop(clock: Clock, rows: Any, accumulation: int, steps: int) -> Callable[[], Any]:
    import torch
    from torch.utils.data import DataLoader

    model = make_model()

    def train() -> None:
        model.train()
        optimizer = make_optimizer(model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        batches = iter(DataLoader(rows, batch_size=BATCH, shuffle=True, collate_fn=clock))
        total = torch.zeros(())
        for step in range(1, steps + 1):
            for _ in range(accumulation):
                loss = model(**next(batches)).loss / accumulation
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            model.zero_grad()
            if step % LOGGING == 0:
                total.item()

    return train


def settings_of(accumulation: int, steps: int) -> dict[str, Any]:
    return {
        "output_dir": "out",
        "use_cpu": True,
        "save_strategy": "no",
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "logging_steps": LOGGING,
        "learning_rate": RATE,
        "max_grad_norm": CLIP,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def run_native(clock: Clock, rows: Any, accumulation: int, steps: int) -> Callable[[], Any]:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    arguments = TrainingArguments(**settings_of(accumulation, steps))
    trainer = Trainer(make_model(), arguments, train_dataset=rows, data_collator=clock)
    trainer.remove_callback(PrinterCallback)
    return trainer.train


def run_hfbridge(clock: Clock, rows: Any, accumulation: int, steps: int) -> Callable[[], Any]:
    import hfbridge

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings = settings_of(accumulation, steps)
    del settings["disable_tqdm"]  # the argument below says it
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = hfbridge.Trainer(settings, **quiet)
    module = hfbridge.HFModule(make_model(), loss_normalization="native")
    data = hfbridge.HFDataModule(train_dataset=rows, data_collator=clock)
    return lambda: trainer.fit(module, data)


def run_hfmodule_in_plain_lightning(
    clock: Clock, rows: Any, accumulation: int, steps: int
) -> Callable[[], Any]:
    import lightning.pytorch as pl

    import hfbridge

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings = settings_of(accumulation, steps)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, **quiet)
    module = hfbridge.HFModule(make_model(), loss_normalization="native", settings=settings)
    data = hfbridge.HFDataModule(train_dataset=rows, data_collator=clock)
    return lambda: trainer.fit(module, data)


def run_plain_lightning(clock: Clock, rows: Any, accumulation: int, steps: int) -> Callable[[], Any]:
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader

    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            optimizer = make_optimizer(self.model)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=CLIP,
        log_every_n_steps=LOGGING,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    loader = DataLoader(rows, batch_size=BATCH, shuffle=True, collate_fn=clock)
    return lambda: trainer.fit(Plain(), loader)


def measure_one(engine: str, accumulation: int, steps: int, *, counts_calls: bool) -> dict[str, float]:
    """Measure one engine in this process: microseconds, or Python calls, per optimizer step."""
    import torch

    # In every process: what it imports may patch torch's optimizers, as bitsandbytes does, for any engine.
    importlib.import_module("transformers.trainer")
    torch.set_num_threads(1)
    total = WARM_UP + steps + 5
    profile = cProfile.Profile(builtins=False) if counts_calls else None
    clock = Clock(accumulation, steps, profile)
    rows = [{"values": [float(i % 7)] * 8, "labels": i % 2} for i in range(total * accumulation * BATCH)]
    train = globals()[f"run_{engine}"](clock, rows, accumulation, total)
    train()
    if profile is not None:
        return {"calls": sum(entry.callcount for entry in profile.getstats()) / steps}
    (cpu_start, wall_start), (cpu_end, wall_end) = clock.readings
    return {"cpu_us": (cpu_end - cpu_start) / steps * 1e6, "wall_us": (wall_end - wall_start) / steps * 1e6}


def measure_all(accumulation: int, steps: int, repeats: int) -> dict[str, Any]:
    values: dict[str, dict[str, list[float]]] = {e: {"cpu_us": [], "wall_us": []} for e in ENGINES}
    for repeat in range(repeats):
        for engine in ENGINES:
            found = run_fresh(__file__, "--worker", engine, "--accumulation", accumulation, "--steps", steps)
            for clock in ("cpu_us", "wall_us"):
                values[engine][clock].append(found[clock])
        print(f"accumulation {accumulation}: repeat {repeat + 1} of {repeats}", file=sys.stderr)
    result: dict[str, Any] = {}
    for engine in ENGINES:
        calls = run_fresh(
            __file__, "--worker", engine, "--accumulation", accumulation, "--steps", 100, "--count-calls"
        )
        above = [
            one - loop for one, loop in zip(values[engine]["cpu_us"], values["loop"]["cpu_us"], strict=True)
        ]
        result[engine] = {
            "cpu_us_per_step": spread(values[engine]["cpu_us"]),
            "wall_us_per_step": spread(values[engine]["wall_us"]),
            "overhead_us_per_step": spread(above),
            "python_calls_per_step": calls["calls"],
        }
    native = result["native"]["overhead_us_per_step"]["median"]
    by_hand = result["loop"]["python_calls_per_step"]
    for engine in ENGINES:
        row = result[engine]
        row["overhead_of_native"] = row["overhead_us_per_step"]["median"] / native
        calls_above = row["python_calls_per_step"] - by_hand
        row["calls_of_native"] = calls_above / (result["native"]["python_calls_per_step"] - by_hand)
    return result


def exceeded(results: dict[str, Any]) -> list[str]:
    """Name what is above its limit."""
    found = []
    for g, limit in LIMITS.items():
        rows = results[f"accumulation_{g}"]
        ours, plain, inside = (
            rows[name] for name in ("hfbridge", "plain_lightning", "hfmodule_in_plain_lightning")
        )
        if ours["overhead_of_native"] > limit:
            found.append(f"accumulation {g}: {ours['overhead_of_native']:.2f} of its time, at most {limit}")
        if ours["calls_of_native"] > CALL_LIMIT:
            found.append(
                f"accumulation {g}: {ours['calls_of_native']:.2f} of its calls, at most {CALL_LIMIT}"
            )
        for name, cost in (("time", "overhead_us_per_step"), ("calls", "python_calls_per_step")):
            one, other = (row[cost]["median"] if name == "time" else row[cost] for row in (inside, plain))
            if one > other:
                found.append(
                    f"accumulation {g}: HFModule costs a plain Trainer more {name} than a minimal "
                    f"LightningModule, {one:.0f} for {other:.0f}"
                )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=800, help="measured optimizer steps")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/overhead.json")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if hfbridge's overhead is above its limits"
    )
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--accumulation", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--count-calls", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        found = measure_one(
            arguments.worker, arguments.accumulation, arguments.steps, counts_calls=arguments.count_calls
        )
        print(json.dumps(found))
        return 0
    results = {f"accumulation_{g}": measure_all(g, arguments.steps, arguments.repeats) for g in LIMITS}
    print(
        f"{'':16} {'accumulation':>12} {'us/step':>9} {'above loop':>11} {'of native':>10} {'calls/step':>11}"
    )
    for g in LIMITS:
        for engine, row in results[f"accumulation_{g}"].items():
            print(
                f"{engine:16} {g:>12} {row['cpu_us_per_step']['median']:>9.0f} "
                f"{row['overhead_us_per_step']['median']:>11.0f} "
                f"{row['overhead_of_native']:>10.2f} {row['python_calls_per_step']:>11.0f}"
            )
    print(f"written to {write('overhead', results, arguments)}")
    print(*exceeded(results), sep="\n")
    return int(arguments.check and bool(exceeded(results)))


if __name__ == "__main__":
    sys.exit(main())

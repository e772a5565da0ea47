"""How long training stands still for a checkpoint.

A causal language model of about 130 MB is trained with AdamW, so that a checkpoint is about 400 MB; all saves
replace the one before (save_total_limit=1). Some seconds are between two saves, in which a virtual machine
may take freed memory back, as it always does in a long run. Each measurement is a fresh process; the engines
take turns.

    stands still    what a save has training wait for: from the end of the step to the beginning of the next
                    one's forward pass, beyond the median of those that do not save, and in the steps after,
                    before the optimizer changes what is being written or copied
    slower steps    what the steps until the next save took longer than the median before the first, for each
                    save: the price of writing while training goes on
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import run_fresh, spread, write

ENGINES = ("native", "hfbridge", "asynchronous")
LIMITS = {"hfbridge": 1.0, "asynchronous": 0.2}  # as a share of native's
SAVES, WARM_UP, BETWEEN, ROWS, LENGTH = 6, 1, 30, 2, 16


def make_model() -> Any:
    """Build a model of 33 million parameters, random."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=8_000,
        hidden_size=512,
        intermediate_size=1_376,
        num_hidden_layers=8,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def make_clock() -> Any:
    """Make a TrainerCallback that notes when forward passes begin and steps end."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.began: list[float] = []
            self.ended: list[float] = []
            self.waited: list[float] = []  # in the steps

        def on_train_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
            model.register_forward_pre_hook(self.begin)

        def begin(self, *args: Any) -> None:
            self.began.append(time.perf_counter())
            self.waited.append(0.0)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if not self.ended:  # before the first step a model may be tried out
                del self.began[:-1], self.waited[:-1]
            self.ended.append(time.perf_counter())

    return Clock()


def settings_of(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": BETWEEN,
        "save_total_limit": 1,
        "per_device_train_batch_size": ROWS,
        "max_steps": BETWEEN * (SAVES + 1) - 1,
        "logging_strategy": "no",
        "remove_unused_columns": False,
    }


def time_waits(clock: Any) -> None:
    """Have the clock know how long optimizer steps wait for copies."""
    from hfbridge.checkpoints.writer import CheckpointWriter

    before_step = CheckpointWriter.before_step

    def timed(self: CheckpointWriter) -> None:
        began = time.perf_counter()
        before_step(self)
        if clock.waited:  # not yet before the first step
            clock.waited[-1] += time.perf_counter() - began

    CheckpointWriter.before_step = timed  # type: ignore[method-assign]


def train(engine: str, folder: str) -> Any:
    """Train; returns the clock."""
    import torch

    clock = make_clock()
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": ids, "labels": ids}
        for ids in torch.randint(0, 8_000, (ROWS * BETWEEN * (SAVES + 1), LENGTH), generator=generator)
    ]
    if engine == "native":
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(**settings_of(folder), disable_tqdm=True)
        Trainer(make_model(), arguments, train_dataset=rows, callbacks=[clock]).train()
        return clock
    import hfbridge

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = hfbridge.Trainer(
        settings_of(folder),
        asynchronous_saving=engine == "asynchronous",
        callbacks=[clock],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    time_waits(clock)
    trainer.fit(hfbridge.HFModule(make_model()), hfbridge.HFDataModule(train_dataset=rows))
    return clock


def measure_one(engine: str) -> dict[str, Any]:
    """Measure one engine in this process: seconds for each save but those of the warm-up."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        clock = train(engine, folder)
        (last,) = Path(folder).glob(f"checkpoint-{BETWEEN * (SAVES + 1) - 1}")
        size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    pauses = [began - ended for ended, began in zip(clock.ended, clock.began[1:], strict=False)]
    steps = [ended - began for began, ended in zip(clock.began, clock.ended, strict=True)]
    saving = [BETWEEN * (i + 1) - 1 for i in range(SAVES)]
    usual_pause = statistics.median(pause for i, pause in enumerate(pauses) if i not in saving)
    usual_step = statistics.median(steps[BETWEEN // 2 : BETWEEN])
    between = [steps[i + 1 : i + 1 + BETWEEN] for i in saving[WARM_UP:-1]]
    return {
        "stands_still_s": [
            pauses[i] - usual_pause + sum(clock.waited[i + 1 : i + BETWEEN]) for i in saving[WARM_UP:]
        ],
        "slower_steps_s": [sum(taken) - len(taken) * usual_step for taken in between],
        "step_s": usual_step,
        "checkpoint_mb": size / 1e6,
    }


def measure_all(repeats: int) -> dict[str, Any]:
    """Let the engines take turns."""
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for repeat in range(repeats):
        for engine in ENGINES:
            found[engine].append(run_fresh(__file__, "--worker", engine))
        print(f"repeat {repeat + 1} of {repeats}", file=sys.stderr)
    result: dict[str, Any] = {}
    for engine, runs in found.items():
        result[engine] = {
            "stands_still_s": spread([second for run in runs for second in run["stands_still_s"]]),
            "slower_steps_s": spread([second for run in runs for second in run["slower_steps_s"]]),
            "step_s": spread([run["step_s"] for run in runs]),
            "checkpoint_mb": runs[0]["checkpoint_mb"],
        }
    native = result["native"]["stands_still_s"]["median"]
    for row in result.values():
        row["of_native"] = row["stands_still_s"]["median"] / native
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/checkpoint.json")
    parser.add_argument("--check", action="store_true", help="exit 1 if a save is above its limit")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure_one(arguments.worker)))
        return 0
    results = measure_all(arguments.repeats)
    for engine, row in results.items():
        print(
            f"{engine:14} stands still {row['stands_still_s']['median']:.3f} s, "
            f"{row['of_native']:.3f} of native; "
            f"slower steps {row['slower_steps_s']['median']:.3f} s; {row['checkpoint_mb']:.0f} MB"
        )
    print(f"written to {write('checkpoint', results, arguments)}")
    return int(arguments.check and any(results[name]["of_native"] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())

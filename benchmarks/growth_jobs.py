"""What growth.py measures, one engine in one process: a job for each axis, resuming, and a cached start.

Each job is trained with a few steps before anything is measured, so that all imports are done. The clocks are
read at the end of two steps, by a TrainerCallback that both engines have. CPU time includes the thread that
looks at the memory a hundred times a second.

    accumulation          one linear layer, micro-batches of 4 rows
    callbacks             the same, accumulation 4; TrainerCallbacks that do nothing at three events of a step
    lightning_callbacks   the same; natively TrainerCallbacks, here Lightning's, that do nothing at both ends
    loggers               the same, a row every 5 steps; TensorBoard, by each library's own class for it
    length                a tiny DistilBERT, rows of so many tokens
    rows                  the same, rows of 4 tokens in an Arrow file, in random order
"""

import argparse
import gc
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rows_memory import VOCABULARY, anonymous_bytes, peak

BATCH, WARM_UP, WORK, LEAST_STEPS = 4, 20, 600, 12
ROWS_OF_TOKENS, ROW_LENGTH = 8, 4
CALLBACKS_ACCUMULATION, LOGGING = 4, 5
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
Begin = Callable[..., Any]


def make_clock(first: int, last: int, *, stops: bool = False) -> Any:
    """Make a TrainerCallback that reads the clocks at the end of two steps, and may stop after the second."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.readings: list[tuple[float, float]] = []
            self.first_end = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.first_end = self.first_end or time.time()
            if state.global_step in (first, last):
                self.readings.append((time.process_time(), time.perf_counter()))
            control.should_training_stop |= stops

    return Clock()


def make_token_model() -> Any:
    """Build a tiny DistilBERT."""
    import torch
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 1024}
    return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=VOCABULARY, **sizes))


def make_callbacks(engine: str, axis: str, count: int) -> list[Any]:
    """Make callbacks that do nothing."""
    if axis == "lightning_callbacks" and engine == "hfbridge":
        import lightning.pytorch as pl

        class Ends(pl.Callback):
            def on_train_batch_start(self, *hook: Any) -> None:
                pass

            def on_train_batch_end(self, *hook: Any) -> None:
                pass

        return [Ends() for _ in range(count)]
    from transformers import TrainerCallback

    def nothing(*event: Any, **kwargs: Any) -> None:
        pass

    names = ("on_step_begin", "on_step_end", "on_substep_end")[: 3 if axis == "callbacks" else 2]
    return [type("Nothing", (TrainerCallback,), dict.fromkeys(names, nothing))() for _ in range(count)]


def make_loggers(engine: str, count: int, folder: Path) -> list[Any]:
    """Make loggers that write files of TensorBoard: native callbacks, or Lightning's loggers."""
    folders = [str(folder / f"log-{number}") for number in range(count)]
    if engine == "hfbridge":
        from lightning.pytorch.loggers import TensorBoardLogger

        return [TensorBoardLogger(name) for name in folders]
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(name)) for name in folders]


def train(engine: str, model: Any, rows: Any, settings: dict[str, Any], **parts: Any) -> Begin:
    """Prepare a run of an engine.

    Args:
        engine: "native" or "hfbridge".
        model: to train.
        rows: to train on.
        settings: of the run.
        parts: `callbacks`, `loggers`, `collate`, `mapped` (a function for `datasets.map`).

    Returns:
        What begins it; it takes the checkpoint to go on from.
    """
    callbacks, loggers = parts.get("callbacks", []), parts.get("loggers", [])
    given = {"use_cpu": True, "save_strategy": "no", "report_to": "none", **settings}
    if engine == "hfbridge":
        import hfbridge

        trainer = hfbridge.Trainer(given, callbacks=callbacks, **{**QUIET, "logger": loggers or False})
        module = hfbridge.HFModule(model, loss_normalization="native")
        data = hfbridge.HFDataModule(
            rows, data_collator=parts.get("collate"), map_function=parts.get("mapped")
        )
        return lambda checkpoint=None: trainer.fit(module, data, ckpt_path=checkpoint)
    import transformers
    from transformers.trainer_callback import PrinterCallback

    if parts.get("mapped") is not None:
        rows = rows.map(parts["mapped"], batched=True)
    arguments = transformers.TrainingArguments(**given, disable_tqdm=True)
    native = transformers.Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=parts.get("collate"),
        callbacks=[*callbacks, *loggers],
    )
    native.remove_callback(PrinterCallback)
    return lambda checkpoint=None: native.train(resume_from_checkpoint=checkpoint)


def stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate rows of numbers."""
    import torch

    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def job_of(
    axis: str, engine: str, size: int, folder: Path, steps: int
) -> tuple[Any, Any, dict[str, Any], Any]:
    """Make model, rows, settings and parts of a job."""
    import datasets
    import torch
    from overhead import make_model

    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "logging_strategy": "no",
        "max_steps": steps,
    }
    settings["per_device_train_batch_size"] = BATCH
    if axis == "rows":
        settings["per_device_train_batch_size"] = ROWS_OF_TOKENS
        rows = datasets.Dataset.from_file(str(folder / f"{size}.arrow"))
        return make_token_model(), rows, settings, {}
    settings["remove_unused_columns"] = False
    if axis == "length":
        ids = torch.randint(3, VOCABULARY, (64, size), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [{"input_ids": ids[n % 64], "labels": n % 2} for n in range(BATCH * steps)]
        return make_token_model(), rows, settings, {"collate": stack}
    accumulation = size if axis == "accumulation" else CALLBACKS_ACCUMULATION
    settings["gradient_accumulation_steps"] = accumulation
    parts: dict[str, Any] = {"collate": stack}
    if axis.endswith("callbacks"):
        parts["callbacks"] = make_callbacks(engine, axis, size)
    elif axis == "loggers":
        settings |= {"logging_strategy": "steps", "logging_steps": LOGGING}
        parts["loggers"] = make_loggers(engine, size, folder / engine)
    rows = [{"values": [n % 7 / 7] * 8, "labels": n % 2} for n in range(BATCH * accumulation * steps)]
    return make_model(), rows, settings, parts


def measure(axis: str, engine: str, sizes: list[int], folder: Path, *, scale: float) -> dict[str, Any]:
    """Train with each size, the smallest first; microseconds of a step, and the most memory so far.

    Args:
        axis: what grows.
        engine: which one.
        sizes: to try.
        folder: for files; has those of rows.
        scale: of the number of steps.
    """

    def run(size: int, first: int, last: int) -> Any:
        clock = make_clock(first, last)
        model, rows, settings, parts = job_of(axis, engine, size, folder, last + 1)
        parts["callbacks"] = [clock, *parts.get("callbacks", [])]
        train(engine, model, rows, settings, **parts)()
        return clock

    run(min(sizes) if axis == "rows" else max(sizes), 1, 2)
    gc.collect()
    before = anonymous_bytes()
    found = {}
    for size in sorted(sizes):
        work = {"accumulation": size, "length": max(size // 32, 1)}.get(axis, 1)
        steps = max(int(WORK * scale) // work, LEAST_STEPS)
        first = max(WARM_UP // work, 3)
        with peak() as highest:
            clock = run(size, first, first + steps)
        (cpu_start, wall_start), (cpu_end, wall_end) = clock.readings
        found[size] = {
            "cpu_us": (cpu_end - cpu_start) / steps * 1e6,
            "wall_us": (wall_end - wall_start) / steps * 1e6,
            "memory_bytes": highest[0] - before,
        }
        gc.collect()
    return found


def epoch_of(rows: int) -> dict[str, Any]:
    """Settings of a run over one pass."""
    return {
        "per_device_train_batch_size": ROWS_OF_TOKENS,
        "num_train_epochs": 1,
        "logging_strategy": "no",
    }


def write_middles(rows: int, folder: Path) -> None:
    """Write a checkpoint of the middle of a pass for each engine, without training half of it.

    The native Trainer's is one of its first step, which is then said to be of the middle: the number of the
    step is all that it keeps of the place. hfbridge takes a step from there and writes its own.
    """
    steps = rows // ROWS_OF_TOKENS
    saving = {**epoch_of(rows), "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    for engine in ("native", "hfbridge"):
        out = folder / f"{engine}-{rows}"
        begin = train(
            engine,
            make_token_model(),
            open_rows(rows, folder),
            {**saving, "output_dir": str(out)},
            callbacks=[make_clock(0, 0, stops=True)],
        )
        if engine == "hfbridge":
            begin(str(folder / f"native-{rows}" / f"checkpoint-{steps // 2}"))
            continue
        begin()
        state_file = out / "checkpoint-1" / "trainer_state.json"
        state = json.loads(state_file.read_text())
        state |= {"global_step": steps // 2, "epoch": (steps // 2) / steps}
        state_file.write_text(json.dumps(state))
        (out / "checkpoint-1").rename(out / f"checkpoint-{steps // 2}")


def open_rows(rows: int, folder: Path) -> Any:
    """Open an Arrow file."""
    import datasets

    return datasets.Dataset.from_file(str(folder / f"{rows}.arrow"))


def resume(engine: str, sizes: list[int], folder: Path) -> dict[str, Any]:
    """Measure seconds from `fit` or `train` to the end of the first step, from scratch and in mid-pass."""

    def seconds(rows: int, checkpoint: str | None) -> float:
        clock = make_clock(0, 0, stops=True)
        settings = {**epoch_of(rows), "output_dir": str(folder / "none")}
        parts = {"callbacks": [clock]}
        begin = train(engine, make_token_model(), open_rows(rows, folder), settings, **parts)
        start = time.time()
        begin(checkpoint)
        gc.collect()
        return float(clock.first_end - start)

    def middle(rows: int) -> str:
        half = rows // ROWS_OF_TOKENS // 2 + (engine == "hfbridge")
        return str(folder / f"{engine}-{rows}" / f"checkpoint-{half}")

    smallest = min(sizes)
    seconds(smallest, None)
    seconds(smallest, middle(smallest))
    return {
        rows: {"scratch_s": seconds(rows, None), "resume_s": seconds(rows, middle(rows))} for rows in sizes
    }


def halve(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Cut rows, for `datasets.map`."""
    names = ("input_ids", "attention_mask")
    return {name: [values[: ROW_LENGTH // 2] for values in rows[name]] for name in names}


def start(engine: str, rows: int, folder: Path, since_s: float) -> dict[str, float]:
    """Measure seconds to the end of the first step of a job whose map is cached, from three moments."""
    import datasets

    if engine == "hfbridge":
        from hfbridge import HFDataModule, HFModule, Trainer

        assert all((HFDataModule, HFModule, Trainer))
    else:
        from transformers import Trainer, TrainingArguments

        assert all((Trainer, TrainingArguments))
    model = make_token_model()
    datasets.disable_progress_bars()
    clock = make_clock(0, 0, stops=True)
    imported = time.time()
    settings = {**epoch_of(rows), "output_dir": str(folder / "none")}
    given = open_rows(rows, folder)
    begin = train(engine, model, given, settings, callbacks=[clock], mapped=halve)
    called = time.time()
    begin()
    return {
        "from_process_s": clock.first_end - since_s,
        "from_imports_s": clock.first_end - imported,
        "from_call_s": clock.first_end - called,
    }


def run_job(job: str, engine: str, sizes: list[int], given: argparse.Namespace) -> Any:
    """Do one job; returns what was measured for each size."""
    if job == "middles":
        for rows in sizes:
            write_middles(rows, given.folder)
        return {}
    if job == "resume":
        return resume(engine, sizes, given.folder)
    if job == "start":
        return {sizes[0]: start(engine, sizes[0], given.folder, given.since)}
    return measure(job, engine, sizes, given.folder, scale=given.scale)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("native", "hfbridge"), default="native")
    parser.add_argument("--jobs", type=json.loads, required=True, help="sizes by the names of jobs, as JSON")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--since", type=float, default=0.0)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = {job: run_job(job, given.engine, sizes, given) for job, sizes in given.jobs.items()}
    shutil.rmtree(given.folder / "out", ignore_errors=True)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

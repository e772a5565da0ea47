"""Sets of many rows, memory-mapped: what they cost in memory and time, hfbridge and the native Trainer.

Rows of 32 tokens and a label, in one Arrow file, opened by `datasets.Dataset.from_file`. A tiny classifier is
trained for some steps in shuffled order. Measured in a fresh process each time, in which the engine has
trained on a few rows before, so that all it imports is there:

    memory        anonymous memory at its peak, beyond what there was before the engine was made; pages of the
                  file, which the system may drop, do not count
    first step    seconds from before the engine is made to the end of the first step
    step          median of the later ones
"""

import argparse
import gc
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import run_fresh, spread, write

ENGINES = ("native", "hfbridge")
LENGTH, BATCH, STEPS, VOCABULARY = 32, 8, 40, 1_000
_WRITTEN = 10_000


def write_rows(path: Path, rows: int, *, length: int = LENGTH) -> None:
    """Write random rows of some tokens and a label, some thousand at a time."""
    import numpy as np
    import pyarrow as pa

    draw = np.random.default_rng(3)
    schema = pa.schema(
        {"input_ids": pa.list_(pa.int32()), "attention_mask": pa.list_(pa.int8()), "label": pa.int64()}
    )
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for start in range(0, rows, _WRITTEN):
            count = min(_WRITTEN, rows - start)
            offsets = np.arange(0, (count + 1) * length, length, dtype=np.int32)
            ids = pa.array(draw.integers(3, VOCABULARY, count * length, dtype=np.int32))
            mask = pa.array(np.ones(count * length, dtype=np.int8))
            columns = [pa.ListArray.from_arrays(offsets, values) for values in (ids, mask)]
            stream.write_batch(
                pa.record_batch([*columns, pa.array(draw.integers(0, 2, count))], schema=schema)
            )


def anonymous_bytes() -> int:
    """Resident memory of this process that belongs to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@contextmanager
def peak() -> Iterator[list[int]]:
    """Watch the anonymous memory, a hundred times a second, and tell its peak in the list's first place."""
    found, ends = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not ends.wait(0.01):
            found[0] = max(found[0], anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ends.set()
        thread.join()
        found[0] = max(found[0], anonymous_bytes())


def train(engine: str, path: Path) -> dict[str, Any]:
    """Train on the rows of a file."""
    import datasets
    import torch
    import transformers
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, TrainerCallback

    import hfbridge

    torch.set_num_threads(1)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    settings = {
        "output_dir": str(path.parent / "out"),
        "use_cpu": True,
        "per_device_train_batch_size": BATCH,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }

    def run(rows: datasets.Dataset, steps: int) -> None:
        model = DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
        )
        given = {**settings, "max_steps": steps}
        if engine == "native":
            arguments = transformers.TrainingArguments(**given)
            transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
        else:
            ours = hfbridge.Trainer(given, callbacks=[Clock()], logger=False, enable_model_summary=False)
            ours.fit(hfbridge.HFModule(model), hfbridge.HFDataModule(rows))

    rows = datasets.Dataset.from_file(str(path))
    run(rows.select(range(2 * BATCH)), 2)
    ends.clear()
    gc.collect()
    before = anonymous_bytes()
    with peak() as highest:
        start = time.perf_counter()
        run(rows, STEPS)
    steps = [end - begin for begin, end in pairwise(ends)]
    return {
        "memory_bytes": highest[0] - before,
        "first_step_s": ends[0] - start,
        "step_s": statistics.median(steps),
    }


def measure_all(sizes: list[int], repeats: int, folder: Path) -> dict[str, Any]:
    """Measure each number of rows, the engines by turns."""
    results: dict[str, Any] = {"tokens_per_row": LENGTH, "batch_size": BATCH, "steps": STEPS}
    for rows in sizes:
        path = folder / f"{rows}.arrow"
        write_rows(path, rows)  # and the file is in the system's memory
        found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
        for _ in range(repeats):
            for engine in ENGINES:
                found[engine].append(run_fresh(__file__, "--engine", engine, "--file", path))
                print(f"{rows} rows, {engine}: {found[engine][-1]}", file=sys.stderr)
        results[f"rows_{rows}"] = {
            "file_bytes": path.stat().st_size,
            **{
                engine: {name: spread([run[name] for run in runs]) for name in runs[0]}
                for engine, runs in found.items()
            },
        }
        path.unlink()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/rows_memory.json")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        import json

        print(json.dumps(train(given.engine, given.file)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        results = measure_all(given.rows, given.repeats, Path(name))
    print(f"written to {write('rows_memory', results, given)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

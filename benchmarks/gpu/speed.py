"""Part three: speed and memory, by turns in fresh processes, warm-up left out.

    classifier        22 million parameters, micro-batches of 32 ragged samples, four a step, fp32
    language model    half a billion parameters, bf16 autocast, eight samples of 2,048 tokens a step

Engines are a hand-written loop, the HF Trainer and hfbridge; then what either can set beside. Options that
need ragged samples train the language model on samples of 128 to 2,048 tokens; their `tokens_per_second`
counts real tokens only.
"""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from jobs import (
    Collator,
    fit_hfbridge,
    fit_native,
    make_callback,
    make_model,
    make_rows,
    make_settings,
    make_task,
    wait_for_device,
)
from plan import Measurement

ENGINES = ("loop", "native", "hfbridge")
# Dense bf16 matrix products per second, of the data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
Option = tuple[str, str, dict[str, Any]]


def _options() -> list[Option]:
    """Tasks, names, and arguments of what is set beside; `settings` goes to both engines."""
    found: list[Option] = [
        ("classifier", "regroup", {"data": {"regroup": True}, "module": {"loss_normalization": "exact"}}),
        ("ragged language model", "padded", {"settings": {}}),
        ("ragged language model", "packing", {"data": {"packing": 2048, "data_collator": None}}),
        ("language model", "chunked_loss", {"module": {"chunked_loss": True}}),
        ("language model", "gradient_checkpointing", {"settings": {"gradient_checkpointing": True}}),
        ("language model", "torch_compile", {"settings": {"torch_compile": True}}),
    ]
    if importlib.util.find_spec("liger_kernel"):
        found.append(("language model", "liger", {"settings": {"use_liger_kernel": True}}))
    return found


def measurements(*, tiny: bool) -> Iterator[Measurement]:
    repeats = 1 if tiny else 3
    for repeat in range(repeats):
        for task in ("classifier", "language model"):
            for engine in ENGINES:
                given = {"engine": engine, "task_name": task, "tiny": tiny}
                yield Measurement(f"{task}, {engine}, {repeat + 1}", train, given)
    for task, name, arguments in _options():
        if tiny and name == "torch_compile":
            continue  # compiling takes a CPU minutes
        for engine in ("native", "hfbridge") if "settings" in arguments else ("hfbridge",):
            given = {"engine": engine, "task_name": task, "tiny": tiny, **arguments}
            yield Measurement(f"{task}, {engine}, {name}", train, given)


class Meter:
    """Measures the steps after warm-up: seconds, real tokens, memory."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.first, self.last = warm_up, warm_up + steps
        self.ends: list[float] = []
        self.peak_bytes = 0

    def end_step(self, step: int) -> None:
        import torch

        if step in (self.first, self.last) and torch.cuda.is_available():
            wait_for_device()
            if step == self.first:
                torch.cuda.reset_peak_memory_stats()
            self.peak_bytes = torch.cuda.max_memory_allocated()
        if step >= self.first:
            self.ends.append(time.perf_counter())

    def make_callback(self) -> Any:
        return make_callback(on_step_end=lambda state: self.end_step(state.global_step))


def train(
    *,
    engine: str,
    task_name: str,
    tiny: bool,
    settings: dict[str, Any] | None = None,
    module: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train with an engine, and measure its steps after warm-up.

    Args:
        engine: "loop", "native" or "hfbridge".
        task_name: of jobs.py.
        tiny: for a CPU.
        settings: further fields of TrainingArguments.
        module: further arguments of `HFModule`.
        data: further arguments of `HFDataModule`.
    """
    import torch

    from hfbridge.data.packing import Packed

    warm_up, steps = (1, 2) if tiny else (8, 32) if task_name == "classifier" else (5, 15)
    task, meter = make_task(task_name, tiny=tiny), Meter(warm_up, steps)
    packing = (data or {}).get("packing")
    if packing and tiny:
        packing = 64
        data = {**(data or {}), "packing": packing}
    samples = task.micro_batch * task.accumulation
    # A pack holds several samples: of 128 to 2,048 tokens fewer than three.
    rows = make_rows(task, (warm_up + steps + 1) * samples * (3 if packing else 1), tiny=tiny)
    with tempfile.TemporaryDirectory() as folder:
        given = make_settings(
            folder,
            tiny=tiny,
            max_steps=warm_up + steps,
            per_device_train_batch_size=task.micro_batch,
            gradient_accumulation_steps=task.accumulation,
            bf16=task.bf16,
            **(settings or {}),
        )
        with torch.device("cpu" if tiny else "cuda"):
            model = make_model(task_name, tiny=tiny)
        if engine == "loop":
            _fit_by_hand(model, given, rows, meter.end_step, tiny=tiny)
        elif engine == "native":
            fit_native(model, given, rows, [meter.make_callback()])
        else:
            fit_hfbridge(model, given, rows, [meter.make_callback()], module=module, data=data)
    tokens = sum(map(len, rows["input_ids"])) / (len(Packed(rows, packing)) if packing else len(rows))
    return _summarize(meter, task_name, model, samples=samples * steps, tokens=tokens * samples * steps)


def _summarize(meter: Meter, task: str, model: Any, *, samples: int, tokens: float) -> dict[str, Any]:
    """Say how fast the measured steps were.

    Args:
        meter: has measured them.
        task: its name.
        model: for its weights.
        samples: of all measured steps; packs, where samples are packed.
        tokens: of them, without padding.
    """
    import torch

    steps = meter.last - meter.first
    seconds = meter.ends[-1] - meter.ends[0]
    between = [later - one for one, later in zip(meter.ends, meter.ends[1:], strict=False)]
    found: dict[str, Any] = {
        "seconds_per_step": seconds / steps,
        "median_s_between_ends_of_steps": statistics.median(between),
        "samples_per_second": samples / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_bytes": meter.peak_bytes,
    }
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    if task == "language model" and peak is not None:
        found["mfu"] = _flops_per_token(model) * found["tokens_per_second"] / peak
    return found


def _flops_per_token(model: Any) -> float:
    """Count forward and backward of a token: six for each weight in a product, and causal attention."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    return 6.0 * weights + 6.0 * config.num_hidden_layers * config.hidden_size * 2048


def _fit_by_hand(
    model: Any, settings: dict[str, Any], rows: Any, end_step: Callable[[int], None], *, tiny: bool
) -> None:
    """Train as a loop does that does nothing but train: AdamW, a linear schedule, clipping."""
    import torch
    from torch.utils.data import DataLoader

    device = torch.device("cpu" if tiny else "cuda")
    accumulation, steps = settings["gradient_accumulation_steps"], settings["max_steps"]
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["learning_rate"], weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    batches = iter(
        DataLoader(
            rows,
            batch_size=settings["per_device_train_batch_size"],
            shuffle=True,
            collate_fn=Collator(),
            pin_memory=not tiny,
        )
    )
    for step in range(1, steps + 1):
        for _ in range(accumulation):
            batch = {name: value.to(device, non_blocking=True) for name, value in next(batches).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=settings["bf16"]):
                loss = model(**batch).loss / accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()
        end_step(step)


def summarize(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Give medians of the repeats of each engine, as a share of the HF Trainer's, and the overhead of a step.

    Args:
        found: results by the names of `measurements`; those with an error are left out.
    """
    summary: dict[str, Any] = {}
    for task in ("classifier", "language model"):
        rows: dict[str, dict[str, float]] = {}
        for engine in ENGINES:
            repeats = [r for n, r in found.items() if n.startswith(f"{task}, {engine}, ") and n[-1].isdigit()]
            repeats = [r for r in repeats if "error" not in r]
            names = dict.fromkeys(name for r in repeats for name in r)
            if repeats:
                rows[engine] = {
                    name: statistics.median(r[name] for r in repeats if name in r) for name in names
                }
        for row in rows.values():
            if "native" in rows:
                row["of_native"] = row["samples_per_second"] / rows["native"]["samples_per_second"]
            if "loop" in rows:
                apart = row["seconds_per_step"] - rows["loop"]["seconds_per_step"]
                row["overhead_us_per_step"] = apart * 1e6
        summary[task] = rows
    return summary

"""Part four: what the host waits for: values of the device in a step, checkpoints, batches."""

import collections
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from jobs import (
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

# Calls of CUDA that wait for the device, and the operator behind `.item()`, which a CPU has, too.
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::_local_scalar_dense",
)
WARM_UP, PROFILED = 3, 5
SAVES = 3


def measurements(*, tiny: bool) -> Iterator[Measurement]:
    for engine in ("native", "hfbridge"):
        yield Measurement(f"waits, {engine}", count_waits, {"engine": engine, "tiny": tiny})
    for engine in ("native", "hfbridge", "asynchronous"):
        yield Measurement(f"saving, {engine}", time_saving, {"engine": engine, "tiny": tiny})
    for engine in ("native", "hfbridge"):
        for workers in (0,) if tiny else (0, 4):
            for pins in (False,) if tiny else (False, True):
                given = {"engine": engine, "workers": workers, "pins": pins, "tiny": tiny}
                name = f"batches, {engine}, {workers} workers{', pinned' * pins}"
                yield Measurement(name, time_batches, given)


def _train(engine: str, steps: int, callback: Any, *, tiny: bool, **more: Any) -> None:
    """Train the classifier for some steps; `more` are further settings."""
    task = make_task("classifier", tiny=tiny)
    per_step = task.micro_batch * more.get("gradient_accumulation_steps", 1)
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(
            folder, tiny=tiny, max_steps=steps, per_device_train_batch_size=task.micro_batch, **more
        )
        model, rows = make_model(task.name, tiny=tiny), make_rows(task, steps * per_step, tiny=tiny)
        if engine == "native":
            fit_native(model, settings, rows, [callback])
        else:
            trainer = {"asynchronous_saving": True} if engine == "asynchronous" else {}
            fit_hfbridge(model, settings, rows, [callback], trainer=trainer)


def count_waits(*, engine: str, tiny: bool) -> dict[str, Any]:
    """Count, for each optimizer step, how often the host waits; nothing is logged in these steps."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available() and not tiny:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=activities)

    def end_step(state: Any) -> None:
        if state.global_step == WARM_UP:
            profile.start()
        elif state.global_step == WARM_UP + PROFILED:
            profile.stop()

    accumulation = make_task("classifier", tiny=tiny).accumulation
    steps, callback = WARM_UP + PROFILED + 1, make_callback(on_step_end=end_step)
    _train(engine, steps, callback, tiny=tiny, gradient_accumulation_steps=accumulation)
    counted = collections.Counter(event.name for event in profile.events())
    copies = sum(n for name, n in counted.items() if "Memcpy DtoH" in name)
    return {
        "per_step": {name: counted[name] / PROFILED for name in WAITS}
        | {"copies to the host": copies / PROFILED}
    }


def time_saving(*, engine: str, tiny: bool) -> dict[str, Any]:
    """Measure how much longer the way from one step to the next is where a checkpoint is written."""
    every = 2 if tiny else 10
    ends: dict[int, float] = {}
    gaps: dict[int, float] = {}

    def end_step(state: Any) -> None:
        wait_for_device()
        ends[state.global_step] = time.perf_counter()

    def begin_step(state: Any) -> None:
        if state.global_step in ends:
            gaps[state.global_step] = time.perf_counter() - ends[state.global_step]

    callback = make_callback(on_step_end=end_step, on_step_begin=begin_step)
    saving = {"save_strategy": "steps", "save_steps": every, "save_total_limit": 1}
    _train(engine, every * SAVES + 2, callback, tiny=tiny, **saving)
    plain = statistics.median(gap for step, gap in gaps.items() if step % every)
    saved = [gap - plain for step, gap in gaps.items() if step % every == 0]
    return {"seconds_of_a_save": statistics.median(saved), "values": saved}


def time_batches(*, engine: str, workers: int, pins: bool, tiny: bool) -> dict[str, Any]:
    """Measure samples per second by how batches are made and moved."""
    times: list[float] = []

    def end_step(state: Any) -> None:
        if state.global_step in (warm_up, warm_up + steps):
            wait_for_device()
            times.append(time.perf_counter())

    warm_up, steps = (1, 2) if tiny else (10, 60)
    loading = {"dataloader_num_workers": workers, "dataloader_pin_memory": pins}
    _train(engine, warm_up + steps, make_callback(on_step_end=end_step), tiny=tiny, **loading)
    micro_batch = make_task("classifier", tiny=tiny).micro_batch
    return {"samples_per_second": steps * micro_batch / (times[1] - times[0])}

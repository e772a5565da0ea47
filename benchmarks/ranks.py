"""One engine on several ranks: what memory.py, scaling.py and growth.py measure; each rank notes it.

A causal language model is read from a folder and trained on rows of random tokens. torchrun starts a fresh
process for each rank, one thread each.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

SIZES = {
    # vocabulary, hidden, intermediate, layers, heads: 110 and 5 million parameters, and 75 thousand
    "large": (1_000, 512, 1_536, 32, 8),
    "small": (16_000, 128, 512, 4, 4),
    "tiny": (1_000, 32, 64, 1, 2),
}
WARM_UP = 3
LOOK_EVERY_S = 0.005
BOUNDED = 1_000_000
"""Elements in DeepSpeed's buckets, and of stage 3's weights that are gathered at a time.

DeepSpeed's defaults, 5e8 and 1e9, are more than the model has: every rank would hold all of it.
"""
LATE_IMPORTS = ("deepspeed", "mlflow")
"""What accelerate and transformers import when a Trainer is made, if it is there: fifty
megabytes, which are no engine's."""
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Has glibc return what a tensor took as soon as it is freed; else a process keeps it, and it counts."""


def make_model_folder(size: str, folder: Path) -> int:
    """Write a model with random weights; returns its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    vocabulary, hidden, intermediate, layers, heads = SIZES[size]
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(folder)
    return int(model.num_parameters())


def make_in_a_process(size: str, folder: Path) -> None:
    """Write a model with random weights; this process needs no torch for it."""
    command = [sys.executable, __file__, "--make", size, "--folder", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def run(
    size: str,
    engine: str,
    strategy: str,
    ranks: int,
    *,
    steps: int,
    rows: int,
    length: int,
    environment: Mapping[str, str] | None = None,
    model: Path | None = None,
) -> list[Any]:
    """Train in fresh processes; returns what each rank has noted.

    Args:
        size: one of `SIZES`.
        engine: "native" or "hfbridge".
        strategy: a name.
        ranks: how many.
        steps: optimizer steps.
        rows: of a rank in a step.
        length: tokens in a row.
        environment: further variables.
        model: a folder that `make_in_a_process` has written for this size; `None` has it write one.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model is None:
            make_in_a_process(size, folder / "model")
        else:
            (folder / "model").symlink_to(model)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [__file__, "--engine", engine, "--strategy", strategy, "--folder", str(folder)]
        command += ["--steps", str(steps), "--rows", str(rows), "--length", str(length)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "TRANSFORMERS_VERBOSITY": "error",
                "HF_HUB_OFFLINE": "1",
                **(environment or {}),
            },
        )
        if done.returncode:
            raise SystemExit(f"{engine} {strategy} on {ranks} ranks failed:\n{done.stderr[-4000:]}")
        return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def memory_bytes(line: str) -> int:
    """Read a line of what the kernel knows of this process.

    Args:
        line: "VmHWM", the most that it has had in memory since `forget_peak`; "RssAnon" and "RssFile", what
            it has there that is its own, and pages of files, which all processes share.
    """
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


class Watch:
    """Looks again and again how much memory of its own this process has.

    Attributes:
        most_bytes: the most that was seen.
    """

    def __init__(self) -> None:
        self.most_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            self.most_bytes = max(self.most_bytes, memory_bytes("RssAnon"))


def make_probe(watch: Watch) -> Any:
    """Make a TrainerCallback that notes seconds and memory of the steps after the warm-up."""
    from transformers import TrainerCallback

    class Probe(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []
            self.peak_bytes = 0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            watch.end()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARM_UP:
                forget_peak()
            if state.global_step >= WARM_UP:
                self.times.append((time.perf_counter(), time.process_time()))
                self.peak_bytes = max(self.peak_bytes, memory_bytes("VmHWM") - memory_bytes("RssFile"))

    return Probe()


def deepspeed_config(strategy: str) -> dict[str, Any]:
    """What both engines are given for a stage."""
    stage = int(strategy[-1])
    zero = {"stage": stage, "reduce_bucket_size": BOUNDED, "allgather_bucket_size": BOUNDED}
    if stage == 3:
        names = ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
        zero |= {f"stage3_{name}": BOUNDED for name in names} | {"sub_group_size": BOUNDED}
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def train(engine: str, strategy: str, folder: Path, *, steps: int, rows: int, length: int) -> dict[str, Any]:
    """Train on this rank."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

    import hfbridge.datamodule
    import hfbridge.module
    import hfbridge.trainer  # all three here, so that what their imports take is there before

    torch.set_num_threads(1)
    for name in LATE_IMPORTS:
        if find_spec(name) is not None:
            import_module(name)
    world = int(os.environ["WORLD_SIZE"])
    generator = torch.Generator().manual_seed(0)
    vocabulary = AutoConfig.from_pretrained(folder / "model").vocab_size
    tokens = torch.randint(0, vocabulary, (rows * world * steps, length), generator=generator)
    data = [{"input_ids": ids, "labels": ids} for ids in tokens]
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "save_strategy": "no",
        "per_device_train_batch_size": rows,
        "max_steps": steps,
        "logging_strategy": "no",
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    before = memory_bytes("RssAnon")
    watch = Watch()
    probe = make_probe(watch)
    if engine == "native":
        if strategy.startswith("deepspeed"):
            import_module("deepspeed").init_distributed(dist_backend="gloo")
            settings["deepspeed"] = deepspeed_config(strategy)
        arguments = TrainingArguments(**settings)
        set_seed(arguments.seed)
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        Trainer(model, arguments, train_dataset=data, callbacks=[probe]).train()
    else:
        if strategy.startswith("deepspeed"):
            settings["deepspeed"] = deepspeed_config(strategy)
        trainer = hfbridge.Trainer(
            settings, strategy=strategy, callbacks=[probe], logger=False, enable_model_summary=False
        )
        module = hfbridge.HFModule(folder / "model", "AutoModelForCausalLM", loss_normalization="native")
        trainer.fit(module, hfbridge.HFDataModule(train_dataset=data))
    wall_s, cpu_s = (
        statistics.median(later - earlier for earlier, later in pairwise(readings))
        for readings in zip(*probe.times, strict=True)
    )
    return {
        "building_bytes": watch.most_bytes - before,
        "training_bytes": probe.peak_bytes - before,
        "step_s": wall_s,
        "step_cpu_s": cpu_s,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--make", choices=SIZES)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--engine", choices=("native", "hfbridge"))
    parser.add_argument("--strategy")
    for number in ("steps", "rows", "length"):
        parser.add_argument(f"--{number}", type=int)
    given = parser.parse_args()
    if given.make:
        make_model_folder(given.make, given.folder)
        return 0
    sizes = {"steps": given.steps, "rows": given.rows, "length": given.length}
    found = train(given.engine, given.strategy, given.folder, **sizes)
    (given.folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))

    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

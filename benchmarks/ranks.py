"""One engine on several ranks: what memory.py and scaling.py measure. Each rank notes what it sees.

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
import time
from pathlib import Path
from typing import Any

VOCABULARY = 16_000
SIZES = {
    # hidden, intermediate, layers, heads: 110 and 5 million parameters
    "large": (768, 2_048, 12, 12),
    "small": (128, 512, 4, 4),
}
WARM_UP = 3


def make_model_folder(size: str, folder: Path) -> int:
    """Write a model with random weights; returns its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    hidden, intermediate, layers, heads = SIZES[size]
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(folder)
    return int(model.num_parameters())


def run(
    size: str, engine: str, strategy: str, ranks: int, *, steps: int, rows: int, length: int
) -> list[Any]:
    """Train in fresh processes; returns what each rank has noted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [sys.executable, __file__, "--make", size, "--folder", str(folder / "model")],
            check=True,
            capture_output=True,
        )
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
            },
        )
        if done.returncode:
            raise SystemExit(f"{engine} {strategy} on {ranks} ranks failed:\n{done.stderr[-4000:]}")
        return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def memory_bytes(line: str) -> int:
    """Read VmRSS, what this process has in memory, or VmHWM, the most since `forget_peak`."""
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def make_probe() -> Any:
    """Make a TrainerCallback that notes seconds and memory of the steps after the warm-up."""
    from transformers import TrainerCallback

    class Probe(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.peak_bytes = self.building_bytes = 0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.building_bytes = memory_bytes("VmHWM")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARM_UP:
                forget_peak()
            if state.global_step >= WARM_UP:
                self.times.append(time.perf_counter())
                self.peak_bytes = max(self.peak_bytes, memory_bytes("VmHWM"))

    return Probe()


def deepspeed_config(strategy: str) -> dict[str, Any]:
    """What the native Trainer is given for a stage."""
    return {
        "zero_optimization": {"stage": int(strategy[-1])},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def train(engine: str, strategy: str, folder: Path, *, steps: int, rows: int, length: int) -> dict[str, Any]:
    """Train on this rank."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

    import hfbridge

    torch.set_num_threads(1)
    probe, world = make_probe(), int(os.environ["WORLD_SIZE"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (rows * world * steps, length), generator=generator)
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
    forget_peak()
    before = memory_bytes("VmRSS")
    if engine == "native":
        if strategy.startswith("deepspeed"):
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo")
            settings["deepspeed"] = deepspeed_config(strategy)
        arguments = TrainingArguments(**settings)
        set_seed(arguments.seed)
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        Trainer(model, arguments, train_dataset=data, callbacks=[probe]).train()
    else:
        trainer = hfbridge.Trainer(
            settings, strategy=strategy, callbacks=[probe], logger=False, enable_model_summary=False
        )
        module = hfbridge.HFModule(folder / "model", "AutoModelForCausalLM", loss_normalization="native")
        trainer.fit(module, hfbridge.HFDataModule(train_dataset=data))
    taken = [later - earlier for earlier, later in zip(probe.times, probe.times[1:], strict=False)]
    return {
        "before_bytes": before,
        "building_bytes": probe.building_bytes - before,
        "training_bytes": probe.peak_bytes - before,
        "step_s": statistics.median(taken),
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

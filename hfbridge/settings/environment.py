"""The environment variables of `accelerate launch`, which the HF Trainer obeys without any setting.

    variable                                        requests              setting or strategy
    ACCELERATE_MIXED_PRECISION=bf16, fp16, fp8      mixed precision       bf16, fp16
    ACCELERATE_USE_FSDP=true                        FSDP                  fsdp, strategy="fsdp2"
    ACCELERATE_USE_DEEPSPEED=true                   DeepSpeed             deepspeed, strategy="deepspeed_..."
    ACCELERATE_DYNAMO_BACKEND=inductor, ...         compiling             torch_compile
    ACCELERATE_USE_CPU=true                         no GPU                use_cpu

Here the settings decide; a variable that requests more than they do is an error.
"""

import os
from collections.abc import Iterator

import torch

from hfbridge.errors import Problem, SettingsError, raise_problems
from hfbridge.settings.settings import Settings

_UNSUPPORTED = (
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_USE_SAGEMAKER",
)
_RANKS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
_LEAVE = "leave it out of accelerate's config, or start with torchrun"


def require_environment(settings: Settings, strategy: str) -> None:
    """Check that no variable of accelerate's requests more than the settings do.

    Args:
        settings: of the run.
        strategy: the name of its strategy, or of the strategy's class.

    Raises:
        SettingsError: with all variables that do.

    Proved by: tests/unit/settings/test_environment.py
    """
    problems = list(_unrequested(settings, strategy.lower()))
    # `accelerate launch --cpu` for several processes sets where they meet, and starts one.
    addresses = {"MASTER_ADDR", "MASTER_PORT"}
    is_alone = addresses <= os.environ.keys() and _RANKS.isdisjoint(os.environ)
    if strategy == "single" and _is_true("ACCELERATE_USE_CPU") and is_alone:
        problems.append(
            Problem(
                "accelerate launch",
                "started one of several processes: on CPUs it needs MPI. Use "
                "torchrun --nproc-per-node=2 script.py, or python script.py with Trainer(devices=2)",
            )
        )
    if problems:
        headline = "accelerate launch conflicts with the settings; nothing was started."
        raise_problems(SettingsError, headline, problems)


def _unrequested(settings: Settings, strategy: str) -> Iterator[Problem]:
    """Find the variables that request what the settings do not."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if precision not in ("", "no", "none") and not (settings.bf16 or settings.fp16):
        hint = f"set {precision}=True in the settings, or {_LEAVE}" if precision != "fp8" else _LEAVE
        yield Problem(f"ACCELERATE_MIXED_PRECISION={precision}", hint)
    if _is_true("ACCELERATE_USE_FSDP") and not settings.fsdp and "fsdp" not in strategy:
        hint = f"set fsdp=True and fsdp_config in the settings, or {_LEAVE}"
        yield Problem("ACCELERATE_USE_FSDP=true", hint)
    if _is_true("ACCELERATE_USE_DEEPSPEED") and not settings.deepspeed and "deepspeed" not in strategy:
        yield Problem("ACCELERATE_USE_DEEPSPEED=true", f"set deepspeed=... in the settings, or {_LEAVE}")
    if backend not in ("", "no") and not settings.torch_compile and settings.torch_compile_backend is None:
        hint = f'set torch_compile_backend="{backend}" in the settings, or {_LEAVE}'
        yield Problem(f"ACCELERATE_DYNAMO_BACKEND={backend}", hint)
    if _is_true("ACCELERATE_USE_CPU") and not settings.use_cpu and torch.cuda.is_available():
        yield Problem("ACCELERATE_USE_CPU=true", f"set use_cpu=True in the settings, or {_LEAVE}")
    for name in filter(_is_true, _UNSUPPORTED):
        yield Problem(f"{name}=true", f"is not supported by hfbridge; {_LEAVE}")


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")

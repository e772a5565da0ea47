"""What `accelerate launch` says by environment variables, which the native Trainer obeys without any setting.

    variable                                        asks for              and is the same as
    ACCELERATE_MIXED_PRECISION=bf16, fp16, fp8      mixed precision       bf16, fp16
    ACCELERATE_USE_FSDP=true                        FSDP                  fsdp, strategy="fsdp2"
    ACCELERATE_USE_DEEPSPEED=true                   DeepSpeed             deepspeed, strategy="deepspeed_..."
    ACCELERATE_DYNAMO_BACKEND=inductor, ...         compiling             torch_compile
    ACCELERATE_USE_CPU=true                         no GPU                use_cpu
    ACCELERATE_USE_MEGATRON_LM, ..._SAGEMAKER,      what hfbridge has not
      ..._PARALLELISM_CONFIG=true

Here the settings decide. A variable that asks for more than they do is refused: nothing is switched on
unsaid, nor left off in silence.
"""

import os
from collections.abc import Iterator

import torch

from hfbridge.errors import Problem, SettingsError, raise_problems
from hfbridge.settings.settings import Settings

_NOT_CARRIED = (
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_USE_SAGEMAKER",
)
_LEAVE = "leave it out of accelerate's config, or start with torchrun"


def require_environment(settings: Settings, strategy: str) -> None:
    """See that no variable of accelerate's asks for what the settings do not.

    Args:
        settings: of the run.
        strategy: the name of its strategy, or of the strategy's class.

    Raises:
        SettingsError: with all variables that do.

    Proved by: tests/unit/settings/test_environment.py
    """
    problems = list(_unsaid(settings, strategy.lower()))
    if strategy == "single" and _is_left_alone():
        problems.append(
            Problem(
                "accelerate launch",
                "was told of several processes and has started one: on CPUs it needs MPI for more. Use "
                "torchrun --nproc-per-node=2 script.py, or python script.py with Trainer(devices=2)",
            )
        )
    if problems:
        headline = "accelerate launch asks for what the settings do not say; nothing was started."
        raise_problems(SettingsError, headline, problems)


def _unsaid(settings: Settings, strategy: str) -> Iterator[Problem]:
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("", "no", "none") and not (settings.bf16 or settings.fp16):
        cure = f"set {precision}=True in the settings, or {_LEAVE}" if precision != "fp8" else _LEAVE
        yield Problem(f"ACCELERATE_MIXED_PRECISION={precision}", cure)
    if _is_true("ACCELERATE_USE_FSDP") and not settings.fsdp and "fsdp" not in strategy:
        yield Problem(
            "ACCELERATE_USE_FSDP=true", f"set fsdp=True and fsdp_config in the settings, or {_LEAVE}"
        )
    if _is_true("ACCELERATE_USE_DEEPSPEED") and not settings.deepspeed and "deepspeed" not in strategy:
        yield Problem("ACCELERATE_USE_DEEPSPEED=true", f"set deepspeed=... in the settings, or {_LEAVE}")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("", "no") and not settings.torch_compile and settings.torch_compile_backend is None:
        cure = f'set torch_compile_backend="{backend}" in the settings, or {_LEAVE}'
        yield Problem(f"ACCELERATE_DYNAMO_BACKEND={backend}", cure)
    if _is_true("ACCELERATE_USE_CPU") and not settings.use_cpu and torch.cuda.is_available():
        yield Problem("ACCELERATE_USE_CPU=true", f"set use_cpu=True in the settings, or {_LEAVE}")
    for name in _NOT_CARRIED:
        if _is_true(name):
            yield Problem(f"{name}=true", f"is not carried by this version of hfbridge; {_LEAVE}")


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _is_left_alone() -> bool:
    """Whether `accelerate launch --cpu` was to start several processes: it says where they are to meet."""
    said = os.environ.keys()
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
    return _is_true("ACCELERATE_USE_CPU") and {"MASTER_ADDR", "MASTER_PORT"} <= said and not ranks & said

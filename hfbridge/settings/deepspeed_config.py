"""DeepSpeed's configuration: presets for strategy names, reading and checks.

    strategy=                        a configuration with
    "deepspeed_stage_1|2|3"          zero_optimization.stage
    "deepspeed"                      stage 2
    "..._offload"                    the optimizer in CPU memory; with stage 3 the weights, too
    (all)                            "auto" for what the settings have

"auto" is filled as in the HF Trainer. Any other value that is also a setting must equal it.
"""

import base64
import binascii
import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hfbridge.errors import Problem, SettingsError, raise_problems, suggest
from hfbridge.settings.rules import show
from hfbridge.settings.settings import Settings

Config = Mapping[str, Any]

_STAGES = (1, 2, 3)
_DEVICES = ("cpu", "nvme", "none")
# Features of DeepSpeed that change the model, the loop or the loss.
_REFUSED: Mapping[str, str] = {
    "amp": "apex is not supported; use bf16",
    "pipeline": "pipeline parallelism is not supported; leave it out",
    "tensor_parallel": "tensor parallelism is not supported; leave it out",
    "sequence_parallel_size": "sequence parallelism is not supported; leave it out",
    "inference": "is not for training; leave it out",
    "curriculum_learning": "it would truncate samples; leave it out",
    "data_efficiency": "samples come in the HF Trainer's order; leave it out",
}
# Keys of DeepSpeed and the settings that must agree with them.
_TWINS: Mapping[str, tuple[str, ...]] = {
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size",),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "gradient_clipping": ("max_grad_norm",),
    "optimizer.params.lr": ("learning_rate",),
    "optimizer.params.betas": ("adam_beta1", "adam_beta2"),
    "optimizer.params.eps": ("adam_epsilon",),
    "optimizer.params.weight_decay": ("weight_decay",),
    "scheduler.params.warmup_max_lr": ("learning_rate",),
}
_DTYPES = ("bf16", "fp16")


def preset(stage: int, *, offload: bool = False) -> dict[str, Any]:
    """Make the configuration that the name of a strategy stands for.

    Args:
        stage: of ZeRO.
        offload: keep the optimizer, and with stage 3 the weights, in CPU memory.
    """
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload and stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
    }


def read_config(source: Config | str | os.PathLike[str]) -> dict[str, Any]:
    """Read a configuration.

    Args:
        source: a dictionary, which is left alone, the path of a JSON file, or JSON, plain or in base64.

    Raises:
        SettingsError: there is no such file, or it does not hold a dictionary.

    Mirrors: transformers.integrations.deepspeed.HfDeepSpeedConfig
    """
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    text = os.fspath(source)
    path = Path(text).expanduser() if len(text) < 1024 and "{" not in text else None
    is_file = path is not None and path.is_file()
    try:
        found = json.loads(
            path.read_text(encoding="utf-8") if path is not None and is_file else _decoded(text)
        )
    except ValueError as error:
        named = f"deepspeed={text[:80]!r}"
        if is_file:
            raise SettingsError(f"{named} is no JSON: {error}. Correct the file.") from error
        raise SettingsError(
            f"{named}: there is no such file (seen from {Path.cwd()}). Give the path of a JSON file, or the "
            "configuration itself as a dictionary."
        ) from error
    if not isinstance(found, dict):
        raise SettingsError(
            f"deepspeed={text[:80]!r} holds a {type(found).__name__}; it must hold a dictionary."
        )
    return found


def _decoded(text: str) -> str:
    """Return JSON as it is, and anything else as base64 of it."""
    if text.lstrip().startswith(("{", "[")):
        return text
    try:
        return base64.urlsafe_b64decode(text).decode("utf-8")
    except binascii.Error as error:
        raise ValueError(str(error)) from error


def check_config(config: Config, settings: Settings | None = None) -> None:
    """Check that a configuration is supported, and agrees with the settings.

    Args:
        config: as `read_config` returns it.
        settings: of the run; `None` compares nothing.

    Raises:
        SettingsError: with everything that is unsupported or differs.

    Mirrors: transformers.integrations.deepspeed.HfTrainerDeepSpeedConfig
    """
    problems = list(_wrong_in(config))
    if settings is not None and not problems:
        problems += [*_differing(config, settings), *_excluded(config, settings)]
    if problems:
        noun = "value" if len(problems) == 1 else "values"
        headline = (
            f"{len(problems)} {noun} of the DeepSpeed configuration cannot be used; nothing was started."
        )
        raise_problems(SettingsError, headline, problems)


def check_name(config: Config, *, stage: int, offload: bool) -> str:
    """Compare a configuration with the name of a strategy beside it; empty text if they agree."""
    found = value_in(config, "zero_optimization.stage")
    if found != stage:
        return f"its zero_optimization.stage is {found!r}, and the strategy's name says {stage}"
    if offload and not is_offloaded(config):
        return "it offloads nothing, and the strategy's name says offload"
    return ""


def value_in(config: Config, path: str) -> Any:
    """Look up `"zero_optimization.stage"`; `None` if it is not there."""
    found: Any = config
    for key in path.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found


def is_offloaded(config: Config) -> bool:
    """Whether the optimizer is in CPU memory or on disk."""
    return value_in(config, "zero_optimization.offload_optimizer.device") not in (None, "none")


def _wrong_in(config: Config) -> Iterator[Problem]:
    """Find what is wrong with a configuration by itself."""
    zero = config.get("zero_optimization")
    if not isinstance(zero, Mapping):
        text = 'must be a dictionary with a stage, such as {"stage": 2}'
        yield Problem(show("zero_optimization", zero), text)
        return
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in _STAGES:
        text = 'must be 1, 2 or 3; without ZeRO, leave deepspeed out and use strategy="ddp"'
        yield Problem(show("zero_optimization.stage", stage), text)
    for name in ("offload_optimizer", "offload_param"):
        device = value_in(zero, f"{name}.device")
        subject = show(f"zero_optimization.{name}.device", device)
        if device is not None and device not in _DEVICES:
            yield Problem(subject, f"is not one of {', '.join(_DEVICES)}{suggest(device, _DEVICES)}")
        elif device not in (None, "none") and stage != 3 and (name == "offload_param" or device == "nvme"):
            yield Problem(subject, "needs stage 3; leave it out")
    for key, reason in _REFUSED.items():
        entry = config.get(key)
        is_on = entry.get("enabled", True) if isinstance(entry, Mapping) else entry not in (None, 1)
        if is_on and entry:
            yield Problem(show(key, entry), f"refused: {reason}")


def _differing(config: Config, settings: Settings) -> Iterator[Problem]:
    """Find values that differ from the settings."""
    for path, fields in _TWINS.items():
        values = [getattr(settings, name) for name in fields]
        ours: Any = values if len(values) > 1 else values[0]
        if path == "train_micro_batch_size_per_gpu" and settings.auto_find_batch_size:
            continue
        theirs = value_in(config, path)
        if theirs not in (None, "auto") and theirs != ours:
            yield Problem(show(path, theirs), _difference("+".join(fields), ours))
    for name in _DTYPES:
        ours = bool(getattr(settings, name) or getattr(settings, f"{name}_full_eval"))
        theirs = value_in(config, f"{name}.enabled")
        if theirs not in (None, "auto") and theirs != ours:
            yield Problem(show(f"{name}.enabled", theirs), _difference(name, ours))


def _difference(field: str, value: Any) -> str:
    return f'{field}={value!r} in the settings: set both alike, or "auto" here'


def _excluded(config: Config, settings: Settings) -> Iterator[Problem]:
    """Find settings that conflict with DeepSpeed."""
    if settings.auto_find_batch_size:
        text = "an engine is made for one batch size; choose one"
        yield Problem("auto_find_batch_size = True", text)
    if settings.torch_compile:
        yield Problem("torch_compile = True", "is not supported with DeepSpeed; leave it out")
    if settings.save_only_model and settings.load_best_model_at_end:
        text = "the best model is loaded with its optimizer, which save_only_model leaves out; choose one"
        yield Problem("load_best_model_at_end = True", text)


def without_automatic(config: Config) -> dict[str, Any]:
    """Remove what Lightning itself fills in for a module that is no HFModule.

    Args:
        config: DeepSpeed's configuration; optimizers that DeepSpeed has not tested are allowed.
    """

    def stripped(part: Mapping[str, Any]) -> dict[str, Any]:
        left = {name: stripped(v) if isinstance(v, Mapping) else v for name, v in part.items()}
        return {name: value for name, value in left.items() if value not in ("auto", {})}

    left = stripped(config)
    for name in ("gradient_accumulation_steps", "train_batch_size"):
        left.pop(name, None)
    return {"zero_allow_untested_optimizer": True, **left}

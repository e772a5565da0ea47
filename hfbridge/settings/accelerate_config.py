"""Read the YAML file of `accelerate config` as settings and Trainer arguments.

    key                                         becomes
    num_processes, num_machines                 devices (on each machine), num_nodes
    machine_rank, main_process_ip, ..._port     NODE_RANK, MASTER_ADDR, MASTER_PORT, which Lightning reads
    gpu_ids, mixed_precision: bf16, use_cpu     devices, by their numbers; bf16; use_cpu
    distributed_type: FSDP, and fsdp_config     fsdp, fsdp_config; offload_params is cpu_offload there
    distributed_type: DEEPSPEED, with config    deepspeed, gradient_accumulation_steps, max_grad_norm
    dynamo_config                               torch_compile_backend, torch_compile_mode; two variables

What settings or arguments set, too, must agree.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from accelerate.commands.config.config_args import BaseConfig, SageMakerConfig
from accelerate.utils.constants import FSDP_SHARDING_STRATEGY

from hfbridge.errors import Problem, SettingsError, raise_problems, suggest
from hfbridge.settings.deepspeed_config import preset
from hfbridge.settings.io import read_file
from hfbridge.settings.rules import RULES, is_same, show
from hfbridge.settings.settings import Settings

_TPU = "refused: TPUs are not supported; leave it out"
_SAGEMAKER = "refused: SageMaker starts the processes itself; use a config of LOCAL_MACHINE"
_DEVICES = (
    "refused: only CPUs and CUDA devices are supported; set MULTI_GPU, MULTI_CPU, FSDP, DEEPSPEED or NO"
)
_MEGATRON = 'refused: Megatron-LM is not supported; use FSDP ("fsdp2") or DeepSpeed'
_FP8 = "refused: 8-bit training is not supported; use mixed_precision: bf16"
_MPI = "refused: MPI is not supported; start the processes by torchrun, or leave it out"
_PARTS = "refused: tensor and sequence parallelism are not supported; leave it out, and use fsdp_config"
_LAUNCHER = "refused: start hfbridge on each machine; set deepspeed_multinode_launcher: standard"
_REGIONS = "refused: the full model is compiled, as in the HF Trainer; leave it out"
_IGNORED = "refused: FSDP shards all modules; leave it out"
_OFFLOADED = "refused: activations are not offloaded; use activation_checkpointing in the settings"
_NO_EFFECT = "no effect"

KEYS: Mapping[str, str] = {
    **dict.fromkeys((one.name for one in fields(SageMakerConfig)), _SAGEMAKER),
    **dict.fromkeys(("compute_environment", "distributed_type", "mixed_precision", "use_cpu"), "read"),
    **dict.fromkeys(("num_processes", "machine_rank", "num_machines", "gpu_ids"), "read"),
    **dict.fromkeys(("main_process_ip", "main_process_port", "rdzv_backend"), "read"),
    **dict.fromkeys(("deepspeed_config", "fsdp_config", "dynamo_config", "parallelism_config"), "read"),
    **dict.fromkeys(("same_network", "main_training_function"), "ignored"),
    "debug": f"{_NO_EFFECT}: hfbridge checks its collectives by other means",
    "enable_cpu_affinity": f"{_NO_EFFECT}: processes are not bound to cores; use taskset or numactl",
    "fp8_config": _FP8,
    "megatron_lm_config": _MEGATRON,
    "mpirun_config": _MPI,
    **dict.fromkeys(("downcast_bf16", "tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo"), _TPU),
    **dict.fromkeys(("command_file", "commands", "tpu_vm", "tpu_env"), _TPU),
}
"""Each key of a config, and what becomes of it."""

DEEPSPEED_KEYS: Mapping[str, str] = {
    "deepspeed_config_file": "deepspeed",
    "zero_stage": "zero_optimization.stage",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer.nvme_path",
    "offload_param_device": "zero_optimization.offload_param.device",
    "offload_param_nvme_path": "zero_optimization.offload_param.nvme_path",
    "zero3_save_16bit_model": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "zero3_init_flag": "ignored: stage 3 always loads a named model in shards",
    "deepspeed_moe_layer_cls_names": "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
    "deepspeed_multinode_launcher": "read",
    "deepspeed_hostfile": _LAUNCHER,
    "deepspeed_exclusion_filter": _LAUNCHER,
    "deepspeed_inclusion_filter": _LAUNCHER,
}
"""Each key of `deepspeed_config`, and what becomes of it."""

FSDP_KEYS: Mapping[str, str] = {
    **{key: key for key in ("activation_checkpointing", "auto_wrap_policy", "backward_prefetch")},
    **{key: key for key in ("cpu_ram_efficient_loading", "forward_prefetch", "min_num_params")},
    **{key: key for key in ("reshard_after_forward", "state_dict_type", "sync_module_states")},
    **{key: key for key in ("transformer_layer_cls_to_wrap", "use_orig_params", "version")},
    "offload_params": "cpu_offload",
    "sharding_strategy": "reshard_after_forward",
    "activation_checkpointing_offload": _OFFLOADED,
    "ignored_modules": _IGNORED,
}
"""Each key of `fsdp_config`, without "fsdp_" before it, and its name in the settings' `fsdp_config`."""

DYNAMO_KEYS: Mapping[str, str] = {
    "backend": "torch_compile_backend",
    "mode": "torch_compile_mode",
    "use_fullgraph": "ACCELERATE_DYNAMO_USE_FULLGRAPH",
    "use_dynamic": "ACCELERATE_DYNAMO_USE_DYNAMIC",
    "use_regional_compilation": _REGIONS,
}
"""Each key of `dynamo_config`, without "dynamo_" before it, and what becomes of it."""

OF_MACHINES = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables that say where the ranks of several machines meet; launchers set them, too."""

_SUPPORTED_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")
# Beside a DeepSpeed file accelerate takes none of these.
_IN_FILE = {key for key, target in DEEPSPEED_KEYS.items() if target.startswith("zero_opt")}
_IN_FILE |= {"gradient_accumulation_steps", "gradient_clipping"}
# True unless set; False for any other key says nothing.
_TRUE_UNLESS_SET = ("reshard_after_forward", "use_orig_params")


@dataclass
class AccelerateConfig:
    """What an accelerate config sets.

    Attributes:
        path: of the file.
        settings: by transformers' names.
        arguments: by Lightning's names.
        environment: variables that `accelerate launch` would set, and that are read in a run.
        notes: keys without effect.
        sources: for each setting, argument and variable, the entry of the file that sets it.

    Proved by: tests/unit/settings/test_accelerate_config.py
    """

    path: str
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)

    def applied_to(
        self, settings: Settings, arguments: Mapping[str, Any], *, environment: Mapping[str, str]
    ) -> tuple[Settings, dict[str, Any]]:
        """Merge the file into the settings and arguments of a run.

        Args:
            settings: of the run.
            arguments: of the Trainer.
            environment: the variables that are set.

        Returns:
            Settings and arguments with both.

        Raises:
            SettingsError: the sources conflict, or a setting is unsupported; all are named.
        """
        problems: list[Problem] = []
        given = settings.given
        for name in self.settings.keys() & given.keys():
            if not is_same(given[name], self.settings[name]):
                there = show(name, given[name]).replace(" = ", "=", 1)
                problems.append(self._conflict(name, f"`{there}` in the settings"))
        for name, value in self.arguments.items():
            other = arguments.get(name)
            # `devices=2` and `"2"` are the same.
            if other not in (None, "auto") and other != value and str(other) != str(value):
                problems.append(self._conflict(name, f"`Trainer({name}={other!r})`"))
        for name, text in self.environment.items():
            if environment.get(name, text) != text:
                problems.append(self._conflict(name, f"`{name}={environment[name]}` in the environment"))
        try:
            settings = settings.replace(**{n: v for n, v in self.settings.items() if n not in given})
        except SettingsError as error:
            problems += error.problems
        _raise_if_any(self.path, problems)
        passed = {
            name: value
            for name, value in arguments.items()
            if name not in self.arguments or (value is not None and value != "auto")
        }
        return settings, {**self.arguments, **passed}

    def _conflict(self, name: str, other: str) -> Problem:
        return Problem(self.sources.get(name, name), f"conflicts with {other}; set only one")


def read_accelerate_config(path: str | os.PathLike[str]) -> AccelerateConfig:
    """Read a file that `accelerate config` has written.

    Args:
        path: of a .yaml, .yml or .json file.

    Returns:
        What it sets.

    Raises:
        SettingsError: it cannot be read, or a key in it is unknown, wrong or unsupported; all are named.

    Mirrors: accelerate.commands.config.config_args.load_config_from_file
    """
    shown = os.fspath(path)
    try:
        config = BaseConfig.process_config(read_file(path))
    except ValueError as error:  # of accelerate: without a distributed_type
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"{shown!r} is no accelerate config: {error}") from error
    found = AccelerateConfig(shown)
    _raise_if_any(shown, list(_read(config, found)))
    return found


def _raise_if_any(path: str, problems: list[Problem]) -> None:
    if problems:
        noun = "value" if len(problems) == 1 else "values"
        headline = f"{len(problems)} {noun} of the accelerate config {path!r} cannot be used; "
        raise_problems(SettingsError, f"{headline}nothing was started.", problems)


def _read(config: Mapping[str, Any], found: AccelerateConfig) -> Iterator[Problem]:
    """Read all keys, and yield what is wrong."""
    place = _name_of(config["compute_environment"])
    if place != "LOCAL_MACHINE":
        yield Problem(show("compute_environment", place), _SAGEMAKER.removeprefix("refused: "))
        return
    for key, value in config.items():
        fate = KEYS.get(key)
        if fate is None:
            hint = suggest(key, tuple(KEYS)) or "; accelerate has no such key"
            yield Problem(show(key, value), f"unknown{hint}")
        elif fate.startswith("refused") and _is_on(value):
            yield Problem(show(key, value), fate)
        elif fate.startswith(_NO_EFFECT) and _is_on(value):
            found.notes.append(f"{key} in the accelerate config has {fate}")
    sizes = dict(config.get("parallelism_config") or {})
    if any(str(key).endswith("_size") and value not in (None, 1) for key, value in sizes.items()):
        yield Problem(show("parallelism_config", sizes), _PARTS)
    kind = _name_of(config["distributed_type"])
    if kind not in _SUPPORTED_TYPES:
        reason = {"XLA": _TPU, "MEGATRON_LM": _MEGATRON}.get(kind, _DEVICES)
        yield Problem(show("distributed_type", kind), reason)
    yield from _read_precision(config, found)
    yield from _read_machines(config, kind, found)
    yield from _read_section("dynamo", config, DYNAMO_KEYS, found, _read_dynamo)
    if kind == "FSDP":
        yield from _read_section("fsdp", config, FSDP_KEYS, found, _read_fsdp)
    if kind == "DEEPSPEED":
        yield from _read_section("deepspeed", config, DEEPSPEED_KEYS, found, _read_deepspeed)


def _read_precision(config: Mapping[str, Any], found: AccelerateConfig) -> Iterator[Problem]:
    precision = str(config.get("mixed_precision") or "no").lower()
    if precision == "bf16":
        _set(found, "settings", "bf16", True, source="mixed_precision = bf16")
    elif precision == "fp16":
        yield Problem('mixed_precision = "fp16"', f"refused: {RULES['fp16'].reason}")
    elif precision == "fp8":
        yield Problem('mixed_precision = "fp8"', _FP8)
    elif precision != "no":
        yield Problem(show("mixed_precision", precision), "must be no or bf16")
    if config.get("use_cpu") or _name_of(config["distributed_type"]) == "MULTI_CPU":
        _set(found, "settings", "use_cpu", True, source="use_cpu = True")


def _read_machines(config: Mapping[str, Any], kind: str, found: AccelerateConfig) -> Iterator[Problem]:
    """Read how many processes run, on which machines, and where they meet."""
    processes, machines = config.get("num_processes", -1), config.get("num_machines", 1) or 1
    for key, count, least in (("num_processes", processes, -1), ("num_machines", machines, 1)):
        if not isinstance(count, int) or isinstance(count, bool) or count < least or count == 0:
            yield Problem(show(key, count), "must be a number of 1 or more")
            return
    subject = show("num_processes", processes)
    if kind == "NO" and (processes > 1 or machines > 1):
        yield Problem(subject, "and distributed_type is NO, which is one process; set MULTI_GPU or MULTI_CPU")
    if processes > 0 and processes % machines:
        yield Problem(subject, f"cannot be divided evenly among {machines} machines")
    elif processes > 0:
        on_each = f" on {machines} machines" if machines > 1 else ""
        _set(found, "arguments", "devices", processes // machines, source=f"{subject}{on_each}")
    if machines > 1:
        _set(found, "arguments", "num_nodes", machines, source=show("num_machines", machines))
        _set(found, "environment", "NODE_RANK", str(config.get("machine_rank") or 0), source="machine_rank")
        for key in ("main_process_ip", "main_process_port"):
            if not config.get(key):
                yield Problem(show(key, config.get(key)), f"{machines} machines need an address to meet at")
    if str(config.get("rdzv_backend") or "static") != "static" and machines > 1:
        yield Problem(
            show("rdzv_backend", config["rdzv_backend"]), "is torchrun's; start the script with torchrun"
        )
    if address := config.get("main_process_ip"):
        _set(found, "environment", "MASTER_ADDR", str(address), source=show("main_process_ip", address))
    if port := config.get("main_process_port"):
        _set(found, "environment", "MASTER_PORT", str(port), source=show("main_process_port", port))
    yield from _read_gpus(config, processes // machines, found)


def _read_gpus(config: Mapping[str, Any], count: int, found: AccelerateConfig) -> Iterator[Problem]:
    ids = config.get("gpu_ids")
    if ids is None or ids == "all" or config.get("use_cpu"):
        return
    named = [part.strip() for part in str(ids).split(",")]
    if not all(part.isdigit() for part in named):
        yield Problem(show("gpu_ids", ids), 'must be "all", or numbers such as "0,1"')
    elif count > 0 and len(named) != count:
        yield Problem(show("gpu_ids", ids), f"names {len(named)} devices for {count} processes of a machine")
    else:
        _set(found, "arguments", "devices", [int(part) for part in named], source=show("gpu_ids", ids))


_Read = Callable[[dict[str, Any], AccelerateConfig], Iterable[Problem]]


def _read_section(
    name: str, config: Mapping[str, Any], keys: Mapping[str, str], found: AccelerateConfig, read: _Read
) -> Iterator[Problem]:
    """Check the keys of a section, with their prefix or without, and pass them to `read`."""
    section = f"{name}_config"
    entries: dict[str, Any] = {}
    for written, value in dict(config.get(section) or {}).items():
        bare = str(written).removeprefix(f"{name}_")
        key = bare if bare in keys else str(written)
        if key not in keys:
            yield Problem(f"{section}: {show(key, value)}", f"unknown{suggest(key, tuple(keys))}")
        elif keys[key].startswith("refused") and _is_on(value):
            yield Problem(f"{section}: {show(key, value)}", keys[key])
        elif value is not None:
            entries[key] = value
    yield from read(entries, found)


def _read_dynamo(entries: dict[str, Any], found: AccelerateConfig) -> Iterable[Problem]:
    backend = str(entries.get("backend") or "no").lower()
    if backend in ("no", "false"):
        return ()
    _set(found, "settings", "torch_compile_backend", backend, source=f"dynamo_backend = {backend}")
    if (mode := entries.get("mode", "default")) != "default":
        _set(found, "settings", "torch_compile_mode", mode, source=f"dynamo_mode = {mode}")
    for key in ("use_fullgraph", "use_dynamic"):
        if _is_on(entries.get(key)):
            _set(found, "environment", DYNAMO_KEYS[key], "True", source=f"dynamo_{key} = True")
    return ()


def _read_fsdp(entries: dict[str, Any], found: AccelerateConfig) -> Iterable[Problem]:
    version = entries.setdefault("version", 1)  # accelerate's default; transformers' is 2
    sharding = entries.pop("sharding_strategy", None)
    if str(version) == "1":
        reshard = entries.get("reshard_after_forward")
        if not isinstance(reshard, str) or reshard.lower() in ("true", "false"):
            entries["reshard_after_forward"] = sharding or "FULL_SHARD"
        number = str(entries["reshard_after_forward"])
        if number.isdigit() and 0 < int(number) <= len(FSDP_SHARDING_STRATEGY):
            entries["reshard_after_forward"] = FSDP_SHARDING_STRATEGY[int(number) - 1]
    if entries.get("auto_wrap_policy") != "SIZE_BASED_WRAP":
        entries.pop("min_num_params", None)  # accelerate reads it with that policy only
    config = {
        FSDP_KEYS[key]: value
        for key, value in entries.items()
        if value is not False or key in _TRUE_UNLESS_SET
    }
    _set(found, "settings", "fsdp", True, source='distributed_type = "FSDP"')
    _set(found, "settings", "fsdp_config", config, source="fsdp_config")
    return ()


def _read_deepspeed(entries: dict[str, Any], found: AccelerateConfig) -> Iterator[Problem]:
    if (launcher := entries.get("deepspeed_multinode_launcher", "standard")) != "standard":
        yield Problem(f"deepspeed_config: {show('deepspeed_multinode_launcher', launcher)}", _LAUNCHER)
    if names := entries.get("deepspeed_moe_layer_cls_names"):
        variable = DEEPSPEED_KEYS["deepspeed_moe_layer_cls_names"]
        _set(found, "environment", variable, str(names), source="deepspeed_moe_layer_cls_names")
    file = entries.get("deepspeed_config_file")
    if file not in (None, "none"):
        for key in entries.keys() & _IN_FILE:
            subject = f"deepspeed_config: {show(key, entries[key])}"
            yield Problem(subject, "belongs in the file of deepspeed_config_file; leave it out here")
        _set(found, "settings", "deepspeed", str(file), source=show("deepspeed_config_file", file))
        return
    config = preset(entries.get("zero_stage", 2))
    zero = config["zero_optimization"]
    for name in ("optimizer", "param"):
        device = str(entries.get(f"offload_{name}_device", "none")).lower()
        if device != "none":
            place = {"nvme_path": entries.get(f"offload_{name}_nvme_path")} if device == "nvme" else {}
            zero[f"offload_{name}"] = {"device": device, **place}
    if "zero3_save_16bit_model" in entries and zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = entries["zero3_save_16bit_model"]
    _set(found, "settings", "deepspeed", config, source='distributed_type = "DEEPSPEED"')
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        if entries.get(key, "auto") != "auto":
            source = f"deepspeed_config: {show(key, entries[key])}"
            _set(found, "settings", DEEPSPEED_KEYS[key], entries[key], source=source)


def _set(found: AccelerateConfig, place: str, name: str, value: Any, *, source: str) -> None:
    getattr(found, place)[name] = value
    found.sources[name] = source


def _is_on(value: Any) -> bool:
    return bool(value) and str(value).lower() not in ("no", "false", "none")


def _name_of(value: Any) -> str:
    """Return the name of a member of accelerate's enums, or of text; NO may have been read as False."""
    found = getattr(value, "value", value)
    return "NO" if found is False else str(found)

"""The YAML file of `accelerate config`: what it says by the names of settings and of Trainer arguments. Pure.

    key                                         becomes
    num_processes, num_machines                 devices (on each machine), num_nodes
    machine_rank, main_process_ip, ..._port     NODE_RANK, MASTER_ADDR, MASTER_PORT, which Lightning reads
    gpu_ids                                     devices, by their numbers
    mixed_precision: bf16                       bf16; "no" leaves it to the settings, as natively
    use_cpu                                     use_cpu
    distributed_type: NO, MULTI_GPU, MULTI_CPU  one device; several, under DDP unless the settings say else
    distributed_type: FSDP, and fsdp_config     fsdp, fsdp_config; offload_params is cpu_offload there
    distributed_type: DEEPSPEED, and
      deepspeed_config                          deepspeed: its file, or what zero_stage and the others say
      gradient_accumulation_steps, ..._clipping gradient_accumulation_steps, max_grad_norm
    dynamo_config                               torch_compile_backend, torch_compile_mode; two variables
    debug, enable_cpu_affinity                  nothing, which is told
    what asks for fp16, fp8, TPUs, Megatron,
      SageMaker, MPI or parts of a layer        refused by name

What settings or arguments say, too, must agree. accelerate_keys.py names every key; a test fails when
accelerate has one without a row.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate.commands.config.config_args import BaseConfig
from accelerate.utils.constants import FSDP_SHARDING_STRATEGY

from hfbridge.errors import Problem, SettingsError, raise_problems, suggest
from hfbridge.settings.accelerate_keys import (
    DEEPSPEED_KEYS,
    DEVICES,
    DYNAMO_KEYS,
    FP8,
    FSDP_KEYS,
    KEYS,
    LAUNCHER,
    MEGATRON,
    PARTS,
    SAGEMAKER,
    TPU,
)
from hfbridge.settings.deepspeed_config import preset
from hfbridge.settings.io import read_file
from hfbridge.settings.rules import RULES, is_same, show
from hfbridge.settings.settings import Settings

OF_MACHINES = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables that say where the ranks of several machines meet; a launcher sets them, too."""

_CARRIED_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")
# Beside a DeepSpeed file accelerate takes none of these.
_IN_FILE = [key for key, home in DEEPSPEED_KEYS.items() if home.startswith("zero_opt")]
_IN_FILE += ["gradient_accumulation_steps", "gradient_clipping"]


@dataclass
class AccelerateConfig:
    """What an accelerate config says.

    Attributes:
        path: of the file.
        settings: by transformers' names.
        arguments: by Lightning's names.
        environment: variables that `accelerate launch` would set, and that are read in a run.
        notes: what it says without effect.
        sources: the key behind each setting, argument and variable, as it is written in the file.

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
        """Put what the file says beside what the user says in other places.

        Args:
            settings: of the run.
            arguments: of the Trainer.
            environment: the variables that there are.

        Returns:
            Settings and arguments with both.

        Raises:
            SettingsError: the places contradict each other, or a setting is not carried; all are named.
        """
        problems: list[Problem] = []
        taken = {name: value for name, value in self.settings.items() if name not in settings.given}
        for name, value in self.settings.items():
            if name in settings.given and not is_same(settings.given[name], value):
                there = show(name, settings.given[name]).replace(" = ", "=", 1)
                problems.append(self._both(name, f"`{there}` in the settings"))
        for name, value in self.arguments.items():
            other = arguments.get(name)
            if name in arguments and other not in (None, "auto") and not _says_the_same(other, value):
                problems.append(self._both(name, f"`Trainer({name}={other!r})`"))
        for name, text in self.environment.items():
            if environment.get(name, text) != text:
                problems.append(self._both(name, f"`{name}={environment[name]}` in the environment"))
        try:
            settings = settings.replace(**taken)
        except SettingsError as error:
            problems += error.problems
        if problems:
            _refuse(self.path, problems)
        silent = {name for name, value in arguments.items() if value is None or value == "auto"}
        said = {name: value for name, value in arguments.items() if name not in silent & set(self.arguments)}
        return settings, {**self.arguments, **said}

    def _both(self, name: str, other: str) -> Problem:
        return Problem(self.sources.get(name, name), f"conflicts with {other}; set only one")


def read_accelerate_config(path: str | os.PathLike[str]) -> AccelerateConfig:
    """Read a file that `accelerate config` has written.

    Args:
        path: of a .yaml, .yml or .json file.

    Returns:
        What it says.

    Raises:
        SettingsError: it cannot be read, or a key in it is unknown, wrong or not carried; all are named.

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
    _refuse(shown, list(_read(config, found)))
    return found


def _refuse(path: str, problems: list[Problem]) -> None:
    if problems:
        noun = "value" if len(problems) == 1 else "values"
        headline = f"{len(problems)} {noun} of the accelerate config {path!r} cannot be carried out; "
        raise_problems(SettingsError, f"{headline}nothing was started.", problems)


def _read(config: Mapping[str, Any], found: AccelerateConfig) -> Iterator[Problem]:
    """Take in all keys; yield what is wrong."""
    if _name_of(config["compute_environment"]) != "LOCAL_MACHINE":
        yield Problem(show("compute_environment", _name_of(config["compute_environment"])), SAGEMAKER)
        return
    for key, value in config.items():
        home = KEYS.get(key)
        if home is None:
            hint = suggest(key, tuple(KEYS)) or "; accelerate has no such key"
            yield Problem(show(key, value), f"unknown{hint}")
        elif home.startswith("refused") and _says_something(value):
            yield Problem(show(key, value), home)
        elif home.startswith("told") and _says_something(value):
            found.notes.append(f"{key} in the accelerate config has no effect{home.removeprefix('told')}")
    sizes = dict(config.get("parallelism_config") or {})
    if any(str(key).endswith("_size") and value not in (None, 1) for key, value in sizes.items()):
        yield Problem(show("parallelism_config", sizes), f"refused: {PARTS}")
    kind = _name_of(config["distributed_type"])
    if kind not in _CARRIED_TYPES:
        reason = {"XLA": TPU, "MEGATRON_LM": MEGATRON}.get(kind, DEVICES)
        yield Problem(show("distributed_type", kind), f"refused: {reason}")
    yield from _read_precision(config, found)
    yield from _read_machines(config, kind, found)
    yield from _read_room("dynamo", config, DYNAMO_KEYS, found, _take_dynamo)
    if kind == "FSDP":
        yield from _read_room("fsdp", config, FSDP_KEYS, found, _take_fsdp)
    if kind == "DEEPSPEED":
        yield from _read_room("deepspeed", config, DEEPSPEED_KEYS, found, _take_deepspeed)


def _read_precision(config: Mapping[str, Any], found: AccelerateConfig) -> Iterator[Problem]:
    precision = str(config.get("mixed_precision") or "no").lower()
    if precision == "bf16":
        _set(found, "settings", "bf16", True, source="mixed_precision = bf16")
    elif precision == "fp16":
        yield Problem('mixed_precision = "fp16"', f"refused: {RULES['fp16'].reason}")
    elif precision == "fp8":
        yield Problem('mixed_precision = "fp8"', f"refused: {FP8}")
    elif precision != "no":
        yield Problem(show("mixed_precision", precision), "must be no or bf16")
    if config.get("use_cpu") or _name_of(config["distributed_type"]) == "MULTI_CPU":
        _set(found, "settings", "use_cpu", True, source="use_cpu = True")


def _read_machines(config: Mapping[str, Any], kind: str, found: AccelerateConfig) -> Iterator[Problem]:
    """Read how many processes there are, on which machines, and where they meet."""
    processes, machines = config.get("num_processes", -1), config.get("num_machines", 1) or 1
    for key, count, least in (("num_processes", processes, -1), ("num_machines", machines, 1)):
        if not isinstance(count, int) or isinstance(count, bool) or count < least or count == 0:
            yield Problem(show(key, count), "must be a number of 1 or more")
            return
    subject = show("num_processes", processes)
    if kind == "NO" and (processes > 1 or machines > 1):
        yield Problem(subject, "and distributed_type is NO, which is one process; say MULTI_GPU or MULTI_CPU")
    if processes > 0 and processes % machines:
        yield Problem(subject, f"cannot be dealt evenly to {machines} machines")
    elif processes > 0:
        on_each = f" on {machines} machines" if machines > 1 else ""
        _set(found, "arguments", "devices", processes // machines, source=f"{subject}{on_each}")
    if machines > 1:
        _set(found, "arguments", "num_nodes", machines, source=show("num_machines", machines))
        _set(found, "environment", "NODE_RANK", str(config.get("machine_rank") or 0), source="machine_rank")
        for key in ("main_process_ip", "main_process_port"):
            if not config.get(key):
                yield Problem(show(key, config.get(key)), f"{machines} machines have to know where they meet")
    if str(config.get("rdzv_backend") or "static") != "static" and machines > 1:
        yield Problem(
            show("rdzv_backend", config["rdzv_backend"]), "is of torchrun; start the script with torchrun"
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


Take = Callable[[dict[str, Any], AccelerateConfig], Iterator[Problem]]


def _read_room(
    name: str, config: Mapping[str, Any], keys: Mapping[str, str], found: AccelerateConfig, take: Take
) -> Iterator[Problem]:
    """Read a section, with the prefix of its keys or without, and let `take` say what it means."""
    section = f"{name}_config"
    entries: dict[str, Any] = {}
    for written, value in dict(config.get(section) or {}).items():
        bare = str(written).removeprefix(f"{name}_")
        key = bare if bare in keys else str(written)
        if key not in keys:
            yield Problem(f"{section}: {show(key, value)}", f"unknown{suggest(key, tuple(keys))}")
        elif keys[key].startswith("refused") and _says_something(value):
            yield Problem(f"{section}: {show(key, value)}", keys[key])
        elif value is not None:
            entries[key] = value
    yield from take(entries, found)


def _take_dynamo(entries: dict[str, Any], found: AccelerateConfig) -> Iterator[Problem]:
    backend = str(entries.get("backend") or "no").lower()
    if backend in ("no", "false"):
        return
    _set(found, "settings", "torch_compile_backend", backend, source=f"dynamo_backend = {backend}")
    if (mode := entries.get("mode", "default")) != "default":
        _set(found, "settings", "torch_compile_mode", mode, source=f"dynamo_mode = {mode}")
    for key in ("use_fullgraph", "use_dynamic"):
        if _says_something(entries.get(key)):
            _set(found, "environment", DYNAMO_KEYS[key], "True", source=f"dynamo_{key} = True")
    yield from ()


def _take_fsdp(entries: dict[str, Any], found: AccelerateConfig) -> Iterator[Problem]:
    version = entries.setdefault("version", 1)  # accelerate's default; transformers' is 2
    sharding = entries.pop("sharding_strategy", None)
    if str(version) == "1":
        if not isinstance(entries.get("reshard_after_forward"), str) or _is_flag(
            entries["reshard_after_forward"]
        ):
            entries["reshard_after_forward"] = sharding or "FULL_SHARD"
        number = str(entries["reshard_after_forward"])
        if number.isdigit() and 0 < int(number) <= len(FSDP_SHARDING_STRATEGY):
            entries["reshard_after_forward"] = FSDP_SHARDING_STRATEGY[int(number) - 1]
    if entries.get("auto_wrap_policy") != "SIZE_BASED_WRAP":
        entries.pop("min_num_params", None)  # accelerate reads it with that policy only
    config = {FSDP_KEYS[key]: value for key, value in entries.items() if value is not False or key in _SPOKEN}
    _set(found, "settings", "fsdp", True, source='distributed_type = "FSDP"')
    _set(found, "settings", "fsdp_config", config, source="fsdp_config")
    yield from ()


# What is true if it is not said; of other keys, False says nothing.
_SPOKEN = ("reshard_after_forward", "use_orig_params")


def _take_deepspeed(entries: dict[str, Any], found: AccelerateConfig) -> Iterator[Problem]:
    if (launcher := entries.get("deepspeed_multinode_launcher", "standard")) != "standard":
        subject = f"deepspeed_config: {show('deepspeed_multinode_launcher', launcher)}"
        yield Problem(subject, f"refused: {LAUNCHER}")
    if names := entries.get("deepspeed_moe_layer_cls_names"):
        variable = DEEPSPEED_KEYS["deepspeed_moe_layer_cls_names"]
        _set(found, "environment", variable, str(names), source="deepspeed_moe_layer_cls_names")
    file = entries.get("deepspeed_config_file")
    if file not in (None, "none"):
        for key in entries.keys() & set(_IN_FILE):
            subject = f"deepspeed_config: {show(key, entries[key])}"
            yield Problem(subject, "is said in the file of deepspeed_config_file; leave it out here")
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


def _says_something(value: Any) -> bool:
    return bool(value) and str(value).lower() not in ("no", "false", "none")


def _is_flag(value: Any) -> bool:
    return str(value).lower() in ("true", "false")


def _says_the_same(argument: Any, value: Any) -> bool:
    """Compare an argument with what the file says; `devices=2` and `"2"` are the same."""
    return bool(argument == value) or str(argument) == str(value)


def _name_of(value: Any) -> str:
    """Return the name of a member of accelerate's enums, or of text; NO may have been read as False."""
    found = getattr(value, "value", value)
    return "NO" if found is False else str(found)

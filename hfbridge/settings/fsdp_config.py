"""`fsdp` and `fsdp_config` in all spellings of transformers, checked and translated.

fsdp=True                               FSDP2; FSDP with fsdp_config={"version": 1}
fsdp="full_shard auto_wrap offload"     the same, and reshard_after_forward, cpu_offload; or a list of these
a key "fsdp_..." in fsdp_config         the same key without the prefix
"true", "false", ...                    True, False
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from accelerate.utils.constants import FSDP_AUTO_WRAP_POLICY, FSDP_BACKWARD_PREFETCH, FSDP_SHARDING_STRATEGY

from hfbridge.errors import suggest
from hfbridge.settings.rules import Value

_TRUE, _FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")
_SHARDINGS = tuple(name.lower() for name in FSDP_SHARDING_STRATEGY)
_WORDS = (*_SHARDINGS, "offload", "auto_wrap")
_STATES = ("FULL_STATE_DICT", "SHARDED_STATE_DICT", "LOCAL_STATE_DICT")
_OF_FSDP1 = ("sync_module_states", "limit_all_gathers", "forward_prefetch", "backward_prefetch")
_OF_BOTH = (
    "reshard_after_forward",
    "cpu_offload",
    "auto_wrap_policy",
    "transformer_layer_cls_to_wrap",
    "min_num_params",
    "activation_checkpointing",
)
_XLA_FLAGS = ("xla", "xla_fsdp_grad_ckpt", "xla_fsdp_v2")
_FLAGS = (
    *("activation_checkpointing", "cpu_offload", "cpu_ram_efficient_loading", "forward_prefetch"),
    *("limit_all_gathers", "sync_module_states", "use_orig_params"),
    *_XLA_FLAGS,
)
_KEYS = ("version", *_OF_BOTH, *_FLAGS, "backward_prefetch", "state_dict_type", "xla_fsdp_settings")


def version_of(config: Any) -> int:
    """Return the version of FSDP in a config, 2 by default."""
    return 1 if str(read_config(config).get("version")) == "1" else 2


def read_config(config: Any) -> dict[str, Any]:
    """Return the config with one spelling of keys; empty if it is no dictionary."""
    return {str(k).removeprefix("fsdp_"): v for k, v in config.items()} if isinstance(config, Mapping) else {}


def fsdp_problems(fsdp: Any, config: Any, *, version: int) -> Iterator[tuple[str, str]]:
    """Find what is wrong with `fsdp` and `fsdp_config`.

    Args:
        fsdp: its value.
        config: the dictionary.
        version: of FSDP; `Trainer(strategy=)` may set it.

    Yields:
        "fsdp" or "fsdp_config", and what is wrong.

    Mirrors: transformers.TrainingArguments._process_fsdp_args
    """
    for word in _words_of(fsdp):
        if word not in _WORDS:
            yield "fsdp", f"{word} is not one of {', '.join(_WORDS)}{suggest(word, _WORDS)}; or set True"
        elif version == 2 and word in _SHARDINGS[2:]:
            yield "fsdp", f'{word} is of FSDP 1 only; set fsdp_config={{"version": 1}}, or fsdp=True'
    read = read_config(config)
    if isinstance(config, Mapping) and len(read) < len(config):
        yield "fsdp_config", "has a key twice, with and without the prefix fsdp_; leave one out"
    found = read.get("version", version)
    if str(found) not in ("1", "2") or isinstance(found, bool):
        yield "fsdp_config", f"version is {found!r}; it must be 1 or 2"
    for key, entry in read.items():
        if wrong := _wrong_entry(key, entry, version):
            yield "fsdp_config", wrong
    policy, smallest = read.get("auto_wrap_policy", FSDP_AUTO_WRAP_POLICY[0]), read.get("min_num_params", 0)
    if policy != FSDP_AUTO_WRAP_POLICY[1] and smallest:
        yield "fsdp_config", f'min_num_params is read with auto_wrap_policy="{FSDP_AUTO_WRAP_POLICY[1]}" only'
    if policy == FSDP_AUTO_WRAP_POLICY[1] and not smallest:
        yield "fsdp_config", f'auto_wrap_policy="{policy}" needs min_num_params; at 0 it finds no layer'
    if policy != FSDP_AUTO_WRAP_POLICY[0] and read.get("transformer_layer_cls_to_wrap"):
        other = f'is read with auto_wrap_policy="{FSDP_AUTO_WRAP_POLICY[0]}" only'
        yield "fsdp_config", f"transformer_layer_cls_to_wrap {other}"


def fsdp_conflicts(value: Value, config: Any) -> Iterator[tuple[str, str]]:
    """Find settings that conflict with FSDP of either version.

    Args:
        value: a setting by its name.
        config: `fsdp_config`.

    Mirrors: transformers.Trainer.create_accelerator_and_postprocess
    """
    if value("activation_checkpointing") and _flag(
        read_config(config).get("activation_checkpointing", False)
    ):
        yield (
            "activation_checkpointing",
            "fsdp_config has activation_checkpointing, too, which is FSDP's own; leave one of them out",
        )
    if value("deepspeed"):
        yield "deepspeed", "and FSDP are two ways to shard a model; set only one"
    if value("save_only_model") and value("load_best_model_at_end"):
        yield "save_only_model", "does not go with load_best_model_at_end under FSDP; leave one of them out"
    compiling = filter(value, ("torch_compile", "torch_compile_backend", "torch_compile_mode"))
    for name in list(compiling)[:1]:
        yield name, 'a compiled model cannot be sharded by hfbridge; leave it out, or use strategy="ddp"'


def fsdp_options(fsdp: Any, config: Any, *, version: int) -> dict[str, Any]:
    """Make the arguments of FSDPStrategy or FSDP2Strategy from valid `fsdp` and `fsdp_config`."""
    read = read_config(config)
    for word in _words_of(fsdp):
        if word in _SHARDINGS:
            read.setdefault("reshard_after_forward", word if version == 1 else word == "full_shard")
        elif word == "offload":
            read.setdefault("cpu_offload", True)
    wanted = (*_OF_BOTH, *(_OF_FSDP1 if version == 1 else ()))
    options = {name: read[name] for name in wanted if name in read}
    for name, entry in options.items():
        if name in _FLAGS or (name == "reshard_after_forward" and version == 2):
            options[name] = _flag(entry)
    classes = options.get("transformer_layer_cls_to_wrap")
    if isinstance(classes, str):
        options["transformer_layer_cls_to_wrap"] = [name.strip() for name in classes.split(",")]
    return options


def unread_keys(config: Any, *, version: int) -> Iterator[str]:
    """List the keys that FSDP2 does not have."""
    for key in read_config(config):
        if version == 2 and key in (*_OF_FSDP1, "use_orig_params"):
            yield f"fsdp_config: {key} has no effect in FSDP2, as in the HF Trainer"


def _words_of(fsdp: Any) -> list[str]:
    words = fsdp.split() if isinstance(fsdp, str) else fsdp if isinstance(fsdp, list) else []
    return [str(word).lower() for word in words]


def _flag(entry: Any) -> Any:
    """Read a flag; any other value is returned as it is."""
    word = str(entry).lower()
    return True if word in _TRUE else False if word in _FALSE else entry


def _wrong_entry(key: str, entry: Any, version: int) -> str:
    """Describe what is wrong with one entry; empty if nothing is."""
    if key not in _KEYS:
        return f"{key} is no key of it; there are {', '.join(sorted(_KEYS))}{suggest(key, _KEYS)}"
    if key == "cpu_offload" and isinstance(entry, str):
        return (
            f"cpu_offload is {entry!r}; it must be True or False: to transformers, any string switches it on"
        )
    if key in _FLAGS and not isinstance(_flag(entry), bool):
        return f"{key} is {entry!r}; it must be True or False"
    if key in _CHECKED and (wrong := _CHECKED[key](entry, version)):
        return f"{key} is {entry!r}; {wrong}"
    if key in (*_XLA_FLAGS, "xla_fsdp_settings") and entry and _flag(entry):
        return f"{key} is refused: TPUs are not supported; leave it out"
    return ""


def _wrong_sharding(entry: Any, version: int) -> str:
    if version == 2:
        return "" if isinstance(_flag(entry), bool) else "in FSDP2 it must be True or False"
    is_known = str(entry).lower() in _SHARDINGS
    return "" if is_known else f"in version 1 it must be one of {', '.join(_SHARDINGS)}"


def _wrong_choice(entry: Any, possible: Collection[str]) -> str:
    hint = suggest(entry, possible)
    return "" if entry in possible else f"it must be one of {', '.join(possible)}{hint}"


def _wrong_state(entry: Any, version: int) -> str:
    if str(entry).upper() not in _STATES:
        return f"it must be one of {', '.join(_STATES)}"
    if str(entry).upper() == _STATES[0]:
        return ""
    return (
        "refused: checkpoints hold full weights and optimizer states, from which any strategy and number of "
        'ranks resumes; leave it out, or set "FULL_STATE_DICT"'
    )


def _wrong_classes(entry: Any, version: int) -> str:
    names = entry.split(",") if isinstance(entry, str) else entry
    is_list = isinstance(names, list) and names and all(isinstance(n, str) and n.strip() for n in names)
    return "" if entry is None or is_list else "it must be the name of a class, or a list of names"


def _wrong_size(entry: Any, version: int) -> str:
    is_count = isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0
    return "" if is_count else "it must be a number of parameters, 0 or more"


def _wrong_loading(entry: Any, version: int) -> str:
    if version == 2 or not _flag(entry):
        return ""
    return "refused: FSDP loads the model on every rank; version 2 loads each rank's shard only"


def _wrong_parameters(entry: Any, version: int) -> str:
    if version == 2 or _flag(entry):
        return ""
    return "refused: without it, parameters with and without weight decay are merged; leave it out"


_CHECKED: Mapping[str, Callable[[Any, int], str]] = {
    "reshard_after_forward": _wrong_sharding,
    "auto_wrap_policy": lambda entry, _: _wrong_choice(entry, FSDP_AUTO_WRAP_POLICY),
    "backward_prefetch": lambda entry, _: _wrong_choice(str(entry).upper(), FSDP_BACKWARD_PREFETCH),
    "state_dict_type": _wrong_state,
    "transformer_layer_cls_to_wrap": _wrong_classes,
    "min_num_params": _wrong_size,
    "cpu_ram_efficient_loading": _wrong_loading,
    "use_orig_params": _wrong_parameters,
}

"""Check and simplify each value by itself.

Types are those of the installed `TrainingArguments`. The conditions are those of its `_validate_args`, those
that torch and transformers raise later, and what none of them notices (`max_steps=0`, NaN).

setting                          spellings of one value                    plain value
report_to                        "none", [], ["none"]                      "none"
                                 "all", ["all"]                            "all"
                                 "wandb", ["wandb"]                        ["wandb"]
debug                            "", [], None                              ""
                                 "underflow_overflow", a list or enum      "underflow_overflow"
include_num_input_tokens_seen    True, False                               "all", "no"
torch_compile_backend            "INDUCTOR"                                "inductor"
a dictionary                     the same as a JSON string                 the dictionary
fsdp_config                      the path of a JSON file                   the dictionary in it
"""

import contextlib
import datetime
import json
import math
import operator
import os
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from types import UnionType

import transformers
import yaml
from accelerate.utils import DynamoBackend
from transformers import GenerationConfig, Seq2SeqTrainingArguments
from transformers.debug_utils import DebugOption
from transformers.trainer_pt_utils import AcceleratorConfig

from hfbridge.errors import suggest

_TYPE_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a dictionary",
}
_IN_JSON = ("accelerator_config", "lr_scheduler_kwargs", "activation_checkpointing_kwargs", "fsdp_config")
# Choices that transformers does not have as an enum.
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
    "include_num_input_tokens_seen": ("no", "all", "non_padding"),
    "torch_compile_backend": tuple(
        member.value.lower() for member in DynamoBackend if member is not DynamoBackend.NO
    ),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}
_DEBUG_OPTIONS = tuple(option.value for option in DebugOption)


def _annotated_types() -> Mapping[str, tuple[type, ...]]:
    """The types that transformers' annotations allow, by setting."""
    allowed: dict[str, tuple[type, ...]] = {}
    for name, hint in typing.get_type_hints(Seq2SeqTrainingArguments).items():
        is_union = isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union
        kinds: list[type] = []
        for member in typing.get_args(hint) if is_union else (hint,):
            if typing.get_origin(member) is typing.Literal:
                kinds += map(type, typing.get_args(member))
            else:
                kinds.append(typing.get_origin(member) or member)
        allowed[name] = tuple(kinds)
    allowed["fsdp"] += (bool, list)  # what the annotation says is for the command line
    allowed["generation_config"] += (dict,)  # what a GenerationConfig becomes
    return allowed


_TYPES = _annotated_types()


def choices(name: str) -> tuple[str, ...]:
    """The strings a setting may be, in the installed transformers; empty if any will do."""
    if name in _CHOICES:
        return _CHOICES[name]
    if name == "debug":
        return ()  # several may be given: _debug_of
    enums = [kind for kind in _TYPES[name] if isinstance(kind, type) and issubclass(kind, Enum)]
    return tuple(str(member.value) for kind in enums for member in kind)


def simplify(name: str, value: object) -> object:
    """Turn a value into the plain one it stands for: enums, paths and configuration objects.

    Args:
        name: the setting.
        value: what the user gave, of any type.

    Returns:
        The plain value, or the value itself if it stands for nothing plainer.
    """
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if name in _IN_JSON and isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return value
    if isinstance(value, AcceleratorConfig):
        value = value.to_dict()
    if isinstance(value, GenerationConfig):
        said = json.loads(value.to_json_string())
        value = {key: entry for key, entry in said.items() if key != "transformers_version"}
    if name == "accelerator_config" and isinstance(value, Mapping):
        defaults = AcceleratorConfig().to_dict()
        return {key: entry for key, entry in value.items() if key not in defaults or entry != defaults[key]}
    if isinstance(value, list | tuple | Mapping):
        value = _plain(value)
    if name in _SPELLINGS:
        return _SPELLINGS[name](value)
    # to_dict() of transformers writes this in place of the token, or of no token.
    return None if isinstance(value, str) and value == "<HUB_TOKEN>" else value


def _plain(value: object) -> object:
    """Make what lies inside lists and dictionaries plain: what a file can hold."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Integral) and not isinstance(value, bool):
        return operator.index(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _debug_spelling(value: object) -> object:
    """Join the words of `debug`, each once."""
    if value is None:
        return ""
    words = value.split() if isinstance(value, str) else value
    if isinstance(words, list) and all(isinstance(word, str) for word in words):
        return " ".join(dict.fromkeys(words))
    return value


def _file_spelling(value: object) -> object:
    """Read a dictionary from a JSON file; a string that is none stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(Path(value).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return value
    return found if isinstance(found, dict) else value


def _reporter_spelling(value: object) -> object:
    """Put one reporter into a list, and take "none" and "all" out of one."""
    if isinstance(value, str) and value not in ("none", "all"):
        return [value]
    if isinstance(value, list) and value in ([], ["none"], ["all"]):
        return value[0] if value else "none"
    return value


_SPELLINGS: Mapping[str, Callable[[typing.Any], object]] = {
    "debug": _debug_spelling,
    "report_to": _reporter_spelling,
    "include_num_input_tokens_seen": lambda value: (
        {True: "all", False: "no"}[value] if isinstance(value, bool) else value
    ),
    "fsdp_config": _file_spelling,
    "torch_compile_backend": lambda value: value.lower() if isinstance(value, str) else value,
}


def convert(name: str, value: object) -> tuple[object, str]:
    """Bring a plain value to the type of its setting.

    Args:
        name: the setting.
        value: as `simplify` returns it.

    Returns:
        The value, and a note if it was read as something else than what was given.

    Raises:
        ValueError: the value has the wrong type; the text says what is possible.
    """
    kinds, possible = _TYPES[name], choices(name)
    if wrong := _wrong_words(name, value):
        raise ValueError(wrong)
    if value is None and type(None) in kinds:
        return value, ""
    if possible:
        if value is False and "no" in possible:
            return "no", f'{name}=False is read as "no": to YAML a bare no is False; write {name}: "no"'
        if value not in possible:
            listed = ", ".join(f'"{word}"' if word == "no" else word for word in possible)
            raise ValueError(f"is not one of {listed}{suggest(value, possible)}{_in_yaml(name, value)}")
        return value, ""
    if isinstance(value, str) and float in kinds:
        return _number_in(name, value)
    if isinstance(value, Real) and not isinstance(value, bool):
        if isinstance(value, Integral) and not {int, float}.isdisjoint(kinds):
            return operator.index(value), ""
        if float in kinds:
            return float(value), ""
    elif _is_of(kinds, value, name):
        return dict(value) if isinstance(value, Mapping) else value, ""
    raise ValueError(_wrong_type(name, value, kinds))


def _wrong_words(name: str, value: object) -> str:
    """Say what is wrong with a setting that holds several words, or empty text."""
    if name == "debug" and isinstance(value, str):
        words, known = value.split(), _DEBUG_OPTIONS
    elif name == "report_to" and value is None:
        return 'must be a list of names, "all" or "none", not NoneType'
    elif name == "report_to" and isinstance(value, list):
        # By transformers' own lazy name: without peft, its module takes more time than all the others.
        words, known = value, tuple(transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK)
    elif name == "fsdp_config" and isinstance(value, str):
        return "is neither a dictionary nor the path of a JSON file that holds one"
    else:
        return ""
    for word in words:
        if word in ("none", "all") and name == "report_to":
            return f'"{word}" stands alone; leave it out of the list, or the others'
        if isinstance(word, str) and "," in word:
            listed = [part.strip() for part in word.split(",") if part.strip()]
            return f"holds several names in one string; write a list: {json.dumps(listed)}"
        if isinstance(word, str) and word not in known:
            more = ', "all" or "none"' if name == "report_to" else ""
            return f'"{word}" is not one of {", ".join(known)}{more}{suggest(word, known)}'
    if len(set(map(str, words))) < len(words):
        return "holds a name twice; write each once"
    return ""


def _is_of(kinds: tuple[type, ...], value: object, name: str) -> bool:
    """Whether a value that is no number has one of these types."""
    if isinstance(value, str):
        return str in kinds and name not in _IN_JSON
    if isinstance(value, list):
        return list in kinds and all(isinstance(item, str) for item in value)
    return (isinstance(value, bool) and bool in kinds) or (isinstance(value, Mapping) and dict in kinds)


def _number_in(name: str, text: str) -> tuple[object, str]:
    """Read a number that was written as a string, as YAML loads 2e-5.

    Raises:
        ValueError: it is no number.
    """
    try:
        number = float(text)
    except ValueError:
        raise ValueError(_wrong_type(name, text, _TYPES[name])) from None
    return number, f'{name}="{text}" is a string, read as the number {number!r}'


def _wrong_type(name: str, value: object, kinds: tuple[type, ...]) -> str:
    """Say what type a value has and which are possible."""
    names = [
        _TYPE_NAMES[kind] for kind in kinds if kind in _TYPE_NAMES and not (kind is str and name in _IN_JSON)
    ]
    names += ["a list of strings"] if list in kinds else []
    names += ["None"] if type(None) in kinds else []
    return f"must be {' or '.join(names)}, not {type(value).__name__}{_in_yaml(name, value)}"


def _in_yaml(name: str, value: object) -> str:
    """Say how to write a value in YAML that was probably written without quotes, or with, by mistake."""
    kinds, words = _TYPES[name], choices(name)
    if isinstance(value, str):
        # "true", "10": in quotes a word, without them what is wanted.
        with contextlib.suppress(yaml.YAMLError):
            meant = yaml.safe_load(value)
            if type(meant) in kinds and not isinstance(meant, str) and meant is not None:
                return f"; in YAML without quotes: {name}: {json.dumps(meant)}"
        return ""
    if not words and (str not in kinds or name in _IN_JSON):
        return ""
    if isinstance(value, bool):
        word = "none" if name == "report_to" else "no" if "no" in words else (*words, "on")[0]
        return f'; to YAML a bare no or on is False or True; write words in quotes: {name}: "{word}"'
    if isinstance(value, int | float | datetime.date) and not words:
        return f'; in YAML with quotes: {name}: "{value}"'
    return ""


def check_range(name: str, value: object) -> str:
    """Check one value of the right type by itself.

    Args:
        name: the setting.
        value: as `convert` returns it.

    Returns:
        What is wrong, or empty text.
    """
    if (
        isinstance(value, float)
        and not math.isfinite(value)
        and not (name == "max_grad_norm" and value == math.inf)
    ):
        return "must be a finite number"
    if name == "generation_config" and isinstance(value, Mapping):
        return _wrong_generation(value)
    if name not in _RANGES or value is None:
        return ""
    text, is_inside = _RANGES[name]
    return "" if is_inside(value) else f"must be {text}"


def _wrong_generation(values: Mapping[str, typing.Any]) -> str:
    """Describe what is wrong with a generation config; empty if nothing is.

    Mirrors: transformers.Seq2SeqTrainer.load_generation_config
    """
    try:
        GenerationConfig.from_dict(dict(values)).validate(strict=True)
    except (TypeError, ValueError) as error:
        return f"is no valid GenerationConfig: {' '.join(str(error).split())}"
    return ""


_AT_LEAST_1 = ("1 or more", lambda value: value >= 1)
_AT_LEAST_0 = ("0 or more", lambda value: value >= 0)
_BETA = ("from 0 to below 1", lambda value: 0 <= value < 1)

_NAME = ("a name; leave it out if there is none", lambda value: value != "")

_RANGES: Mapping[str, tuple[str, Callable[[typing.Any], bool]]] = {
    "per_device_train_batch_size": _AT_LEAST_1,
    "per_device_eval_batch_size": _AT_LEAST_1,
    "gradient_accumulation_steps": _AT_LEAST_1,
    "num_train_epochs": ("more than 0; to evaluate only, call validate", lambda value: value > 0),
    "max_steps": ("1 or more, or -1 to train for num_train_epochs", lambda value: value == -1 or value >= 1),
    "learning_rate": _AT_LEAST_0,
    "warmup_steps": (
        "a number of steps, or below 1 a share of them; never negative",
        lambda value: value >= 0,
    ),
    "weight_decay": _AT_LEAST_0,
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": _AT_LEAST_0,
    "max_grad_norm": ("0 (no clipping) or more", lambda value: value >= 0),
    "label_smoothing_factor": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "neftune_noise_alpha": ("more than 0; leave it out for no noise", lambda value: value > 0),
    "torch_empty_cache_steps": _AT_LEAST_1,
    "metric_for_best_model": _NAME,
    "optim_target_modules": (
        'a pattern, a list of them, or "all-linear"; empty, it matches no layer',
        lambda value: len(value) > 0,
    ),
    "trackio_static_space_id": ("a string, False or None, not True", lambda value: value is not True),
    "eval_delay": _AT_LEAST_0,
    "eval_accumulation_steps": _AT_LEAST_1,
    "include_for_metrics": (
        'a list of "inputs" and "loss"; predictions and labels are always given',
        lambda value: {"inputs", "loss"}.issuperset(value),
    ),
    "seed": ("from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32),
    "data_seed": ("from -2**63 to 2**64 - 1", lambda value: -(2**63) <= value < 2**64),
    "generation_max_length": _AT_LEAST_1,
    "generation_num_beams": ("1 (no beam search) or more", lambda value: value >= 1),
    "generation_config": (
        "a GenerationConfig, a dictionary, or the path or name of one; leave it out if there is none",
        lambda value: value != "",
    ),
    "dataloader_num_workers": _AT_LEAST_0,
    "dataloader_prefetch_factor": _AT_LEAST_1,
}

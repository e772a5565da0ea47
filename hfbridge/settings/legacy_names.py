"""The names that settings had in transformers 4, and what becomes of them.

    renamed   the value moves to the new name, with a note
    ignored   the value has no effect in transformers 5 either; a note says so
    removed   an error with the reason

An old name that holds its old "not set" value, as files written by transformers 4 do, is dropped. So is one
that transformers 5 still has beside the new one, if both have the same value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from hfbridge.settings.rules import DEFAULTS, is_same, show


@dataclass(frozen=True, slots=True)
class OldName:
    """What becomes of one name of transformers 4.

    Attributes:
        fate: renamed, ignored or removed.
        new: the name in transformers 5, if renamed.
        unset: values that mean "not set".
        convert: returns the new value for the old one, or raises a ValueError.
        text: why it is ignored or removed, and what to do.
    """

    fate: Literal["renamed", "ignored", "removed"]
    new: str = ""
    unset: tuple[object, ...] = ()
    convert: Callable[[object], object] = lambda value: value
    text: str = ""


@dataclass(slots=True)
class Renaming:
    """Values under their new names.

    Attributes:
        values: by the name in transformers 5; names unknown to transformers 4 and 5 are passed on.
        origins: new name -> the old name and value it came from.
        notes: new (or ignored old) name -> what was decided.
        problems: the name as given, and what is wrong with it.
    """

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, tuple[str, object]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)


def _ratio(value: object) -> object:
    """Read a warmup ratio: below 1, since `warmup_steps` takes 1 and more as a number of steps."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError("must be a number from 0 to below 1; give the number of steps as warmup_steps")
    return value


def _flag(meaning: object) -> Callable[[object], object]:
    def convert(value: object) -> object:
        if value is not True:
            raise ValueError("must be True or False")
        return meaning

    return convert


def _entry(key: str) -> Callable[[object], object]:
    return lambda value: {key: value}


def _only(*accepted: object) -> Callable[[object], object]:
    def convert(value: object) -> object:
        if value not in accepted:
            listed = ", ".join(repr(item) for item in accepted)
            raise ValueError(
                f"was removed from transformers; only {listed} is still accepted, without effect"
            )
        return value

    return convert


def _renamed(new: str, *unset: object, convert: Callable[[object], object] = lambda value: value) -> OldName:
    return OldName("renamed", new=new, unset=unset, convert=convert)


def _removed(text: str, *unset: object) -> OldName:
    return OldName("removed", unset=unset, text=text)


_GONE = "removed from transformers, without a successor; leave it out"
_AMP = "torch's own mixed precision is the only one"

OLD_NAMES: Mapping[str, OldName] = MappingProxyType(
    {
        "warmup_ratio": _renamed("warmup_steps", 0, 0.0, None, convert=_ratio),
        "evaluation_strategy": _renamed("eval_strategy"),
        "no_cuda": _renamed("use_cpu"),
        "group_by_length": _renamed("train_sampling_strategy", False, convert=_flag("group_by_length")),
        "per_gpu_train_batch_size": _renamed("per_device_train_batch_size", None),
        "per_gpu_eval_batch_size": _renamed("per_device_eval_batch_size", None),
        "include_inputs_for_metrics": _renamed("include_for_metrics", False, convert=_flag(["inputs"])),
        "include_tokens_per_second": _renamed(
            "include_num_input_tokens_seen", False, None, convert=_flag("all")
        ),
        "dispatch_batches": _renamed("accelerator_config", None, convert=_entry("dispatch_batches")),
        "split_batches": _renamed("accelerator_config", None, convert=_entry("split_batches")),
        "adafactor": _renamed("optim", False, convert=_flag("adafactor")),
        "gradient_checkpointing": _renamed("activation_checkpointing", None),
        "gradient_checkpointing_kwargs": _renamed("activation_checkpointing_kwargs", None),
        "push_to_hub_model_id": _renamed("hub_model_id", None),
        "push_to_hub_token": _renamed("hub_token", None, "<PUSH_TO_HUB_TOKEN>"),
        "xpu_backend": _renamed("ddp_backend", None),
        "fsdp_min_num_params": _renamed("fsdp_config", 0, None, convert=_entry("min_num_params")),
        "fsdp_transformer_layer_cls_to_wrap": _renamed(
            "fsdp_config", None, convert=_entry("transformer_layer_cls_to_wrap")
        ),
        "torchdynamo": _renamed("torch_compile_backend", None),
        "tpu_metrics_debug": _renamed("debug", False, convert=_flag("tpu_metrics_debug")),
        "use_mps_device": OldName("ignored", unset=(False,), text="MPS is used where there is one"),
        "overwrite_output_dir": OldName(
            "ignored", unset=(False,), text="an existing output_dir is never an error"
        ),
        "save_safetensors": OldName(
            "ignored", convert=_only(True), text="model weights are always written as safetensors"
        ),
        **dict.fromkeys(
            ("fp16_backend", "half_precision_backend", "bf16_backend"),
            OldName("ignored", convert=_only("auto", "amp", "cuda_amp", "cpu_amp"), text=_AMP),
        ),
        "fp16_opt_level": OldName("ignored", convert=_only("O1"), text=_AMP),
        "logging_dir": _removed(
            'no longer a setting; give it to a logger: Trainer(logger=CSVLogger("logs")), or, with '
            'report_to="tensorboard", to the environment variable TENSORBOARD_LOGGING_DIR',
            None,
        ),
        "push_to_hub_organization": _removed(
            "removed from transformers; it is part of hub_model_id now", None
        ),
        "tokenizer": _removed(
            "not a setting; pass it as processing_class= to HFModule and HFDataModule", None
        ),
        **dict.fromkeys(
            ("torchscript", "jit_mode_eval", "use_ipex", "use_legacy_prediction_loop"),
            _removed(_GONE, False),
        ),
        "sharded_ddp": _removed(_GONE, "", [], None),
        "mp_parameters": _removed(_GONE, "", None),
        "past_index": _removed(_GONE, -1),
        "ray_scope": _removed(_GONE, "last"),
        "tpu_num_cores": _removed(_GONE, None),
    }
)
"""Every name of transformers 4 that transformers 5 removed or deprecated."""


def rename(values: Mapping[str, object]) -> Renaming:
    """Give values of transformers 4 their names in transformers 5.

    Args:
        values: as the user gave them, with names of either version or unknown ones.

    Returns:
        The values under new names, with notes and problems.
    """
    renaming = Renaming(values={name: value for name, value in values.items() if name not in OLD_NAMES})
    for name, value in values.items():
        old = OLD_NAMES.get(name)
        if old is None or any(is_same(value, unset) for unset in old.unset):
            continue
        if old.fate == "removed":
            renaming.problems.append((name, old.text))
            continue
        try:
            converted = old.convert(value)
        except ValueError as error:
            renaming.problems.append((name, str(error)))
            continue
        if old.fate == "ignored":
            renaming.notes[name] = f"{name} is ignored: {old.text}"
        else:
            _move(name, converted, to=old.new, given=values, renaming=renaming)
    return renaming


def _move(name: str, value: object, *, to: str, given: Mapping[str, object], renaming: Renaming) -> None:
    """Put a converted value under its new name, unless that already says something else."""
    present = renaming.values.get(to)
    if isinstance(value, dict) and isinstance(present, dict) and not value.keys() & present.keys():
        value = present | value
    elif to in renaming.values and not is_same(present, value):
        other = to if to in given else renaming.origins[to][0]
        renaming.problems.append((name, f"contradicts {show(other, given[other])}; give only one of the two"))
        return
    elif name in DEFAULTS and to in given:
        return
    renaming.values[to] = value
    renaming.origins[to] = (name, given[name])
    spelled = "" if is_same(value, given[name]) else f"={value!r}"
    renaming.notes[to] = f"{name} is now called {to}{spelled}"

"""Which settings each optimizer reads, and whether it can use their values.

optim                    optim_args that are read                                     package
adamw_torch(_fused)      none                                                         torch
adafactor                none                                                         transformers
sgd, adagrad, rmsprop    those of torch, but weight_decay, which is a setting         torch
adamw_*8bit, lion_*      none                                                         bitsandbytes
*ademamix*               beta1, beta2, beta3, alpha, eps, t_alpha, t_beta3            bitsandbytes
rmsprop_bnb*             none: passed as text, where numbers are needed               bitsandbytes
adamw_torch_4bit, _8bit  bf16_stochastic_round; block_size is passed as text          torchao
schedule_free_*          weight_lr_power, r                                           schedulefree
stable_adamw             max_lr; kahan_sum and decouple_lr, where any text means True optimi
grokadamw                alpha_init, lamb, gamma, ...                                 grokadamw
galore_*, apollo_*       rank, update_proj_gap, scale, proj_type, ...                 galore_, apollo_torch
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.training_args import OptimizerNames

from hfbridge.errors import suggest
from hfbridge.settings.rules import RULES, Complaint, Unread, Value

_BETAS = frozenset({"adam_beta1", "adam_beta2"})
ADAM_FIELDS = _BETAS | {"adam_epsilon"}
"""The settings that only optimizers of Adam's family read."""

_NUMBER, _COUNT, _FLAG = "a number", "a whole number, 1 or more", "True or False"


@dataclass(frozen=True, slots=True)
class Reader:
    """What an optimizer reads.

    Attributes:
        package: the module it comes from; empty if it comes with torch or transformers.
        arguments: the names in `optim_args` that count, and what they may be: the description of a kind, or
            the words.
        ignored: names in `optim_args` that transformers takes and that have no effect, with what to do.
        adam: those of `ADAM_FIELDS` that count.
        decays: whether `weight_decay` counts.
        is_low_rank: whether `optim_target_modules` counts, and is needed.
        needs_gpu: whether it runs on a GPU only.
    """

    package: str = ""
    arguments: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    adam: Collection[str] = ADAM_FIELDS
    decays: bool = True
    is_low_rank: bool = False
    needs_gpu: bool = False


_DECAY = {"weight_decay": "the setting weight_decay stands in the parameter groups and wins; use that"}
_AS_TEXT = "transformers passes it as text, where a number is needed; leave it out"
_ONLY_TRUE = ("True",)  # bool("False") is True
_PROJECTIONS = ("std", "reverse_std", "right", "left", "full")
_LOW_RANK: Mapping[str, str | tuple[str, ...]] = {
    "rank": _COUNT,
    "update_proj_gap": _COUNT,
    "scale": _NUMBER,
    "proj_type": _PROJECTIONS,
}

_ADAM_OF_TORCH = Reader()
_BNB = "bitsandbytes"
_ADAM_OF_BNB, _LION = Reader(_BNB), Reader(_BNB, adam=_BETAS)
_ADEMAMIX = Reader(
    _BNB,
    {
        **dict.fromkeys(("beta1", "beta2", "beta3", "alpha", "eps"), _NUMBER),
        **dict.fromkeys(("t_alpha", "t_beta3"), _COUNT),
    },
)
_RMSPROP_OF_BNB = Reader(
    _BNB,
    ignored=dict.fromkeys(("alpha", "eps", "weight_decay", "momentum", "centered"), _AS_TEXT),
    adam=(),
)
_LOW_BIT = Reader("torchao", {"bf16_stochastic_round": _FLAG}, {"block_size": _AS_TEXT})
_SCHEDULE_FREE = {"weight_lr_power": _NUMBER, "r": _NUMBER}
_GALORE = Reader("galore_torch", _LOW_RANK, adam=(), decays=False, is_low_rank=True)

READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "adamw_torch": _ADAM_OF_TORCH,
        "adamw_torch_fused": _ADAM_OF_TORCH,
        "adafactor": Reader(adam=()),
        "sgd": Reader(
            arguments={"momentum": _NUMBER, "dampening": _NUMBER, "nesterov": _FLAG}, ignored=_DECAY, adam=()
        ),
        "adagrad": Reader(arguments={"lr_decay": _NUMBER, "eps": _NUMBER}, ignored=_DECAY, adam=()),
        "rmsprop": Reader(
            arguments={"momentum": _NUMBER, "alpha": _NUMBER, "eps": _NUMBER, "centered": _FLAG},
            ignored=_DECAY,
            adam=(),
        ),
        "schedule_free_radam": Reader("schedulefree", _SCHEDULE_FREE),
        "schedule_free_adamw": Reader("schedulefree", _SCHEDULE_FREE),
        "schedule_free_sgd": Reader("schedulefree", _SCHEDULE_FREE, adam=()),
        "stable_adamw": Reader(
            "optimi", {"max_lr": _NUMBER, "kahan_sum": _ONLY_TRUE, "decouple_lr": _ONLY_TRUE}
        ),
        "grokadamw": Reader(
            "grokadamw",
            dict.fromkeys(
                ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"), _NUMBER
            ),
            adam=(),
        ),
        "adamw_torch_4bit": _LOW_BIT,
        "adamw_torch_8bit": _LOW_BIT,
        "galore_adamw": _GALORE,
        "galore_adafactor": _GALORE,
        "galore_adamw_8bit": replace(_GALORE, needs_gpu=True),
        "apollo_adamw": Reader(
            "apollo_torch",
            {**_LOW_RANK, "proj": ("random", "svd"), "scale_type": ("channel", "tensor")},
            decays=False,
            is_low_rank=True,
        ),
        **dict.fromkeys(
            ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"), _ADAM_OF_BNB
        ),
        **dict.fromkeys(("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"), _LION),
        **dict.fromkeys(
            ("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), _ADEMAMIX
        ),
        **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_32bit", "rmsprop_bnb_8bit"), _RMSPROP_OF_BNB),
    }
)
"""Every supported optimizer, by its name in `optim`."""


def check_optimizer(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    """Check that the optimizer reads the settings for it, and has what it needs.

    Args:
        value: a setting by its name, given or default.
        given: the names of the settings that were given.

    Yields:
        The name of a setting, and what is wrong with its value.

    Mirrors: transformers.Trainer.get_optimizer_cls_and_kwargs
    Proved by: tests/unit/settings/test_optimizer_requirements.py
    """
    optim, targets, text = value("optim"), value("optim_target_modules"), value("optim_args")
    if not RULES["optim"].supports(optim):
        return
    reader = READERS[optim]
    if reader.is_low_rank and targets is None:
        blamed = "optim" if "optim" in given else "optim_target_modules"
        yield blamed, 'needs optim_target_modules, such as "all-linear" or ["attn", "mlp"]'
    elif targets is not None and not reader.is_low_rank:
        readers = ", ".join(name for name, other in READERS.items() if other.is_low_rank)
        yield "optim_target_modules", Unread(f"{optim} does not read it, only {readers}; leave it out")
    for pattern in [targets] if isinstance(targets, str) else targets or ():
        try:
            re.compile(pattern)
        except re.error as error:
            yield "optim_target_modules", f"{pattern!r} is no regular expression: {error}"
    if text:
        wrong = list(_check_arguments(optim, text))
        yield from (("optim_args", complaint) for complaint in wrong)
        if not wrong and (raised := _error_of_torch(optim, text, value)):
            yield "optim_args", f"{optim} raises: {raised}"


def _check_arguments(optim: str, text: str) -> Iterator[str]:
    """Check `optim_args`, whose unknown names transformers drops silently."""
    reader, seen = READERS[optim], set()
    if not reader.arguments and not reader.ignored:
        instead = "use the settings of its name, such as adam_beta1, or leave it out"
        yield Unread(f"{optim} does not read it; {instead}")
        return
    for part in text.replace(" ", "").split(","):
        name, sign, entry = part.partition("=")
        if not sign or not name or not entry or "=" in entry:
            yield f'{part!r} is not of the form key=value; write "key=value,key=value"'
        elif name in seen:
            yield f"{name} occurs twice; the last would win"
        elif name in reader.ignored:
            yield f"{name} cannot be used: {reader.ignored[name]}"
        elif name not in reader.arguments:
            known = reader.arguments
            possible = f"possible are {', '.join(known)}" if known else "there are none"
            yield f"{name} is no argument of {optim}; {possible}{suggest(name, known)}"
        elif wrong := _wrong_entry(entry, reader.arguments[name]):
            yield f"{name} must be {wrong}, not {entry!r}"
        seen.add(name)


def _wrong_entry(entry: str, kind: str | tuple[str, ...]) -> str:
    """Describe what a value in `optim_args` must be; empty if it is that."""
    if kind is _ONLY_TRUE:
        more = "; to transformers any text means True, even False: leave it out"
        return "" if entry in _ONLY_TRUE else f"True{more}"
    if isinstance(kind, tuple):
        return "" if entry in kind else f"one of {', '.join(kind)}"
    if kind == _FLAG:
        return "" if entry.lower() in ("true", "false", "1", "0", "yes", "no") else kind
    try:
        number = float(entry) if kind == _NUMBER else int(entry)
    except ValueError:
        return str(kind)
    is_right = math.isfinite(number) and (kind == _NUMBER or number >= 1)
    return "" if is_right else f"{kind}{', finite' if kind == _NUMBER else ''}"


def _error_of_torch(optim: str, text: str, value: Value) -> str:
    """Build one of torch's optimizers over a single number, and return its error."""
    if READERS[optim].package:
        return ""
    read = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon")
    args: Any = SimpleNamespace(
        optim=OptimizerNames(optim), optim_args=text, **{name: value(name) for name in read}
    )
    try:
        # By transformers' own lazy name: the Trainer's module takes a second, and few need it here.
        kind, arguments = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
        kind([torch.zeros(1, requires_grad=True)], **arguments)
    except ValueError as error:
        return str(error)
    return ""

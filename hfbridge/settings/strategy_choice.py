"""Choose the strategy of a run.

    Trainer(strategy=)                       settings                    strategy
    "ddp"                                    -                           ddp
    "fsdp2"                                  fsdp=True                   fsdp2
    "fsdp"                                   fsdp_config version 1       fsdp
    "deepspeed", "deepspeed_stage_..."       deepspeed={...}             deepspeed
    (none), with several devices or ranks    -                           ddp
    (none)                                   -                           single
    an object                                -                           that object

Argument and setting must agree.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from hfbridge.errors import suggest
from hfbridge.settings.deepspeed_config import check_config
from hfbridge.settings.fsdp_config import (
    fsdp_conflicts,
    fsdp_options,
    fsdp_problems,
    read_config,
    unread_keys,
    version_of,
)
from hfbridge.settings.rules import DEFAULTS, Complaint, is_same, show
from hfbridge.settings.settings import Settings

Kind = Literal["single", "ddp", "fsdp", "fsdp2", "deepspeed", "given"]

NAMES: Mapping[str, tuple[Kind, Mapping[str, Any]]] = {
    "ddp": ("ddp", {}),
    "ddp_find_unused_parameters_true": ("ddp", {"find_unused_parameters": True}),
    "ddp_find_unused_parameters_false": ("ddp", {"find_unused_parameters": False}),
    "fsdp": ("fsdp", {}),
    "fsdp2": ("fsdp2", {}),
    "deepspeed": ("deepspeed", {}),
    "deepspeed_stage_1": ("deepspeed", {"stage": 1}),
    "deepspeed_stage_2": ("deepspeed", {"stage": 2}),
    "deepspeed_stage_2_offload": ("deepspeed", {"stage": 2, "offload": True}),
    "deepspeed_stage_3": ("deepspeed", {"stage": 3}),
    "deepspeed_stage_3_offload": ("deepspeed", {"stage": 3, "offload": True}),
}
"""The names of strategies, with the kind and options of each."""

NAMES_IN_SHORT = "ddp, fsdp, fsdp2, deepspeed_stage_1, _2 and _3 (_2 and _3 also with _offload)"
"""The same for messages."""

_FSDP: Mapping[int, Kind] = {1: "fsdp", 2: "fsdp2"}
_DDP_FIELDS = tuple(name for name in DEFAULTS if name.startswith("ddp_"))
_DEFAULT_BUCKET_MB = 25
_EVERY_STRATEGY_READS = ("ddp_backend", "ddp_timeout")


@dataclass(frozen=True)
class Launched:
    """The processes that a launcher has started.

    Attributes:
        world_size: ranks on all nodes.
        local_world_size: ranks on this node.
    """

    world_size: int
    local_world_size: int


@dataclass(frozen=True)
class StrategyChoice:
    """The strategy of a run.

    Attributes:
        kind: its name; "given" is an object of the user's.
        options: arguments of its class; none for "given".
        notes: settings that it does not read.
    """

    kind: Kind
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def choose_strategy(settings: Settings, strategy: object, *, has_several: bool) -> StrategyChoice:
    """Choose the strategy of a run.

    Args:
        settings: of the run.
        strategy: `Trainer(strategy=)`; a name, an object, or `None` or "auto" for no choice.
        has_several: there are several devices or ranks.

    Raises:
        ValueError: the argument is wrong, or conflicts with the settings.
    """
    configured = _kind_in_settings(settings)
    if strategy is None or strategy == "auto":
        kind: Kind = configured or ("ddp" if has_several else "single")
        options: Mapping[str, Any] = {}
    elif not isinstance(strategy, str):
        if configured:
            raise ValueError(_conflict(strategy, settings, configured))
        if all(kind.__name__ != "Strategy" for kind in type(strategy).__mro__):
            raise ValueError(f"must be a strategy, got {strategy!r}; set a name: {NAMES_IN_SHORT}")
        return StrategyChoice("given", notes=tuple(_unread(settings, "given")))
    elif strategy not in NAMES:
        raise ValueError(
            f"is unknown{suggest(strategy, tuple(NAMES))}; there are {NAMES_IN_SHORT}, and objects of "
            "hfbridge.strategies"
        )
    else:
        kind, options = NAMES[strategy]
        if configured and configured != kind:
            raise ValueError(_conflict(strategy, settings, configured))
    return StrategyChoice(kind, {**_options(kind, settings), **options}, tuple(_unread(settings, kind)))


def check_ranks(settings: Settings) -> Iterator[Complaint]:
    """Check that settings fit a run of several ranks; those of the strategies have checks of their own."""
    if settings.auto_find_batch_size:
        yield (
            "auto_find_batch_size",
            "cannot start again with several ranks: one that runs out of memory alone leaves the others "
            "waiting; leave it out, and set per_device_train_batch_size",
        )
    if not (settings.accelerator_config or {}).get("even_batches", True):
        yield (
            "accelerator_config",
            "even_batches=False gives ranks different numbers of micro-batches, and those that have one more "
            "would wait for the others forever; leave it out, or drop the rest by dataloader_drop_last=True",
        )


def _kind_in_settings(settings: Settings) -> Kind | None:
    if settings.deepspeed:
        return "deepspeed"
    if settings.fsdp:
        return _FSDP[version_of(settings.fsdp_config)]
    return None


def _conflict(strategy: object, settings: Settings, configured: Kind) -> str:
    name = "deepspeed" if configured == "deepspeed" else "fsdp"
    shown = show(name, getattr(settings, name)).replace(" = ", "=", 1)
    value = f'"{strategy}"' if isinstance(strategy, str) else f"{type(strategy).__name__}(...)"
    return (
        f"`strategy={value}` conflicts with `{shown}`, which is {configured}, in the settings; set only one"
    )


def _options(kind: Kind, settings: Settings) -> dict[str, Any]:
    """Read the arguments of the strategy's class from the settings."""
    if kind == "single":
        return {}
    options: dict[str, Any] = {"timeout": timedelta(seconds=settings.ddp_timeout)}
    if settings.ddp_backend is not None:
        options["process_group_backend"] = settings.ddp_backend
    if kind == "deepspeed":
        if isinstance(settings.deepspeed, Mapping) and settings.deepspeed:
            check_config(settings.deepspeed, settings)
        options |= {"config": settings.deepspeed or None, "settings": settings}
        options |= {"on_cpu": True} if settings.use_cpu else {}
    if kind == "ddp":
        names = ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers", "static_graph")
        configured = {name: getattr(settings, f"ddp_{name}") for name in names}
        if configured["bucket_cap_mb"] == _DEFAULT_BUCKET_MB:
            # Passed to torch, it would be the size of the first bucket, too; accelerate leaves it out.
            del configured["bucket_cap_mb"]
        options |= {name: value for name, value in configured.items() if value is not None}
    if kind in _FSDP.values():
        options |= _fsdp_options(kind, settings)
    return options


def _fsdp_options(kind: Kind, settings: Settings) -> dict[str, Any]:
    """Read `fsdp` and `fsdp_config` for the chosen version; raises ValueError for what conflicts with it."""
    version, config = (1 if kind == "fsdp" else 2), settings.fsdp_config
    if "version" in read_config(config) and version_of(config) != version:
        shown = show("fsdp_config", config).replace(" = ", "=", 1)
        raise ValueError(f"{shown} in the settings names the other version; set only one")
    found = [*fsdp_problems(settings.fsdp, config, version=version)]
    found += fsdp_conflicts(lambda name: getattr(settings, name), config)
    if found:
        raise ValueError("; ".join(f"{name} in the settings: {text}" for name, text in found))
    return fsdp_options(settings.fsdp, config, version=version)


def _read_by(kind: Kind) -> Collection[str]:
    return () if kind in ("single", "given") else _DDP_FIELDS if kind == "ddp" else _EVERY_STRATEGY_READS


def _unread(settings: Settings, kind: Kind) -> Iterator[str]:
    """List settings about processes that have no effect."""
    read = _read_by(kind)
    for name in _DDP_FIELDS:
        value = getattr(settings, name)
        if name not in read and not is_same(value, DEFAULTS[name]):
            yield f"{show(name, value)} has no effect here: the strategy does not read it"
    if kind not in _FSDP.values() and settings.fsdp_config:
        yield "fsdp_config has no effect here: the strategy is not FSDP"
    elif kind in _FSDP.values():
        yield from unread_keys(settings.fsdp_config, version=1 if kind == "fsdp" else 2)

"""The engines of a comparison, and how they are named.

name                             trains with
native                           transformers.Trainer; on several ranks by DDP
native:deepspeed_stage_2         the same, with the configuration that hfbridge fills for that strategy
accelerate                       a loop written with accelerate; on several ranks by DDP
lightning                        hfbridge; on several ranks by DDP, or as the job's settings say
lightning:fsdp2                  hfbridge with that strategy
lightning@exact                  hfbridge with `loss_normalization="exact"`; else it is "native"
lightning:ddp@exact              both
"""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from hfbridge.errors import JobError, MissingDependencyError, Problem, raise_problems, suggest
from hfbridge.settings.strategy_choice import NAMES, NAMES_IN_SHORT

Kind = Literal["native", "accelerate", "lightning"]
Normalization = Literal["native", "exact"]

ENGINES: tuple[str, ...] = get_args(Kind)
"""Kinds of engines; each but "accelerate" may be followed by a strategy, as in "lightning:fsdp2"."""

_NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)
_NATIVE = ("ddp", *(name for name in NAMES if name.startswith("deepspeed_stage_")))


def slug_of(name: str) -> str:
    """Name an engine's folder: `lightning-deepspeed_stage_2` of `lightning:deepspeed_stage_2`."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip(".") or "-"


@dataclass(frozen=True)
class Engine:
    """One engine of a comparison.

    Attributes:
        name: as it was given.
        kind: what trains.
        strategy: how ranks share the work; `None` leaves it to the engine.
        normalization: of hfbridge's loss.
    """

    name: str
    kind: Kind
    strategy: str | None = None
    normalization: Normalization = "native"

    @property
    def slug(self) -> str:
        """The name of its folder."""
        return slug_of(self.name)

    @property
    def needs_deepspeed(self) -> bool:
        """Whether its strategy is DeepSpeed's."""
        return (self.strategy or "").startswith("deepspeed")

    @classmethod
    def parse(cls, name: str) -> "Engine":
        """Read an engine's name.

        Raises:
            ValueError: what is wrong with it.
        """
        rest, has_normalization, normalization = name.partition("@")
        kind, has_strategy, strategy = rest.partition(":")
        if kind not in ENGINES:
            raise ValueError(f"is unknown{suggest(kind, ENGINES)}; there are {', '.join(ENGINES)}")
        if has_normalization and kind != "lightning":
            raise ValueError("has a loss of its own; @exact and @native are for lightning")
        if has_normalization and normalization not in _NORMALIZATIONS:
            raise ValueError(
                f"@{normalization} is unknown{suggest(normalization, _NORMALIZATIONS)}; there are @exact and "
                "@native"
            )
        if has_strategy:
            _check_strategy(kind, strategy)
        used: Any = normalization if has_normalization else "native"
        return cls(name, cast(Kind, kind), strategy if has_strategy else None, used)


def parse_engines(names: Sequence[str]) -> list[Engine]:
    """Read the engines of a comparison; the first one is what the others are compared with.

    Raises:
        JobError: with everything that is wrong with them.
        MissingDependencyError: a strategy needs a package that is not installed.
    """
    if isinstance(names, str):
        raise JobError(f"engines={names!r}; give a list of names: {names.split(',')!r}")
    problems = list(_problems(names))
    if problems:
        raise_problems(JobError, "These engines cannot be compared; nothing was started.", problems)
    found = [Engine.parse(name) for name in names]
    for engine in found:
        if engine.needs_deepspeed and importlib.util.find_spec("deepspeed") is None:
            raise MissingDependencyError(
                f"{engine.name} needs the package deepspeed, which is not installed; run: pip install "
                '"hfbridge[deepspeed]"',
                name="deepspeed",
            )
    return found


def pairs_of(engines: Sequence[Engine]) -> list[tuple[Engine, Engine]]:
    """Pair the engines to be judged, theirs and ours.

    Each one with the first; and, since that may have another strategy, each Lightning engine with "native" of
    its own.
    """
    pairs = [(engines[0], other) for other in engines[1:]]
    natives = {engine.strategy: engine for engine in engines[1:] if engine.kind == "native"}
    for engine in engines[1:]:
        if engine.kind == "lightning" and engine.normalization == "native" and engine.strategy in natives:
            pairs.append((natives[engine.strategy], engine))
    return pairs


def _problems(names: Sequence[str]) -> Iterator[Problem]:
    slugs: dict[str, str] = {}
    for name in names:
        try:
            slug = Engine.parse(name).slug
        except ValueError as error:
            yield Problem(name, str(error))
            continue
        if slug in slugs:
            yield Problem(name, "is named twice; name each engine once")
        slugs[slug] = name
    if len(names) < 2:
        text = "a comparison needs two at least, the reference first: native and lightning, say"
        yield Problem(f"engines={list(names)!r}", text)


def _check_strategy(kind: str, strategy: str) -> None:
    if kind == "accelerate":
        raise ValueError("takes no strategy: on several ranks its loop works by DDP; leave it out")
    if strategy not in NAMES:
        raise ValueError(
            f"{strategy!r} is unknown{suggest(strategy, tuple(NAMES))}; there are {NAMES_IN_SHORT}"
        )
    if kind == "native" and strategy not in _NATIVE:
        reason = "has FSDP on GPUs only, by fsdp in the job's settings" if "fsdp" in strategy else "has not"
        raise ValueError(f"the HF Trainer {reason}; possible are {', '.join(_NATIVE)}")

"""Arguments for Lightning that wait for settings not known yet, as in a script that is only read.

argument                setting it waits for
max_epochs              max_steps; num_train_epochs, unless max_steps decides
max_steps               max_steps
accelerator             use_cpu
default_root_dir        output_dir
enable_progress_bar     disable_tqdm
log_every_n_steps       logging_strategy; logging_steps, if that counts steps
strategy, devices       deepspeed, fsdp, fsdp_config, unless the Trainer says them
"""

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from hfbridge.settings.settings import Settings

OF_STRATEGIES = ("deepspeed", "fsdp", "fsdp_config")
"""The settings that may choose a strategy."""


def waiting(settings: Settings, said: Mapping[str, Any]) -> Mapping[str, tuple[str, ...]]:
    """Name the arguments of `lightning.Trainer` that follow from undecided settings.

    Args:
        settings: of which some may be undecided.
        said: the arguments of the Trainer beside them.

    Returns:
        Each argument, with the settings it waits for.

    Proved by: tests/unit/settings/test_undecided.py
    """
    undecided = settings.undecided
    found = {name: tuple(n for n in of if n in undecided) for name, of in _sources(settings, said)}
    return MappingProxyType({name: of for name, of in found.items() if of})


def _sources(settings: Settings, said: Mapping[str, Any]) -> Iterator[tuple[str, Collection[str]]]:
    """Name the settings that each argument follows from."""
    has_steps = "max_steps" not in settings.undecided and settings.max_steps > 0
    yield "max_epochs", () if has_steps else ("max_steps", "num_train_epochs")
    yield "max_steps", ("max_steps",)
    yield "accelerator", ("use_cpu",)
    yield "default_root_dir", ("output_dir",)
    yield "enable_progress_bar", ("disable_tqdm",)
    counts = "logging_strategy" in settings.undecided or settings.logging_strategy == "steps"
    yield "log_every_n_steps", ("logging_strategy", "logging_steps") if counts else ()
    if said.get("strategy") in (None, "auto"):
        yield "strategy", OF_STRATEGIES
        if said.get("devices") in (None, "auto"):
            yield "devices", OF_STRATEGIES

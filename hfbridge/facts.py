"""What all ranks of a run must have been given alike, for agreement.compare; knows both worlds.

settings    every value that is not the default, but for those which only the first rank reads
data        rows, columns and a part of the contents of each set, as given (data/mapping.py)
model       names, shapes, dtypes of its parameters, and which are trained; not the weights: the first
            rank's are used
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from hfbridge.agreement import Fact
from hfbridge.data.mapping import facts_of
from hfbridge.settings import Settings
from hfbridge.settings.fields import DEFAULTS, is_same, show

# Scripts give these to the first rank only, or by the time of day, and nothing comes of it.
_MAY_DIFFER = (
    "disable_tqdm",
    "log_level",
    "log_level_replica",
    "output_dir",
    "report_to",
    "run_name",
)
_OF_SETTINGS = "Give all ranks the same: no times, ranks or random names in it."
_OF_MODEL = "Build the same model on every rank."


def facts_of_run(settings: Settings, sets: Mapping[str, Any]) -> Iterator[Fact]:
    """Describe what a run was given for comparing it with what the other ranks were given.

    Args:
        settings: of the run.
        sets: by their splits, as the user gave them.
    """
    yield from facts_of_settings(settings)
    for split, given in sets.items():
        yield from facts_of(given, split)


def facts_of_settings(settings: Settings) -> Iterator[Fact]:
    """Describe settings for comparing them with those of other ranks."""
    for name in DEFAULTS:
        value = getattr(settings, name)
        if name not in _MAY_DIFFER and not is_same(value, DEFAULTS[name]):
            text = show(name, value).partition(" = ")[2]
            if text.endswith("..."):  # cut: two long values may begin alike
                text += f" (digest {hashlib.sha256(repr(value).encode()).hexdigest()[:12]})"
            yield Fact(f"the setting {name}", text, _OF_SETTINGS)


def facts_of_model(model: nn.Module) -> Iterator[Fact]:
    """Describe a model for comparing it with those of other ranks.

    One that FSDP has cut in an earlier run is described as it is as a whole.
    """
    parameters = getattr(model, "_outline", None) or dict(model.named_parameters())
    for name, parameter in parameters.items():
        shape: Any = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed holds it elsewhere
        kind = str(parameter.dtype).removeprefix("torch.")
        trained = "" if parameter.requires_grad else ", not trained"
        yield Fact(f"the parameter {name}", f"{list(shape)} {kind}{trained}", _OF_MODEL)

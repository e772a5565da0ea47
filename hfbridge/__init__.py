"""hfbridge runs the Hugging Face training stack under PyTorch Lightning, with the same numbers.

`import hfbridge` imports nothing else: each name imports its module, and what that needs, at its first
use. So commands that train nothing answer at once.
"""

import gc
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfbridge.checkpoints.convert import convert
    from hfbridge.data.span_corruption import DataCollatorForT5MLM
    from hfbridge.datamodule import HFDataModule
    from hfbridge.dropin.from_trainer import from_trainer
    from hfbridge.errors import (
        BridgeError,
        BridgeWarning,
        CheckpointError,
        DataError,
        JobError,
        MetricsError,
        MissingDependencyError,
        ModelError,
        RankError,
        ReportError,
        SettingsError,
    )
    from hfbridge.evaluation.generation import decode
    from hfbridge.metrics.load import load_metric
    from hfbridge.module import HFModule
    from hfbridge.settings import Settings
    from hfbridge.trainer import Trainer

__all__ = [
    "BridgeError",
    "BridgeWarning",
    "CheckpointError",
    "DataCollatorForT5MLM",
    "DataError",
    "HFDataModule",
    "HFModule",
    "JobError",
    "MetricsError",
    "MissingDependencyError",
    "ModelError",
    "RankError",
    "ReportError",
    "Settings",
    "SettingsError",
    "Trainer",
    "convert",
    "decode",
    "from_trainer",
    "load_metric",
]

# Where each name is at home; the errors are all in one module.
_HOMES = {
    "DataCollatorForT5MLM": "data.span_corruption",
    "HFDataModule": "datamodule",
    "HFModule": "module",
    "Settings": "settings",
    "Trainer": "trainer",
    "convert": "checkpoints.convert",
    "decode": "evaluation.generation",
    "from_trainer": "dropin.from_trainer",
    "load_metric": "metrics.load",
}
# Rooms whose public names are reached through them: hfbridge.strategies.FSDP2Strategy().
_ROOMS = ("compare", "dropin", "strategies")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return _import(f"hfbridge.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'hfbridge' has no attribute {name!r}")
    value = getattr(_import(f"hfbridge.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})


def _import(name: str) -> Any:
    """Import a module, and let garbage wait: looking takes a fifth of the time, and finds little."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if collects:
            gc.enable()

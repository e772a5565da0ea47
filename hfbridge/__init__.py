"""hfbridge runs the Hugging Face training stack under PyTorch Lightning, with the same numbers."""

from hfbridge.datamodule import HFDataModule
from hfbridge.errors import (
    BridgeError,
    BridgeWarning,
    DataError,
    MetricsError,
    MissingDependencyError,
    ModelError,
    SettingsError,
)
from hfbridge.module import HFModule
from hfbridge.settings import Settings
from hfbridge.trainer import Trainer

__all__ = [
    "BridgeError",
    "BridgeWarning",
    "DataError",
    "HFDataModule",
    "HFModule",
    "MetricsError",
    "MissingDependencyError",
    "ModelError",
    "Settings",
    "SettingsError",
    "Trainer",
]

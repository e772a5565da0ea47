"""hfbridge runs the Hugging Face training stack under PyTorch Lightning, with the same numbers."""

from hfbridge.checkpoints.export import convert
from hfbridge.data.spans import DataCollatorForT5MLM
from hfbridge.datamodule import HFDataModule
from hfbridge.errors import (
    BridgeError,
    BridgeWarning,
    CheckpointError,
    DataError,
    MetricsError,
    MissingDependencyError,
    ModelError,
    RankError,
    SettingsError,
)
from hfbridge.evaluation.generate import decode
from hfbridge.metrics.load import load_metric
from hfbridge.migrate import from_trainer
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
    "MetricsError",
    "MissingDependencyError",
    "ModelError",
    "RankError",
    "Settings",
    "SettingsError",
    "Trainer",
    "convert",
    "decode",
    "from_trainer",
    "load_metric",
]

"""The progress bar of a run: one bar over its optimizer steps; knows both worlds.

It is what `hfbridge.Trainer` shows unless the user brings a bar of Lightning's or of transformers'.
"""

import logging
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from transformers import ProgressCallback
from transformers.utils.logging import get_verbosity

from hfbridge.settings import Settings

# Shown in this order and under these names, when a row has them.
_SHOWN = {"loss": "loss", "grad_norm": "norm", "learning_rate": "lr"}
_HIDDEN = ("_runtime", "_per_second")


class RunProgressBar(TQDMProgressBar):
    """Show the whole run in one bar, with the last logged loss, gradient norm, learning rate and metrics.

    Lightning's own bars begin anew each epoch and show a learning rate of 2e-5 as 0.000.
    """

    _rows_shown = 0

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Write the last logged values with four significant digits."""
        logged = trainer.progress_bar_metrics
        names = [name for name in _SHOWN if name in logged]
        names += [name for name in logged if name not in _SHOWN and not name.endswith(_HIDDEN)]
        return {_SHOWN.get(name, name): f"{logged[name]:.4g}" for name in names}

    @property
    def validation_description(self) -> str:
        """Text before the bar of an evaluation."""
        return "Evaluation"

    def on_train_start(self, *hook: Any) -> None:
        """Begin the bar of the run."""
        super().on_train_start(*hook)
        self.train_progress_bar.reset(total=self.trainer.max_steps)
        self.train_progress_bar.initial = self.trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, *hook: Any) -> None:
        """Tell the epoch; the bar goes on."""
        epochs = trainer.max_epochs
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch + 1}/{epochs}", refresh=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on by one optimizer step; tqdm decides when to draw."""
        module: Any = pl_module
        rows = len(module.log_history)
        if rows != self._rows_shown:
            self._rows_shown = rows
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        self.train_progress_bar.update(trainer.global_step - self.train_progress_bar.n)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Begin the bar of an evaluation."""
        if self.has_dataloader_changed(dataloader_idx):
            self.val_progress_bar.reset(total=self.total_val_batches_current_dataloader)
            self.val_progress_bar.set_description(self.validation_description)


def has_native_bar(callbacks: Iterable[Any]) -> bool:
    """Tell whether a `ProgressCallback` of transformers, or its class, is among a run's callbacks."""
    return any(issubclass(cb if isinstance(cb, type) else type(cb), ProgressCallback) for cb in callbacks)


def is_silenced(settings: Settings) -> bool:
    """Tell whether rows are printed instead of a bar because transformers is to tell errors only.

    Mirrors: transformers.TrainingArguments
    """
    return settings.disable_tqdm is None and get_verbosity() > logging.WARNING

"""The progress bar of `hfbridge.Trainer`: one bar over the optimizer steps of a run."""

import logging
import sys
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.trainer.states import TrainerFn
from transformers import ProgressCallback
from transformers.utils.logging import get_verbosity

from hfbridge.data.iterable import ENDLESS
from hfbridge.settings import Settings

# Shown under these names, and the first and the last of all that a log entry has.
_SHOWN = {"loss": "loss", "learning_rate": "lr", "grad_norm": "norm"}
_HIDDEN = ("_runtime", "_per_second")


class RunProgressBar(TQDMProgressBar):
    """Show the whole run in one bar, with the last logged loss, metrics, learning rate and gradient norm.

    Lightning's bars restart each epoch and show a learning rate of 2e-5 as 0.000. Values that do not fit into
    the terminal are left out, and the bar keeps ten columns.

    Proved by: tests/unit/callbacks/test_progress.py
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

    _entries_shown = 0

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Format the last logged values with four significant digits, the most important first."""
        logged = trainer.progress_bar_metrics
        metrics = [name for name in logged if name not in _SHOWN and not name.endswith(_HIDDEN)]
        names = [name for name in ("loss", *metrics, "learning_rate", "grad_norm") if name in logged]
        return {_SHOWN.get(name, name): f"{logged[name]:.4g}" for name in names}

    def init_train_tqdm(self) -> Tqdm:
        """Begin the bar of the run at the step where the run begins."""
        trainer = self.trainer
        return self._begin("Training", trainer.max_steps, initial=trainer.global_step, leave=True)

    def init_validation_tqdm(self) -> Tqdm:
        """Begin the bar of an evaluation with its length, below the bar of the run if there is one."""
        is_below = self.trainer.state.fn != TrainerFn.VALIDATING
        length = int(sum(self.trainer.num_val_batches))
        known = length if length < ENDLESS else None
        return self._begin("Evaluation", known, line=int(is_below), leave=not is_below)

    def _begin(self, text: str, length: int | None, *, leave: bool, line: int = 0, initial: int = 0) -> Tqdm:
        return Tqdm(
            desc=text,
            total=length,
            initial=initial,
            leave=leave,
            position=2 * self.process_position + line,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, *hook: Any) -> None:
        """Show the epoch in the bar of the run."""
        text = f"Epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self.train_progress_bar.set_description(text, refresh=False)

    def on_train_batch_start(self, *hook: Any) -> None:
        """Clear the bar before the first step, which may log notes."""
        bar = self.train_progress_bar
        if not bar.disable and bar.n == bar.initial:
            bar.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance by one optimizer step; tqdm decides when to draw."""
        self._show_entry(trainer, pl_module)
        self.train_progress_bar.update(trainer.global_step - self.train_progress_bar.n)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the last log entry; at the end of the run clear the bar for Lightning's messages."""
        self._show_entry(trainer, pl_module)
        self._draw(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the bar of an evaluation below the bar of the run."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.train_progress_bar.refresh()
        super().on_validation_start(trainer, pl_module)

    def on_validation_batch_start(self, *hook: Any) -> None:
        """Keep the bar: all sets share it."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the bar of the evaluation, and show its metrics in the bar of the run."""
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_entry(trainer, pl_module)
            self._draw(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave one line with the last values."""
        self._show_entry(trainer, pl_module)
        self.train_progress_bar.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the bars, so that the error begins on a line of its own."""
        for bar in (self._val_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()

    def _show_entry(self, trainer: pl.Trainer, module: Any) -> None:
        """Show the last log entry after the bar, if there is a new one."""
        entries = len(module.log_history)
        if entries != self._entries_shown:
            self._entries_shown = entries
            shown = [f"{name}={value}" for name, value in self.get_metrics(trainer, module).items()]
            bar = self.train_progress_bar
            bar.set_postfix_str(", ".join(shown if bar.disable else fitting(shown, bar)), refresh=False)

    def _draw(self, trainer: pl.Trainer) -> None:
        bar = self.train_progress_bar
        if trainer.global_step < trainer.max_steps:
            bar.refresh()
        else:
            bar.clear()  # drawn again when it is closed, below Lightning's messages


def fitting(shown: list[str], bar: Any) -> list[str]:
    """Choose, in their order, the texts that fit after a tqdm bar of ten columns in its terminal."""
    drawn = {**bar.format_dict, "postfix": "", "n": bar.total}
    columns = drawn.pop("ncols")
    if columns is None:
        return shown
    room = columns - len(bar.format_meter(**drawn, ncols=None)) - 1
    chosen = []
    for text in shown:
        if len(text) + 2 <= room:
            chosen.append(text)
            room -= len(text) + 2
    return chosen


def has_progress_callback(callbacks: Iterable[Any]) -> bool:
    """Whether a `ProgressCallback` of transformers, or its class, is among a run's callbacks."""
    return any(issubclass(cb if isinstance(cb, type) else type(cb), ProgressCallback) for cb in callbacks)


def is_silenced(settings: Settings) -> bool:
    """Whether log entries are printed instead of a bar because transformers logs errors only.

    Mirrors: transformers.TrainingArguments
    """
    return settings.disable_tqdm is None and get_verbosity() > logging.WARNING

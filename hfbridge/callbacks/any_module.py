"""What settings mean for a LightningModule of the user's: Lightning's own loop, callbacks and plugins.

setting                                      for any module
max_steps, num_train_epochs                  max_steps, max_epochs; a part of an epoch is counted in steps
gradient_accumulation_steps, max_grad_norm   accumulate_grad_batches, gradient_clip_val
bf16                                         precision "bf16-mixed"
logging_steps                                log_every_n_steps
eval_strategy, eval_steps                    check_val_every_n_epoch, val_check_interval
save_strategy, save_steps, save_total_limit,
  metric_for_best_model                      a ModelCheckpoint in output_dir
seed                                         set_seed before the run
output_dir                                   default_root_dir
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning_utilities.core.rank_zero import rank_zero_info
from transformers import set_seed

from hfbridge.callbacks.connector import note_of_seeds
from hfbridge.evaluation.metrics import metric_name
from hfbridge.settings import Settings


@contextmanager
def configured_for(trainer: Any, module: pl.LightningModule) -> Iterator[None]:
    """Configure an `hfbridge.Trainer` for a LightningModule of the user's.

    Args:
        trainer: the Trainer, with its plan.
        module: that it is about to train.
    """
    settings: Settings = trainer.settings
    if trainer.plan.has_settings:
        if "seed" in settings.given:
            if note := note_of_seeds(settings):
                rank_zero_info(f"hfbridge: {note}")
            set_seed(settings.seed)
        _set_precision(trainer, settings)
        if not module.automatic_optimization:
            trainer.accumulate_grad_batches = trainer.plan.passed.get("accumulate_grad_batches") or 1
            trainer.gradient_clip_val = trainer.plan.passed.get("gradient_clip_val")
        if not trainer.plan.validates:
            _set_validation(trainer, settings)
        _add_checkpoint(trainer, settings)
    yield


def _set_precision(trainer: Any, settings: Settings) -> None:
    """Have Lightning autocast the module's steps."""
    if settings.bf16 and type(trainer.strategy.precision_plugin) is Precision:
        device = trainer.strategy.root_device.type
        trainer.strategy.precision_plugin = MixedPrecision("bf16-mixed", device)


def _set_validation(trainer: Any, settings: Settings) -> None:
    """Have Lightning validate when `eval_strategy` says; its intervals count batches and not steps."""
    if settings.eval_strategy == "epoch":
        trainer.check_val_every_n_epoch = 1
    elif settings.eval_strategy == "steps":
        every = settings.eval_steps or settings.logging_steps
        trainer.check_val_every_n_epoch = None
        trainer.val_check_interval = int(every) * trainer.accumulate_grad_batches
    else:
        trainer.limit_val_batches = 0


def _add_checkpoint(trainer: Any, settings: Settings) -> None:
    """Add the ModelCheckpoint that `save_strategy` stands for, unless the user passed one."""
    if settings.save_strategy == "no" or any(isinstance(cb, Checkpoint) for cb in trainer.callbacks):
        return
    limit = settings.save_total_limit
    best = settings.metric_for_best_model
    given: dict[str, Any] = {"save_top_k": -1 if limit is None else limit}
    if best is not None:
        name = best if best.startswith("eval_") else metric_name(best)
        larger = settings.greater_is_better
        given |= {
            "monitor": name,
            "mode": "max" if larger or (larger is None and "loss" not in best) else "min",
        }
    elif limit is not None:
        given |= {"monitor": "step", "mode": "max"}
    if settings.save_strategy == "steps":
        given["every_n_train_steps"] = max(1, math.ceil(settings.save_steps))
    callback = ModelCheckpoint(dirpath=settings.output_dir, filename="checkpoint-{step}", **given)
    trainer.callbacks.append(callback)

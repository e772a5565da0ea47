"""The INFO messages of `transformers.trainer`'s logger, which scripts and test suites look for."""

import logging
from typing import Any

from transformers.trainer import logger
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import has_length

from hfbridge.data.accumulation import Schedule


def log_begin(native: Any, loader: Any, schedule: Schedule) -> None:
    """Log the sizes of a run before `on_train_begin`.

    Mirrors: transformers.Trainer._inner_training_loop
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    args, steps, done = native.args, schedule.steps_per_epoch, native.state.global_step
    in_all = native.get_total_train_batch_size(args)
    samples = native.num_examples(loader) if has_length(loader) else in_all * schedule.max_steps
    logger.info("***** Running training *****")
    sizes = {
        "Num examples": samples,
        "Num Epochs": schedule.epochs,
        "Num update steps per epoch": steps,
        "Instantaneous batch size per device": args.per_device_train_batch_size,
        "Total train batch size (w. parallel, distributed & accumulation)": in_all,
        "Gradient Accumulation steps": args.gradient_accumulation_steps,
        "Total optimization steps": schedule.max_steps,
        "Number of trainable parameters": get_model_param_count(native.model, trainable_only=True),
    }
    for name, size in sizes.items():
        logger.info(f"  {name} = {size:,}")
    if done:
        logger.info(f"  Resuming training from checkpoint with epoch {done // steps} and global step {done}")


def log_end() -> None:
    """Log that a run has ended.

    Mirrors: transformers.Trainer._finalize_training
    """
    logger.info("Training completed.")

"""What `lightning.Trainer` is told, by name and type, where `hfbridge.Trainer` passes it on.

Type checkers, editors and LightningCLI know the arguments by it. One that is not given is not there, so that
settings/translate.py still knows what was said: a default of Lightning's says nothing about the run.
"""

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypedDict

from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from transformers import TrainerCallback

AnyCallback = Callback | TrainerCallback | type[TrainerCallback]
"""A callback of Lightning's or of transformers'."""


class TrainerArguments(TypedDict, total=False):
    """The arguments of `lightning.Trainer` but `callbacks`; settings/translate.py says what they become.

    Args:
        accelerator: "cpu", "gpu" or "auto"; `use_cpu` of the settings says the same.
        strategy: how ranks share the work: "ddp", "fsdp", "fsdp2", "deepspeed_stage_2", ..., or an object of
            `hfbridge.strategies`.
        devices: how many devices of a node take part, or which.
        num_nodes: how many nodes take part.
        precision: only what the settings say; `bf16` is their word for it.
        logger: loggers of Lightning's, which get every row that the native Trainer would log.
        fast_dev_run: refused; use `max_steps` of the settings.
        max_epochs: `num_train_epochs` of the settings.
        min_epochs: passed on.
        max_steps: `max_steps` of the settings.
        min_steps: passed on.
        max_time: ends the run when the time is over, "00:12:00:00" say.
        limit_train_batches: refused; use `max_steps` of the settings.
        limit_val_batches: refused; use a smaller evaluation set.
        limit_test_batches: batches of `trainer.test`.
        limit_predict_batches: batches of `trainer.predict`.
        overfit_batches: refused; use `max_steps` of the settings.
        val_check_interval: refused; `eval_strategy` and `eval_steps` of the settings decide.
        check_val_every_n_epoch: refused; `eval_strategy` and `eval_steps` of the settings decide.
        num_sanity_val_steps: only 0; `eval_on_start` of the settings evaluates first.
        log_every_n_steps: `logging_steps` of the settings.
        enable_checkpointing: Lightning's own checkpoints, beside those that `save_strategy` asks for.
        enable_progress_bar: the opposite of `disable_tqdm` of the settings.
        enable_model_summary: print the parts of the model and their sizes.
        accumulate_grad_batches: `gradient_accumulation_steps` of the settings.
        gradient_clip_val: `max_grad_norm` of the settings.
        gradient_clip_algorithm: only "norm".
        deterministic: refused; use `full_determinism` of the settings.
        benchmark: cuDNN looks for the fastest kernels.
        inference_mode: only false, as natively.
        use_distributed_sampler: only false; rows are dealt to the ranks as natively.
        profiler: of Lightning's, or its name: "simple", "advanced".
        detect_anomaly: find the operation whose gradient is not a number.
        barebones: refused; it takes out what hfbridge runs on.
        plugins: of Lightning's, but for precision.
        sync_batchnorm: batch norms see the rows of all ranks.
        reload_dataloaders_every_n_epochs: only 0.
        default_root_dir: `output_dir` of the settings.
        enable_autolog_hparams: hand hyperparameters to the loggers.
        model_registry: where Lightning keeps models.
    """

    accelerator: str | Accelerator
    strategy: str | Strategy
    devices: int | str | list[int]
    num_nodes: int
    precision: str | int | None
    logger: bool | Logger | Sequence[Logger] | None
    fast_dev_run: int | bool
    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    max_time: str | timedelta | Mapping[str, int] | None
    limit_train_batches: int | float | None
    limit_val_batches: int | float | None
    limit_test_batches: int | float | None
    limit_predict_batches: int | float | None
    overfit_batches: int | float
    val_check_interval: int | float | str | None
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: int | None
    log_every_n_steps: int | None
    enable_checkpointing: bool | None
    enable_progress_bar: bool | None
    enable_model_summary: bool | None
    accumulate_grad_batches: int
    gradient_clip_val: int | float | None
    gradient_clip_algorithm: str | None
    deterministic: bool | str | None
    benchmark: bool | None
    inference_mode: bool
    use_distributed_sampler: bool
    profiler: str | Profiler | None
    detect_anomaly: bool
    barebones: bool
    plugins: Any
    sync_batchnorm: bool
    reload_dataloaders_every_n_epochs: int
    default_root_dir: str | os.PathLike[str] | None
    enable_autolog_hparams: bool
    model_registry: str | None

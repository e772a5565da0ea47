"""The arguments of `lightning.Trainer` by name and type, as `hfbridge.Trainer` accepts them.

Type checkers, editors and LightningCLI read them here. One that is not passed is not in the dictionary, so
that settings/to_lightning.py can distinguish it from one passed with Lightning's default.
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
    """The arguments of `lightning.Trainer` but `callbacks`, each with Lightning's meaning.

    Where a setting means the same, both must agree; a default value of either says nothing.

    Args:
        accelerator: "cpu", "gpu" or "auto"; "cpu" is `use_cpu` of the settings.
        strategy: how ranks share the work: "ddp", "fsdp", "fsdp2", "deepspeed_stage_2", ..., or an object of
            `hfbridge.strategies`; `fsdp` and `deepspeed` of the settings.
        devices: number of devices of a node, or which.
        num_nodes: number of nodes.
        precision: "32-true"; "bf16-mixed", which is `bf16` of the settings; "16-mixed", "bf16-true",
            "16-true", "64-true" and "transformer-engine" by Lightning's precision plugins.
        logger: loggers of Lightning, which get every log entry beside `report_to`; `True` for Lightning's.
        fast_dev_run: run so many micro-batches of training, validation, test and prediction; save and report
            nothing.
        max_epochs: `num_train_epochs` of the settings; 0 trains nothing, -1 does not limit.
        min_epochs: epochs before a callback can stop training.
        max_steps: `max_steps` of the settings; 0 trains nothing, -1 does not limit.
        min_steps: steps before a callback can stop training.
        max_time: end the run after this time, "00:12:00:00" say.
        limit_train_batches: micro-batches of an epoch, or a share of them; the schedule follows.
        limit_val_batches: batches of a validation, or a share of them.
        limit_test_batches: batches of `trainer.test`, or a share of them.
        limit_predict_batches: batches of `trainer.predict`, or a share of them.
        overfit_batches: train and validate on so many batches, in the order of the set.
        val_check_interval: validate after so many micro-batches, a share of an epoch, or a time; conflicts
            with an `eval_strategy` of the settings.
        check_val_every_n_epoch: validate after every so many epochs; conflicts with an `eval_strategy` of
            the settings.
        num_sanity_val_steps: batches to validate on before training; 0 with settings, 2 without. Random
            states are restored.
        log_every_n_steps: `logging_steps` of the settings; 0 is `logging_strategy="no"`.
        enable_checkpointing: add a ModelCheckpoint, beside the checkpoints of `save_strategy`; false with
            settings, true without.
        enable_progress_bar: the opposite of `disable_tqdm` of the settings.
        enable_model_summary: print the parts of the model and their sizes.
        accumulate_grad_batches: `gradient_accumulation_steps` of the settings.
        gradient_clip_val: `max_grad_norm` of the settings; without settings gradients are not clipped.
        gradient_clip_algorithm: "norm" or "value".
        deterministic: use deterministic algorithms of torch, or "warn".
        benchmark: let cuDNN search for the fastest kernels.
        inference_mode: validate, test and predict under `torch.inference_mode`, and not `torch.no_grad`;
            false if not passed.
        use_distributed_sampler: on several ranks, replace the samplers of DataLoaders; those of HFDataModule
            stay.
        profiler: of Lightning, or its name: "simple", "advanced".
        detect_anomaly: find the operation whose gradient is not a number.
        barebones: switch off what costs time in Lightning: loggers, checkpoints, progress bar, model summary.
        plugins: of Lightning; a precision plugin stands in place of `precision`.
        sync_batchnorm: compute batch norms over the samples of all ranks.
        reload_dataloaders_every_n_epochs: make the loaders anew after so many epochs.
        default_root_dir: `output_dir` of the settings.
        enable_autolog_hparams: log hyperparameters at the start of a run.
        model_registry: name of the model in Lightning's registry, for `ckpt_path="registry"`.
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

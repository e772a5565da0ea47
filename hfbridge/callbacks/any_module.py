"""Settings for a LightningModule that is no HFModule: Lightning's own loop, callbacks and plugins.

setting                                      for any module
max_steps, num_train_epochs                  max_steps, max_epochs; a part of an epoch is counted in steps
gradient_accumulation_steps, max_grad_norm   accumulate_grad_batches, gradient_clip_val
bf16                                         precision "bf16-mixed"
logging_strategy, logging_steps              log_every_n_steps
eval_strategy, eval_steps                    check_val_every_n_epoch, val_check_interval
eval_on_start                                a validation before the first step
save_strategy, save_steps, save_total_limit,
  metric_for_best_model, greater_is_better   a ModelCheckpoint in output_dir
resume_from_checkpoint                       ckpt_path of fit
seed                                         set_seed before the run
output_dir                                   default_root_dir

Steps below 1 are shares of the run, as in transformers. A note names the settings passed that have no effect:
the module makes its own optimizer, schedule and loss.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from transformers import set_seed

from hfbridge.callbacks.connector import note_of_seeds, run_validation
from hfbridge.callbacks.progress import RunProgressBar
from hfbridge.datamodule import HFDataModule
from hfbridge.settings import Settings
from hfbridge.settings.plan import NEVER

_PREFIX = "checkpoint-"
# Settings that have an effect with any module, or that another part of the Trainer reads.
_EFFECTIVE = frozenset(
    [
        "accelerator_config",
        "bf16",
        "ddp_backend",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
        "ddp_timeout",
        "deepspeed",
        "disable_tqdm",
        "eval_on_start",
        "eval_steps",
        "eval_strategy",
        "fsdp",
        "fsdp_config",
        "gradient_accumulation_steps",
        "greater_is_better",
        "logging_steps",
        "logging_strategy",
        "max_grad_norm",
        "max_steps",
        "metric_for_best_model",
        "num_train_epochs",
        "output_dir",
        "resume_from_checkpoint",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "seed",
        "use_cpu",
    ]
)
# And those that HFDataModule reads.
_OF_DATA = frozenset(
    [
        "data_seed",
        "dataloader_drop_last",
        "dataloader_in_order",
        "dataloader_multiprocessing_context",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "per_device_eval_batch_size",
        "per_device_train_batch_size",
        "remove_unused_columns",
        "train_sampling_strategy",
    ]
)
# Values with which a setting does what happens anyway.
_SILENT: dict[str, tuple[object, ...]] = {"report_to": ("none", []), "do_train": (True,), "do_eval": (True,)}


class SettingsCheckpoint(ModelCheckpoint):
    """The checkpoints of `save_strategy`: `output_dir/checkpoint-<step>.ckpt`."""

    def __init__(self, settings: Settings) -> None:
        self._strategy, self._steps = str(settings.save_strategy), float(settings.save_steps)
        limit, best = settings.save_total_limit, settings.metric_for_best_model
        chosen: dict[str, Any] = {"save_top_k": limit or -1}
        if best is not None and (self._strategy == "best" or limit is None):
            larger = settings.greater_is_better
            is_larger = larger or (larger is None and not best.endswith("loss"))
            chosen |= {"monitor": best, "mode": "max" if is_larger else "min"}
            chosen |= {"save_top_k": limit or 1} if self._strategy == "best" else {}
        elif limit is not None:
            chosen |= {"monitor": "step", "mode": "max"}
        chosen["every_n_train_steps" if self._strategy == "steps" else "every_n_epochs"] = 1
        super().__init__(
            dirpath=Path(settings.output_dir or "trainer_output").expanduser(),
            filename=f"{_PREFIX}{{step}}",
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=self._strategy == "epoch",
            **chosen,
        )

    @property
    def state_key(self) -> str:
        """Name the state in a checkpoint by what was set."""
        return self._generate_state_key(monitor=self.monitor, strategy=self._strategy, steps=self._steps)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the steps between two checkpoints, which may be a share of the run."""
        if self._strategy == "steps":
            self._every_n_train_steps = count_steps(trainer, self._steps)
        super().on_train_start(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after the last step, as `DefaultFlowCallback` does."""
        is_saved = self._last_global_step_saved == trainer.global_step
        if self._strategy == "steps" and not is_saved and not trainer.should_stop:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        super().on_train_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was saved; checkpoints of a run in another folder are not this run's to delete."""
        if str(state_dict.get("dirpath")) == str(self.dirpath):
            super().load_state_dict(state_dict)

    def _monitor_candidates(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return the metrics; the monitored one may lack "eval_", as in transformers."""
        found: dict[str, Any] = super()._monitor_candidates(trainer)
        prefixed = f"eval_{self.monitor}"
        if self.monitor not in found and prefixed in found:
            found[str(self.monitor)] = found[prefixed]
        return found


class RunSettings(pl.Callback):
    """Configure the loop of a run once the number of its steps is known.

    Args:
        settings: of the run.
        evaluates: `eval_strategy` decides when Lightning validates, and not the Trainer's arguments.
        val_batches: `limit_val_batches` for `eval_on_start`.
    """

    def __init__(self, settings: Settings, *, evaluates: bool, val_batches: Any) -> None:
        self._settings, self._evaluates, self._val_batches = settings, evaluates, val_batches

    def on_fit_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Count the steps of the run, between two log entries, and between two evaluations."""
        settings = self._settings
        if has_partial_epoch(settings):
            trainer.fit_loop.epoch_loop.max_steps = trainer.estimated_stepping_batches
        if settings.logging_strategy != "steps":
            trainer.log_every_n_steps = 0
        elif settings.logging_steps < 1:
            trainer.log_every_n_steps = count_steps(trainer, settings.logging_steps)
        if self._evaluates and settings.eval_strategy == "steps":
            steps = settings.eval_steps or settings.logging_steps
            trainer.val_check_interval = count_steps(trainer, steps) * trainer.accumulate_grad_batches
            trainer.val_check_batch = trainer.val_check_interval

    def on_train_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Evaluate before the first step, if `eval_on_start`."""
        if self._settings.eval_on_start and trainer.global_step == 0:
            limit, trainer.limit_val_batches = trainer.limit_val_batches, self._val_batches
            trainer.fit_loop.epoch_loop.val_loop.restarting = False
            run_validation(trainer)
            trainer.limit_val_batches = limit


def has_partial_epoch(settings: Settings) -> bool:
    """Whether the last epoch of a run ends early."""
    return bool(settings.max_steps <= 0 and settings.num_train_epochs % 1)


def count_steps(trainer: pl.Trainer, steps: float) -> int:
    """Count optimizer steps of which fewer than 1 are a share of the run.

    Mirrors: transformers.trainer_callback.TrainerState.compute_steps
    """
    return int(steps) if steps >= 1 else max(1, math.ceil(trainer.estimated_stepping_batches * steps))


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint of the last step that `SettingsCheckpoint` has written to a folder."""
    numbered = {path.stem.removeprefix(_PREFIX): path for path in folder.glob(f"{_PREFIX}*.ckpt")}
    steps = {int(number): path for number, path in numbered.items() if number.isdigit()}
    return steps[max(steps)] if steps else None


@contextmanager
def configured_for_any_module(trainer: Any) -> Iterator[None]:
    """Configure an `hfbridge.Trainer` for any LightningModule; restore it afterwards."""
    settings: Settings = trainer.settings
    bar = next((cb for cb in trainer.callbacks if isinstance(cb, RunProgressBar)), None)
    if bar is not None:  # which shows what HFModule logs
        trainer.callbacks[trainer.callbacks.index(bar)] = own = TQDMProgressBar()
    precision = trainer.strategy.precision_plugin
    if settings.bf16 and type(precision) is Precision:
        device = trainer.strategy.root_device.type
        trainer.strategy.precision_plugin = MixedPrecision("bf16-mixed", device)
    try:
        yield
    finally:
        trainer.strategy.precision_plugin = precision
        if bar is not None:
            trainer.callbacks[trainer.callbacks.index(own)] = bar


@contextmanager
def configured_to_fit_any_module(trainer: Any, module: pl.LightningModule, data: Any) -> Iterator[None]:
    """Configure an `hfbridge.Trainer` to train any LightningModule; restore it afterwards."""
    settings: Settings = trainer.settings
    limits = trainer.limit_val_batches, trainer.fit_loop.epoch_loop.max_steps
    evaluates = trainer.plan.has_settings and not trainer.plan.validates
    run = RunSettings(settings, evaluates=evaluates, val_batches=trainer.limit_val_batches)
    if trainer.plan.has_settings:
        _warn_of_no_effect(trainer, module, data)
        if "seed" in settings.given:
            if note := note_of_seeds(settings):
                rank_zero_info(f"hfbridge: {note}")
            set_seed(settings.seed)
        if not trainer.plan.validates:
            _set_validation(trainer, settings)
        _add_checkpoint(trainer, settings)
        trainer.callbacks.insert(0, run)
    if not module.automatic_optimization:
        trainer.accumulate_grad_batches = trainer.plan.passed.get("accumulate_grad_batches") or 1
        trainer.gradient_clip_val = trainer.plan.passed.get("gradient_clip_val")
    try:
        with configured_for_any_module(trainer):
            yield
    finally:
        trainer.limit_val_batches = limits[0]
        if has_partial_epoch(settings):
            trainer.fit_loop.epoch_loop.max_steps = limits[1]
        if run in trainer.callbacks:
            trainer.callbacks.remove(run)


def _warn_of_no_effect(trainer: Any, module: pl.LightningModule, data: Any) -> None:
    """Name what was passed for a run of HFModule and has no effect here."""
    name, given = type(module).__name__, trainer.settings.given
    known = _EFFECTIVE | (_OF_DATA if isinstance(data, HFDataModule) else frozenset())
    idle = [field for field in given if field not in known and given[field] not in _SILENT.get(field, ())]
    if idle:
        rank_zero_info(
            f"hfbridge: settings without an effect: {', '.join(idle)}. HFModule reads them, and {name} is "
            "another LightningModule."
        )
    if callbacks := trainer.trainer_callbacks:
        names = ", ".join((cb if isinstance(cb, type) else type(cb)).__name__ for cb in callbacks)
        rank_zero_warn(f"hfbridge: {names}: a TrainerCallback is called with HFModule only, not with {name}.")


def _set_validation(trainer: Any, settings: Settings) -> None:
    """Have Lightning validate when `eval_strategy` says; its intervals count batches and not steps."""
    if settings.eval_strategy == "epoch":
        trainer.check_val_every_n_epoch, trainer.val_check_interval = 1, 1.0
    elif settings.eval_strategy == "steps":
        trainer.check_val_every_n_epoch, trainer.val_check_interval = None, 1.0
    elif settings.eval_on_start:
        trainer.check_val_every_n_epoch = NEVER
    else:  # ModelCheckpoint acts at the end of each epoch then
        trainer.limit_val_batches, trainer.check_val_every_n_epoch = 0, 1


def _add_checkpoint(trainer: Any, settings: Settings) -> None:
    """Add the ModelCheckpoint that `save_strategy` stands for, unless the user passed one."""
    if settings.save_strategy != "no" and not any(isinstance(cb, Checkpoint) for cb in trainer.callbacks):
        trainer.callbacks.append(SettingsCheckpoint(settings))

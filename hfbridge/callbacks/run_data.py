"""What a run of HFModule reads of its data, and of the user's own loaders."""

import math
from dataclasses import replace
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from transformers.trainer_utils import has_length

from hfbridge.callbacks.connector import done_by, end_with, epoch_limit, settings_of
from hfbridge.data.accumulation import BatchLayout, Schedule, plan_schedule
from hfbridge.errors import SettingsError
from hfbridge.settings import Settings
from hfbridge.settings.to_lightning import ENDLESS_EPOCHS

ENDLESS_STEPS = 2**53
"""Optimizer steps of a run that nothing ends."""


class RunData(Protocol):
    """What HFModule and CallbackHost read of the data of a run."""

    processing_class: Any
    data_collator: Any
    packing: int | None

    @property
    def settings(self) -> Settings:
        """The settings of the run."""

    @property
    def schedule(self) -> Schedule:
        """Steps and epochs of the run."""

    @property
    def train_batch_size(self) -> int:
        """Samples of a micro-batch."""

    @property
    def layout(self) -> BatchLayout:
        """How the samples of an epoch are grouped into optimizer steps."""

    @property
    def eval_splits(self) -> tuple[str, ...]:
        """Prefixes of the metrics of the evaluation sets that can be tried before training starts."""

    def is_streamed(self, split: str) -> bool:
        """Whether a set can only be iterated."""


class UserData:
    """The loaders, or the LightningDataModule, that the user passed to the Trainer.

    Raises:
        SettingsError: the settings conflict.
    """

    packing: int | None = None
    eval_splits: tuple[str, ...] = ()

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self.settings: Settings = settings_of(trainer)
        self.processing_class = self.data_collator = None
        self._schedule: Schedule | None = None
        self._check_evaluation()

    def _check_evaluation(self) -> None:
        """Check that there is a loader to evaluate on where the settings evaluate."""
        trainer, strategy = self._trainer, self.settings.eval_strategy
        is_fit = trainer.state.fn == TrainerFn.FITTING and trainer.limit_val_batches != 0
        if is_fit and strategy != "no" and not trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined():
            raise SettingsError(
                f"eval_strategy={str(strategy)!r} needs validation loaders, got none. Pass val_dataloaders=, "
                'or set eval_strategy="no".'
            )

    def is_streamed(self, split: str) -> bool:
        """Loaders of the user's are iterated as they are."""
        return True

    @property
    def train_batch_size(self) -> int:
        """Samples of a micro-batch, as far as the loader says; else `per_device_train_batch_size`."""
        loader = self._trainer.train_dataloader
        size = getattr(loader, "batch_size", None)
        return size if isinstance(size, int) else int(self.settings.per_device_train_batch_size)

    @property
    def layout(self) -> BatchLayout:
        """How the samples of an epoch are grouped into optimizer steps."""
        trainer = self._trainer
        return BatchLayout(trainer.world_size, self.train_batch_size, trainer.accumulate_grad_batches)

    @property
    def schedule(self) -> Schedule:
        """Steps and epochs of the run; Lightning makes the training loader the first time.

        Raises:
            SettingsError: the loader has no length, and the learning rate depends on the number of steps.
        """
        if self._schedule is None:
            self._trainer.fit_loop.setup_data()
            self._schedule = self._plan(done_by(self._trainer))
            end_with(self._trainer, self._schedule)
        return self._schedule

    def loader_states(self) -> list[Any]:
        """Return the states of the training loaders, as of the optimizer step that was taken."""
        fit_loop = self._trainer.fit_loop
        states_of: Any = getattr(fit_loop.epoch_loop, "loader_states", None)
        if states_of is not None:
            return list(states_of())
        loader = fit_loop._combined_loader
        return [] if loader is None else loader._state_dicts()

    def restore_loaders(self) -> None:
        """Restore training loaders that were made before the checkpoint was read."""
        fit_loop = self._trainer.fit_loop  # tests/lightning/test_data.py pins its private names
        if fit_loop._combined_loader_states_to_load and fit_loop._data_fetcher is not None:
            fit_loop._load_combined_loader_states()
            iter(fit_loop._data_fetcher)

    def plan_again(self) -> None:
        """Count the steps again: a batch size finder has changed the loader."""
        self._schedule = None

    def plan_rest(self) -> Schedule:
        """Count the remaining steps after Lightning has reloaded the loader, before an epoch."""
        done = self._trainer.current_epoch, self._trainer.global_step
        before, self._schedule = self.schedule, self._plan(done)
        end_with(self._trainer, self._schedule)
        if self._schedule.max_steps != before.max_steps:
            rank_zero_info(
                f"hfbridge: the training loader was reloaded, and the run takes {self._schedule.max_steps} "
                f"steps, not {before.max_steps}; the learning-rate schedule stays as it was."
            )
        return self._schedule

    def _plan(self, done: tuple[int, int]) -> Schedule:
        trainer, settings = self._trainer, self.settings
        batches, accumulation = trainer.num_training_batches, trainer.accumulate_grad_batches
        if isinstance(batches, float) and math.isinf(batches):
            return self._plan_endless()
        size = self.train_batch_size
        loader: Any = trainer.train_dataloader
        is_full = isinstance(loader, DataLoader) and has_length(loader) and batches == len(loader)
        return plan_run(
            settings,
            samples=len(loader.dataset) if is_full else int(batches) * size * trainer.world_size,
            micro_batches=int(batches),
            accumulation=accumulation,
            total_batch_size=size * accumulation * trainer.world_size,
            epochs=epoch_limit(trainer),
            trainer=trainer,
            done=done,
        )

    def _plan_endless(self) -> Schedule:
        """Count a run over a loader without a length."""
        settings, steps = self.settings, int(self.settings.max_steps)
        module: Any = self._trainer.lightning_module
        needs_steps = settings.lr_scheduler_type not in ("constant", "reduce_lr_on_plateau", "greedy")
        if steps <= 0 and needs_steps and not module.overrides("configure_optimizers"):
            raise SettingsError(
                f"max_steps={steps}, and the training loader has no length: lr_scheduler_type="
                f"{str(settings.lr_scheduler_type)!r} needs the number of steps. Set max_steps, or "
                'lr_scheduler_type="constant".'
            )
        epochs = epoch_limit(self._trainer) if steps > 0 else math.ceil(settings.num_train_epochs)
        steps = steps if steps > 0 else ENDLESS_STEPS
        accumulation = self._trainer.accumulate_grad_batches
        per_step = self.train_batch_size * accumulation * self._trainer.world_size
        return Schedule(steps * accumulation, steps, steps, epochs or ENDLESS_EPOCHS, steps * per_step)


def plan_run(
    settings: Settings,
    *,
    samples: int,
    micro_batches: int,
    accumulation: int,
    total_batch_size: int,
    epochs: int | None,
    trainer: pl.Trainer,
    done: tuple[int, int],
) -> Schedule:
    """Count the optimizer steps and epochs of a run.

    Args:
        settings: `max_steps` and `num_train_epochs`.
        samples: of an epoch.
        micro_batches: of an epoch, on each rank.
        accumulation: micro-batches of a full step.
        total_batch_size: samples of a full optimizer step on all ranks.
        epochs: also ends a run of `max_steps`, unless it is `None`.
        trainer: its GradientAccumulationScheduler, if any, changes `accumulation` with the epochs.
        done: completed epochs and steps.
    """
    schedule = plan_schedule(
        samples_per_epoch=samples,
        micro_batches_per_epoch=micro_batches,
        accumulation=accumulation,
        total_batch_size=total_batch_size,
        max_steps=int(settings.max_steps),
        num_train_epochs=settings.num_train_epochs,
    )
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    scheduler = next((cb for cb in callbacks if isinstance(cb, GradientAccumulationScheduler)), None)
    done_epochs, done_steps = done
    constant_from = 0 if scheduler is None else max(scheduler.scheduling)

    def steps_of(epoch: int) -> int:
        of_step = accumulation if scheduler is None else scheduler.get_accumulate_grad_batches(epoch)
        return max(math.ceil(micro_batches / of_step), 1)

    def steps_until(end: float) -> int:
        whole, first = math.floor(end), max(constant_from, done_epochs)
        steps = sum(map(steps_of, range(done_epochs, min(whole, first))))
        steps += max(whole - first, 0) * steps_of(first)
        return done_steps + steps + math.ceil((end - whole) * steps_of(whole))

    if settings.max_steps <= 0:
        return replace(schedule, max_steps=steps_until(settings.num_train_epochs))
    steps = schedule.max_steps if epochs is None else min(schedule.max_steps, steps_until(epochs))
    end = done_epochs
    while end < constant_from and steps_until(end) < steps:
        end += 1
    end += max(math.ceil((steps - steps_until(end)) / steps_of(end)), 0)
    return replace(schedule, max_steps=steps, epochs=end, samples=steps * total_batch_size)

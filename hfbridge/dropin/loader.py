"""The training data of a Trainer whose methods make the loader, or collect the batches of a step.

the HF Trainer calls                     here
get_train_dataloader,                    when the run is planned; again with auto_find_batch_size
  set_initial_training_values
get_batch_samples, once a step           when the first micro-batch of the step is fetched
skip_first_batches, _load_rng_state      when a run is resumed within an epoch
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from accelerate.data_loader import skip_first_batches

from hfbridge.data.accumulation import AccumulationStep, DataPosition, MicroBatch, Schedule
from hfbridge.data.dataloaders import Start
from hfbridge.datamodule import HFDataModule
from hfbridge.dropin.replaced_methods import EVALUATES, STEPS, Overrides
from hfbridge.settings import Settings
from hfbridge.utilities import rng

_PLACEHOLDER: tuple[dict[str, Any], ...] = ({},)


class OwnLoader:
    """Iterate the loader of a Trainer's `get_train_dataloader`, by optimizer steps of `get_batch_samples`.

    Args:
        native: the Trainer.
        counts: the Trainer's own steps divide by the items that it has counted.

    Attributes:
        schedule: epochs and steps, as the Trainer counts them.
        loader: what `get_train_dataloader` returned.
        current: the last micro-batch; `None` before the first one of an epoch.
        sampler: the object whose `set_epoch` Lightning calls before each epoch: this loader.

    Mirrors: transformers.Trainer._run_epoch
    Proved by: tests/dropin/test_overrides.py
    """

    record = sampler_state = None

    def __init__(self, native: Any, *, counts: bool) -> None:
        self._native, self._counts = native, counts
        self.loader: Any = native.get_train_dataloader()
        epochs, steps, _, samples, _, micro_batches, max_steps = native.set_initial_training_values(
            native.args, self.loader
        )
        self.schedule = Schedule(micro_batches, steps, max_steps, epochs, samples)
        self.current: MicroBatch | None = None
        self.sampler = self
        self._start: Start | None = None
        self._restores: Callable[[], None] | None = None
        self._epoch = 0

    def __len__(self) -> int:
        """Micro-batches of an epoch; those of the whole run, if the length is unknown."""
        return self.schedule.micro_batches_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Take the number of the epoch about to begin, counted from 0."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: checkpoints of HFModule store the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: `start_at` is called."""

    def start_at(self, start: Start, *, restores: Callable[[], None] | None = None) -> None:
        """Begin the next epoch at `start`; `restores` replaces its restoring of random states."""
        self._start, self._restores = start, restores

    def __iter__(self) -> Iterator[MicroBatch]:
        self.current = None
        native, schedule, loader = self._native, self.schedule, self.loader
        accumulation = native.args.gradient_accumulation_steps
        (start, self._start), first = (self._start, None), 0
        position = DataPosition(self._epoch) if start is None else start.position
        if start is not None and (first := position.windows):
            loader = skip_first_batches(loader, first * accumulation)
        elif start is not None:
            self._restore(start)
            start = None
        _set_epoch(loader, position.epoch)
        batches, done, per_epoch = iter(loader), first * accumulation, schedule.micro_batches_per_epoch
        for number in range(first, schedule.steps_per_epoch):
            is_last = number == schedule.steps_per_epoch - 1
            size = (per_epoch - 1) % accumulation + 1 if is_last else accumulation
            found, items = native.get_batch_samples(batches, size, native.args.device)
            native.current_gradient_accumulation_steps = len(found)
            if start is not None:
                self._restore(start)
                start = None
            if not found:
                continue
            done += len(found)
            ends_epoch = done == per_epoch
            step = AccumulationStep(
                [_as_micro_batch(one) for one in found], done_micro_batches=done, ends_epoch=ends_epoch
            )
            # The end of a stream of unknown length leaves gradients to the next epoch.
            step.micro_batches[-1].is_last = ends_epoch or done % accumulation == 0
            position = DataPosition(position.epoch + 1) if ends_epoch else position.next()
            step.position = position
            if self._counts:
                step.begin(native, items)
            for self.current in step:
                yield self.current

    def _restore(self, start: Start) -> None:
        if self._restores is not None:
            self._restores()
        elif start.states is not None:
            rng.restore(start.states)


class OwnData(HFDataModule):
    """A data module whose training loader is made by the methods of a Trainer.

    Args:
        native: the Trainer.
        overrides: what it overrides.
        **arguments: of HFDataModule.

    Attributes:
        own_loader: the loader; `None` until the run is planned.
    """

    def __init__(self, native: Any, overrides: Overrides, **arguments: Any) -> None:
        self._native, self._overrides = native, overrides
        self.own_loader: OwnLoader | None = None
        train = arguments.pop("train_dataset", None)
        is_own = train is None or overrides.any({"get_train_dataloader"})  # which may read another set
        super().__init__(train_dataset=_PLACEHOLDER if is_own else train, **arguments)

    def is_streamed(self, split: str) -> bool:
        """Whether a set is iterable only; the train set is read by the Trainer's methods."""
        return split != "train" and super().is_streamed(split)

    def micro_batches(self, *, first_row: int = 0, layout: Any = None) -> int:
        """Count the micro-batches of an epoch, or of what is left of it from a sample on."""
        per_step = self.layout if layout is None else layout
        return self.schedule.micro_batches_per_epoch - first_row // (per_step.rows * per_step.ranks)

    def train_dataloader(self) -> Any:
        """Return the loader that the Trainer's methods have made."""
        assert self.own_loader is not None
        module: Any = self._trainer().lightning_module
        if module.resumption is not None:
            overridden = self._overrides.any({"_load_rng_state"})
            restores = partial(self._native._load_rng_state, module.resumed_from) if overridden else None
            self.own_loader.start_at(module.resumption.start, restores=restores)
        return self.own_loader

    def _plan(self, settings: Settings) -> Schedule:
        if self.own_loader is None or self._native._train_batch_size != self.train_batch_size:
            self._native._train_batch_size = self.train_batch_size  # of auto_find_batch_size
            self.own_loader = OwnLoader(self._native, counts=self._overrides.any(STEPS))
        return self.own_loader.schedule

    def _check_evaluation(self, settings: Settings) -> None:
        if not self._overrides.any(EVALUATES):
            super()._check_evaluation(settings)

    def _check_batches(self, split: str, settings: Settings) -> None:
        if split != "train":
            super()._check_batches(split, settings)


def _as_micro_batch(batch: Any) -> MicroBatch:
    found = MicroBatch(batch if isinstance(batch, Mapping) else {})
    found.source = batch
    return found


def _set_epoch(loader: Any, epoch: int) -> None:
    """Set the epoch of a loader and its batch sampler.

    Mirrors: transformers.Trainer._run_epoch
    """
    inner = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    parts: tuple[Any, ...] = (loader, inner)
    for part in parts:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)

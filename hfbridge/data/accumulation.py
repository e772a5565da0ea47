"""Micro-batches and the optimizer steps that they are accumulated into; the length of a run in steps.

A Lightning batch is a micro-batch. Loaders fetch all micro-batches of an optimizer step before they hand out
the first one, so that items are counted, and random numbers drawn, in the order of the HF Trainer. The last
step of an epoch may be short; a step never crosses an epoch.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from accelerate.utils import send_to_device

from hfbridge.errors import DataError


@dataclass(frozen=True)
class BatchLayout:
    """How the samples of an epoch are grouped into optimizer steps.

    Attributes:
        ranks: ranks that share the epoch.
        rows: samples of a micro-batch of one rank.
        accumulation: micro-batches of a full optimizer step, on each rank.
    """

    ranks: int
    rows: int
    accumulation: int

    @property
    def rows_per_step(self) -> int:
        """Samples of a full optimizer step, on all ranks."""
        return self.ranks * self.rows * self.accumulation

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks}, micro-batches of {self.rows}, accumulation {self.accumulation}"


@dataclass(frozen=True)
class DataPosition:
    """Where in the data a run is, between two optimizer steps.

    Attributes:
        epoch: completed epochs.
        windows: completed optimizer steps of the current epoch, counted from `first_row`.
        first_row: sample, in the order of the epoch, at which its present layout begins; 0 unless the run was
            resumed with another layout in mid-epoch.
        extra: optimizer steps that the run takes more than if it had had its present layout from the start.
    """

    epoch: int = 0
    windows: int = 0
    first_row: int = 0
    extra: int = 0

    def next(self) -> "DataPosition":
        """Return the position one step later, five times as fast as `dataclasses.replace`."""
        return DataPosition(self.epoch, self.windows + 1, self.first_row, self.extra)


_BEGINNING = DataPosition()


class AccumulationStep:
    """The micro-batches of one optimizer step.

    Attributes:
        micro_batches: all of them, as the collator made them, on the CPU.
        done_micro_batches: completed micro-batches of this epoch once the step is taken.
        loss: computes the shares of its micro-batches; known once `begin` was called.
        items: what the loss counts in the step, over all micro-batches and ranks; known with `loss`.
        position: where the run is in the data once the step is taken.
        ends_epoch: whether it is the epoch's last step.
    """

    __slots__ = ("done_micro_batches", "ends_epoch", "items", "loss", "micro_batches", "position")

    def __init__(
        self, micro_batches: "list[MicroBatch]", *, done_micro_batches: int, ends_epoch: bool = False
    ) -> None:
        self.micro_batches = micro_batches
        self.done_micro_batches, self.ends_epoch = done_micro_batches, ends_epoch
        self.loss: Any = None
        self.items: Any = None
        self.position = _BEGINNING
        last = len(micro_batches) - 1
        for index, micro_batch in enumerate(micro_batches):
            micro_batch.step, micro_batch.index, micro_batch.is_last = self, index, index == last

    def begin(self, loss: Any, items: Any) -> None:
        """Set `loss` and `items`."""
        self.loss, self.items = loss, items

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> "Iterator[MicroBatch]":
        return iter(self.micro_batches)

    def __repr__(self) -> str:
        return f"AccumulationStep({len(self)} micro-batches, {self.done_micro_batches} done)"


class MicroBatch(dict[str, Any]):
    """A batch: the columns by name, as the collator made them, and the optimizer step that it belongs to.

    Attributes:
        step: the optimizer step; `None` for a batch that a run does not accumulate, as in an evaluation.
        index: number of the micro-batch in its step, from 0.
        is_last: the optimizer step is taken after this micro-batch.
        source: what the loader made, for a step that needs that very object; `None` elsewhere.
    """

    __slots__ = ("index", "is_last", "source", "step")

    def __init__(self, *columns: Any, step: AccumulationStep | None = None, index: int = 0) -> None:
        super().__init__(*columns)
        self.step, self.index, self.is_last = step, index, True
        self.source: Any = None

    def to(self, device: torch.device | str, **arguments: Any) -> "MicroBatch":
        """Copy the tensors to a device without blocking, as Lightning's `batch_to_device` requests."""
        if torch.device(device).type == "cpu":
            return self
        moved = {name: send_to_device(value, device, non_blocking=True) for name, value in self.items()}
        batch = MicroBatch(moved, step=self.step, index=self.index)
        batch.is_last, batch.source = self.is_last, self.source
        return batch


def group_micro_batches(
    batches: Iterable[Mapping[str, Any]],
    size: int | Callable[[], int],
    *,
    done: int = 0,
    prefetched: Mapping[str, Any] | None = None,
    sizes: Iterator[int] | None = None,
    prefetches: bool = True,
) -> Iterator[AccumulationStep]:
    """Yield the optimizer steps of an epoch; the last one may be short.

    All micro-batches of a step, and the first of the next one, are collated before it is yielded, so that a
    collator that draws random numbers finds the generators in the HF Trainer's state.

    Args:
        batches: of one epoch, or of what is left of it.
        size: micro-batches of a full step; a function is called when a step begins.
        done: completed micro-batches of the epoch.
        prefetched: the first micro-batch, collated already.
        sizes: how many micro-batches each step really holds, read after its first one; each counts as `size`
            of the epoch.
        prefetches: collate one micro-batch ahead.

    Mirrors: transformers.Trainer.get_batch_samples
    Mirrors: accelerate.data_loader.DataLoaderShard.__iter__
    """
    collected: list[MicroBatch] = []
    full = counted = 0
    source = iter(batches)
    for batch, is_last in _prefetch_one(source, prefetched) if prefetches else zip(source, repeat(False)):
        if not collected:
            counted = size if isinstance(size, int) else size()
            full = counted if sizes is None else next(sizes)
        check_batch(batch)
        collected.append(MicroBatch(batch))
        if len(collected) == full:
            done += counted
            yield AccumulationStep(collected, done_micro_batches=done, ends_epoch=is_last)
            collected = []
    if collected:
        yield AccumulationStep(collected, done_micro_batches=done + len(collected), ends_epoch=True)


def check_batch(batch: Any) -> None:
    """Check that a batch has columns.

    Raises:
        DataError: it is no dict.
    """
    if not isinstance(batch, Mapping):
        raise DataError(
            f"A batch must be a dict of columns, got {type(batch).__name__}. Return a dict from the "
            "data_collator (or the collate_fn of the DataLoader), or override the steps of HFModule."
        )


def _prefetch_one(
    batches: Iterator[Mapping[str, Any]], prefetched: Mapping[str, Any] | None
) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Yield each micro-batch once the next one is collated, and whether it is the last."""
    if prefetched is None:
        prefetched = next(batches, None)
        if prefetched is None:
            return
    for following in batches:
        yield prefetched, False
        prefetched = following
    yield prefetched, True


@dataclass(frozen=True)
class Schedule:
    """How long a run is, counted in optimizer steps.

    Attributes:
        micro_batches_per_epoch: micro-batches of one epoch, on each rank.
        steps_per_epoch: optimizer steps of one epoch, the short last one included.
        max_steps: optimizer steps of the run.
        epochs: epochs begun; the last may end early.
        samples: samples the run counts for its speed, as the HF Trainer does.
    """

    micro_batches_per_epoch: int
    steps_per_epoch: int
    max_steps: int
    epochs: int
    samples: float

    def lengthened(self, steps: int, *, max_steps: int) -> "Schedule":
        """Return the schedule of a run that takes some steps more than its layout gives, or fewer.

        Args:
            steps: how many.
            max_steps: the setting; if positive, it stays, and the epochs change.
        """
        if max_steps > 0:
            return replace(self, epochs=math.ceil((max_steps - steps) / self.steps_per_epoch))
        return replace(self, max_steps=self.max_steps + steps)


def plan_schedule(
    *,
    samples_per_epoch: int,
    micro_batches_per_epoch: int,
    accumulation: int,
    total_batch_size: int,
    max_steps: int,
    num_train_epochs: float,
) -> Schedule:
    """Count the optimizer steps and epochs of a run over a sized dataset.

    Args:
        samples_per_epoch: samples of the training set.
        micro_batches_per_epoch: micro-batches of one epoch, on each rank; at least 1.
        accumulation: micro-batches of a full step.
        total_batch_size: samples of one full optimizer step on all ranks.
        max_steps: overrides the epochs when positive.
        num_train_epochs: epochs; a fraction ends the last one early.

    Mirrors: transformers.Trainer.set_initial_training_values
    """
    steps_per_epoch = max(math.ceil(micro_batches_per_epoch / accumulation), 1)
    if max_steps > 0:
        epochs = math.ceil(max_steps / steps_per_epoch)
        samples: float = max_steps * total_batch_size
    else:
        max_steps = math.ceil(num_train_epochs * steps_per_epoch)
        epochs = math.ceil(num_train_epochs)
        samples = samples_per_epoch * num_train_epochs
    return Schedule(micro_batches_per_epoch, steps_per_epoch, max_steps, epochs, samples)

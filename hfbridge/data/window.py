"""One optimizer step's data, and how many of them a run has; knows neither engine.

A window is the list of micro-batches whose gradients one optimizer step sums. The last window of an epoch
may be short; a window never crosses an epoch.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

MicroBatch = Mapping[str, Any]


@dataclass(frozen=True)
class Cut:
    """How the rows of a pass are cut into optimizer steps.

    Attributes:
        ranks: that share the pass.
        rows: of a micro-batch of one rank.
        accumulation: micro-batches of a full window.
    """

    ranks: int
    rows: int
    accumulation: int

    @property
    def rows_per_step(self) -> int:
        """Rows of a full optimizer step, on all ranks."""
        return self.ranks * self.rows * self.accumulation

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks}, micro-batches of {self.rows}, accumulation {self.accumulation}"


@dataclass(frozen=True)
class Place:
    """Where in the data a run is, between two optimizer steps.

    Attributes:
        epoch: passes that are behind.
        windows: optimizer steps of the running pass that are behind, counted from `first_row`.
        first_row: row, in the order of the pass, at which its present cut begins; 0 unless the run went on
            with another cut in mid-pass.
        extra: optimizer steps that the run takes more than if it had had its present cut from the beginning.
    """

    epoch: int = 0
    windows: int = 0
    first_row: int = 0
    extra: int = 0

    def next(self) -> "Place":
        """Return the place one window on; `dataclasses.replace` would cost five times as much."""
        return Place(self.epoch, self.windows + 1, self.first_row, self.extra)


_BEGINNING = Place()


class Window:
    """The micro-batches of one optimizer step.

    A plain class on purpose: Lightning walks through dicts, lists and dataclasses to move or measure a
    batch, which costs time and would take the micro-batches apart.

    Attributes:
        micro_batches: one mapping each, keys and shapes as the collator made them.
        done_micro_batches: micro-batches of this epoch that are behind the window when it has been trained.
        items: what the loss counts in the window, set by `HFModule` when the window reaches the device.
        place: where the run is when the window has been trained.
    """

    __slots__ = ("done_micro_batches", "items", "micro_batches", "place")

    def __init__(
        self, micro_batches: list[MicroBatch], *, done_micro_batches: int, items: Any = None
    ) -> None:
        self.micro_batches = micro_batches
        self.done_micro_batches = done_micro_batches
        self.items = items
        self.place = _BEGINNING

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)

    def __repr__(self) -> str:
        return f"Window({len(self)} micro-batches, {self.done_micro_batches} done)"


def cut_into_windows(
    micro_batches: Iterable[MicroBatch],
    size: int,
    *,
    done: int = 0,
    in_hand: MicroBatch | None = None,
    sizes: Iterator[int] | None = None,
) -> Iterator[Window]:
    """Yield windows of `size` micro-batches; the last one holds what is left.

    All micro-batches of a window are collated before it is yielded, and one more is kept in hand: a collator
    that draws from the generator the model draws from, too, finds it in the state the native Trainer leaves
    it in.

    Args:
        micro_batches: of one pass, or of what is left of it.
        size: micro-batches of a full window.
        done: micro-batches of the pass that are behind; full windows of them.
        in_hand: the first micro-batch, collated already.
        sizes: how many micro-batches each window really holds, asked for when its first one is there; each
            counts as `size` of the pass.

    Mirrors: transformers.Trainer.get_batch_samples
    Mirrors: accelerate.data_loader.DataLoaderShard.__iter__
    """
    window: list[MicroBatch] = []
    full = size
    for micro_batch in _one_in_hand(iter(micro_batches), in_hand):
        if sizes is not None and not window:
            full = next(sizes)
        window.append(micro_batch)
        if len(window) == full:
            done += size
            yield Window(window, done_micro_batches=done)
            window = []
    if window:
        yield Window(window, done_micro_batches=done + len(window))


def _one_in_hand(micro_batches: Iterator[MicroBatch], in_hand: MicroBatch | None) -> Iterator[MicroBatch]:
    if in_hand is None:
        in_hand = next(micro_batches, None)
        if in_hand is None:
            return
    for following in micro_batches:
        yield in_hand
        in_hand = following
    yield in_hand


@dataclass(frozen=True)
class Schedule:
    """How long a run is, counted in optimizer steps.

    Attributes:
        micro_batches_per_epoch: batches of one pass, on each rank.
        steps_per_epoch: optimizer steps of one pass, the short last window included.
        max_steps: optimizer steps of the run.
        epochs: passes begun; the last may end early.
        samples: samples the run counts for its speed, as the native Trainer does.
    """

    micro_batches_per_epoch: int
    steps_per_epoch: int
    max_steps: int
    epochs: int
    samples: float

    def lengthened(self, steps: int, *, max_steps: int) -> "Schedule":
        """Return the schedule of a run that takes some steps more than its cut tells, or fewer.

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
        samples_per_epoch: rows of the training set.
        micro_batches_per_epoch: batches of one pass, on each rank; at least 1.
        accumulation: micro-batches of a full window.
        total_batch_size: samples of one full optimizer step on all ranks.
        max_steps: overrides the epochs when positive.
        num_train_epochs: passes; a fraction ends the last one early.

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

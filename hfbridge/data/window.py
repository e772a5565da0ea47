"""One optimizer step's data, and how many of them a run has; knows neither engine.

A window is the list of micro-batches whose gradients one optimizer step sums. The last window of an epoch
may be short; a window never crosses an epoch.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MicroBatch = Mapping[str, Any]


class Window:
    """The micro-batches of one optimizer step.

    A plain class on purpose: Lightning walks through dicts, lists and dataclasses to move or measure a
    batch, which costs time and would take the micro-batches apart.

    Attributes:
        micro_batches: one mapping each, keys and shapes as the collator made them.
        done_micro_batches: micro-batches of this epoch that are behind the window when it has been trained.
        items: what the loss counts in the window, set by `HFModule` when the window reaches the device.
    """

    __slots__ = ("done_micro_batches", "items", "micro_batches")

    def __init__(
        self, micro_batches: list[MicroBatch], *, done_micro_batches: int, items: Any = None
    ) -> None:
        self.micro_batches = micro_batches
        self.done_micro_batches = done_micro_batches
        self.items = items

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

    Mirrors: transformers.Trainer.get_batch_samples
    Mirrors: accelerate.data_loader.DataLoaderShard.__iter__
    """
    window: list[MicroBatch] = []
    for micro_batch in _one_in_hand(iter(micro_batches), in_hand):
        window.append(micro_batch)
        done += 1
        if len(window) == size:
            yield Window(window, done_micro_batches=done)
            window = []
    if window:
        yield Window(window, done_micro_batches=done)


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

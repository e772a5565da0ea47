"""What Lightning iterates: windows for training, micro-batches for evaluation; knows neither engine.

Both loaders are thin. They draw nothing from the random generators before the first batch is asked for:
Lightning calls `iter` more often than it iterates, and each `iter(DataLoader)` draws. And a training loader
knows how to go on in the middle of a pass, with every draw as if it had never stopped:

    draws of a pass                     when it goes on
    the seed of the workers             drawn again from the state the pass began in
    the order (some samplers)           likewise; the batches behind are skipped as indices, uncollated
    collating (some collators)          the micro-batch in hand is collated in the state it was collated in;
                                        with workers, whose generators nobody can set, all of the pass are
                                        collated again
    training                            from the state at the checkpoint
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch.utils.data import DataLoader

from hfbridge import generators
from hfbridge.data.order import batches_from, sampler_of
from hfbridge.data.regroup import Regrouped
from hfbridge.data.window import MicroBatch, Place, Window, cut_into_windows
from hfbridge.generators import RandomStates


@dataclass
class PassRecord:
    """What has to be known of a pass over the data to go on in its middle.

    Attributes:
        states: the random states in which it began.
        sampler: state of the sampler's own generator then; `None` without one.
        in_hand: the random states in which the micro-batch now in hand was collated; `None` if collating it
            drew nothing, or was done by a worker.
    """

    states: RandomStates
    sampler: torch.Tensor | None = None
    in_hand: RandomStates | None = None


@dataclass(frozen=True)
class Start:
    """Where a resumed run begins.

    Attributes:
        place: where in the data.
        done: micro-batches that count as behind in this pass, so that its last one has the number of any
            pass's; `windows` full ones of them, unless the pass was begun with another cut.
        states: random states in which training goes on; `None` leaves the generators alone.
        record: of the pass to go on with; `None` if the checkpoint has none, as a native one.
        sampler: state of the sampler's own generator; `None` without one.
    """

    place: Place
    done: int
    states: RandomStates | None
    record: PassRecord | None = None
    sampler: torch.Tensor | None = None


class KeepsWorkers:
    """A loader around a DataLoader: Lightning ends the workers that live on when it is done with the run.

    It looks for the iterator of a DataLoader under torch's private name. Workers that nobody ends are ended
    by the garbage collector, some time later, which may wait five seconds for each.
    """

    @property
    def _inner(self) -> DataLoader[Any] | None:
        """The DataLoader, if it is there."""
        raise NotImplementedError

    @property
    def _iterator(self) -> Any:
        return None if self._inner is None else self._inner._iterator

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        if self._inner is not None:
            self._inner._iterator = value


class WindowLoader(KeepsWorkers):
    """Iterate a training DataLoader one optimizer step at a time.

    Args:
        micro_batches: loader of the micro-batches of this rank.
        accumulation: micro-batches of a full window.

    Attributes:
        record: of the pass that is running, or ran last.

    Proved by: tests/unit/data/test_loader.py
    """

    def __init__(self, micro_batches: DataLoader[Any], *, accumulation: int) -> None:
        self.micro_batches = micro_batches
        self.accumulation = accumulation
        self.record: PassRecord | None = None
        self._start: Start | None = None
        self._place = Place()
        self._epoch = 0

    def __len__(self) -> int:
        """Optimizer steps of one pass, whether it is gone through whole or not."""
        return -(-len(self.micro_batches) // self.accumulation)

    def __iter__(self) -> Iterator[Window]:
        start, self._start = self._start, None
        if start is None:
            self._place = Place(self._epoch, extra=self._place.extra)
            yield from self._whole_pass()
            return
        self._place = start.place
        if start.place.windows == 0:
            if start.states is not None:
                generators.restore(start.states)
            self._set_sampler_state(start.sampler)
            yield from self._whole_pass(start.done)
        else:
            yield from self._rest_of_pass(start)

    def start_at(self, start: Start) -> None:
        """Begin the next pass where a checkpoint was written."""
        self._start = start

    def state_dict(self) -> dict[str, Any]:
        """Tell Lightning that this loader can go on in mid-pass; what it needs travels elsewhere."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: `start_at` says where to go on."""

    @property
    def _inner(self) -> DataLoader[Any]:
        return self.micro_batches

    @property
    def sampler(self) -> "WindowLoader":
        """The object whose `set_epoch` Lightning calls before each pass: this loader."""
        return self

    @property
    def sampler_state(self) -> torch.Tensor | None:
        """State of the generator that the sampler keeps to itself; `None` without one."""
        generator = getattr(sampler_of(self.micro_batches), "generator", None)
        return None if generator is None else generator.get_state()

    def set_epoch(self, epoch: int) -> None:
        """Give sampler and dataset the number of the pass about to begin, counted from 0."""
        self._epoch = epoch
        loader = self.micro_batches
        parts: tuple[Any, ...] = (sampler_of(loader), loader.batch_sampler, loader.dataset)
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def _whole_pass(self, done: int = 0) -> Iterator[Window]:
        """Go through a pass, or from a row on through what is left of it for another cut."""
        loader, first_row = self.micro_batches, self._place.first_row
        self.record = PassRecord(generators.capture(), self.sampler_state)
        if loader.persistent_workers and self._epoch > 0:
            # The seed of workers that live on was drawn in the first pass; one of new workers is no draw of
            # this run.
            loader.generator = torch.Generator()
        micro_batches = iter(self._without(0, loader.generator) if first_row else loader)
        yield from self._windows(self._watched(micro_batches), done=done)

    def _windows(
        self, micro_batches: Iterator[MicroBatch], *, done: int, in_hand: MicroBatch | None = None
    ) -> Iterator[Window]:
        """Cut a pass into windows, each with the place behind it."""
        of_pass, behind = len(self.micro_batches), self._place
        windows = cut_into_windows(
            micro_batches, self.accumulation, done=done, in_hand=in_hand, sizes=self._sizes()
        )
        for window in windows:
            window.done_micro_batches = min(window.done_micro_batches, of_pass)
            behind = behind.next()
            if window.done_micro_batches == of_pass:
                behind = Place(epoch=behind.epoch + 1, extra=behind.extra)
            window.place = self._place = behind
            yield window

    def _rest_of_pass(self, start: Start) -> Iterator[Window]:
        """Go on behind the batches that were trained."""
        behind, done, record = start.place.windows, start.done, start.record
        if record is None:
            # As natively: the random states are set when the first window has been fetched.
            self.record = PassRecord(generators.capture(), self.sampler_state)
            windows = self._windows(iter(self._without(behind)), done=done)
            first = next(windows)
            if start.states is not None:
                generators.restore(start.states)
            yield first
            yield from windows
            return
        assert start.states is not None
        self.record = record
        generators.restore(record.states)
        self._set_sampler_state(record.sampler)
        seeds_workers = torch.Generator()
        seeds_workers.set_state(record.states["cpu"])
        _draw_worker_seed()
        if self._collates_randomly_in_workers():
            micro_batches = iter(self._without(0, seeds_workers))
            self._leave_out(micro_batches, behind)
        else:
            micro_batches = iter(self._without(behind, seeds_workers))
        generators.restore(record.in_hand or start.states)
        in_hand = next(micro_batches)
        generators.restore(start.states)
        following = self._watched(micro_batches, draws=record.in_hand is not None)
        yield from self._windows(following, done=done, in_hand=in_hand)

    def _sizes(self) -> Iterator[int]:
        """Tell how many micro-batches each window has; the last one may have fewer."""
        batches = self.micro_batches.batch_sampler
        return batches.sizes() if isinstance(batches, Regrouped) else repeat(self.accumulation)

    def _leave_out(self, micro_batches: Iterator[MicroBatch], windows: int) -> None:
        """Collate the first windows again, for the draws that takes."""
        sizes = self._sizes()
        for _ in range(windows):
            next(micro_batches)  # then the size of its window is known
            for _ in range(next(sizes) - 1):
                next(micro_batches)

    def _without(self, windows: int, generator: torch.Generator | None = None) -> DataLoader[Any]:
        """Make a loader of the rest of a pass; the order is drawn here, nothing is collated."""
        loader, first_row = self.micro_batches, self._place.first_row
        rest = batches_from(loader, first_row, windows=windows, accumulation=self.accumulation)
        return DataLoader(
            loader.dataset,
            batch_sampler=_Rest(rest),
            generator=generator,
            **{name: getattr(loader, name) for name in _KEPT_ARGUMENTS},
        )

    def _watched(
        self, micro_batches: Iterator[MicroBatch], draws: bool | None = None
    ) -> Iterator[MicroBatch]:
        """Pass micro-batches on; where collating draws, keep the states in which each was collated."""
        record = self.record
        assert record is not None
        if self.micro_batches.num_workers > 0:
            draws = False
        if draws is None:
            before = generators.capture()
            first = next(micro_batches, None)
            if first is None:
                return
            # The order itself may be drawn with the first batch; then the states are kept for nothing.
            draws = not generators.are_equal(before, generators.capture())
            yield first
        if not draws:
            yield from micro_batches
            return
        while True:
            record.in_hand = generators.capture()
            following = next(micro_batches, None)
            if following is None:
                return
            yield following

    def _collates_randomly_in_workers(self) -> bool:
        """Try on one batch, in this process, whether collating draws."""
        loader = self.micro_batches
        if loader.num_workers == 0 or loader.persistent_workers:
            return False
        states, batches = generators.capture(), loader.batch_sampler
        # The first rows of the set: drawing an order of millions for a trial would take as long as the start.
        count = getattr(getattr(batches, "batch_sampler", batches), "batch_size", None) or 2
        rows = [loader.dataset[i] for i in range(min(count, len(loader.dataset)))]  # type: ignore[arg-type]
        between = generators.capture()
        if loader.collate_fn is not None:
            loader.collate_fn(rows)
        draws = not generators.are_equal(between, generators.capture())
        generators.restore(states)
        return draws

    def _set_sampler_state(self, state: torch.Tensor | None) -> None:
        generator = getattr(sampler_of(self.micro_batches), "generator", None)
        if generator is not None and state is not None:
            generator.set_state(state)


_KEPT_ARGUMENTS = (
    "collate_fn",
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


def _draw_worker_seed() -> None:
    """Draw what `iter(DataLoader)` draws."""
    torch.empty((), dtype=torch.int64).random_()


class _Rest:
    """The batches of indices that an iterator still has."""

    def __init__(self, batches: Iterator[list[int]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches


class EvalLoader(KeepsWorkers):
    """Iterate an evaluation DataLoader batch by batch.

    As accelerate's loaders do, it fetches each batch before the one in front of it is used; a collator that
    draws random numbers shows the difference.

    Args:
        batches: the DataLoader.
        prefix: what the names of the set's metrics begin with.
        batch_size: rows of a full batch.
        is_first_pass: whether its workers, if they live on, are yet to be made; a resumed run has made its
            own before, and draws no seed for those that take their place.
        order: the rows' numbers in the order they are read in; `None` is that of the set.

    Proved by: tests/unit/data/test_loader.py
    """

    def __init__(
        self,
        batches: DataLoader[Any],
        *,
        prefix: str,
        batch_size: int,
        is_first_pass: bool = True,
        order: Sequence[int] | None = None,
    ) -> None:
        self.batches = batches
        if batches.persistent_workers and not is_first_pass:
            batches.generator = torch.Generator()
        self.prefix = prefix
        self.batch_size = batch_size
        self.order = order

    def __len__(self) -> int:
        """Batches of one pass."""
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        generator = getattr(sampler_of(self.batches), "generator", None)
        if generator is not None and not self.batches.persistent_workers:
            # Natively, each evaluation has a new loader, unless its workers live on.
            generator.manual_seed(generator.initial_seed())
        batches = iter(self.batches)
        batch = next(batches, None)
        while batch is not None:
            following = next(batches, None)
            yield batch
            batch = following

    @property
    def _inner(self) -> DataLoader[Any]:
        return self.batches

    @property
    def samples(self) -> int:
        """Rows of the dataset behind the loader."""
        return len(self.batches.dataset)  # type: ignore[arg-type]

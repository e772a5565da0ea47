"""The loaders that Lightning iterates. They draw no random numbers before the first batch is requested.

draws of an epoch                   when it is resumed in the middle
workers' seed, order of samples     drawn again from the states at the start of the epoch; completed batches
                                    are skipped as indices, uncollated
collating (some collators)          the prefetched micro-batch is collated again in its states; with workers,
                                    whose generators cannot be set, all of the epoch are
training                            from the states at the checkpoint
"""

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply
from torch.utils.data import DataLoader, SequentialSampler

from hfbridge.data.accumulation import AccumulationStep, DataPosition, MicroBatch, group_micro_batches
from hfbridge.data.length_grouping import Regrouped
from hfbridge.data.samplers import batches_from, sampler_of
from hfbridge.utilities import rng
from hfbridge.utilities.rng import RandomStates


@dataclass
class EpochRecord:
    """What is needed to resume in the middle of an epoch.

    Attributes:
        states: the random states at its start.
        sampler: state of the sampler's own generator then; `None` without one.
        prefetch_states: the random states in which the prefetched micro-batch was collated; `None` if that
            drew nothing, or was done by a worker.
    """

    states: RandomStates
    sampler: torch.Tensor | None = None
    prefetch_states: RandomStates | None = None


@dataclass(frozen=True)
class Start:
    """Where a resumed run begins.

    Attributes:
        position: in the data.
        done: micro-batches that count as completed in this epoch: those of `windows` full steps, unless the
            epoch was begun with another layout.
        states: random states in which training resumes; `None` leaves the generators alone.
        record: of the epoch to resume; `None` for a checkpoint of the HF Trainer.
        sampler: state of the sampler's own generator; `None` without one.
    """

    position: DataPosition
    done: int
    states: RandomStates | None
    record: EpochRecord | None = None
    sampler: torch.Tensor | None = None


class PersistentWorkersMixin:
    """A wrapper of a DataLoader whose workers Lightning shuts down at the end of the run.

    Lightning finds the iterator of a DataLoader under torch's private name. Workers that are left to the
    garbage collector may take five seconds each to end.

    Attributes:
        explain_errors: the context in which samples are read, which explains errors.
    """

    explain_errors: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def _inner(self) -> DataLoader[Any] | None:
        """The DataLoader, if there is one yet."""
        raise NotImplementedError

    @property
    def _iterator(self) -> Any:
        return None if self._inner is None else self._inner._iterator

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        if self._inner is not None:
            self._inner._iterator = value


class _WrappedDataLoader(PersistentWorkersMixin):
    """A loader around a DataLoader, `batches`."""

    batches: DataLoader[Any]

    @property
    def dataset(self) -> Any:
        """The samples, which Lightning's `BatchSizeFinder` counts."""
        return self.batches.dataset

    @property
    def _inner(self) -> DataLoader[Any]:
        return self.batches

    @property
    def _sampler_generator(self) -> torch.Generator | None:
        return getattr(sampler_of(self.batches), "generator", None)


class ResumableMixin:
    """A training loader that records its states before each optimizer step is fetched.

    Attributes:
        record: of the current epoch, or the last one.
        sampler_state: state of the sampler's own generator; `None` without one.
        _fetched: position, random states and `prefetch_states` before the current step was fetched.
    """

    record: EpochRecord | None = None
    sampler_state: torch.Tensor | None = None
    _start: Start | None = None
    _fetched: tuple[DataPosition, RandomStates, RandomStates | None] | None = None

    def start_at(self, start: Start) -> None:
        """Begin the next epoch where a checkpoint was written."""
        self._start = start

    def start_from(self, position: DataPosition) -> Start:
        """Describe how another loader begins with the step at a position, the current or the next one.

        Args:
            position: after the last completed optimizer step.

        Returns:
            The start; without `states` where they are the present ones.
        """
        if self._start is not None:  # nothing was fetched since the run was resumed
            return self._start
        record, fetched, sampler = self.record, self._fetched, self.sampler_state
        if fetched is None or fetched[0] != position or record is None:
            return Start(position, 0, None, record, sampler)
        if position.windows == 0:
            return Start(position, 0, record.states, record, record.sampler)
        return Start(position, 0, fetched[1], replace(record, prefetch_states=fetched[2]), sampler)


class TrainLoader(_WrappedDataLoader, ResumableMixin):
    """Iterate a training DataLoader: micro-batches, each with its optimizer step.

    Args:
        batches: loader of the micro-batches of this rank.
        accumulation: micro-batches of a full step; a function is called when a step begins.
        limit: micro-batches of an epoch, if fewer (`limit_train_batches`).
        is_stateful: `state_dict` holds the position in the epoch, which HFModule keeps in its checkpoints.

    Attributes:
        current: the last micro-batch that was yielded; `None` before the first one of an epoch.
        sampler: Lightning calls its `set_epoch`, and recognizes by its class that samples are not shuffled.

    Proved by: tests/unit/data/test_dataloaders.py
    """

    def __init__(
        self,
        batches: DataLoader[Any],
        *,
        accumulation: int | Callable[[], int],
        limit: int | None = None,
        is_stateful: bool = False,
    ) -> None:
        self.batches, self._limit, self._is_stateful = batches, limit, is_stateful
        self._handed_out = self._skipped = 0
        self.sampler: Any = self
        if isinstance(sampler_of(batches), SequentialSampler):
            self.sampler = _InOrder(batches.dataset, self.set_epoch)
        self._accumulation = accumulation
        self.current: MicroBatch | None = None
        self._generators = rng.Recorder()
        self._position = DataPosition()
        self._epoch = 0

    def __len__(self) -> int:
        """Micro-batches of an epoch; with a token budget, whose steps differ, no epoch has more."""
        batches = self.batches.batch_sampler
        return batches.most if isinstance(batches, Regrouped) else len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        self.current, self._handed_out, self._skipped = None, self._skipped, 0
        with self.explain_errors():
            for step in self._rest_by_count() if self._handed_out else self._steps():
                for self.current in step.micro_batches:
                    self._handed_out += 1
                    if step.ends_epoch and self.current.is_last:
                        self._handed_out = 0
                    yield self.current

    def state_dict(self) -> dict[str, Any]:
        """Return the completed micro-batches of the epoch; empty for HFModule."""
        return {"micro_batches": self._handed_out} if self._is_stateful else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip the completed micro-batches of the next epoch; HFModule uses `start_at`."""
        self._skipped = int(state.get("micro_batches", 0))

    @property
    def accumulation(self) -> int:
        """Micro-batches of a full step."""
        return self._accumulation if isinstance(self._accumulation, int) else self._accumulation()

    @property
    def sampler_state(self) -> torch.Tensor | None:  # type: ignore[override]
        """State of the sampler's own generator; `None` without one."""
        generator = self._sampler_generator
        return None if generator is None else generator.get_state()

    def set_epoch(self, epoch: int) -> None:
        """Set the index of the next epoch in sampler and dataset."""
        self._epoch = epoch
        loader: Any = self.batches
        for part in (sampler_of(loader), loader.batch_sampler, loader.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def _steps(self) -> Iterator[AccumulationStep]:
        start, self._start = self._start, None
        if start is None:
            self._position = DataPosition(self._epoch, extra=self._position.extra)
            yield from self._full_epoch()
            return
        self._position = start.position
        if start.position.windows == 0:
            if start.states is not None:
                rng.restore(start.states)
            self._set_sampler_state(start.sampler)
            yield from self._full_epoch(start.done)
        else:
            yield from self._rest_of_epoch(start)

    def _full_epoch(self, done: int = 0) -> Iterator[AccumulationStep]:
        """Iterate an epoch, or the rest of it from a sample on in another layout."""
        loader = self.batches
        self.record = EpochRecord(rng.capture(), self.sampler_state)
        if loader.persistent_workers and self._epoch > 0:
            # The seed of persistent workers was drawn in the first epoch; that of new ones is no draw of this
            # run.
            loader.generator = torch.Generator()
        batches = iter(self._without(0, loader.generator) if self._position.first_row else loader)
        yield from self._group(self._watched(batches), done=done)

    def _group(
        self,
        batches: Iterator[Mapping[str, Any]],
        *,
        done: int,
        prefetched: Mapping[str, Any] | None = None,
        sizes: Iterator[int] | None = None,
    ) -> Iterator[AccumulationStep]:
        """Group the micro-batches of an epoch into steps, each with the position after it."""
        per_epoch, position = len(self.batches), self._position
        if self._limit is not None:
            per_epoch = min(self._limit, per_epoch)
            if not isinstance(self.batches.batch_sampler, Regrouped):  # which limits itself
                batches = islice(batches, per_epoch - done - (prefetched is not None))
        steps = group_micro_batches(
            batches,
            self._accumulation,
            done=done,
            prefetched=prefetched,
            sizes=self._sizes() if sizes is None else sizes,
        )
        record = self.record
        assert record is not None
        while True:
            if not self._is_stateful:
                self._fetched = (position, self._generators.capture(), record.prefetch_states)
            step = next(steps, None)
            if step is None:
                return
            step.done_micro_batches = min(step.done_micro_batches, per_epoch)
            position = position.next()
            if step.done_micro_batches == per_epoch:
                position = DataPosition(epoch=position.epoch + 1, extra=position.extra)
                step.ends_epoch = True
            step.position = self._position = position
            yield step

    def _rest_of_epoch(self, start: Start) -> Iterator[AccumulationStep]:
        """Iterate the rest of an epoch after its completed steps."""
        completed, done, record = start.position.windows, start.done, start.record
        if record is None:
            # Like the HF Trainer, set the random states after the first step is fetched.
            self.record = EpochRecord(rng.capture(), self.sampler_state)
            steps = self._group(iter(self._without(completed)), done=done)
            first = next(steps)
            if start.states is not None:
                rng.restore(start.states)
                self._fetched = (start.position, start.states, None)
            yield first
            yield from steps
            return
        assert start.states is not None
        self.record, self._fetched = record, (start.position, start.states, record.prefetch_states)
        rng.restore(record.states)
        self._set_sampler_state(record.sampler)
        seeds_workers = torch.Generator()
        seeds_workers.set_state(record.states["cpu"])
        torch.empty((), dtype=torch.int64).random_()  # as `iter(DataLoader)` draws
        if self._collates_randomly_in_workers():
            batches = iter(self._without(0, seeds_workers))
            self._discard(batches, completed)
        else:
            batches = iter(self._without(completed, seeds_workers))
        rng.restore(record.prefetch_states or start.states)
        prefetched = next(batches)
        rng.restore(start.states)
        following = self._watched(batches, draws=record.prefetch_states is not None)
        yield from self._group(following, done=done, prefetched=prefetched)

    def _rest_by_count(self) -> Iterator[AccumulationStep]:
        """Iterate the rest of an epoch after a checkpoint of Lightning's."""
        self._position = DataPosition(self._epoch)
        self.record = EpochRecord(rng.capture(), self.sampler_state)
        steps, begun = divmod(self._handed_out, self.accumulation)
        batches = iter(self._without(steps))
        for _ in range(begun):
            next(batches)
        sizes = chain([self.accumulation - begun], repeat(self.accumulation)) if begun else None
        yield from self._group(batches, done=self._handed_out - begun, sizes=sizes)

    def _sizes(self) -> Iterator[int] | None:
        """Return the number of micro-batches of each step, where they differ."""
        batches = self.batches.batch_sampler
        return batches.sizes() if isinstance(batches, Regrouped) else None

    def _discard(self, batches: Iterator[Any], steps: int) -> None:
        """Collate the first steps again, for their random draws."""
        sizes = self._sizes()
        for _ in range(steps):
            next(batches)  # its step's size is known after this
            for _ in range((self.accumulation if sizes is None else next(sizes)) - 1):
                next(batches)

    def _without(self, steps: int, generator: torch.Generator | None = None) -> DataLoader[Any]:
        """Make a loader of the rest of an epoch; the order is drawn here, nothing is collated."""
        loader = self.batches
        rest = batches_from(loader, self._position.first_row, steps=steps, accumulation=self.accumulation)
        return DataLoader(
            loader.dataset,
            batch_sampler=_OneShot(rest),
            generator=generator,
            **{name: getattr(loader, name) for name in _KEPT_ARGUMENTS},
        )

    def _watched(self, batches: Iterator[Any], draws: bool | None = None) -> Iterator[Any]:
        """Yield micro-batches; where collating draws, keep the states in which each was collated."""
        record = self.record
        assert record is not None
        if self.batches.num_workers > 0:
            draws = False
        if draws is None:
            before = rng.capture()
            first = next(batches, None)
            if first is None:
                return
            # The order itself may be drawn with the first batch; then the states are kept needlessly.
            draws = not rng.are_equal(before, rng.capture())
            yield first
        if not draws:
            yield from batches
            return
        while True:
            record.prefetch_states = rng.capture()
            following = next(batches, None)
            if following is None:
                return
            yield following

    def _collates_randomly_in_workers(self) -> bool:
        """Whether collating one batch in this process draws random numbers."""
        loader = self.batches
        if loader.num_workers == 0 or loader.persistent_workers:
            return False
        states, batches = rng.capture(), loader.batch_sampler
        # The first samples of the set, since drawing an order of millions takes long.
        count = getattr(getattr(batches, "batch_sampler", batches), "batch_size", None) or 2
        dataset: Any = loader.dataset
        samples = [dataset[i] for i in range(min(count, len(dataset)))]
        between = rng.capture()
        if loader.collate_fn is not None:
            loader.collate_fn(samples)
        draws = not rng.are_equal(between, rng.capture())
        rng.restore(states)
        return draws

    def _set_sampler_state(self, state: torch.Tensor | None) -> None:
        if (generator := self._sampler_generator) is not None and state is not None:
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


class _InOrder(SequentialSampler):
    """What Lightning recognizes as a sampler without shuffling, with `set_epoch`."""

    def __init__(self, dataset: Any, set_epoch: Callable[[int], None]) -> None:
        super().__init__(dataset)
        self.set_epoch = set_epoch


class _OneShot:
    """An iterator as a batch sampler."""

    def __init__(self, batches: Iterator[list[int]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches


def first_samples(tensors: Any, count: int | None) -> Any:
    """Return the first samples of a tensor, or of tensors in tuples, lists and dicts.

    Args:
        tensors: each [batch, ...].
        count: how many; `None` is all.
    """
    if count is None:
        return tensors
    return recursively_apply(lambda tensor: tensor[:count], tensors)


class EvalLoader(_WrappedDataLoader):
    """Iterate an evaluation DataLoader batch by batch.

    Like accelerate's loaders it prefetches one batch, which matters for a collator that draws random numbers.

    Args:
        batches: the DataLoader.
        prefix: of the metrics' names.
        batch_size: samples of a full batch.
        draws_worker_seed: whether persistent workers draw a seed; those of a resumed run drew it before.
        order: sample indices in the order they are read in; `None` is that of the set.

    Attributes:
        batch_sampler: for predictions Lightning's record of the indices of each batch; else `None`.

    Proved by: tests/unit/data/test_dataloaders.py
    """

    def __init__(
        self,
        batches: DataLoader[Any],
        *,
        prefix: str,
        batch_size: int,
        draws_worker_seed: bool = True,
        order: Sequence[int] | None = None,
    ) -> None:
        self.batches = batches
        if batches.persistent_workers and not draws_worker_seed:
            batches.generator = torch.Generator()
        self.prefix = prefix
        self.batch_size = batch_size
        self.order = order
        sampler: Any = batches.batch_sampler
        self.batch_sampler = sampler if hasattr(sampler, "seen_batch_indices") else None

    def own_samples(self, batch_idx: int) -> int | None:
        """Count a batch's samples without repeated ones; `None` for a loader that does not predict."""
        sampler = self.batch_sampler
        return None if sampler is None else len(sampler.seen_batch_indices[batch_idx])

    def __len__(self) -> int:
        """Batches of an evaluation."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        generator = self._sampler_generator
        if generator is not None and not self.batches.persistent_workers:
            # In the HF Trainer each evaluation has a new loader, unless workers are persistent.
            generator.manual_seed(generator.initial_seed())
        with self.explain_errors():
            batches = iter(self.batches)
            batch = next(batches, None)
            while batch is not None:
                following = next(batches, None)
                # A BatchEncoding, which a tokenizer's collator makes, is no dict.
                yield dict(batch) if isinstance(batch, UserDict) else batch
                batch = following

    @property
    def samples(self) -> int:
        """Samples of the dataset."""
        return len(self.batches.dataset)  # type: ignore[arg-type]

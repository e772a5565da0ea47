"""Reading sets that are streams: rows in their own order, often of unknown number; knows Hugging Face.

A stream is a `datasets.IterableDataset` or a torch `IterableDataset`. It is read through accelerate's own
loaders, as natively:

    dispatch_batches     on several ranks
    None, True           the first rank reads, and sends each rank its part of every round
    False                each rank reads: its shards, if there is one for each rank, else the stream, of which
                         it takes its part of every round

The native Trainer calls the whole run one pass if the length is unknown: epochs are counted in parts of
`max_steps`, and a stream that ends before begins again.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import torch
from accelerate.data_loader import DataLoaderDispatcher, prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import has_length

from hfbridge.data.accumulation import AccumulationStep, DataPosition, MicroBatch, Schedule
from hfbridge.data.dataloaders import EpochRecord, PersistentWorkersMixin, ResumableMixin
from hfbridge.data.sample_errors import NamingColumns
from hfbridge.distributed import collectives
from hfbridge.distributed.consistency import Fact
from hfbridge.errors import CheckpointError, DataError, SettingsError
from hfbridge.utilities import rng
from hfbridge.utilities.rng import RandomStates

# Batches that a stream of unknown length says it has: Lightning draws ahead of a loader without a length.
ENDLESS = 2**40


def is_stream(dataset: Any) -> bool:
    """Whether a set gives its rows one after the other only."""
    return isinstance(dataset, (datasets.IterableDataset, TorchIterableDataset))


def has_unknown_length(dataset: Any) -> bool:
    """Whether a set is a stream that does not tell the number of its rows."""
    return is_stream(dataset) and not has_length(dataset)


def is_split_by_rank(dataset: Any) -> bool:
    """Whether the user has split a stream of `datasets` between the ranks."""
    split: Any = getattr(dataset, "_distributed", None) if is_stream(dataset) else None
    return split is not None and split.world_size > 1


def check_stream(dataset: Any, split: str, settings: Any, *, needs_steps: bool = True) -> None:
    """See that settings can be honoured for a stream.

    Args:
        dataset: the stream.
        split: its name.
        settings: of the run.
        needs_steps: a run without a number of steps cannot be planned.

    Raises:
        SettingsError: they have no effect on streams, natively, or need a length.
    """
    subject = f"the {split} set is a stream ({type(dataset).__name__})"
    if settings.dataloader_drop_last:
        raise SettingsError(
            f"dataloader_drop_last=True, and {subject}, whose last batch the native Trainer keeps all the "
            "same. Leave it out, or have the stream itself drop rows."
        )
    if split != "train":
        return
    if settings.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise SettingsError(
            f"train_sampling_strategy={str(settings.train_sampling_strategy)!r}, and {subject}, whose order "
            "is its own. Leave it out, or load the set with streaming=False."
        )
    if needs_steps and has_unknown_length(dataset) and settings.max_steps <= 0:
        raise SettingsError(
            f"max_steps={settings.max_steps}, and {subject} without a length: the number of steps cannot be "
            "told. Set max_steps to how many optimizer steps the run is to take."
        )


def plan_stream(settings: Any, *, total_batch_size: int) -> Schedule:
    """Count a run over a stream of unknown length.

    Args:
        settings: with `max_steps`.
        total_batch_size: samples of one full optimizer step on all ranks.

    Mirrors: transformers.Trainer.set_initial_training_values
    """
    steps = settings.max_steps
    return Schedule(
        micro_batches_per_epoch=steps * settings.gradient_accumulation_steps,
        steps_per_epoch=steps,
        max_steps=steps,
        epochs=sys.maxsize,
        samples=steps * total_batch_size,
    )


def native_place(state: Any, schedule: Schedule, *, accumulation: int) -> DataPosition:
    """Find the place that the epoch of a native checkpoint tells, in whichever pass it was written.

    The native Trainer itself takes every step for one of the first pass, and goes on elsewhere when a stream
    that ends before `max_steps` has begun again.

    Args:
        state: of the checkpoint.
        schedule: of the run that goes on.
        accumulation: micro-batches of a full window.

    Raises:
        CheckpointError: that is no whole number of windows.
    """
    epoch, of_pass = state.epoch or 0.0, schedule.micro_batches_per_epoch
    if schedule.epochs == sys.maxsize:  # the length is unknown
        of_pass = state.max_steps * accumulation
    passes = int(epoch + 1e-9)
    windows = (epoch - passes) * of_pass / accumulation
    if abs(windows - round(windows)) > 1e-3:
        raise CheckpointError(
            f"The checkpoint tells epoch={epoch!r}, which is no whole number of optimizer steps of "
            f"gradient_accumulation_steps={accumulation} in a pass of {of_pass} micro-batches. Go on with "
            "the accumulation it was written with."
        )
    return DataPosition(passes, round(windows))


def facts_of_stream(dataset: Any, split: str) -> list[Fact]:
    """Describe a stream for comparing it with those of other ranks; its rows are not read."""
    cure = "Open the same stream on every rank."
    facts = [Fact(f"the kind of the {split} set", type(dataset).__name__, cure)]
    if has_length(dataset):
        facts.append(Fact(f"rows of the {split} set", str(len(dataset)), cure))
    if isinstance(dataset, datasets.IterableDataset):
        facts.append(Fact(f"shards of the {split} set", str(dataset.num_shards), cure))
        names = dataset.column_names
        if names is not None:
            facts.append(Fact(f"columns of the {split} set", ", ".join(names), cure))
    return facts


# Arguments of `map` that streams have, too.
_LAZY = (
    "with_indices",
    "input_columns",
    "batched",
    "batch_size",
    "drop_last_batch",
    "remove_columns",
    "features",
    "fn_kwargs",
)


def map_stream(dataset: Any, function: Callable[..., Any], arguments: Mapping[str, Any], split: str) -> Any:
    """Have a function called on the rows of a stream as they come.

    Raises:
        DataError: the stream is no datasets.IterableDataset, or its `map` does not take an argument.
    """
    if not isinstance(dataset, datasets.IterableDataset):
        raise DataError(
            f"map_function needs a datasets.IterableDataset, and the {split} set is a "
            f"{type(dataset).__name__}. Map its rows yourself, or make it with "
            "datasets.IterableDataset.from_generator."
        )
    wrong = [name for name in arguments if name not in _LAZY]
    if wrong:
        raise DataError(
            f"map_kwargs has {', '.join(wrong)}, and the {split} set is a stream, which is mapped while it "
            f"is read. Possible are {', '.join(_LAZY)}."
        )
    return dataset.map(NamingColumns(function, split), **arguments)


def read_stream(dataset: Any, *, args: Any, device: torch.device, **loading: Any) -> Any:
    """Make accelerate's loader of a stream.

    Args:
        dataset: the stream.
        args: the native arguments, with `accelerator_config`.
        device: where batches go.
        loading: further arguments of DataLoader: batch size, collator, workers.

    Raises:
        DataError: the batch size cannot be split by the ranks.

    Mirrors: transformers.Trainer._get_dataloader
    """
    config: Any = args.accelerator_config
    try:
        return prepare_data_loader(
            DataLoader(dataset, **loading),
            device=device,
            put_on_device=True,
            split_batches=config.split_batches,
            dispatch_batches=config.dispatch_batches,
            even_batches=config.even_batches,
            rng_types=["generator"],
        )
    except ValueError as error:
        raise DataError(f"The stream cannot be shared by the ranks: {error}") from error


class WatchedCollator:
    """A collator whose draws from the random generators are known, and can be had again.

    Args:
        collator: the collator.
        watches: it is called in this process, not in workers.
        round_size: micro-batches that are collated for one of this rank.

    Attributes:
        in_hand: random states in which the micro-batch now in hand was collated; `None` if nothing is drawn.
    """

    def __init__(
        self, collator: Callable[[list[Any]], Mapping[str, Any]], *, watches: bool, round_size: int
    ) -> None:
        self._collator, self._watches, self._round_size = collator, watches, round_size
        self._draws: bool | None = None
        self._calls = 0
        self._again: tuple[int, RandomStates, RandomStates] | None = None
        self.in_hand: RandomStates | None = None

    def begin(self, again: tuple[int, RandomStates, RandomStates] | None = None) -> None:
        """Begin a pass.

        Args:
            again: which micro-batch was in hand when a checkpoint was written, in which states it is to be
                collated, and those that the run goes on in behind it.
        """
        self._calls, self.in_hand = 0, None
        self._again = again

    def settle(self) -> None:
        """Go on in the states of the checkpoint, unless that has happened."""
        if self._again is not None:
            rng.restore(self._again[2])
            self._again = None

    def __call__(self, rows: list[Any]) -> Mapping[str, Any]:
        """Collate a micro-batch."""
        if not self._watches:
            return self._collator(rows)
        number, within = divmod(self._calls, self._round_size)
        self._calls += 1
        if self._again is not None and number == self._again[0] and within == 0:
            rng.restore(self._again[1])
        before = None if self._draws is False else rng.capture()
        batch = self._collator(rows)
        if self._draws is None and before is not None:
            self._draws = not rng.are_equal(before, rng.capture())
        if within == 0:
            self.in_hand = before if self._draws else None
        if self._again is not None and number == self._again[0] and within == self._round_size - 1:
            self.settle()
        return batch


class StreamLoader(PersistentWorkersMixin, ResumableMixin):
    """Iterate a stream: micro-batches, each with its optimizer step, as `TrainLoader` does a sized dataset.

    Args:
        loader: of `read_stream`.
        collator: the one it has.
        micro_batches: of an epoch; `None` if it ends with the stream, whose length is not known.
        accumulation: micro-batches of a full step.
        keeps_short: a step that the end of a stream of unknown length cuts short is a step of its own.
        limit: micro-batches of an epoch, if fewer than there are (`limit_train_batches`).
        is_stateful: `state_dict` holds the place in the epoch; that of HFModule is kept by its checkpoints.
        is_read_ahead: of a stream without a length Lightning's own loop reads one micro-batch ahead.

    Attributes:
        current: the micro-batch that was handed out last; `None` before the first one of an epoch.

    Mirrors: transformers.Trainer._run_epoch
    Proved by: tests/parity/test_streams.py
    """

    def __init__(
        self,
        loader: Any,
        collator: WatchedCollator,
        *,
        micro_batches: int | None,
        accumulation: int,
        keeps_short: bool,
        limit: int | None = None,
        is_stateful: bool = False,
        is_read_ahead: bool = False,
    ) -> None:
        self.loader, self.accumulation, self._limit = loader, accumulation, limit
        self.current: MicroBatch | None = None
        self._generators = rng.Recorder()
        self._collator, self._keeps_short = collator, keeps_short
        self._per_epoch, self._is_stateful = micro_batches, is_stateful
        self._handed_out = self._skipped = 0
        self._ahead = int(is_read_ahead and micro_batches is None)
        self._is_over = True
        self._has_length = has_length(loader)
        self._epoch = 0

    def __len__(self) -> int:
        """Micro-batches of an epoch; in the HF Trainer's way those of the run, if the length is unknown."""
        if self._per_epoch is None:
            raise TypeError("the length of the stream is not known")
        return self._per_epoch

    @property
    def _inner(self) -> Any:
        return self.loader

    @property
    def sampler(self) -> "StreamLoader":
        """The object whose `set_epoch` Lightning calls before each pass: this loader."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Give the stream the number of the pass about to begin, counted from 0."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the micro-batches of the epoch that were handed out; nothing for HFModule."""
        if not self._is_stateful:
            return {}
        return {"micro_batches": 0 if self._is_over else self._handed_out - self._ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip micro-batches of the next epoch that were handed out before; `start_at` is HFModule's way."""
        self._skipped = int(state.get("micro_batches", 0))

    def __iter__(self) -> Iterator[MicroBatch]:
        self.current, self._handed_out, self._skipped, self._is_over = None, self._skipped, 0, False
        for step in self._steps():
            for self.current in step.micro_batches:
                self._handed_out += 1
                self._is_over = not self._ahead and step.ends_epoch and self.current.is_last
                yield self.current
        self._is_over = True

    def _steps(self) -> Iterator[AccumulationStep]:
        start, self._start = self._start, None
        place = DataPosition(self._epoch) if start is None else start.position
        behind = self._handed_out or place.windows * self.accumulation
        loader = skip_first_batches(self.loader, behind) if behind else self.loader
        loader.set_epoch(place.epoch)
        record = None if start is None else start.record
        if start is None or start.states is None:
            self._collator.begin()
        elif behind == 0:
            rng.restore(start.states)
            self._collator.begin()
        elif record is None:
            # As the HF Trainer: the random states are set when the first step's data have been fetched.
            self._collator.begin((sys.maxsize, start.states, start.states))
        else:
            rng.restore(record.states)
            self._collator.begin((behind, record.in_hand or start.states, start.states))
        self.record = record if record is not None and behind else EpochRecord(rng.capture())
        yield from self._group(loader, place, done=behind, states=None if start is None else start.states)

    def _group(
        self, loader: Any, place: DataPosition, *, done: int, states: RandomStates | None
    ) -> Iterator[AccumulationStep]:
        """Group an epoch, or what is left of it, into steps, each with the position after it."""
        batches, window, is_last = self._batches(loader, may_be_empty=done > 0), list[MicroBatch](), False
        missing = done % self.accumulation  # of a step that was begun before a checkpoint
        assert self.record is not None
        while not is_last:
            if not window:
                states = self._generators.capture() if states is None else states
                self._fetched, states = (place, states, self.record.in_hand), None
            batch = next(batches, None)
            if batch is not None:
                window.append(MicroBatch(batch))
                done += 1
            is_last = batch is None or bool(loader.end_of_dataloader) or done == self._limit
            if len(window) + missing < self.accumulation and not is_last:
                continue
            missing = 0
            self._collator.settle()
            if not window:
                return
            is_short = is_last and done != self._limit and len(window) < self.accumulation
            takes_step = not is_short or self._has_length or self._keeps_short
            if not takes_step and done < self.accumulation:
                raise DataError(
                    f"The stream ended after {done} micro-batches, fewer than gradient_accumulation_steps="
                    f"{self.accumulation}: no optimizer step is ever taken. Set it to {done} or less."
                )
            place = DataPosition(place.epoch + 1) if is_last else place.next()
            step, window = AccumulationStep(window, done_micro_batches=done, ends_epoch=is_last), []
            step.position = place
            # In "native" no step is taken, and the gradients are added to the first step of the next epoch.
            step.micro_batches[-1].is_last = takes_step
            self.record.in_hand = self._collator.in_hand
            yield step

    def _batches(self, loader: Any, *, may_be_empty: bool) -> Iterator[Any]:
        found = False
        try:
            with self.explaining():
                for batch in loader:
                    found = True
                    yield batch
        except Exception as error:
            # accelerate sends what it has not read.
            if found or not getattr(loader, "_stop_iteration", False):
                raise
            raise DataError(self._empty) from error
        if not found and not may_be_empty:
            raise DataError(self._empty)

    @property
    def _empty(self) -> str:
        return (
            f"The train set is a stream that gave no rows in pass {self._epoch + 1}. Is it used up after one "
            "pass? Give one that can be read again, or set max_steps to what one pass has."
        )


class StreamEvalLoader(PersistentWorkersMixin):
    """Iterate a stream for evaluation, and count what it gives.

    Args:
        make: makes the loader, which natively is another for each evaluation.
        prefix: what the names of the set's metrics begin with.
        batch_size: rows of a full batch.
        has_length: its length is a number that no stream has: without one Lightning reads a batch ahead.

    Attributes:
        rounds: for each round so far its rows on all ranks, without repeated ones, and those of a rank.
        is_complete: the last one has been handed out.
        remainder: rows that accelerate cuts the last one to; 0 if it does not.

    Proved by: tests/parity/test_streams.py
    """

    def __init__(
        self, make: Callable[[], Any], *, prefix: str, batch_size: int, has_length: bool = True
    ) -> None:
        self._make, self._says_length = make, has_length
        self._kept: Any = None
        self.prefix, self.batch_size = prefix, batch_size
        self.rounds: list[tuple[int, int]] = []
        self.is_complete = False
        self.remainder = 0

    @property
    def _inner(self) -> Any:
        return self._kept

    def __len__(self) -> int:
        """More than any stream has, if it has a length."""
        if not self._says_length:
            raise TypeError("the length of the stream is not known")
        return ENDLESS

    def __iter__(self) -> Iterator[MicroBatch]:
        self.rounds, self.is_complete = [], False
        loader: Any = self._make() if self._kept is None else self._kept
        if loader.persistent_workers:
            self._kept = loader
        with self.explaining():
            for batch in loader:
                share = find_batch_size(batch) or self.batch_size
                self.is_complete = bool(loader.end_of_dataloader)
                rows = share * collectives.count()
                if self.is_complete:
                    self.remainder = max(int(loader.remainder), 0)
                    if isinstance(loader, DataLoaderDispatcher):
                        rows = self.remainder
                self.rounds.append((rows, share))
                yield batch

"""Read streams, the iterable datasets of `datasets` and torch, through accelerate's loaders.

    dispatch_batches     on several ranks
    None, True           the first rank reads, and sends each rank its part of every round
    False                each rank reads its shards, if each has one, else its part of every round

If the length is unknown, the HF Trainer counts the full run as one epoch: epochs are fractions of
`max_steps`, and a stream that ends earlier is read again.
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
from hfbridge.data.sample_errors import StreamMapFunction
from hfbridge.distributed import collectives
from hfbridge.distributed.consistency import Fact
from hfbridge.errors import CheckpointError, DataError, SettingsError
from hfbridge.utilities import rng
from hfbridge.utilities.rng import RandomStates

# The length of a stream of unknown length: Lightning prefetches from a loader without one.
ENDLESS = 2**40


def is_stream(dataset: Any) -> bool:
    """Whether a dataset is iterable only."""
    return isinstance(dataset, (datasets.IterableDataset, TorchIterableDataset))


def has_unknown_length(dataset: Any) -> bool:
    """Whether a dataset is a stream without `len`."""
    return is_stream(dataset) and not has_length(dataset)


def is_split_by_rank(dataset: Any) -> bool:
    """Whether the user has split a stream of `datasets` between the ranks."""
    split: Any = getattr(dataset, "_distributed", None) if is_stream(dataset) else None
    return split is not None and split.world_size > 1


def check_stream(dataset: Any, split: str, settings: Any, *, needs_steps: bool = True) -> None:
    """Check that settings support a stream.

    Args:
        dataset: the stream.
        split: its name.
        settings: of the run.
        needs_steps: the run needs a number of steps.

    Raises:
        SettingsError: one has no effect on streams, or needs a length.
    """
    subject = f"the {split} set is a stream ({type(dataset).__name__})"
    if settings.dataloader_drop_last:
        raise SettingsError(
            f"dataloader_drop_last=True has no effect: {subject}, whose last batch the HF Trainer keeps. "
            "Leave it out, or drop rows in the stream itself."
        )
    if split != "train":
        return
    if settings.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise SettingsError(
            f"train_sampling_strategy={str(settings.train_sampling_strategy)!r} has no effect: {subject}, in "
            "its own order. Leave it out, or load the set with streaming=False."
        )
    if needs_steps and has_unknown_length(dataset) and settings.max_steps <= 0:
        raise SettingsError(
            f"max_steps={settings.max_steps}, and {subject} without a length. Set max_steps to the number of "
            "optimizer steps."
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


def hf_position(state: Any, schedule: Schedule, *, accumulation: int) -> DataPosition:
    """Read the position from the epoch of a checkpoint of the HF Trainer.

    The HF Trainer itself takes every step for one of the first epoch, and so resumes elsewhere where a stream
    that ends before `max_steps` was read again.

    Args:
        state: of the checkpoint.
        schedule: of the resumed run.
        accumulation: micro-batches of a full step.

    Raises:
        CheckpointError: the epoch is no integer number of steps.
    """
    epoch, per_epoch = state.epoch or 0.0, schedule.micro_batches_per_epoch
    if schedule.epochs == sys.maxsize:  # the length is unknown
        per_epoch = state.max_steps * accumulation
    epochs = int(epoch + 1e-9)
    steps = (epoch - epochs) * per_epoch / accumulation
    if abs(steps - round(steps)) > 1e-3:
        raise CheckpointError(
            f"The checkpoint has epoch={epoch!r}, which is no integer number of optimizer steps of "
            f"gradient_accumulation_steps={accumulation} in an epoch of {per_epoch} micro-batches. Resume "
            "with the gradient_accumulation_steps that it was written with."
        )
    return DataPosition(epochs, round(steps))


def facts_of_stream(dataset: Any, split: str) -> list[Fact]:
    """Describe a stream for comparison across ranks, without reading it."""
    facts = {"the kind": type(dataset).__name__}
    if has_length(dataset):
        facts["rows"] = str(len(dataset))
    if isinstance(dataset, datasets.IterableDataset):
        facts["shards"] = str(dataset.num_shards)
        if dataset.column_names is not None:
            facts["columns"] = ", ".join(dataset.column_names)
    hint = "Open the same stream on every rank."
    return [Fact(f"{subject} of the {split} set", value, hint) for subject, value in facts.items()]


# Arguments of `Dataset.map` that `IterableDataset.map` has, too.
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
    """Map a stream lazily.

    Raises:
        DataError: the stream is no datasets.IterableDataset, or its `map` does not support an argument.
    """
    if not isinstance(dataset, datasets.IterableDataset):
        raise DataError(
            f"map_function needs a datasets.IterableDataset, and the {split} set is a "
            f"{type(dataset).__name__}. Make it with datasets.IterableDataset.from_generator, or map it "
            "yourself."
        )
    wrong = [name for name in arguments if name not in _LAZY]
    if wrong:
        raise DataError(
            f"map_kwargs has {', '.join(wrong)}, and the {split} set is a stream, which is mapped while it "
            f"is read. Supported are {', '.join(_LAZY)}."
        )
    return dataset.map(StreamMapFunction(function, split), **arguments)


def read_stream(dataset: Any, *, args: Any, device: torch.device, **loading: Any) -> Any:
    """Make accelerate's loader of a stream.

    Args:
        dataset: the stream.
        args: of the run.
        device: of the batches.
        loading: arguments of DataLoader: batch size, collator, workers.

    Raises:
        DataError: the batch size is no multiple of the ranks.

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
        raise DataError(f"The stream cannot be split between the ranks: {error}") from error


class WatchedCollator:
    """A collator whose random draws are recorded, and can be repeated.

    Args:
        collator: the collator.
        watches: it is called in this process, not in workers.
        round_size: micro-batches that are collated for one of this rank.

    Attributes:
        prefetch_states: random states in which the prefetched micro-batch was collated; `None` if that draws
            nothing.
    """

    def __init__(
        self, collator: Callable[[list[Any]], Mapping[str, Any]], *, watches: bool, round_size: int
    ) -> None:
        self._collator, self._watches, self._round_size = collator, watches, round_size
        self._draws: bool | None = None
        self._calls = 0
        self._again: tuple[int, RandomStates, RandomStates] | None = None
        self.prefetch_states: RandomStates | None = None

    def begin(self, again: tuple[int, RandomStates, RandomStates] | None = None) -> None:
        """Begin an epoch.

        Args:
            again: index of the micro-batch that was prefetched when the checkpoint was written, the states to
                collate it in, and those to resume in after it.
        """
        self._calls, self.prefetch_states = 0, None
        self._again = again

    def restore(self) -> None:
        """Restore the states of the checkpoint, once."""
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
            self.prefetch_states = before if self._draws else None
        if self._again is not None and number == self._again[0] and within == self._round_size - 1:
            self.restore()
        return batch


class StreamLoader(PersistentWorkersMixin, ResumableMixin):
    """Iterate a stream: micro-batches, each with its optimizer step, like `TrainLoader`.

    Args:
        loader: of `read_stream`.
        collator: the loader's.
        micro_batches: of an epoch; `None` if unknown.
        accumulation: micro-batches of a full step.
        keeps_short: take the optimizer step of the last micro-batches of a stream of unknown length, even if
            there are fewer.
        limit: micro-batches of an epoch, if fewer (`limit_train_batches`).
        is_stateful: as in `TrainLoader`.
        is_read_ahead: Lightning's own loop prefetches one micro-batch of a stream without a length.

    Attributes:
        current: the last micro-batch that was yielded; `None` before the first one of an epoch.

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
        """Micro-batches of an epoch; of the run if the length is unknown, as in the HF Trainer."""
        if self._per_epoch is None:
            raise TypeError("the length of the stream is not known")
        return self._per_epoch

    @property
    def _inner(self) -> Any:
        return self.loader

    @property
    def sampler(self) -> "StreamLoader":
        """The object whose `set_epoch` Lightning calls before each epoch: this loader."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the index of the next epoch."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the completed micro-batches of the epoch; empty for HFModule."""
        if not self._is_stateful:
            return {}
        return {"micro_batches": 0 if self._is_over else self._handed_out - self._ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip the completed micro-batches of the next epoch; HFModule uses `start_at`."""
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
        position = DataPosition(self._epoch) if start is None else start.position
        done = self._handed_out or position.windows * self.accumulation
        loader = skip_first_batches(self.loader, done) if done else self.loader
        loader.set_epoch(position.epoch)
        record = None if start is None else start.record
        if start is None or start.states is None:
            self._collator.begin()
        elif done == 0:
            rng.restore(start.states)
            self._collator.begin()
        elif record is None:
            # As the HF Trainer: the random states are set when the first step's data have been fetched.
            self._collator.begin((sys.maxsize, start.states, start.states))
        else:
            rng.restore(record.states)
            self._collator.begin((done, record.prefetch_states or start.states, start.states))
        self.record = record if record is not None and done else EpochRecord(rng.capture())
        yield from self._group(loader, position, done=done, states=None if start is None else start.states)

    def _group(
        self, loader: Any, position: DataPosition, *, done: int, states: RandomStates | None
    ) -> Iterator[AccumulationStep]:
        """Group an epoch, or the rest of it, into steps, each with the position after it."""
        batches, collected, is_last = self._batches(loader, may_be_empty=done > 0), list[MicroBatch](), False
        missing = done % self.accumulation  # of a step that was begun before a checkpoint
        assert self.record is not None
        while not is_last:
            if not collected:
                states = self._generators.capture() if states is None else states
                self._fetched, states = (position, states, self.record.prefetch_states), None
            batch = next(batches, None)
            if batch is not None:
                collected.append(MicroBatch(batch))
                done += 1
            is_last = batch is None or bool(loader.end_of_dataloader) or done == self._limit
            if len(collected) + missing < self.accumulation and not is_last:
                continue
            missing = 0
            self._collator.restore()
            if not collected:
                return
            is_short = is_last and done != self._limit and len(collected) < self.accumulation
            takes_step = not is_short or self._has_length or self._keeps_short
            if not takes_step and done < self.accumulation:
                raise DataError(
                    f"The stream ended after {done} micro-batches, fewer than gradient_accumulation_steps="
                    f"{self.accumulation}, so no optimizer step is taken. Set it to {done} or less."
                )
            position = DataPosition(position.epoch + 1) if is_last else position.next()
            step, collected = AccumulationStep(collected, done_micro_batches=done, ends_epoch=is_last), []
            step.position = position
            # Without a step ("native") the gradients are added to the first step of the next epoch.
            step.micro_batches[-1].is_last = takes_step
            self.record.prefetch_states = self._collator.prefetch_states
            yield step

    def _batches(self, loader: Any, *, may_be_empty: bool) -> Iterator[Any]:
        found = False
        try:
            with self.explain_errors():
                for batch in loader:
                    found = True
                    yield batch
        except Exception as error:
            # accelerate fails on broadcasting a batch that it could not read.
            if found or not getattr(loader, "_stop_iteration", False):
                raise
            raise DataError(self._empty) from error
        if not found and not may_be_empty:
            raise DataError(self._empty)

    @property
    def _empty(self) -> str:
        return (
            f"The iterable train set has no rows in epoch {self._epoch + 1}. If it is exhausted after one "
            "epoch, make it re-iterable, or set max_steps to the steps of one epoch."
        )


class StreamEvalLoader(PersistentWorkersMixin):
    """Iterate a stream for evaluation, and count its samples.

    Args:
        make: makes the loader; the HF Trainer makes another for each evaluation.
        prefix: of the metrics' names.
        batch_size: samples of a full batch.
        has_length: `len` is `ENDLESS`, since Lightning prefetches from a loader without a length.

    Attributes:
        rounds: for each round so far its samples on all ranks, without repeated ones, and those of a rank.
        is_complete: whether the last round was yielded.
        remainder: samples that accelerate cuts the last round to; 0 if it does not.

    Proved by: tests/parity/test_streams.py
    """

    def __init__(
        self, make: Callable[[], Any], *, prefix: str, batch_size: int, has_length: bool = True
    ) -> None:
        self._make, self._has_length = make, has_length
        self._kept: Any = None
        self.prefix, self.batch_size = prefix, batch_size
        self.rounds: list[tuple[int, int]] = []
        self.is_complete = False
        self.remainder = 0

    @property
    def _inner(self) -> Any:
        return self._kept

    def __len__(self) -> int:
        """`ENDLESS`, or a TypeError."""
        if not self._has_length:
            raise TypeError("the length of the stream is not known")
        return ENDLESS

    def __iter__(self) -> Iterator[MicroBatch]:
        self.rounds, self.is_complete = [], False
        loader: Any = self._make() if self._kept is None else self._kept
        if loader.persistent_workers:
            self._kept = loader
        with self.explain_errors():
            for batch in loader:
                size = find_batch_size(batch) or self.batch_size
                self.is_complete = bool(loader.end_of_dataloader)
                samples = size * collectives.count()
                if self.is_complete:
                    self.remainder = max(int(loader.remainder), 0)
                    if isinstance(loader, DataLoaderDispatcher):
                        samples = self.remainder
                self.rounds.append((samples, size))
                yield batch

"""What Lightning iterates: windows for training, micro-batches for evaluation; knows neither engine.

Both loaders are thin. Their one duty beside iterating is to draw nothing from the random generators before
the first batch is asked for: Lightning calls `iter` more often than it iterates, and each `iter(DataLoader)`
draws.
"""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from hfbridge.data.window import MicroBatch, Window, cut_into_windows


class WindowLoader:
    """Iterate a training DataLoader one optimizer step at a time.

    Args:
        micro_batches: loader of the micro-batches of this rank.
        accumulation: micro-batches of a full window.

    Proved by: tests/unit/data/test_loader.py
    """

    def __init__(self, micro_batches: DataLoader[Any], *, accumulation: int) -> None:
        self.micro_batches = micro_batches
        self.accumulation = accumulation

    def __len__(self) -> int:
        """Optimizer steps of one pass."""
        return -(-len(self.micro_batches) // self.accumulation)

    def __iter__(self) -> Iterator[Window]:
        yield from cut_into_windows(self.micro_batches, self.accumulation)

    @property
    def sampler(self) -> "WindowLoader":
        """The object whose `set_epoch` Lightning calls before each pass: this loader."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Give sampler and dataset the number of the pass about to begin, counted from 0."""
        loader = self.micro_batches
        parts: tuple[Any, ...] = (loader.sampler, loader.batch_sampler, loader.dataset)
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)


class EvalLoader:
    """Iterate an evaluation DataLoader batch by batch.

    As accelerate's loaders do, it fetches each batch before the one in front of it is used; a collator that
    draws random numbers shows the difference.

    Args:
        batches: the DataLoader.
        prefix: what the names of the set's metrics begin with.
        batch_size: rows of a full batch.

    Proved by: tests/unit/data/test_loader.py
    """

    def __init__(self, batches: DataLoader[Any], *, prefix: str, batch_size: int) -> None:
        self.batches = batches
        self.prefix = prefix
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Batches of one pass."""
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        generator = getattr(self.batches.sampler, "generator", None)
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
    def samples(self) -> int:
        """Rows of the dataset behind the loader."""
        return len(self.batches.dataset)  # type: ignore[arg-type]

"""Group the samples of one optimizer step into micro-batches by length.

Samples are padded to the longest of their micro-batch, so samples of similar length should share one. The
step has the same samples, so its gradient is the same where the loss does not depend on the grouping.

    regroup=True         as many micro-batches as without, of as many samples
    regroup=4096         as few as possible, none of more than 4096 tokens with its padding
    on several ranks     samples change ranks, too; each has as many micro-batches, and about as many tokens
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice, tee
from typing import Any, Literal

import numpy as np
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from hfbridge.data.lengths import Lengths, raise_conflicts
from hfbridge.errors import DataError

Regroup = bool | int
_PLANNED = 512  # samples of a step that are grouped for the least padding; the cost grows with their square


class Regrouped:
    """The micro-batches of one rank, as lists of sample indices.

    Args:
        batches: the micro-batches before regrouping: the sampler of all batches, or a rank's shard of it.
        lengths: returns the lengths of samples, in tokens.
        accumulation: micro-batches of a full optimizer step.
        max_tokens: of a micro-batch, padding included; a longer sample is one by itself. `None` keeps the
            number of micro-batches.
        limit: micro-batches of an epoch before regrouping; `None` for all.

    Attributes:
        batches: as passed.
        batch_sampler: of all ranks' batches.

    Proved by: tests/properties/test_regroup.py
    """

    def __init__(
        self,
        batches: BatchSampler | BatchSamplerShard,
        lengths: Lengths,
        *,
        accumulation: int,
        max_tokens: int | None = None,
        limit: int | None = None,
    ) -> None:
        self.batches, self._lengths, self._limit = batches, lengths, limit
        self._accumulation, self._max_tokens = accumulation, max_tokens
        self.batch_sampler: Any = getattr(batches, "batch_sampler", batches)
        self._ranks: int = getattr(batches, "num_processes", 1)
        self._rank: int = getattr(batches, "process_index", 0)
        self._sizes: deque[int] = deque()

    def __len__(self) -> int:
        """Micro-batches of an epoch before regrouping."""
        return len(self.batches)

    @property
    def most(self) -> int:
        """The most micro-batches that an epoch can have."""
        size = 1 if self._max_tokens is None else int(self.batch_sampler.batch_size)
        return len(self.batches) * size

    def __iter__(self) -> Iterator[list[int]]:
        return self.regroup(self.batch_sampler)

    def regroup(self, batches: Any, *, skipped: int = 0) -> Iterator[list[int]]:
        """Regroup an epoch, or the rest of one.

        Args:
            batches: all ranks' batches, in the order of the epoch.
            skipped: optimizer steps to skip, without reading the lengths of their samples.
        """
        self._sizes.clear()
        steps = self._steps(batches)
        for _ in islice(steps, skipped):
            pass
        return self._assign(steps)

    def sizes(self) -> Iterator[int]:
        """Yield the micro-batches of each optimizer step; known once its first micro-batch is read."""
        return iter(self._sizes.popleft, None)

    def _assign(self, steps: Iterator[tuple[list[int], int]]) -> Iterator[list[int]]:
        for samples, micro_batches in steps:
            step = assign_micro_batches(
                samples,
                self._lengths(samples),
                ranks=self._ranks,
                micro_batches=micro_batches,
                max_tokens=self._max_tokens,
            )[self._rank]
            self._sizes.append(len(step))
            yield from step

    def _steps(self, batches: Any) -> Iterator[tuple[list[int], int]]:
        """Yield the samples of each optimizer step, of all ranks, and the micro-batches that a rank had."""
        shards, left = self._shards(batches), self._limit
        while True:
            size = self._accumulation if left is None else min(self._accumulation, left)
            left = None if left is None else left - size
            step = [list(islice(shard, size)) for shard in shards]
            if not step[0]:
                return
            yield [sample for of_rank in step for batch in of_rank for sample in batch], len(step[0])

    def _shards(self, batches: Any) -> list[Iterator[list[int]]]:
        """Split one order between all ranks, by accelerate's own rule for each."""
        if self._ranks == 1:
            return [iter(batches)]
        own: Any = self.batches
        return [
            iter(
                BatchSamplerShard(
                    _Drawn(batches, order),  # type: ignore[arg-type]
                    num_processes=self._ranks,
                    process_index=rank,
                    split_batches=own.split_batches,
                    even_batches=own.even_batches,
                )
            )
            for rank, order in enumerate(tee(batches, self._ranks))
        ]


class _Drawn:
    """Batches that were drawn once for all ranks; each gets its own lists, which accelerate may lengthen."""

    def __init__(self, batches: Any, order: Iterator[list[int]]) -> None:
        self.batch_size, self.drop_last = batches.batch_size, batches.drop_last
        self._order = order

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self._order)


def assign_micro_batches(
    samples: Sequence[int],
    lengths: Sequence[int],
    *,
    ranks: int,
    micro_batches: int,
    max_tokens: int | None,
) -> list[list[list[int]]]:
    """Assign the samples of one optimizer step to the micro-batches of all ranks, the longest first.

    Args:
        samples: their indices, which may repeat.
        lengths: of each, in tokens.
        ranks: that share the step.
        micro_batches: of each rank, unless there is a budget.
        max_tokens: of a micro-batch, padding included.

    Returns:
        The micro-batches of each rank, equally many on all.
    """
    order = sorted(range(len(samples)), key=lambda place: -lengths[place])
    if max_tokens is None:
        size, more = divmod(len(samples), ranks * micro_batches)
        sizes = [size + (number < more) for number in range(ranks * micro_batches)]
    else:
        sizes = _split_within([lengths[place] for place in order], max_tokens, ranks)
    sorted_samples = iter([samples[place] for place in order])
    groups = [list(islice(sorted_samples, size)) for size in sizes]
    assigned: list[list[list[int]]] = [[] for _ in range(ranks)]
    for start in range(0, len(groups), ranks):
        # Back and forth, so that no rank has the longest of every round.
        forth = (start // ranks) % 2 == 0
        for rank, group in enumerate(groups[start : start + ranks]):
            assigned[rank if forth else ranks - 1 - rank].append(group)
    return assigned


def _split_within(lengths: Sequence[int], max_tokens: int, ranks: int) -> list[int]:
    """Split lengths, the longest first, into groups within a budget: the fewest, a multiple of the ranks."""
    sizes, start = [], 0
    while start < len(lengths):
        sizes.append(min(max(max_tokens // max(lengths[start], 1), 1), len(lengths) - start))
        start += sizes[-1]
    while len(sizes) % ranks:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[largest : largest + 1] = [-(-sizes[largest] // 2), sizes[largest] // 2]
    if len(lengths) > _PLANNED:
        return sizes
    return _split_for_least_padding(lengths, max_tokens, groups=len(sizes))


def _split_for_least_padding(lengths: Sequence[int], max_tokens: int, *, groups: int) -> list[int]:
    """Split lengths, the longest first, into groups within a budget that hold the fewest tokens."""
    indices = np.arange(len(lengths))
    counts = indices[None, :] + 1 - indices[:, None]  # [first, last] sample of a group
    tokens = (np.asarray(lengths)[:, None] * counts).astype(float)
    tokens[(counts < 1) | ((counts > 1) & (tokens > max_tokens))] = np.inf
    fewest, firsts = np.full(len(lengths) + 1, np.inf), []
    fewest[0] = 0
    for _ in range(groups):
        # For every first sample that the last group may have, and every number of samples that are grouped.
        totals = fewest[:-1, None] + tokens
        firsts.append(totals.argmin(axis=0))
        fewest = np.concatenate([[np.inf], totals.min(axis=0)])
    sizes, end = [], len(lengths)
    for first_of in reversed(firsts):
        first = int(first_of[end - 1])
        sizes.append(end - first)
        end = first
    return sizes[::-1]


def check_regroup(regroup: Any) -> Regroup:
    """Check the value of `regroup`.

    Raises:
        DataError: it is neither a bool nor a number of tokens.
    """
    if isinstance(regroup, bool) or (isinstance(regroup, int) and regroup > 0):
        return regroup
    raise DataError(
        f"regroup={regroup!r}: it must be True (group the samples of an optimizer step by length), False, or "
        "the most tokens of a micro-batch, padding included."
    )


def check_regrouped(
    settings: Any, *, loss_normalization: Literal["exact", "native"], is_stream: bool, is_packed: bool
) -> None:
    """Check that a run can regroup its samples.

    Raises:
        SettingsError: it cannot; it lists all reasons.
    """
    is_balanced = settings.train_sampling_strategy == "batch_rebalance"
    conflicts = {
        f'loss_normalization="{loss_normalization}"': loss_normalization != "exact"
        and 'its loss depends on how the rows of a step are grouped; regroup needs the default, "exact".',
        'train_sampling_strategy="batch_rebalance"': is_balanced
        and "it assigns rows to micro-batches itself; leave it out, or regroup.",
        "a stream to train on": is_stream
        and "its rows are read one after the other; use a set with a length, or leave regroup out.",
        "packing": is_packed and "packed rows have nearly one length; leave regroup out.",
    }
    raise_conflicts("regroup", conflicts)

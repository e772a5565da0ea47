"""The rows of one optimizer step, dealt to its micro-batches by length; knows neither engine.

Rows are padded to the longest of their micro-batch. In the order of a pass long rows stand beside short ones;
sorted within the optimizer step, rows of like lengths stand together. The step has the same rows, so its
gradient is the same where the loss does not depend on the cut.

    regroup=True         as many micro-batches as without, of as many rows
    regroup=4096         as few as it takes, none of more than 4096 tokens with its padding
    on several ranks     rows change ranks, too; each has as many micro-batches, and about as many tokens
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice, tee
from typing import Any, Literal

import numpy as np
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from hfbridge.data.lengths import Lengths
from hfbridge.errors import DataError, Problem, SettingsError, raise_problems

Regroup = bool | int
_PLANNED = 512  # rows of a step that are cut for the least padding; the effort grows with their square


class Regrouped:
    """The micro-batches of one rank, as lists of row numbers.

    Args:
        batches: what they would be without: the sampler of all batches, or a rank's share of it.
        lengths: the lengths of some rows, in tokens.
        accumulation: micro-batches of a full optimizer step.
        max_tokens: of a micro-batch, padding included; a row that is longer is one by itself. `None` leaves
            the number of micro-batches as it is.
        limit: micro-batches of an epoch, as they would be without, if fewer than there are.

    Attributes:
        batches: what was given.
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
        """Micro-batches of a pass as they would be without."""
        return len(self.batches)

    @property
    def most(self) -> int:
        """The most micro-batches that an epoch can have."""
        size = 1 if self._max_tokens is None else int(self.batch_sampler.batch_size)
        return len(self.batches) * size

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches_of(self.batch_sampler)

    def batches_of(self, whole: Any, *, behind: int = 0) -> Iterator[list[int]]:
        """Deal the rows of a pass, or of what is left of it.

        Args:
            whole: all ranks' batches, in the order of the pass.
            behind: optimizer steps that are left out, now, without looking at the lengths of their rows.
        """
        self._sizes.clear()
        steps = self._steps(whole)
        for _ in islice(steps, behind):
            pass
        return self._dealt(steps)

    def sizes(self) -> Iterator[int]:
        """Tell the micro-batches of each optimizer step; ask when its first micro-batch is there."""
        return iter(self._sizes.popleft, None)

    def _dealt(self, steps: Iterator[tuple[list[int], int]]) -> Iterator[list[int]]:
        for rows, micro_batches in steps:
            window = deal(
                rows,
                self._lengths(rows),
                ranks=self._ranks,
                micro_batches=micro_batches,
                max_tokens=self._max_tokens,
            )[self._rank]
            self._sizes.append(len(window))
            yield from window

    def _steps(self, whole: Any) -> Iterator[tuple[list[int], int]]:
        """Tell the rows of each optimizer step, of all ranks, and how many micro-batches each rank had."""
        shares, left = self._shares(whole), self._limit
        while True:
            size = self._accumulation if left is None else min(self._accumulation, left)
            left = None if left is None else left - size
            window = [list(islice(share, size)) for share in shares]
            if not window[0]:
                return
            yield [row for of_rank in window for batch in of_rank for row in batch], len(window[0])

    def _shares(self, whole: Any) -> list[Iterator[list[int]]]:
        """Deal one order to all ranks, by accelerate's own rule for each."""
        if self._ranks == 1:
            return [iter(whole)]
        batches: Any = self.batches
        return [
            iter(
                BatchSamplerShard(
                    _Drawn(whole, order),  # type: ignore[arg-type]
                    num_processes=self._ranks,
                    process_index=rank,
                    split_batches=batches.split_batches,
                    even_batches=batches.even_batches,
                )
            )
            for rank, order in enumerate(tee(whole, self._ranks))
        ]


class _Drawn:
    """Batches that were drawn for all ranks; each gets lists of its own, which its share may lengthen."""

    def __init__(self, whole: Any, order: Iterator[list[int]]) -> None:
        self.batch_size, self.drop_last = whole.batch_size, whole.drop_last
        self._order = order

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self._order)


def deal(
    rows: Sequence[int],
    lengths: Sequence[int],
    *,
    ranks: int,
    micro_batches: int,
    max_tokens: int | None,
) -> list[list[list[int]]]:
    """Deal the rows of one optimizer step to the micro-batches of all ranks, the longest first.

    Args:
        rows: their numbers; some may come twice.
        lengths: of each, in tokens.
        ranks: that share the step.
        micro_batches: of each rank, unless there is a budget.
        max_tokens: of a micro-batch, padding included.

    Returns:
        For each rank its micro-batches, as many as any other rank has.
    """
    order = sorted(range(len(rows)), key=lambda place: -lengths[place])
    numbers, sorted_lengths = [rows[place] for place in order], [lengths[place] for place in order]
    if max_tokens is None:
        sizes = _even(len(rows), ranks * micro_batches)
    else:
        sizes = _within(sorted_lengths, max_tokens, ranks)
    ends = iter(numbers)
    groups = [list(islice(ends, size)) for size in sizes]
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    for start in range(0, len(groups), ranks):
        # Back and forth, so that no rank has the longest of every round.
        forth = (start // ranks) % 2 == 0
        for rank, group in enumerate(groups[start : start + ranks]):
            dealt[rank if forth else ranks - 1 - rank].append(group)
    return dealt


def _even(rows: int, groups: int) -> list[int]:
    """Cut rows into groups whose sizes differ by one at most."""
    size, more = divmod(rows, groups)
    return [size + (number < more) for number in range(groups)]


def _within(lengths: Sequence[int], max_tokens: int, ranks: int) -> list[int]:
    """Cut rows, the longest first, into groups within a budget: as few as can be, a multiple of the ranks."""
    sizes, start = [], 0
    while start < len(lengths):
        sizes.append(min(max(max_tokens // max(lengths[start], 1), 1), len(lengths) - start))
        start += sizes[-1]
    while len(sizes) % ranks:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[largest : largest + 1] = [-(-sizes[largest] // 2), sizes[largest] // 2]
    if len(lengths) > _PLANNED:
        return sizes
    return _least_padding(lengths, max_tokens, groups=len(sizes))


def _least_padding(lengths: Sequence[int], max_tokens: int, *, groups: int) -> list[int]:
    """Cut rows, the longest first, into groups within a budget, so that they hold the fewest tokens."""
    rows = np.arange(len(lengths))
    counts = rows[None, :] + 1 - rows[:, None]  # [first, last] row of a group
    tokens = (np.asarray(lengths)[:, None] * counts).astype(float)
    tokens[(counts < 1) | ((counts > 1) & (tokens > max_tokens))] = np.inf
    fewest, firsts = np.full(len(lengths) + 1, np.inf), []
    fewest[0] = 0
    for _ in range(groups):
        # Of every first row the last group may have, for every number of rows that are cut.
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
    """Read what `regroup` was given.

    Raises:
        DataError: it is neither a bool nor a number of tokens.
    """
    if isinstance(regroup, bool) or (isinstance(regroup, int) and regroup > 0):
        return regroup
    raise DataError(
        f"regroup={regroup!r}: True sorts the rows of an optimizer step by length; a number, 1 or more, is "
        "the most tokens that a micro-batch may hold, padding included; False leaves the order alone."
    )


def check_regrouped(
    settings: Any, *, loss_normalization: Literal["exact", "native"], is_stream: bool, is_packed: bool
) -> None:
    """See that a run can regroup its rows.

    Raises:
        SettingsError: it cannot; all reasons are named.
    """
    problems = []
    if loss_normalization != "exact":
        text = 'its loss depends on how the rows of a step are cut; regroup needs the default, "exact".'
        problems.append(Problem(f'loss_normalization="{loss_normalization}"', text))
    if settings.train_sampling_strategy == "batch_rebalance":
        text = "it deals rows to micro-batches itself; leave it out, or regroup."
        problems.append(Problem('train_sampling_strategy="batch_rebalance"', text))
    if is_stream:
        text = "its rows are read one after the other; use a set with a length, or leave regroup out."
        problems.append(Problem("a stream to train on", text))
    if is_packed:
        text = "packed rows have nearly one length; leave regroup out."
        problems.append(Problem("packing", text))
    if problems:
        raise_problems(SettingsError, "regroup cannot be honoured. Nothing was started.", problems)

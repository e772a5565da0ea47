"""Predictions of an evaluation, collected part by part; knows Hugging Face.

per part        losses, one a row; logits, labels and inputs (tensors or tuples of them, first dimension the
                rows); in "native" a part is a round, the batches that all ranks run at the same time, in
                "exact" a batch, as in one process
at the end      numpy arrays over the whole set, padded with -100 where lengths differ, or a list of those
                of each part
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor
from transformers.trainer_pt_utils import EvalLoopContainer, nested_detach, nested_numpify

from hfbridge.evaluation.gather import of_each_rank

_BLOCK = 256  # mean losses in one tensor


@dataclass(frozen=True)
class EvalSet:
    """A set to evaluate, in rounds: the batches that all ranks run at the same time.

    Attributes:
        prefix: what its metrics' names begin with: "eval", "eval_<key>" or "test".
        samples: rows of the set.
        batches: batches it is read in on each rank, which is the number of rounds; the last round may hold
            fewer rows than the others.
        batch_size: rows of a full batch, as the settings have it.
        ranks: ranks that share the set.
        splits: the batches of a round are one of that size, split (`split_batches`).
        order: the rows' numbers in the order they are evaluated in; `None` is that of the set.
    """

    prefix: str
    samples: int
    batches: int
    batch_size: int
    ranks: int = 1
    splits: bool = False
    order: Sequence[int] | None = None

    @property
    def steps(self) -> int:
        """Rounds as the native speed counts them: one that is dropped included, and none split."""
        return -(-self.samples // (self.batch_size * self.ranks))

    def is_last(self, index: int) -> bool:
        """Whether a round, counted from 0, is the last one."""
        return index + 1 == self.batches

    def rows_of(self, index: int) -> int:
        """Rows of a round, without those that are repeated to fill it up."""
        size = self._share * self.ranks
        return min(size, self.samples - index * size)

    def remainder_of(self, index: int) -> int:
        """Rows that a round which is filled up is cut to; 0 for any other."""
        rows = self.rows_of(index)
        return 0 if rows == self._share * self.ranks else rows

    def rows_by_rank(self, index: int) -> tuple[int, ...]:
        """Rows of each batch of a round, without repeated ones; the ranks behind have none."""
        rows, share = self.rows_of(index), self._share
        return tuple(min(share, rows - start) for start in range(0, rows, share))

    @property
    def _share(self) -> int:
        """Rows of a full batch of one rank."""
        return self.batch_size // self.ranks if self.splits else self.batch_size


class StreamedSet:
    """A stream to evaluate, which tells its rounds as they come; in its other words an `EvalSet`.

    Args:
        prefix: likewise.
        batch_size: likewise.
        source: counts its rounds: `rounds`, each the rows of all ranks and of one, `is_complete`, and
            `remainder`.
        ranks: likewise.
    """

    def __init__(self, prefix: str, batch_size: int, source: Any, *, ranks: int = 1) -> None:
        self.prefix, self.batch_size, self.ranks = prefix, batch_size, ranks
        self.order = None
        self._source = source

    @property
    def samples(self) -> int:
        """Rows so far."""
        return sum(rows for rows, _ in self._source.rounds)

    @property
    def batches(self) -> int:
        """Rounds of the whole stream; -1 while that is not known."""
        return len(self._source.rounds) if self._source.is_complete else -1

    @property
    def steps(self) -> int:
        """Rounds as the native speed counts them."""
        return -(-self.samples // (self.batch_size * self.ranks))

    def is_last(self, index: int) -> bool:
        """Whether a round, counted from 0, is the last one."""
        return index + 1 == self.batches

    def remainder_of(self, index: int) -> int:
        """Rows that the last round is cut to; 0 for any other, and if accelerate does not know it."""
        return int(self._source.remainder) if self.is_last(index) else 0

    def rows_by_rank(self, index: int) -> tuple[int, ...]:
        """Rows of each batch of a round, without repeated ones; the ranks behind have none."""
        rows, share = self._source.rounds[index]
        return tuple(min(share, rows - start) for start in range(0, rows, share))


class UserSet:
    """A loader of the user's to evaluate: its batches are counted as they come; else like an `EvalSet`.

    Args:
        prefix: what its metrics' names begin with.
        batch_size: samples of a full batch, as the settings have it.
        ranks: ranks that evaluate, each with batches of its own.
    """

    def __init__(self, prefix: str, batch_size: int, *, ranks: int = 1) -> None:
        self.prefix, self.batch_size, self.ranks = prefix, batch_size, ranks
        self.order = None
        self._rounds: list[tuple[int, ...]] = []

    def add_round(self, samples: int) -> None:
        """Count a batch of each rank.

        Args:
            samples: of this rank's batch.
        """
        self._rounds.append(tuple(of_each_rank(samples, ranks=self.ranks)))

    @property
    def samples(self) -> int:
        """Samples so far."""
        return sum(map(sum, self._rounds))

    @property
    def batches(self) -> int:
        """Rounds: it is not known which one is the last."""
        return -1

    @property
    def steps(self) -> int:
        """Rounds so far."""
        return len(self._rounds)

    def is_last(self, index: int) -> bool:
        """Whether a round is the last one, which is not known."""
        return False

    def remainder_of(self, index: int) -> int:
        """Samples that the last round is cut to: no round is."""
        return 0

    def rows_by_rank(self, index: int) -> tuple[int, ...]:
        """Samples of each rank's batch."""
        return self._rounds[index]


AnySet = EvalSet | StreamedSet | UserSet


@dataclass(frozen=True, slots=True)
class Part:
    """What a batch, or a round of batches, gave.

    Attributes:
        losses: the mean loss of a row's batch, for each row; `None` without labels.
        logits: `None` if not kept.
        labels: `None` if not kept or not there.
        inputs: what was asked for of the inputs; `None` if nothing.
        mean: mean loss of a batch that is weighed by its items; `None` if rows weigh.
        items: items that it is a mean of.
    """

    losses: Any
    logits: Any
    labels: Any
    inputs: Any
    mean: Tensor | None = None
    items: int = 0


@dataclass(frozen=True)
class Collected:
    """What an evaluation has seen.

    Attributes:
        predictions: array, tuple of arrays, list of these, or `None` when only losses were kept.
        label_ids: likewise; `None` without labels.
        inputs: likewise; `None` if not kept.
        losses: one a row, or a list of those; `None` without labels.
        means: mean loss of each batch; `None` without labels, or if rows weigh.
        items: items that each of these is a mean of.
    """

    predictions: Any
    label_ids: Any
    inputs: Any
    losses: Any
    means: np.ndarray[Any, Any] | None
    items: np.ndarray[Any, np.dtype[np.int64]]

    def put_back(self, order: Sequence[int]) -> "Collected":
        """Put what was collected of the rows into the order of the set.

        Args:
            order: the row's number in the set, for each row that was collected.
        """
        places = np.argsort(np.asarray(order), kind="stable")
        rows = {name: getattr(self, name) for name in ("predictions", "label_ids", "inputs", "losses")}

        def ordered(value: Any) -> Any:
            if is_list_of_objects(value):
                return [value[place] for place in places]
            return recursively_apply(lambda array: array[places], value, test_type=_is_array)

        return replace(self, **{name: ordered(value) for name, value in rows.items() if value is not None})


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def is_list_of_objects(value: Any) -> bool:
    """Whether a batch's labels are dicts, one of each sample, as those of object detection."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


class _Objects:
    """Keep a dict of each sample; in other words an `EvalLoopContainer`."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def add(self, objects: Sequence[Any]) -> None:
        self._kept += objects

    def to_cpu_and_numpy(self) -> None:
        self._kept = nested_numpify(nested_detach(self._kept))

    def get_arrays(self) -> list[Any]:
        self.to_cpu_and_numpy()
        return self._kept


class Collector:
    """Collect losses, logits, labels and inputs of one evaluation.

    Args:
        move_every: parts after which what is kept moves from the device to numpy; `None` keeps it there
            until the end.
        joins: join the parts; otherwise they become a list.
        keeps: what of a part is collected.
        lists_objects: join lists of dicts, one of each sample, to a longer list; otherwise as the HF Trainer
            does, which joins the first dicts of all parts, the second ones, and so on.

    Mirrors: transformers.Trainer.evaluation_loop
    """

    def __init__(
        self,
        *,
        move_every: int | None,
        joins: bool = True,
        keeps: Sequence[str] = ("losses", "logits", "labels", "inputs"),
        lists_objects: bool = False,
    ) -> None:
        self._move_every = move_every
        self._kept: dict[str, Any] = {n: EvalLoopContainer(joins, padding_index=-100) for n in keeps}
        self._lists_objects = joins and lists_objects
        self._blocks: list[Tensor] = []
        self._items = array("q")
        self._parts = 0

    def add(self, part: Part) -> None:
        """Take in a part."""
        self._parts += 1
        if part.mean is not None:
            place = len(self._items) % _BLOCK
            if place == 0:
                self._blocks.append(part.mean.new_empty(_BLOCK))
            # A tensor of its own would take a hundred times the bytes, and on the CPU lie where the logits of
            # the next batch would else: the heap grows with every batch.
            self._blocks[-1][place] = part.mean
            self._items.append(part.items)
        for name, container in self._kept.items():
            given = getattr(part, name)
            if self._lists_objects and is_list_of_objects(given):
                container = self._kept[name] = _Objects() if self._parts == 1 else container
            if given is not None:
                container.add(given)
            if self._move_every is not None and self._parts % self._move_every == 0:
                container.to_cpu_and_numpy()

    def finish(self) -> Collected:
        """Hand over everything as numpy arrays."""
        arrays = {name: container.get_arrays() for name, container in self._kept.items()}
        return Collected(
            predictions=arrays.get("logits"),
            label_ids=arrays.get("labels"),
            inputs=arrays.get("inputs"),
            losses=arrays.get("losses"),
            means=nested_numpify(torch.cat(self._blocks)[: len(self._items)]) if self._blocks else None,
            items=np.asarray(self._items, dtype=np.int64),
        )

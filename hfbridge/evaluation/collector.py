"""Collect the predictions of an evaluation part by part.

per part        losses of samples; logits, labels and inputs (tensors or tuples of them, [samples, ...]);
                in "native" a part is a round, the batches that ranks run at the same time, else a batch
at the end      numpy arrays over the full set, padded with -100 where lengths differ, or a list of those
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

from hfbridge.evaluation.gather import gather_per_rank

_BLOCK = 256  # mean losses in one tensor


@dataclass(frozen=True)
class EvalSet:
    """A set to evaluate, in rounds: the batches that all ranks run at the same time.

    Attributes:
        prefix: of the metrics' names: "eval", "eval_<key>" or "test".
        samples: of the set.
        batches: of each rank, which is the number of rounds; the last round may be short.
        batch_size: samples of a full batch, as in the settings.
        ranks: that share the set.
        splits: `batch_size` is that of all ranks together (`split_batches`).
        order: sample indices in the order they are evaluated in; `None` is that of the set.
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
        """Rounds as the HF Trainer counts them for the speed: a dropped one included, and none split."""
        return -(-self.samples // (self.batch_size * self.ranks))

    def is_last(self, index: int) -> bool:
        """Whether a round, counted from 0, is the last one."""
        return index + 1 == self.batches

    def rows_of(self, index: int) -> int:
        """Samples of a round, without repeated ones."""
        size = self._share * self.ranks
        return min(size, self.samples - index * size)

    def remainder_of(self, index: int) -> int:
        """Samples that a padded round is cut to; 0 for any other."""
        rows = self.rows_of(index)
        return 0 if rows == self._share * self.ranks else rows

    def rows_by_rank(self, index: int) -> tuple[int, ...]:
        """Samples of each batch of a round, without repeated ones; further ranks have none."""
        rows, share = self.rows_of(index), self._share
        return tuple(min(share, rows - start) for start in range(0, rows, share))

    @property
    def _share(self) -> int:
        """Samples of a full batch of one rank."""
        return self.batch_size // self.ranks if self.splits else self.batch_size


class StreamedSet:
    """A stream to evaluate, read by a `StreamEvalLoader`, with the interface of `EvalSet`."""

    def __init__(self, prefix: str, batch_size: int, source: Any, *, ranks: int = 1) -> None:
        self.prefix, self.batch_size, self.ranks = prefix, batch_size, ranks
        self.order = None
        self._source = source

    @property
    def samples(self) -> int:
        """Samples so far."""
        return sum(rows for rows, _ in self._source.rounds)

    @property
    def batches(self) -> int:
        """Rounds of the stream; -1 while unknown."""
        return len(self._source.rounds) if self._source.is_complete else -1

    @property
    def steps(self) -> int:
        """Rounds as the HF Trainer counts them for the speed."""
        return -(-self.samples // (self.batch_size * self.ranks))

    def is_last(self, index: int) -> bool:
        """Whether a round, counted from 0, is the last one."""
        return index + 1 == self.batches

    def remainder_of(self, index: int) -> int:
        """Samples that the last round is cut to; 0 for any other, and where accelerate does not know."""
        return int(self._source.remainder) if self.is_last(index) else 0

    def rows_by_rank(self, index: int) -> tuple[int, ...]:
        """Samples of each batch of a round, without repeated ones; further ranks have none."""
        rows, share = self._source.rounds[index]
        return tuple(min(share, rows - start) for start in range(0, rows, share))


class UserSet:
    """A loader of the user's to evaluate, of unknown length, with the interface of `EvalSet`."""

    def __init__(self, prefix: str, batch_size: int, *, ranks: int = 1) -> None:
        self.prefix, self.batch_size, self.ranks = prefix, batch_size, ranks
        self.order = None
        self._rounds: list[tuple[int, ...]] = []

    def add_round(self, samples: int) -> None:
        """Add a round, from the number of samples of this rank's batch."""
        self._rounds.append(tuple(gather_per_rank(samples, ranks=self.ranks)))

    @property
    def samples(self) -> int:
        """Samples so far."""
        return sum(map(sum, self._rounds))

    @property
    def batches(self) -> int:
        """Unknown."""
        return -1

    @property
    def steps(self) -> int:
        """Rounds so far."""
        return len(self._rounds)

    def is_last(self, index: int) -> bool:
        """Unknown."""
        return False

    def remainder_of(self, index: int) -> int:
        """No round is padded."""
        return 0

    def rows_by_rank(self, index: int) -> tuple[int, ...]:
        """Samples of each rank's batch."""
        return self._rounds[index]


AnySet = EvalSet | StreamedSet | UserSet


@dataclass(frozen=True, slots=True)
class Part:
    """The results of a batch, or of a round of batches.

    Attributes:
        losses: the batch's mean loss, for each sample; `None` without labels.
        logits: `None` if not kept.
        labels: `None` if not kept or missing.
        inputs: `None` if not kept.
        mean: mean loss of a batch that is weighted by items; `None` if losses are weighted by sample.
        items: that it is a mean of.
    """

    losses: Any
    logits: Any
    labels: Any
    inputs: Any
    mean: Tensor | None = None
    items: int = 0


@dataclass(frozen=True)
class Collected:
    """The results of an evaluation, as arrays, tuples of arrays, or lists of these.

    Attributes:
        predictions: `None` if only losses were kept.
        label_ids: `None` without labels.
        inputs: `None` if not kept.
        losses: of samples; `None` without labels.
        means: mean loss of each batch; `None` without labels, or if losses are weighted by sample.
        items: that each of these is a mean of.
    """

    predictions: Any
    label_ids: Any
    inputs: Any
    losses: Any
    means: np.ndarray[Any, Any] | None
    items: np.ndarray[Any, np.dtype[np.int64]]

    def restore_order(self, order: Sequence[int]) -> "Collected":
        """Sort by sample indices, given that of each collected sample."""
        places = np.argsort(np.asarray(order), kind="stable")
        fields = {name: getattr(self, name) for name in ("predictions", "label_ids", "inputs", "losses")}

        def ordered(value: Any) -> Any:
            if is_list_of_objects(value):
                return [value[place] for place in places]
            return recursively_apply(lambda array: array[places], value, test_type=_is_array)

        return replace(self, **{name: ordered(value) for name, value in fields.items() if value is not None})


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def is_list_of_objects(value: Any) -> bool:
    """Whether a batch's labels are dicts, one of each sample, as those of object detection."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


class _Objects:
    """Keep a dict of each sample, with the interface of `EvalLoopContainer`."""

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
        move_every: parts after which tensors move from the device to numpy; `None`: at the end.
        joins: join the parts; otherwise list them.
        keeps: fields of a part that are collected.
        lists_objects: concatenate lists of dicts; the HF Trainer joins the first dicts of all parts etc.

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
        """Collect a part."""
        self._parts += 1
        if part.mean is not None:
            place = len(self._items) % _BLOCK
            if place == 0:
                self._blocks.append(part.mean.new_empty(_BLOCK))
            # A tensor of its own would take a hundred times the bytes, and fragment the CPU's heap.
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
        """Return everything as numpy arrays."""
        arrays = {name: container.get_arrays() for name, container in self._kept.items()}
        return Collected(
            predictions=arrays.get("logits"),
            label_ids=arrays.get("labels"),
            inputs=arrays.get("inputs"),
            losses=arrays.get("losses"),
            means=nested_numpify(torch.cat(self._blocks)[: len(self._items)]) if self._blocks else None,
            items=np.asarray(self._items, dtype=np.int64),
        )

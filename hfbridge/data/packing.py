"""Pack several examples into one row, for causal language models, without attention between them.

column          of a pack
input_ids       its examples, unsplit, one after the other
labels          theirs, or else their input_ids; the first label of each example is ignored, since the end of
                the previous example would predict it
position_ids    0, 1, 2, ..., restarting with each example; transformers derives the attention mask from it
                unless there is an attention_mask; padding has position 0, so each of its tokens is isolated
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hfbridge.data.iterable import is_stream
from hfbridge.errors import DataError

IGNORED = -100
STREAMED_ROWS = 1_000
"""Examples of a stream that are packed at a time."""

_COLUMNS = ("input_ids", "labels", "attention_mask")
_SCANNED = 10_000


def plan_packs(lengths: NDArray[np.int64], max_tokens: int) -> list[list[int]]:
    """Assign examples to packs: best fit, the longest first.

    Args:
        lengths: tokens of each example, [examples], from 1 to `max_tokens`.
        max_tokens: most tokens of a pack.

    Returns:
        The examples of each pack in order; packs in the order of their first examples.
    """
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms = 0  # bit n: a pack has room for n tokens
    for example in np.argsort(-lengths, kind="stable").tolist():
        length, room = int(lengths[example]), max_tokens
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            pack = len(packs)
            packs.append([])
        packs[pack].append(example)
        if left := room - length:
            with_room.setdefault(left, []).append(pack)
            rooms |= 1 << left
    return sorted(sorted(pack) for pack in packs)


class Packed(Dataset[dict[str, list[int]]]):
    """A dataset whose rows are packs of unsplit examples, joined lazily.

    Args:
        dataset: examples, not padded: a datasets.Dataset, or another sized dataset.
        max_tokens: most tokens of a row.
        split: name of the set, for messages.

    Attributes:
        packs: the examples of each row.
        longest: tokens of the longest example.
        dropped: columns other than `input_ids`, `labels` and `attention_mask`, which packs do not have.

    Raises:
        DataError: an example is longer than `max_tokens`, empty, padded, or has labels of another length.

    Proved by: tests/unit/data/test_packing.py
    """

    def __init__(self, dataset: Any, max_tokens: int, *, split: str = "train") -> None:
        check_max_tokens(max_tokens)
        columns = dataset.column_names if isinstance(dataset, datasets.Dataset) else dataset[0]
        self.dropped = [name for name in columns if name not in _COLUMNS]
        if isinstance(dataset, datasets.Dataset):
            dataset = _without_format(dataset, split)
        self._dataset, self._split = dataset, split
        lengths = _lengths_of(dataset, split)
        _check_lengths(lengths, max_tokens, split)
        self.packs = plan_packs(lengths, max_tokens)
        self.longest = int(lengths.max(initial=0))
        self[0]  # raises now what all rows would raise

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        pack = self.packs[index]
        return _joined([(f"Row {row} of the {self._split} set", self._dataset[row]) for row in pack])


def pack_rows(rows: Mapping[str, Sequence[Any]], max_tokens: int) -> dict[str, list[list[int]]]:
    """Pack a batch of examples, for `map(..., batched=True)` with the old columns removed.

    Args:
        rows: columns of the examples.
        max_tokens: most tokens of a pack.

    Raises:
        DataError: see `Packed`.
    """
    count = len(rows["input_ids"])
    examples = [{name: rows[name][i] for name in _COLUMNS if name in rows} for i in range(count)]
    packed = Packed(examples, max_tokens)
    made = [packed[i] for i in range(len(packed))]
    return {name: [row[name] for row in made] for name in ("input_ids", "labels", "position_ids")}


def pack_set(dataset: Any, max_tokens: int) -> Any:
    """Pack a training set: a sized one at once, a stream a thousand examples at a time.

    Raises:
        DataError: see `Packed`; or a stream that is no datasets.IterableDataset with known columns.
    """
    check_max_tokens(max_tokens)
    if not is_stream(dataset):
        return Packed(dataset, max_tokens)
    columns = getattr(dataset, "column_names", None)
    if not isinstance(dataset, datasets.IterableDataset) or columns is None:
        raise DataError(
            f"packing={max_tokens} needs a datasets.IterableDataset with known columns; the train set is a "
            f"stream ({type(dataset).__name__}) without. Set its features, or map "
            "hfbridge.data.packing.pack_rows over it (batched=True, remove_columns=[...], "
            f"fn_kwargs={{'max_tokens': {max_tokens}}})."
        )
    pack = partial(pack_rows, max_tokens=max_tokens)
    return dataset.map(pack, batched=True, batch_size=STREAMED_ROWS, remove_columns=list(columns))


class PackCollator:
    """Collate packs into `input_ids`, `labels`, `position_ids`, each [packs, longest].

    Args:
        pad_token_id: pads shorter packs; any id will do, since padding is neither attended to nor learnt.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self._fills = {"input_ids": pad_token_id, "labels": IGNORED, "position_ids": 0}

    def __call__(self, packs: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad packs to the longest of them."""
        longest = max(len(pack["input_ids"]) for pack in packs)
        return {
            name: torch.tensor([list(pack[name]) + [fill] * (longest - len(pack[name])) for pack in packs])
            for name, fill in self._fills.items()
        }


def check_max_tokens(max_tokens: object) -> None:
    """Check that `packing` is a number of tokens.

    Raises:
        DataError: it is not.
    """
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise DataError(
            f"packing={max_tokens!r}; it must be the most tokens of a row, 1 or more: those of the longest "
            "example, or a few times that."
        )


def check_packs(packed: Packed, *, positions: int | None, accepted: Sequence[str]) -> None:
    """Check that examples fit the model, and that packing drops no column it accepts.

    Args:
        packed: the packs.
        positions: most tokens of an example; `None` if unlimited.
        accepted: columns that the model accepts.

    Raises:
        DataError: an example is longer, or there is such a column.
    """
    if positions is not None and packed.longest > positions:
        raise DataError(
            f"The longest example of the train set has {packed.longest} tokens, and the model has "
            f"{positions} positions. Tokenize with truncation=True, max_length={positions}; a pack may have "
            "more."
        )
    lost = [name for name in packed.dropped if name in accepted and name not in ("label", "label_ids")]
    if lost:
        raise DataError(
            f"The train set has the columns {', '.join(lost)}, which the model takes and packing does not "
            "support: a pack has input_ids, labels and position_ids. Remove them "
            f"(dataset.remove_columns({lost!r})), or train without packing."
        )


def _joined(examples: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, list[int]]:
    """Join examples, each with its name for messages."""
    pack: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for name, example in examples:
        ids = _listed(example["input_ids"])
        labels = _listed(example["labels"]) if "labels" in example else ids
        if len(labels) != len(ids):
            raise DataError(
                f"{name} has {len(ids)} tokens in 'input_ids' and {len(labels)} in 'labels'. Packing needs a "
                "label for each token; set -100 to ignore one."
            )
        if not all(_listed(example.get("attention_mask", ()))):
            raise DataError(
                f"{name} is padded: its attention_mask has zeros. For packing, tokenize with padding=False."
            )
        pack["input_ids"] += ids
        pack["labels"] += [IGNORED, *labels[1:]]
        pack["position_ids"] += range(len(ids))
    return pack


def _listed(values: Any) -> list[int]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _without_format(dataset: datasets.Dataset, split: str) -> datasets.Dataset:
    if dataset.format["type"] == "custom":
        raise DataError(
            f"The {split} set has a transform (with_transform), and packing needs the lengths of its rows "
            "before they are read. Use map_function or dataset.map instead."
        )
    kept = dataset.select_columns([name for name in _COLUMNS if name in dataset.column_names])
    plain: datasets.Dataset = kept.with_format(None)
    return plain


def _lengths_of(dataset: Any, split: str) -> NDArray[np.int64]:
    """Count the tokens of each example; of a datasets.Dataset without reading the tokens."""
    if isinstance(dataset, datasets.Dataset):
        if "input_ids" in dataset.column_names:
            ids = dataset.select_columns(["input_ids"]).with_format("arrow")
            parts = [pc.list_value_length(rows["input_ids"]) for rows in ids.iter(batch_size=_SCANNED)]
            return np.concatenate([part.fill_null(0).to_numpy() for part in parts]).astype(np.int64)
    elif "input_ids" in dataset[0]:
        return np.array([len(dataset[i]["input_ids"]) for i in range(len(dataset))])
    raise DataError(f"The {split} set has no column 'input_ids' to pack. Pass a map_function that tokenizes.")


def _check_lengths(lengths: NDArray[np.int64], max_tokens: int, split: str) -> None:
    if lengths.max(initial=0) > max_tokens:
        row = int(lengths.argmax())
        raise DataError(
            f"Row {row} of the {split} set has {lengths[row]} tokens, more than packing={max_tokens}, and no "
            f"example is split. Set a larger packing, or tokenize with truncation=True, "
            f"max_length={max_tokens}."
        )
    if not lengths.all():
        raise DataError(
            f"Row {int((lengths == 0).argmax())} of the {split} set has no tokens. Filter such rows out: "
            "dataset.filter(lambda row: len(row['input_ids']) > 0)."
        )

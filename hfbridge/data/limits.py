"""Check before training that the samples of a dataset fit the model.

column                              may hold
input_ids                           ids of the embedding, as many as there are positions
start_positions, end_positions      tokens of the sample, the end not before the start

Only the first rows of stored datasets are read, and only for collators of transformers (they never truncate).
"""

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from hfbridge.data.sample_errors import is_known
from hfbridge.errors import DataError

ROWS_SEEN = 20_000
"""Rows that are checked, in a fraction of a second."""


@dataclass(frozen=True)
class Limits:
    """What a model accepts.

    Attributes:
        name: of its class.
        vocabulary: number of ids of its embedding; `None` if unknown.
        positions: most tokens of a sample; `None` if unlimited.
    """

    name: str
    vocabulary: int | None = None
    positions: int | None = None


def check_padding(collator: object, split: str) -> None:
    """Check that a padding collator of transformers has a pad token.

    Raises:
        DataError: its tokenizer has none.
    """
    tokenizer: Any = getattr(collator, "tokenizer", None)
    pads = is_known(collator) and getattr(collator, "padding", True) not in (False, "do_not_pad")
    if pads and hasattr(tokenizer, "pad_token") and tokenizer.pad_token is None:
        raise DataError(
            f"{type(collator).__name__} pads the rows of the {split} set, and its tokenizer "
            f"({type(tokenizer).__name__}) has no pad token. Set tokenizer.pad_token = tokenizer.eos_token, "
            "or add one and call model.resize_token_embeddings(len(tokenizer))."
        )


def check_tensors(collator: object, split: str) -> None:
    """Check that a collator of transformers returns torch tensors.

    Raises:
        DataError: it does not.
    """
    kind = getattr(collator, "return_tensors", "pt")
    if is_known(collator) and kind != "pt":
        raise DataError(
            f"{type(collator).__name__} of the {split} set has return_tensors={kind!r}; the model takes "
            "torch tensors. Set return_tensors='pt'."
        )


def check_arrays(batch: Any) -> None:
    """Check that a micro-batch holds no numpy arrays.

    Raises:
        DataError: it does.
    """
    arrays = [name for name, value in batch.items() if isinstance(value, np.ndarray)]
    if arrays:
        raise DataError(
            f"The collator makes arrays of numpy ({', '.join(arrays)}); the model takes torch tensors. Set "
            "return_tensors='pt', or call torch.as_tensor in it."
        )


def check_rows(dataset: Any, limits: Limits, *, split: str) -> str:
    """Check that the first rows fit the model.

    Returns:
        A note on answers that the loss ignores; empty if there are none.

    Raises:
        DataError: an id, a length or an answer does not fit.
    """
    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names:
        return ""
    if dataset.format["type"] == "custom":  # the user's transform may truncate the rows
        return ""
    answer = [name for name in ("start_positions", "end_positions") if name in dataset.column_names]
    seen = dataset.select(range(min(len(dataset), ROWS_SEEN))).select_columns(["input_ids", *answer])
    table = seen.with_format("arrow")[:]
    ids = table["input_ids"]  # in chunks: nothing is copied from a dataset in files
    if not pa.types.is_list(ids.type) and not pa.types.is_large_list(ids.type):
        return ""
    lengths = pc.list_value_length(ids).fill_null(0).to_numpy(zero_copy_only=False)
    _check_ids(ids, limits, split)
    if limits.positions is not None and lengths.max(initial=0) > limits.positions:
        row = int(lengths.argmax())
        raise DataError(
            f"Row {row} of the {split} set has {lengths[row]} tokens in 'input_ids', and {limits.name} has "
            f"{limits.positions} positions. Truncate: tokenizer(..., truncation=True, "
            f"max_length={limits.positions})."
        )
    if len(answer) < 2 or not all(pa.types.is_integer(table[name].type) for name in answer):
        return ""
    starts, ends = (table[name].combine_chunks().to_numpy(zero_copy_only=False) for name in answer)
    return _check_answers(starts, ends, lengths, split)


def _check_ids(ids: pa.ChunkedArray, limits: Limits, split: str) -> None:
    if limits.vocabulary is None or not pa.types.is_integer(ids.type.value_type):
        return
    for found in (pc.min_max(chunk.flatten()).as_py() for chunk in ids.chunks):
        for value in (found["min"], found["max"]):
            if value is not None and not 0 <= value < limits.vocabulary:
                raise DataError(
                    f"The {split} set holds the id {value} in 'input_ids', and the embedding of "
                    f"{limits.name} has the ids 0 to {limits.vocabulary - 1}. Use the model's own tokenizer, "
                    "or call model.resize_token_embeddings(len(tokenizer)) before training."
                )


def _check_answers(starts: Any, ends: Any, lengths: Any, split: str) -> str:
    """Positions beyond the longest sample mean that there is no answer; others must lie in their sample."""
    longest = lengths.max(initial=0)
    beyond = np.maximum(starts, ends) >= longest
    wrong = (ends < starts) & (starts < longest)
    for positions in (starts, ends):
        wrong |= (positions < 0) | ((positions >= lengths) & (positions < longest))
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"Row {row} of the {split} set has its answer outside its context: start_positions={starts[row]}"
            f", end_positions={ends[row]}, and 'input_ids' has the tokens 0 to {lengths[row] - 1}. Answers "
            "are token positions, question included; set both to 0 where the answer was truncated."
        )
    if not beyond.any():
        return ""
    first = int(beyond.argmax())
    return (
        f"{int(beyond.sum())} of the first {len(lengths)} rows of the {split} set have an answer beyond "
        f"every row, row {first} first (start_positions={starts[first]}, end_positions={ends[first]}). As "
        "in transformers, the loss ignores them."
    )

"""What a model's sizes allow the rows of a dataset to hold, seen before training; knows Hugging Face.

column                              may hold
input_ids                           ids that the embedding has, as many as there are positions
start_positions, end_positions      tokens of the row, the start not behind the end

Looked at are the first rows of stored datasets that a collator of transformers reads as they are; one of the
user's may cut them.
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
"""Rows that are looked at: a fraction of a second."""


@dataclass(frozen=True)
class Limits:
    """What a model can take.

    Attributes:
        name: of its class.
        vocabulary: ids that its embedding has; `None` if that is not known.
        positions: tokens that a row may have; `None` if nothing bounds them.
    """

    name: str
    vocabulary: int | None = None
    positions: int | None = None


def check_padding(collator: object, split: str) -> None:
    """See that a collator of transformers that pads has something to pad with.

    Raises:
        DataError: its tokenizer has no pad token.
    """
    tokenizer: Any = getattr(collator, "tokenizer", None)
    pads = is_known(collator) and getattr(collator, "padding", True) not in (False, "do_not_pad")
    if pads and hasattr(tokenizer, "pad_token") and tokenizer.pad_token is None:
        raise DataError(
            f"{type(collator).__name__} pads the rows of the {split} set, and its tokenizer "
            f"({type(tokenizer).__name__}) has no pad token. Set tokenizer.pad_token = tokenizer.eos_token, "
            "say, or add one: tokenizer.add_special_tokens({'pad_token': '[PAD]'}) and "
            "model.resize_token_embeddings(len(tokenizer))."
        )


def check_tensors(collator: object, split: str) -> None:
    """See that a collator of transformers makes tensors of torch.

    Raises:
        DataError: it makes others.
    """
    kind = getattr(collator, "return_tensors", "pt")
    if is_known(collator) and kind != "pt":
        raise DataError(
            f"{type(collator).__name__} has return_tensors={kind!r}, and the model takes tensors of "
            f"torch, of the {split} set, too. Make it with return_tensors='pt', which is its default."
        )


def check_arrays(batch: Any) -> None:
    """See that a micro-batch does not hold arrays where the model takes tensors.

    Raises:
        DataError: it does.
    """
    arrays = [name for name, value in batch.items() if isinstance(value, np.ndarray)]
    if arrays:
        raise DataError(
            f"The collator makes arrays of numpy ({', '.join(arrays)}), and the model takes tensors of "
            "torch. Make it with return_tensors='pt', or call torch.as_tensor in it."
        )


def check_rows(dataset: Any, limits: Limits, *, split: str) -> str:
    """See that the first rows fit the model.

    Returns:
        A note on answers that are not counted; empty if there are none.

    Raises:
        DataError: an id, a length or an answer does not fit.
    """
    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names:
        return ""
    if dataset.format["type"] == "custom":  # a transform of the user's may cut the rows
        return ""
    answer = [name for name in ("start_positions", "end_positions") if name in dataset.column_names]
    seen = dataset.select(range(min(len(dataset), ROWS_SEEN))).select_columns(["input_ids", *answer])
    table = seen.with_format("arrow")[:]
    ids = table["input_ids"]  # in its chunks: of a set in files nothing is copied
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


def _check_ids(ids: Any, limits: Limits, split: str) -> None:
    if limits.vocabulary is None or not pa.types.is_integer(ids.type.value_type):
        return
    found = [pc.min_max(chunk.flatten()).as_py() for chunk in ids.chunks]
    for value in (value for of_chunk in found for value in (of_chunk["min"], of_chunk["max"])):
        if value is not None and not 0 <= value < limits.vocabulary:
            raise DataError(
                f"The {split} set holds the id {value} in 'input_ids', and the embedding of {limits.name} "
                f"has the ids 0 to {limits.vocabulary - 1}. Use the tokenizer that belongs to the model, or, "
                "for tokens of your own, call model.resize_token_embeddings(len(tokenizer)) before training."
            )


def _check_answers(starts: Any, ends: Any, lengths: Any, split: str) -> str:
    """Positions beyond every row say that there is no answer; others must lie in their rows."""
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
            "are counted in tokens of the row that the tokenizer has made, question included; give both as 0 "
            "where the answer has been cut off."
        )
    if not beyond.any():
        return ""
    first = int(beyond.argmax())
    return (
        f"{int(beyond.sum())} of the first {len(lengths)} rows of the {split} set have an answer beyond "
        f"every row, row {first} first (start_positions={starts[first]}, end_positions={ends[first]}). As "
        "natively, such positions are not counted in the loss."
    )

"""Span corruption, T5's pre-training: lengths, blocks of text, collator.

input   kept tokens, each removed span replaced by one sentinel, end of sequence
target  each sentinel followed by the span it stands for, end of sequence
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hfbridge.errors import DataError


def span_counts(length: int, *, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Count the tokens that are removed from a sequence of at least 2, and the spans they form."""
    noise = min(max(round(length * noise_density), 1), length - 1)
    spans = min(max(round(noise / mean_span_length), 1), noise, length - noise)
    return noise, spans


def t5_lengths(
    input_length: int, *, noise_density: float = 0.15, mean_span_length: float = 3.0
) -> tuple[int, int]:
    """Compute how long raw sequences may be so that corrupted inputs fit, and how long targets become.

    Args:
        input_length: tokens the encoder may see, end of sequence included; at least 3.
        noise_density: share of tokens that are removed, between 0 and 1.
        mean_span_length: tokens of a span on average, at least 1.

    Returns:
        Tokens of a raw sequence, and of its target with end of sequence.

    Raises:
        DataError: a value is out of its range.

    Proved by: tests/unit/data/test_span_corruption.py
    """
    if input_length < 3 or not 0 < noise_density < 1 or mean_span_length < 1:
        raise DataError(
            f"input_length={input_length}, noise_density={noise_density} and "
            f"mean_span_length={mean_span_length}: input_length must be at least 3, noise_density between "
            "0 and 1, mean_span_length at least 1. T5 has 512, 0.15 and 3.0."
        )
    best = target = 0
    # Of n tokens, n * (1 - noise_density) remain at least, but for rounding.
    for length in range(2, int((input_length + 2) / (1 - noise_density)) + 2):
        noise, spans = span_counts(length, noise_density=noise_density, mean_span_length=mean_span_length)
        if length - noise + spans + 1 <= input_length:
            best, target = length, noise + spans + 1
    return best, target


def cut_blocks(rows: Mapping[str, Sequence[Sequence[int]]], length: int) -> dict[str, list[list[int]]]:
    """Join the `input_ids` of rows and cut them into blocks of `length`; the rest is left out.

    For `datasets.Dataset.map(..., batched=True)` or a `map_function`, with the other columns removed.
    """
    joined = [token for ids in rows["input_ids"] for token in ids]
    return {"input_ids": [joined[i : i + length] for i in range(0, len(joined) - length + 1, length)]}


class DataCollatorForT5MLM:
    """Remove random spans of tokens from blocks of text to predict them, as in T5's pre-training.

    Draws come from torch's global generator, which a run seeds and its checkpoints keep.

    Args:
        tokenizer: with an end-of-sequence token and sentinels `<extra_id_0>`, `<extra_id_1>`, ...
        input_length: tokens of each corrupted input; rows have `raw_length` tokens.
        noise_density: share of tokens that are removed.
        mean_span_length: tokens of a removed span on average.

    Attributes:
        raw_length: tokens each row must have; `cut_blocks` makes them.
        target_length: tokens of each target.

    Raises:
        DataError: values out of range, or a tokenizer without end of sequence or with too few sentinels.

    Proved by: tests/unit/data/test_span_corruption.py
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        input_length: int,
        noise_density: float = 0.15,
        mean_span_length: float = 3.0,
    ) -> None:
        self.raw_length, self.target_length = t5_lengths(
            input_length, noise_density=noise_density, mean_span_length=mean_span_length
        )
        self._noise, self._spans = span_counts(
            self.raw_length, noise_density=noise_density, mean_span_length=mean_span_length
        )
        vocabulary = tokenizer.get_vocab()
        names = [f"<extra_id_{i}>" for i in range(self._spans)]
        missing = [name for name in names if name not in vocabulary]
        if missing or tokenizer.eos_token_id is None:
            lacking = missing[0] if missing else "an eos_token"
            raise DataError(
                f"The tokenizer lacks {lacking}. Span corruption of {self.raw_length} tokens needs an "
                f"eos_token and {self._spans} sentinels, <extra_id_0> to {names[-1]}. Add them with "
                "tokenizer.add_special_tokens and resize the model's embeddings, or use shorter inputs."
            )
        self._sentinels = [vocabulary[name] for name in names]
        self._end = int(tokenizer.eos_token_id)

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Corrupt rows: `input_ids` [batch, input] and `labels` [batch, target], without padding."""
        pairs = [self._corrupt([int(token) for token in row["input_ids"]]) for row in rows]
        return {
            "input_ids": torch.tensor([source for source, _ in pairs]),
            "labels": torch.tensor([target for _, target in pairs]),
        }

    def _corrupt(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        if len(tokens) != self.raw_length:
            raise DataError(
                f"A row has {len(tokens)} tokens; DataCollatorForT5MLM needs its raw_length, "
                f"{self.raw_length}. Use hfbridge.data.span_corruption.cut_blocks."
            )
        source: list[int] = []
        target: list[int] = []
        kept = _random_parts(self.raw_length - self._noise, self._spans)
        removed = _random_parts(self._noise, self._spans)
        at = 0
        for sentinel, keep, remove in zip(self._sentinels, kept, removed, strict=True):
            source += [*tokens[at : at + keep], sentinel]
            target += [sentinel, *tokens[at + keep : at + keep + remove]]
            at += keep + remove
        return [*source, self._end], [*target, self._end]


def _random_parts(total: int, count: int) -> list[int]:
    """Divide `total` into `count` parts of at least one, every division being as likely."""
    cuts = sorted((torch.randperm(total - 1)[: count - 1] + 1).tolist())
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]

"""Span corruption: the figures of T5, and that nothing of a text is lost."""

from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from hfbridge import DataCollatorForT5MLM, DataError
from hfbridge.data.span_corruption import cut_blocks, span_counts, t5_lengths
from tests.parity.engines import Job, run_both
from tests.tiny import VOCABULARY, make_tokenizer

SENTINELS = 20
END = VOCABULARY  # added first; the sentinels follow


def make_t5_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    names = [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]  # the first has the highest id, as in T5
    tokenizer.add_special_tokens({"additional_special_tokens": names, "eos_token": "</s>"})
    return tokenizer


def joined(source: list[int], target: list[int]) -> list[int]:
    """Put the spans back in the place of their sentinels."""
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token >= VOCABULARY:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    return [t for token in source[:-1] for t in (spans[token] if token >= VOCABULARY else [token])]


def test_lengths_are_those_of_t5() -> None:
    assert t5_lengths(512) == (568, 114)
    assert span_counts(568, noise_density=0.15, mean_span_length=3.0) == (85, 28)


@pytest.mark.parametrize("input_length", [3, 8, 24, 64, 100])
@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.3, 1.5)])
def test_nothing_is_lost(input_length: int, density: float, mean: float) -> None:
    raw, target_length = t5_lengths(input_length, noise_density=density, mean_span_length=mean)
    noise, spans = span_counts(raw, noise_density=density, mean_span_length=mean)
    if spans > SENTINELS:
        with pytest.raises(DataError, match="sentinels"):
            DataCollatorForT5MLM(
                make_t5_tokenizer(), input_length=input_length, noise_density=density, mean_span_length=mean
            )
        return
    collator = DataCollatorForT5MLM(
        make_t5_tokenizer(), input_length=input_length, noise_density=density, mean_span_length=mean
    )
    rows = torch.randint(3, VOCABULARY, (50, raw)).tolist()
    batch = collator([{"input_ids": row} for row in rows])
    assert batch["labels"].shape == (50, target_length)
    assert batch["input_ids"].shape[1] == raw - noise + spans + 1 <= input_length
    highest_down = [VOCABULARY + SENTINELS - i for i in range(spans)]
    for row, source, target in zip(rows, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert joined(source, target) == row
        assert source[-1] == target[-1] == END
        assert [t for t in source[:-1] if t >= VOCABULARY] == highest_down
        assert [t for t in target[:-1] if t >= VOCABULARY] == highest_down


def test_a_seed_gives_the_same_spans() -> None:
    collator = DataCollatorForT5MLM(make_t5_tokenizer(), input_length=40)
    rows = [{"input_ids": list(range(3, 3 + collator.raw_length))}] * 8
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(collator(rows)["input_ids"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_wrong_use_is_named() -> None:
    with pytest.raises(DataError, match="<extra_id_0>"):
        DataCollatorForT5MLM(make_tokenizer(), input_length=24)
    with pytest.raises(DataError, match="input_length=2"):
        t5_lengths(2)
    collator = DataCollatorForT5MLM(make_t5_tokenizer(), input_length=24)
    with pytest.raises(DataError, match="raw_length"):
        collator([{"input_ids": [3, 4]}])


def test_blocks_lose_only_the_rest() -> None:
    assert cut_blocks({"input_ids": [[1, 2, 3], [4], [5, 6, 7]]}, 3) == {"input_ids": [[1, 2, 3], [4, 5, 6]]}


def make_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(7)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=END + SENTINELS + 1, **sizes, decoder_start_token_id=0)
    )


def test_both_engines_train_t5_on_the_same_spans() -> None:
    rows = [{"input_ids": torch.randint(3, VOCABULARY, (26,)).tolist()} for _ in range(12)]
    collators = [DataCollatorForT5MLM(make_t5_tokenizer(), input_length=24) for _ in range(2)]
    assert collators[0].raw_length == 26
    _, ours = run_both(
        Job(
            "t5",
            {"gradient_accumulation_steps": 2},
            model=make_t5,
            collator=collators.pop,
            train_rows=[{**row, "idx": i} for i, row in enumerate(rows)],
            validation_rows=rows[:4],
        )
    )
    assert len(ours.collated) == 3

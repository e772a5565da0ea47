"""Models from configs and datasets made in code: nothing is downloaded, everything trains in milliseconds."""

from typing import Any

import datasets
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

VOCABULARY = 50
IGNORED = -100


def make_model(
    kind: str, *, dropout: float = 0.1, dtype: torch.dtype = torch.float32, seed: int = 7
) -> PreTrainedModel:
    """Build a tiny model; the same arguments give the same weights.

    Kinds by how their loss is normalised (spec of the native Trainer): A llama; B distilbert, bert-token,
    bert-regression, bert-mlm, albert, t5; C bert-qa; D gpt2.
    """
    set_seed(seed)
    bert: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    if kind == "distilbert":
        config = DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=32,
            max_position_embeddings=64,
            dropout=dropout,
            attention_dropout=dropout,
            seq_classif_dropout=dropout,
            num_labels=2,
        )
        model: PreTrainedModel = DistilBertForSequenceClassification(config)
    elif kind == "bert-token":
        model = BertForTokenClassification(BertConfig(**bert, num_labels=5))
    elif kind == "bert-regression":
        model = BertForSequenceClassification(BertConfig(**bert, num_labels=1))
    elif kind == "bert-mlm":
        model = BertForMaskedLM(BertConfig(**bert))
    elif kind == "albert":
        model = AlbertForSequenceClassification(
            AlbertConfig(**bert, embedding_size=8, classifier_dropout_prob=dropout, num_labels=2)
        )
    elif kind == "t5":
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                dropout_rate=dropout,
                pad_token_id=0,
                decoder_start_token_id=0,
            )
        )
    elif kind == "bert-qa":
        model = BertForQuestionAnswering(BertConfig(**bert))
    elif kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=32,
                max_position_embeddings=64,
                attention_dropout=dropout,
                pad_token_id=0,
            )
        )
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=16,
                n_layer=2,
                n_head=2,
                n_positions=64,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
    else:
        raise ValueError(kind)
    return model.to(dtype)


def make_rows(kind: str, count: int, *, seed: int = 3, longest: int = 12) -> list[dict[str, Any]]:
    """Make rows of different lengths for a kind of model, unpadded."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows: list[dict[str, Any]] = []
    for _ in range(count):
        length = draw(3, longest + 1)
        ids = [draw(3, VOCABULARY) for _ in range(length)]
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * length}
        if kind in ("distilbert", "albert"):
            row["label"] = draw(0, 2)
        elif kind == "bert-regression":
            row["label"] = draw(-100, 100) / 50.0
        elif kind == "bert-token":
            row["labels"] = [IGNORED if draw(0, 4) == 0 else draw(0, 5) for _ in ids]
        elif kind == "t5":
            row["labels"] = [draw(3, VOCABULARY) for _ in range(draw(2, longest + 1))]
        elif kind == "bert-qa":
            start = draw(0, length)
            row["start_positions"], row["end_positions"] = start, draw(start, length)
        elif kind != "bert-mlm":  # there the collator makes them
            row["labels"] = [IGNORED if position < 2 else token for position, token in enumerate(ids)]
        rows.append(row)
    return rows


def make_dataset(kind: str, count: int, *, seed: int = 3) -> datasets.Dataset:
    """Make a dataset of `make_rows`."""
    return datasets.Dataset.from_list(make_rows(kind, count, seed=seed))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of `VOCABULARY` words, the first three of them special."""
    words = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")),
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


class PadRows:
    """Pad every column to its longest of the micro-batch, or to `length`; labels of tokens with -100."""

    def __init__(self, length: int = 0) -> None:
        self.length = length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if isinstance(values[0], list):
                fill = IGNORED if name == "labels" else 0
                longest = max(self.length, *(len(value) for value in values))
                values = [value + [fill] * (longest - len(value)) for value in values]
            batch["labels" if name == "label" else name] = torch.tensor(values)
        return batch

"""What the scripts of this folder import: tiny models with tokenizers on disk, and rows of words."""

import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

WORDS = [f"w{number}" for number in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "[CLS]", "[SEP]", "user", "assistant"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' [EOS] ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def sentence(draw: random.Random, longest: int = 8) -> str:
    """Draw some words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(2, longest)))


def make_rows(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Make rows of a kind that the libraries know."""
    draw = random.Random(seed)
    makers = {
        "text": lambda: {"text": sentence(draw)},
        "completion": lambda: {"prompt": sentence(draw), "completion": " " + sentence(draw)},
        "messages": lambda: {
            "messages": [
                {"role": role, "content": sentence(draw)}
                for role in ("user", "assistant", "user", "assistant")
            ]
        },
        "preference": lambda: {
            "prompt": sentence(draw),
            "chosen": " " + sentence(draw),
            "rejected": " " + sentence(draw),
        },
        "ranked": lambda: {"chosen": sentence(draw), "rejected": sentence(draw)},
        "judged": lambda: {
            "prompt": sentence(draw),
            "completion": " " + sentence(draw),
            "label": draw.random() < 0.5,
        },
        "prompt": lambda: {"prompt": sentence(draw)},
        "pair": lambda: {"anchor": sentence(draw), "positive": sentence(draw)},
        "scored": lambda: {"sentence1": sentence(draw), "sentence2": sentence(draw), "score": draw.random()},
        "labelled": lambda: {"text": sentence(draw), "label": draw.randrange(2)},
    }
    return [makers[kind]() for _ in range(count)]


def make_tokenizer(*, encloses: bool) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words; `encloses` puts [CLS] and [SEP] around a text."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if encloses:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        chat_template=None if encloses else TEMPLATE,
        model_max_length=64,
    )


def save_model(kind: str, folder: Path) -> str:
    """Write a model with its tokenizer: "llama", "llama-reward", "bert", "bert-rank"; returns the folder."""
    set_seed(5)
    sizes = {
        "vocab_size": len(WORDS) + len(SPECIAL),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
    }
    ids = {"bos_token_id": 2, "eos_token_id": 3}
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **ids))
    elif kind == "llama-reward":
        model = LlamaForSequenceClassification(LlamaConfig(**sizes, **ids, num_labels=1))
    elif kind == "bert":
        model = BertModel(BertConfig(**sizes))
    else:
        model = BertForSequenceClassification(BertConfig(**sizes, num_labels=1))
    model.save_pretrained(folder)
    make_tokenizer(encloses=kind.startswith("bert")).save_pretrained(folder)
    return str(folder)

"""Every collator of the installed transformers: two steps as natively, or refused with the reason.

Grade: exact, one process, fp32, CPU. Collators are given as they are: some checks ask what they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from transformers.data import data_collator as defining

from hfbridge import DataError
from tests.parity.engines import Job, run_both, run_ours
from tests.tiny import VOCABULARY, make_model, make_rows, make_tokenizer

# What the package calls a collator and is none: the name of the type, and a base class without a torch_call.
NO_COLLATORS = {"DataCollator", "DataCollatorMixin"}
# Halves of default_data_collator, which it calls by its return_tensors; not exported.
HALVES = {"torch_default_data_collator", "numpy_default_data_collator"}


@dataclass(frozen=True)
class Case:
    """What a collator is tried with.

    Attributes:
        kind: of the model, in tests/tiny.py.
        make: makes the collator.
        rows: makes rows.
        model: makes the model, instead of that of the kind.
        refused: how the refusal begins; empty for one that trains.
    """

    kind: str
    make: Callable[[], Any]
    rows: Callable[[str], list[dict[str, Any]]] = lambda kind: make_rows(kind, 16)
    model: Callable[[], nn.Module] | None = None
    refused: str = ""


def equally_long(kind: str) -> list[dict[str, Any]]:
    return [
        {n: v[:4] if isinstance(v, list) else v for n, v in row.items()}
        for row in make_rows(kind, 40)
        if len(row["input_ids"]) >= 4
    ][:16]


def unlabelled(kind: str) -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"]} for row in make_rows(kind, 16)]


def with_choices(kind: str) -> list[dict[str, Any]]:
    rows = make_rows("llama", 32)
    return [
        {
            **{name: [row[name], other[name]] for name in ("input_ids", "attention_mask")},
            "label": len(row["input_ids"]) % 2,
        }
        for row, other in zip(rows[::2], rows[1::2], strict=True)
    ]


def with_words(kind: str) -> list[dict[str, Any]]:
    """Words of one or two tokens, as whole words are masked."""
    return [{**row, "offset_mapping": [(0, 2), (2, 3), (4, 5), (5, 9)]} for row in equally_long("bert-mlm")]


def xlnet() -> nn.Module:
    hf.set_seed(7)
    return hf.XLNetLMHeadModel(
        hf.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=32)
    )


def bert_of_choices() -> nn.Module:
    hf.set_seed(7)
    config = make_model("bert-mlm").config
    return hf.BertForMultipleChoice(config)


def of_tokenizer(name: str, **arguments: Any) -> Callable[[], Any]:
    return lambda: getattr(hf, name)(make_tokenizer(), **arguments)


def of_words() -> Any:
    return hf.DataCollatorForLanguageModeling(
        make_tokenizer(),
        whole_word_mask=True,
        mlm_probability=0.4,
        mask_replace_prob=1.0,
        random_replace_prob=0.0,
    )


TABLE: dict[str, list[Case]] = {
    "default_data_collator": [
        Case("distilbert", lambda: hf.default_data_collator, equally_long),
        Case(
            "distilbert",
            lambda: partial(hf.default_data_collator, return_tensors="np"),
            equally_long,
            refused=r"makes arrays of numpy",
        ),
    ],
    "DefaultDataCollator": [Case("distilbert", lambda: hf.DefaultDataCollator(), equally_long)],
    "DataCollatorWithPadding": [
        Case("distilbert", of_tokenizer("DataCollatorWithPadding")),
        Case("distilbert", of_tokenizer("DataCollatorWithPadding", padding="max_length", max_length=16)),
    ],
    "DataCollatorForTokenClassification": [
        Case("bert-token", of_tokenizer("DataCollatorForTokenClassification", pad_to_multiple_of=8))
    ],
    "DataCollatorForSeq2Seq": [
        Case("t5", of_tokenizer("DataCollatorForSeq2Seq")),
        Case("t5", lambda: hf.DataCollatorForSeq2Seq(make_tokenizer(), model=make_model("t5"))),
    ],
    "DataCollatorForLanguageModeling": [
        Case("bert-mlm", of_tokenizer("DataCollatorForLanguageModeling", mlm_probability=0.4)),
        # Its own generator is moved on by nothing but the batches that the native Trainer makes, too.
        Case("bert-mlm", of_tokenizer("DataCollatorForLanguageModeling", mlm_probability=0.4, seed=4)),
        Case("llama", of_tokenizer("DataCollatorForLanguageModeling", mlm=False), unlabelled),
        Case("bert-mlm", of_words, with_words),
    ],
    "DataCollatorForPermutationLanguageModeling": [
        Case("xlnet", of_tokenizer("DataCollatorForPermutationLanguageModeling"), equally_long, xlnet)
    ],
    "DataCollatorForMultipleChoice": [
        Case("choice", of_tokenizer("DataCollatorForMultipleChoice"), with_choices, bert_of_choices)
    ],
    "DataCollatorWithFlattening": [
        Case("llama", lambda: hf.DataCollatorWithFlattening()),
        Case("gpt2", lambda: hf.DataCollatorWithFlattening(), unlabelled),
        Case(
            "llama",
            lambda: hf.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
        ),
    ],
}
TRAINED = [
    pytest.param(case, id=f"{name}-{i}")
    for name, cases in TABLE.items()
    for i, case in enumerate(cases)
    if not case.refused
]


def job_of(case: Case) -> Job:
    return Job(
        case.kind,
        {
            "max_steps": 2,
            "gradient_accumulation_steps": 2,
            "per_device_eval_batch_size": 2,
            "eval_strategy": "steps",
        },
        train_rows=case.rows(case.kind),
        validation_rows=case.rows(case.kind)[:6],
        model=case.model,
        collator=case.make,
        has_ids=False,
        is_recorded=False,
        compute_metrics=None,
    )


def test_every_collator_is_in_the_table() -> None:
    exported = {name for name in dir(hf) if "collator" in name.lower() and "." not in name}
    defined = {
        name
        for name, value in vars(defining).items()
        if "collator" in name.lower() and not name.startswith("_") and callable(value)
    }
    assert exported - NO_COLLATORS == set(TABLE)
    assert defined - NO_COLLATORS - HALVES == set(TABLE)


@pytest.mark.parametrize("case", TRAINED)
def test_trained_as_natively(case: Case) -> None:
    _, ours = run_both(job_of(case))
    assert ours.steps[0]["weights"] != ours.steps[1]["weights"]


@pytest.mark.parametrize("kind", ["np", "tf"])
@pytest.mark.parametrize("name", [name for name in TABLE if name != "default_data_collator"])
def test_other_tensors_than_torchs_are_refused(name: str, kind: str) -> None:
    collator = TABLE[name][0].make()
    collator.return_tensors = kind
    case = TABLE[name][0]
    job = job_of(Case(case.kind, lambda: collator, case.rows, case.model))
    with pytest.raises(
        DataError, match=rf"{name} of the train set has return_tensors='{kind}'.* return_tensors='pt'"
    ):
        run_ours(job)


def test_a_batch_of_arrays_is_refused() -> None:
    """Of a function nobody knows what it will return."""
    case = TABLE["default_data_collator"][1]
    with pytest.raises(DataError, match=case.refused):
        run_ours(job_of(case))
    assert isinstance(case.make()(case.rows(case.kind)[:2])["input_ids"], np.ndarray)
    assert isinstance(hf.default_data_collator(case.rows(case.kind)[:2])["input_ids"], torch.Tensor)

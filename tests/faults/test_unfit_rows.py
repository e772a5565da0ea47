"""Rows and models that do not fit: the column, the value and the limit are named, mostly before training."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

import hfbridge
from hfbridge import DataError, ModelError
from hfbridge.data.limits import Limits, check_rows
from hfbridge.models.signature import positions_of, vocabulary_of
from tests.tiny import VOCABULARY, PadRows, make_dataset, make_model, make_rows, make_tokenizer

BASE: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "save_strategy": "no",
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "disable_tqdm": True,
}


class NoStep(TrainerCallback):
    """Fails when a step begins."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a step was begun")


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path) -> Any:
    before = sorted(tmp_path.rglob("*"))
    yield
    assert sorted(tmp_path.rglob("*")) == before


def fit(
    kind: str, rows: Any, collator: Any = None, *, early: bool = True, model: Any = None, **more: Any
) -> Any:
    """Train; `early` allows no step to begin."""
    trainer = hfbridge.Trainer(
        BASE, callbacks=[NoStep] if early else [], logger=False, enable_model_summary=False
    )
    module = hfbridge.HFModule(model or make_model(kind), **more)
    data = datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows
    trainer.fit(module, hfbridge.HFDataModule(train_dataset=data, data_collator=collator))
    return module


def rows_with(kind: str, index: int = 5, **values: Any) -> list[dict[str, Any]]:
    """Make rows one of which holds other values."""
    rows = make_rows(kind, 12)
    rows[index] |= values
    return rows


# Ids.


def test_ids_beyond_the_embedding_before_training() -> None:
    rows = rows_with("distilbert", input_ids=[3, 77, 4], attention_mask=[1, 1, 1])
    with pytest.raises(
        DataError, match=r"train set holds the id 77 in 'input_ids'.*ids 0 to 49.*resize_token"
    ):
        fit("distilbert", rows, DataCollatorWithPadding(make_tokenizer()))


@pytest.mark.parametrize("kind", ["distilbert", "llama", "t5", "bert-qa"])
def test_ids_beyond_the_embedding_in_a_batch(kind: str) -> None:
    rows = make_rows(kind, 12)
    for row in rows:
        row["input_ids"][1] = VOCABULARY + 3
    with pytest.raises(DataError, match=r"column 'input_ids' holds the id 53.*ids 0 to 49"):
        fit(kind, rows, PadRows(), early=False)


def test_a_tokenizer_of_another_model() -> None:
    config = make_model("distilbert").config
    config.vocab_size = VOCABULARY - 8
    from_other = type(make_model("distilbert"))(config)
    with pytest.raises(ModelError, match=r"has 50 words, and the embedding of DistilBert\w+ 42: they do not"):
        fit("distilbert", make_rows("distilbert", 12), model=from_other, processing_class=make_tokenizer())


def test_added_tokens_that_do_not_occur() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<never>"])
    fit("distilbert", make_rows("distilbert", 12), early=False, processing_class=tokenizer)


# Positions.


def test_rows_beyond_the_positions_before_training() -> None:
    rows = rows_with("distilbert", input_ids=[3] * 70, attention_mask=[1] * 70)
    with pytest.raises(DataError, match=r"Row 5 of the train set has 70 tokens.*64 positions.*max_length=64"):
        fit("distilbert", rows, DataCollatorWithPadding(make_tokenizer()))


@pytest.mark.parametrize("kind", ["distilbert", "gpt2", "bert-mlm"])
def test_rows_beyond_the_positions_in_a_batch(kind: str) -> None:
    rows = [{"input_ids": [3] * 70, "attention_mask": [1] * 70, "labels": [3] * 70} for _ in range(12)]
    if kind == "distilbert":
        rows = [{**row, "labels": 1} for row in rows]
    with pytest.raises(DataError, match=r"70 tokens a sample.*64 positions.*max_length=64"):
        fit(kind, rows, PadRows(), early=False)


def test_limits_that_are_read_off_models() -> None:
    assert [vocabulary_of(make_model(kind)) for kind in ("distilbert", "t5", "llama")] == [VOCABULARY] * 3
    assert [positions_of(make_model(kind)) for kind in ("distilbert", "gpt2")] == [64, 64]
    assert [positions_of(make_model(kind)) for kind in ("t5", "llama")] == [
        None,
        None,
    ]  # as long as one likes


# Padding.


@pytest.mark.parametrize("collator", [DataCollatorWithPadding, DataCollatorForLanguageModeling])
def test_no_pad_token(collator: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer, eos_token="w3")
    made = collator(tokenizer) if collator is DataCollatorWithPadding else collator(tokenizer, mlm=False)
    with pytest.raises(
        ValueError, match="padding token"
    ):  # what transformers says, without the collator's name
        made(make_rows("bert-mlm", 4))
    with pytest.raises(
        DataError, match=rf"{collator.__name__} pads the rows.*pad_token = tokenizer.eos_token"
    ):
        fit("gpt2", make_dataset("bert-mlm", 12), made)


def test_a_model_that_has_no_pad_token() -> None:
    set_seed(1)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ModelError, match=r"pad_token_id=None\. Set model\.config\.pad_token_id"):
        fit(
            "",
            make_rows("distilbert", 12),
            PadRows(),
            early=False,
            model=GPT2ForSequenceClassification(config),
        )


# Labels.


@pytest.mark.parametrize("kind", ["distilbert", "bert-token"])
def test_labels_that_the_collator_makes(kind: str) -> None:
    class Wrong(PadRows):
        def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            batch = super().__call__(rows)
            batch["labels"] = torch.full_like(batch["labels"], 7)
            return batch

    with pytest.raises(DataError, match=r"column 'labels' holds 7, and \w+ has the labels 0 to [14] "):
        fit(kind, make_rows(kind, 12), Wrong(), early=False)


def test_labels_of_a_language_model_beyond_its_words() -> None:
    rows = make_rows("gpt2", 12)
    for row in rows:
        row["labels"][-1] = 61
    with pytest.raises(DataError, match=r"'labels' holds 61, and GPT2LMHeadModel has the labels 0 to 49"):
        fit("gpt2", rows, PadRows(), early=False)


def test_a_collator_that_returns_no_labels() -> None:
    class Forgetful(PadRows):
        def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return {name: value for name, value in super().__call__(rows).items() if name != "labels"}

    model = make_model("distilbert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ModelError, match=r"given input_ids, attention_mask\..*data_collator makes a 'labels'"
    ):
        fit("", make_rows("distilbert", 12), Forgetful(), early=False, model=model)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


# Answers.


@pytest.mark.parametrize(
    ("start", "end"), [(1, 6), (6, 6), (3, 1), (-1, 2), (0, -3)], ids=lambda value: str(value)
)
def test_an_answer_outside_its_context(start: int, end: int) -> None:
    rows = rows_with(
        "bert-qa", input_ids=[4] * 5, attention_mask=[1] * 5, start_positions=start, end_positions=end
    )
    with pytest.raises(
        DataError,
        match=rf"Row 5 .*outside its context: start_positions={start}, end_positions={end}.* 0 to 4\.",
    ):
        fit("bert-qa", rows, DataCollatorWithPadding(make_tokenizer()))


def test_answers_that_were_cut_off_are_noted() -> None:
    rows = rows_with("bert-qa", start_positions=512, end_positions=512)
    module = fit("bert-qa", rows, DataCollatorWithPadding(make_tokenizer()), early=False)
    assert any(
        "1 of the first 12 rows of the train set have an answer beyond" in note for note in module.notes
    )


def test_rows_that_fit_are_left_alone() -> None:
    limits = Limits("Any", VOCABULARY, 64)
    for kind in ("distilbert", "bert-qa", "t5"):
        assert check_rows(make_dataset(kind, 30), limits, split="train") == ""
    cut = make_dataset("distilbert", 4).with_transform(lambda batch: batch)
    assert check_rows(cut, Limits("Any", 1, 1), split="train") == ""  # it may cut the rows
    assert check_rows([{"input_ids": [99]}], limits, split="train") == ""

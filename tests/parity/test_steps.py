"""Exact parity, one process on CPU: every step of a job is that of the native Trainer, to the bit.

Grade: exact. There is no tolerance in this file; what is compared stands in tests/parity/engines.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DistilBertForSequenceClassification,
    set_seed,
)

from tests.parity.engines import Job, assert_identical, run_both, run_ours, run_theirs
from tests.tiny import VOCABULARY, make_model, make_rows, make_tokenizer

KINDS = ["llama", "distilbert", "bert-token", "bert-regression", "t5", "albert", "bert-qa", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_epochs_with_accumulation_and_evaluation(kind: str) -> None:
    # 46 rows in micro-batches of 4 are 12, the last one of 2 rows; windows of 5 end with one of 2.
    settings = {
        "gradient_accumulation_steps": 5,
        "num_train_epochs": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    theirs, _ = run_both(Job(kind, settings))
    assert [row["step"] for row in theirs.log_history if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in theirs.log_history if "eval_loss" in row] == [2, 4, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast(kind: str) -> None:
    settings = {"bf16": True, "gradient_accumulation_steps": 3, "eval_strategy": "epoch"}
    run_both(Job(kind, settings, rows=30))


@pytest.mark.parametrize("kind", ["llama", "distilbert", "bert-qa", "gpt2"])
def test_float64_weights(kind: str) -> None:
    job = Job(
        kind,
        {"gradient_accumulation_steps": 3, "eval_strategy": "epoch"},
        rows=30,
        model=lambda: make_model(kind, dtype=torch.float64),
    )
    _theirs, ours = run_both(job)
    assert all(t.dtype == torch.float64 for t in ours.weights.values() if t.is_floating_point())


@pytest.mark.parametrize(
    ("kind", "accumulation", "rows"),
    [
        ("llama", 1, 14),
        ("llama", 4, 50),  # 13 micro-batches: a last window of one short micro-batch
        ("distilbert", 1, 14),
        ("distilbert", 4, 50),
        ("bert-qa", 1, 14),
        ("bert-qa", 4, 50),
        ("gpt2", 3, 30),  # 8 micro-batches: a last window of 2
        ("bert-token", 3, 30),
        ("t5", 4, 50),
        ("distilbert", 4, 6),  # the only window is short
        ("llama", 3, 3),  # the only micro-batch is short
    ],
)
def test_accumulation_with_short_last_window(kind: str, accumulation: int, rows: int) -> None:
    settings = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    run_both(Job(kind, settings, rows=rows, eval_rows=0))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"max_steps": 2, "gradient_accumulation_steps": 3}, id="max-steps-inside-an-epoch"),
        pytest.param({"max_steps": 9, "gradient_accumulation_steps": 3}, id="max-steps-beyond-two-epochs"),
        pytest.param({"max_steps": 4, "gradient_accumulation_steps": 3}, id="max-steps-of-one-epoch"),
        pytest.param({"num_train_epochs": 1.5, "gradient_accumulation_steps": 3}, id="1.5-epochs"),
        pytest.param({"num_train_epochs": 2.5}, id="2.5-epochs"),
        pytest.param({"num_train_epochs": 0.4, "gradient_accumulation_steps": 4}, id="0.4-epochs"),
        pytest.param({"eval_strategy": "steps", "eval_steps": 5}, id="eval-steps"),
        pytest.param({"eval_strategy": "steps"}, id="eval-every-logging-step"),
        pytest.param({"eval_strategy": "epoch", "num_train_epochs": 2}, id="eval-epoch"),
        pytest.param({"eval_strategy": "epoch", "num_train_epochs": 1.5}, id="eval-epoch-fractional"),
        pytest.param({"eval_strategy": "epoch", "max_steps": 5}, id="eval-epoch-cut-short"),
        pytest.param({"eval_strategy": "steps", "eval_steps": 6, "eval_on_start": True}, id="eval-on-start"),
        pytest.param({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 6}, id="eval-delay-steps"),
        pytest.param(
            {"eval_strategy": "epoch", "eval_delay": 1.5, "num_train_epochs": 3}, id="eval-delay-epochs"
        ),
        pytest.param({"eval_strategy": "steps", "eval_steps": 0.3, "logging_steps": 0.2}, id="eval-fraction"),
        pytest.param({"max_grad_norm": 0}, id="no-clipping"),
        pytest.param({"max_grad_norm": 0.01}, id="hard-clipping"),
        pytest.param({"data_seed": 9, "num_train_epochs": 2}, id="data-seed"),
        pytest.param({"seed": 123}, id="seed"),
        pytest.param({"optim": "adamw_torch"}, id="adamw"),
        pytest.param({"optim": "adamw_torch_fused", "adam_beta1": 0.8, "adam_beta2": 0.9}, id="adamw-fused"),
        pytest.param({"weight_decay": 0.0, "adam_epsilon": 1e-6}, id="no-weight-decay"),
        pytest.param({"dataloader_drop_last": True, "num_train_epochs": 2}, id="drop-last"),
        pytest.param(
            {"dataloader_drop_last": True, "gradient_accumulation_steps": 4, "eval_strategy": "epoch"},
            id="drop-last-with-evaluation",
        ),
        pytest.param({"train_sampling_strategy": "sequential", "num_train_epochs": 2}, id="sequential"),
        pytest.param({"logging_steps": 5, "num_train_epochs": 2}, id="log-every-5"),
        pytest.param({"logging_steps": 5, "logging_first_step": True}, id="log-first"),
        pytest.param({"logging_strategy": "epoch", "num_train_epochs": 2}, id="log-epoch"),
        pytest.param({"logging_strategy": "no", "eval_strategy": "epoch"}, id="log-never"),
        pytest.param({"logging_strategy": "epoch", "num_train_epochs": 1.5}, id="log-epoch-fractional"),
        pytest.param({"prediction_loss_only": True, "eval_strategy": "epoch"}, id="loss-only"),
        pytest.param({"eval_accumulation_steps": 2, "eval_strategy": "epoch"}, id="eval-accumulation"),
        pytest.param({"per_device_eval_batch_size": 3, "eval_strategy": "epoch"}, id="eval-batch-of-3"),
        pytest.param({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 7}, id="batch-of-1"),
        pytest.param({"per_device_train_batch_size": 64}, id="one-batch"),
    ],
)
@pytest.mark.parametrize("kind", ["distilbert"])
def test_setting(kind: str, settings: dict[str, Any]) -> None:
    run_both(Job(kind, settings))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"num_train_epochs": 1.5, "logging_steps": 4, "eval_strategy": "epoch"}, id="epochs"),
        pytest.param(
            {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 2, "max_grad_norm": 0}, id="steps"
        ),
        pytest.param({"prediction_loss_only": True, "eval_strategy": "epoch", "bf16": True}, id="loss-only"),
        pytest.param({"eval_accumulation_steps": 1, "eval_strategy": "epoch"}, id="eval-accumulation"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "bert-qa", "t5"])
def test_setting_of_other_kinds(kind: str, settings: dict[str, Any]) -> None:
    run_both(Job(kind, {"gradient_accumulation_steps": 3, **settings}, rows=30))


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [
        ("linear", {"warmup_steps": 0.3}),
        ("linear", {"warmup_steps": 0}),
        ("cosine", {}),
        ("cosine", {"lr_scheduler_kwargs": {"num_cycles": 2.0}}),
        ("cosine_with_restarts", {"lr_scheduler_kwargs": {"num_cycles": 3}}),
        ("constant", {}),
        ("constant_with_warmup", {"warmup_steps": 4}),
        ("polynomial", {"lr_scheduler_kwargs": {"power": 2.0, "lr_end": 1e-5}}),
        ("inverse_sqrt", {"lr_scheduler_kwargs": {"timescale": 3}}),
        ("cosine_with_min_lr", {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
        ("warmup_stable_decay", {"lr_scheduler_kwargs": {"num_decay_steps": 4}}),
    ],
)
def test_schedule(schedule: str, arguments: dict[str, Any]) -> None:
    settings = {"lr_scheduler_type": schedule, "num_train_epochs": 1.5, **arguments}
    theirs, _ = run_both(Job("distilbert", settings, rows=30, eval_rows=0))
    rates = {row["learning_rate"] for row in theirs.log_history if "learning_rate" in row}
    assert len(rates) > 1 or schedule == "constant"


def test_two_workers() -> None:
    settings = {"dataloader_num_workers": 2, "num_train_epochs": 2, "eval_strategy": "epoch"}
    theirs, _ours = run_both(Job("distilbert", settings, rows=18))
    assert not theirs.collated  # collated in the workers; the micro-batches are compared at the model


class NaNDistilBertForSequenceClassification(DistilBertForSequenceClassification):
    """Returns a NaN loss with a finite gradient for about every fourth micro-batch, in evaluation too."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        if outputs.loss is not None and bool((input_ids[:, 0] < 6).any()):
            outputs.loss = outputs.loss + torch.nan
        return outputs


def make_nan_model() -> nn.Module:
    """Give the tiny DistilBERT its class that returns NaN."""
    model = make_model("distilbert")
    model.__class__ = NaNDistilBertForSequenceClassification
    return model


@pytest.mark.parametrize("logging_steps", [1, 5])
@pytest.mark.parametrize("is_filtered", [True, False])
def test_loss_that_is_not_finite(is_filtered: bool, logging_steps: int) -> None:
    settings = {
        "logging_nan_inf_filter": is_filtered,
        "logging_steps": logging_steps,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    theirs, _ = run_both(Job("distilbert", settings, rows=60, eval_rows=22, model=make_nan_model))
    losses = [row["loss"] for row in theirs.log_history if "loss" in row]
    assert any(loss != loss for loss in losses) is not is_filtered


class SometimesInfinite(NaNDistilBertForSequenceClassification):
    """Returns an infinite gradient too: all weights are NaN from then on."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids=input_ids, **kwargs)
        if outputs.loss is not None and bool((input_ids[:, 0] < 6).any()):
            outputs.loss = outputs.loss * torch.inf
        return outputs


def test_gradient_that_is_not_finite() -> None:
    def build() -> nn.Module:
        model = make_model("distilbert")
        model.__class__ = SometimesInfinite
        return model

    run_both(Job("distilbert", {"gradient_accumulation_steps": 2}, eval_rows=0, rows=60, model=build))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param({"gradient_accumulation_steps": 3, "num_train_epochs": 2}, id="windows"),
        pytest.param({"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}, id="evaluation"),
        pytest.param(
            {"gradient_accumulation_steps": 4, "num_train_epochs": 1.5, "bf16": True}, id="fraction"
        ),
        pytest.param({"max_steps": 3, "eval_strategy": "epoch"}, id="max-steps"),
    ],
)
def test_collator_that_draws_from_the_generator_of_the_model(settings: dict[str, Any]) -> None:
    """Masking and dropout share a generator, so the order of fetching and training shows."""

    def collator() -> Any:
        return DataCollatorForLanguageModeling(make_tokenizer(), mlm_probability=0.3)

    # Evaluation draws too: compute_metrics is rehearsed on other random masks, which must leave no trace.
    run_both(Job("bert-mlm", settings, rows=30, collator=collator))


def test_seq2seq_collator_of_transformers() -> None:
    def collator() -> Any:
        return DataCollatorForSeq2Seq(make_tokenizer())

    run_both(
        Job("t5", {"gradient_accumulation_steps": 3, "eval_strategy": "epoch"}, rows=30, collator=collator)
    )


@pytest.mark.parametrize("kind", ["llama", "distilbert"])
def test_dataset_whose_unused_columns_are_removed(kind: str) -> None:
    settings = {"remove_unused_columns": True, "gradient_accumulation_steps": 3, "eval_strategy": "epoch"}

    def as_dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
        return datasets.Dataset.from_list([{**row, "text": "never seen by the model"} for row in rows])

    run_both(Job(kind, settings, rows=30, has_ids=False, as_dataset=as_dataset))


def test_list_whose_unused_columns_are_removed() -> None:
    settings = {"remove_unused_columns": True, "gradient_accumulation_steps": 3, "eval_strategy": "epoch"}
    theirs, _ours = run_both(Job("distilbert", settings, rows=30))
    assert theirs.collated == []  # no id reaches the collator


def test_default_collator_of_a_tokenizer() -> None:
    settings = {"remove_unused_columns": True, "gradient_accumulation_steps": 3, "eval_strategy": "epoch"}
    tokenizer = make_tokenizer()
    job = Job(
        "distilbert",
        settings,
        rows=30,
        has_ids=False,
        as_dataset=datasets.Dataset.from_list,
        processing_class=tokenizer,
        collator=None,
    )
    run_both(job)


def test_without_metrics() -> None:
    settings = {"gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    run_both(Job("llama", settings, rows=30, compute_metrics=None))


def save_headless(folder: Path) -> Path:
    """Save a tiny BERT without a head; the same every time."""
    set_seed(5)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("seed", [42, 7])
@pytest.mark.parametrize("dtype", ["auto", torch.float64])
def test_model_by_the_name_of_its_folder(tmp_path: Path, seed: int, dtype: Any) -> None:
    folder = save_headless(tmp_path / "headless")

    def native_script() -> nn.Module:
        set_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=dtype)

    arguments = (
        [folder, "AutoModelForSequenceClassification"],
        {"model_kwargs": {"num_labels": 2}, "dtype": dtype},
    )
    settings = {"seed": seed, "gradient_accumulation_steps": 3, "eval_strategy": "epoch"}
    run_both(Job("distilbert", settings, rows=30, model=native_script, module_arguments=arguments))


def unseeded_model() -> nn.Module:
    """Build a model from the generator's present state."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("settings", [{}, {"data_seed": 4, "seed": 3}])
def test_model_factory(settings: dict[str, Any]) -> None:
    settings = {**settings, "gradient_accumulation_steps": 3, "eval_strategy": "epoch"}
    run_both(Job("distilbert", settings, rows=30, model_init=unseeded_model))


def test_bf16_weights() -> None:
    job = Job(
        "llama",
        {"gradient_accumulation_steps": 3, "eval_strategy": "epoch"},
        rows=30,
        model=lambda: make_model("llama", dtype=torch.bfloat16),
        compute_metrics=None,
    )
    run_both(job)


@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_frozen_parameters(kind: str) -> None:
    def build() -> nn.Module:
        model = make_model(kind)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "embed" not in name
        return model

    run_both(Job(kind, {"gradient_accumulation_steps": 3}, rows=30, model=build, eval_rows=0))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("distilbert", {"return_dict": False}),
        ("bert-qa", {"return_dict": False}),
        ("distilbert", {"output_hidden_states": True}),
        (
            "llama",
            {"output_hidden_states": True},
        ),  # cannot return tuples: transformers 5.23 fails in its forward
    ],
)
def test_other_shapes_of_output(kind: str, change: dict[str, bool]) -> None:
    def build() -> nn.Module:
        model = make_model(kind)
        for name, value in change.items():
            setattr(model.config, name, value)
        return model

    settings = {"gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    run_both(Job(kind, settings, rows=30, model=build))


@pytest.mark.parametrize("kind", ["distilbert", "llama", "bert-qa"])
def test_evaluation_set_without_labels(kind: str) -> None:
    labels = ("label", "labels", "start_positions", "end_positions")
    rows = [
        {name: value for name, value in row.items() if name not in labels}
        for row in make_rows(kind, 11, seed=5)
    ]
    settings = {"gradient_accumulation_steps": 3, "eval_strategy": "epoch"}
    theirs, _ = run_both(Job(kind, settings, rows=30, validation_rows=rows))
    assert not any("eval_loss" in row for row in theirs.log_history)


def test_a_difference_is_found_and_named() -> None:
    """The comparison itself: another seed, learning rate or normalisation does not pass."""
    job = Job("gpt2", {"gradient_accumulation_steps": 3}, rows=30, eval_rows=0)
    theirs = run_theirs(job)
    with pytest.raises(AssertionError, match=r"step 1 .*: rng"):
        assert_identical(theirs, run_ours(job.with_settings(seed=1)))
    with pytest.raises(AssertionError, match=r"step 1 .*: micro-batches"):
        assert_identical(theirs, run_ours(job.with_settings(data_seed=1)))
    with pytest.raises(AssertionError, match=r"step 2 .*: learning rates"):
        assert_identical(theirs, run_ours(job.with_settings(learning_rate=2e-2)))
    job = replace(job, kind="distilbert")
    with pytest.raises(AssertionError, match=r"step 1 .*: micro-batches.*num_items_in_batch"):
        assert_identical(run_theirs(job), run_ours(job, loss_normalization="exact"))

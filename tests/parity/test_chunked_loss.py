"""Training with a loss in chunks: the native run but for the last digits, and evaluations as they were.

Grade: trajectory; logits are summed in another order, and not rounded on the way. Random states, order of
samples, events and learning rates are equal to the bit.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import hfbridge
from hfbridge import ModelError
from hfbridge.losses.chunked import ChunkedLoss
from tests.parity.engines import Job, Record, run_ours, run_theirs
from tests.parity.test_packing import job_of as packed_job
from tests.tiny import PadRows, make_model, make_rows

CLOSE = 2e-5  # float32, after 6 steps of AdamW, which divides small gradients by their own size
COARSE = 2e-2  # bf16: native rounds its logits to 8 bits


def job_of(kind: str, **settings: Any) -> Job:
    """Train on batches that are cut in two, and evaluate on the way."""
    return Job(
        kind,
        {
            "gradient_accumulation_steps": 2,
            "max_steps": 6,
            "eval_strategy": "steps",
            "eval_steps": 3,
            **settings,
        },
        compute_metrics=None,
    )


def run_in_chunks(job: Job, **more: Any) -> Record:
    """Run a job of hfbridge in "native" with `chunked_loss`."""
    return run_ours(replace(job, module_arguments=((job.make_model(),), {"chunked_loss": True})), **more)


def numbers(record: Record) -> Iterator[tuple[str, float]]:
    for row in record.log_history:
        for name, value in row.items():
            yield f"{name} of step {row['step']}", value


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Note the hidden states of each loss that is computed in chunks."""
    seen: list[torch.Size] = []
    own = ChunkedLoss._summed

    def summed(self: Any, hidden: Any, targets: Any, ignored: int) -> Any:
        seen.append(hidden.shape)
        return own(self, hidden, targets, ignored)

    monkeypatch.setattr(ChunkedLoss, "_summed", summed)
    return seen


@pytest.mark.parametrize(
    ("kind", "settings", "tolerance"),
    [
        ("llama", {}, CLOSE),
        ("gpt2", {"activation_checkpointing": True}, CLOSE),
        ("llama", {"bf16": True}, COARSE),
    ],
    ids=["llama", "gpt2, tied", "llama, bf16"],
)
def test_the_native_run(kind: str, settings: Any, tolerance: float, chunks: list[Any]) -> None:
    job = job_of(kind, **settings)
    theirs, ours = run_theirs(job), run_in_chunks(job)
    assert chunks
    assert ours.collated == theirs.collated
    assert ours.event_names == theirs.event_names
    for their, our in zip(theirs.steps, ours.steps, strict=True):
        for name in ("rng", "micro-batches", "learning rates", "rng at the end"):
            assert our.get(name) == their.get(name), name
    for (name, their_value), (_, our_value) in zip(numbers(theirs), numbers(ours), strict=True):
        assert our_value == pytest.approx(their_value, rel=tolerance), name


def test_exactly_it_is_the_run_with_logits(chunks: list[Any]) -> None:
    job = job_of("llama")
    with_logits = run_ours(job, loss_normalization="exact")
    assert not chunks
    ours = run_in_chunks(job, loss_normalization="exact")
    assert chunks
    for (name, expected), (_, value) in zip(numbers(with_logits), numbers(ours), strict=True):
        assert value == pytest.approx(expected, rel=CLOSE), name


def test_packed_rows(chunks: list[Any]) -> None:
    job = packed_job(max_steps=4, logging_steps=1)
    with_logits = run_ours(job, loss_normalization="exact")
    ours = run_in_chunks(job, loss_normalization="exact")
    assert chunks
    for (name, expected), (_, value) in zip(numbers(with_logits), numbers(ours), strict=True):
        assert value == pytest.approx(expected, rel=CLOSE), name


def first_logits(prediction: Any) -> dict[str, float]:
    return {"width": float(prediction.predictions.shape[-1]), "mean": float(np.mean(prediction.predictions))}


def fitted(**more: Any) -> tuple[Any, Any, Any]:
    """Train a step, without an evaluation."""
    module = hfbridge.HFModule(make_model("llama", dropout=0.0), chunked_loss=True, **more)
    rows = make_rows("llama", 8)
    sets = {"train_dataset": rows, "eval_dataset": rows, "predict_dataset": rows}
    data = hfbridge.HFDataModule(**sets, data_collator=PadRows())
    settings = {"output_dir": "out", "use_cpu": True, "max_steps": 1, "save_strategy": "no"}
    trainer = hfbridge.Trainer(settings, logger=False, enable_model_summary=False)
    trainer.fit(module, data)
    return trainer, module, data


def test_an_evaluation_keeps_logits_for_metrics_and_for_nothing_else(chunks: list[Any]) -> None:
    trainer, module, data = fitted()
    chunks.clear()
    trainer.validate(module, data, verbose=False)
    without = module.eval_metrics["eval_loss"]
    assert len(chunks) >= 1
    trainer, module, data = fitted(compute_metrics=first_logits)
    chunks.clear()
    trainer.validate(module, data, verbose=False)
    assert not chunks
    assert module.eval_metrics["eval_width"] == 50.0
    assert without == pytest.approx(module.eval_metrics["eval_loss"], rel=CLOSE)
    predicted = trainer.predict_dataset(module, data)
    assert predicted.predictions.shape[-1] == 50
    assert not chunks


def test_the_model_is_given_back() -> None:
    _, module, _ = fitted()
    assert "forward" not in vars(module.model.lm_head)
    assert "_loss_function" not in vars(module.model)


class Steps(TrainerCallback):
    """Counts the steps that were begun."""

    begun = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun += 1


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("t5", {}, "its forward does not call its loss_function"),
        ("llama", {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 smooths over all logits"),
        ("distilbert", {}, "its loss is not transformers' own"),
    ],
)
def test_refused_before_a_step(kind: str, settings: Any, reason: str) -> None:
    steps = Steps()
    settings = {"output_dir": "out", "use_cpu": True, "save_strategy": "no", **settings}
    trainer = hfbridge.Trainer(settings, callbacks=[steps], logger=False, enable_model_summary=False)
    data = hfbridge.HFDataModule(train_dataset=make_rows(kind, 8), data_collator=PadRows())
    with pytest.raises(ModelError, match=reason):
        trainer.fit(hfbridge.HFModule(make_model(kind), chunked_loss=True), data)
    assert steps.begun == 0

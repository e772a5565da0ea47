"""Every `AutoModelFor...` of the installed transformers: trained as natively, or refused with the reason.

Grade: exact, one process, fp32, CPU.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from hfbridge import ModelError
from tests.auto_models import TABLE, Tiny
from tests.parity.engines import Job, assert_identical, run_both, run_ours, run_theirs

TRAINED = [name for name, tiny in TABLE.items() if not tiny.refused]
REFUSED = [name for name, tiny in TABLE.items() if tiny.refused]


def job_of(name: str, tiny: Tiny, **more: Any) -> Job:
    """Two optimizer steps of two micro-batches each."""
    return Job(
        settings={
            "max_steps": 2,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
            "warmup_steps": 0,
        },
        model=lambda: tiny.model(name),
        train_rows=tiny.rows(8),
        eval_rows=0,
        collator=lambda: tiny.collator,
        compute_metrics=None,
        **more,
    )


def copying(model: Any) -> Any:
    """Have a model whose loss the native Trainer may not change in place return a copy of it."""

    def copy(module: Any, given: Any, outputs: Any) -> Any:
        outputs["loss"] = outputs["loss"].clone()
        return outputs

    model.register_forward_hook(copy)
    return model


def test_every_class_is_in_the_table() -> None:
    exported = {name for name in dir(transformers) if name.startswith("AutoModelFor")}
    assert exported == set(TABLE)


@pytest.mark.parametrize("name", TRAINED)
def test_trained_as_natively(name: str) -> None:
    job = job_of(name, TABLE[name])
    if TABLE[name].native_fails:
        job = replace(job, model=lambda: copying(job_of(name, TABLE[name]).make_model()))
    _, ours = run_both(job)
    assert [step["step"] for step in ours.steps if "weights" in step] == [1, 2]
    assert ours.steps[0]["weights"] != ours.steps[1]["weights"]


@pytest.mark.parametrize("name", [name for name, tiny in TABLE.items() if tiny.native_fails])
def test_what_the_native_trainer_cannot_train(name: str) -> None:
    """Its own arithmetic is that of a copied loss, which it can train."""
    job = job_of(name, TABLE[name])
    with pytest.raises(RuntimeError, match=TABLE[name].native_fails):
        run_theirs(job)
    assert_identical(run_theirs(replace(job, model=lambda: copying(job.make_model()))), run_ours(job))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    tiny, models = TABLE[name], []

    def kept() -> Any:
        models.append(tiny.model(name))
        return models[-1]

    kind = ImportError if "torchaudio" in tiny.refused else ModelError
    with pytest.raises(kind, match=tiny.refused) as caught:
        run_ours(replace(job_of(name, tiny), model=kept))
    before = dict(tiny.model(name).named_parameters())
    assert all(value.equal(before[key]) for key, value in models[0].named_parameters())
    assert (
        kind is ImportError or "compute_loss_func" in str(caught.value) or "ForSequence" in str(caught.value)
    )


def spread(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """Make a loss of whatever a model has returned."""
    values = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    return values.float().pow(2).mean()


OF_ONES_OWN = ["AutoModelForAudioTokenization", "AutoModelForDecision", "AutoModelForTextEncoding"]


@pytest.mark.parametrize("name", OF_ONES_OWN)
def test_what_is_refused_trains_with_a_loss_of_ones_own(name: str) -> None:
    _, ours = run_both(job_of(name, TABLE[name], compute_loss_func=spread))
    assert ours.steps[0]["weights"] != ours.steps[1]["weights"]

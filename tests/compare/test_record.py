"""Recording changes no number, and is the same on all engines."""

import math
import re
from dataclasses import fields, replace
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, TrainerCallback, set_seed

from hfbridge import from_trainer
from hfbridge.compare import digests, record
from hfbridge.compare.record import Step, merge, merge_metrics
from hfbridge.compare.verdict import judge
from tests.compare.planted import make_trainer, recorded
from tests.dropin.overriding import plain_loss
from tests.tiny import make_tokenizer


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def losses(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{n: v for n, v in row.items() if "runtime" not in n and "second" not in n} for row in rows]


@pytest.mark.parametrize("engine", ["native", "lightning"])
def test_recording_changes_no_number(engine: str) -> None:
    plain = make_trainer()
    set_seed(plain.args.seed)
    if engine == "native":
        plain.train()
        history = plain.state.log_history
    else:
        trainer, module, data = from_trainer(plain, logger=False, enable_model_summary=False)
        trainer.fit(module, data)
        history = trainer.log_history
    before = weights_of(plain.model)
    watched = make_trainer()
    rows: list[dict[str, Any]] = []
    watched.add_callback(_Keep(rows))
    run = recorded(watched, engine=engine)
    after = weights_of(watched.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert losses(history) == losses(rows)
    assert len(run.steps) == 8


class _Keep(TrainerCallback):
    """Keep the history that the run has in the end."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows[:] = state.log_history


def test_what_is_recorded_is_what_the_native_trainer_logs_at_each_step() -> None:
    trainer = make_trainer({"logging_steps": 1})
    run = recorded(trainer)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == len(run.steps) == 8
    for row, step in zip(logged, run.steps, strict=True):
        assert (row["loss"], row["grad_norm"], row["learning_rate"], row["epoch"], row["step"]) == (
            step.loss, step.grad_norm, step.learning_rate, step.epoch, step.step
        )  # fmt: skip
    evaluated = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [(row["step"], row["eval_loss"]) for row in run.metrics] == [
        (row["step"], row["eval_loss"]) for row in evaluated
    ]
    assert [step.rows for step in run.steps] == [12, 12, 12, 10] * 2
    assert all(step.seconds > 0 and step.memory_bytes > 2**20 for step in run.steps)
    assert not any("runtime" in name for row in run.metrics for name in row)


JOBS = [
    ("distilbert", {"gradient_accumulation_steps": 5, "max_steps": 7}),
    ("llama", {"max_grad_norm": 0.0}),
    ("gpt2", {"bf16": True, "lr_scheduler_type": "cosine"}),
    ("bert-token", {"label_smoothing_factor": 0.1}),
    ("bert-qa", {"train_sampling_strategy": "group_by_length", "num_train_epochs": 1.5}),
]


@pytest.mark.parametrize(("kind", "settings"), JOBS)
def test_all_engines_are_equal_to_the_bit(kind: str, settings: dict[str, Any]) -> None:
    theirs, loop, ours = (
        recorded(make_trainer(settings, kind=kind), engine=engine)
        for engine in ("native", "accelerate", "lightning")
    )
    assert judge(theirs, loop).grade == "exact", judge(theirs, loop)
    assert judge(theirs, ours).grade == "exact", judge(theirs, ours)
    assert [step.random for step in theirs.steps] == [step.random for step in loop.steps]
    assert [step.random for step in theirs.steps] == [step.random for step in ours.steps]


def test_jobs_with_a_loss_of_their_own_are_equal_to_the_bit() -> None:
    runs = []
    for engine in ("native", "lightning"):
        trainer: Any = make_trainer()
        trainer.compute_loss = MethodType(plain_loss, trainer)
        runs.append(recorded(trainer, engine=engine))
    assert judge(*runs).grade == "exact", judge(*runs)


def test_collators_that_draw_are_equal_to_the_bit() -> None:
    runs = []
    for engine in ("native", "accelerate", "lightning"):
        trainer = make_trainer(kind="bert-mlm")
        trainer.data_collator = DataCollatorForLanguageModeling(make_tokenizer(), mlm_probability=0.3)
        runs.append(recorded(trainer, engine=engine))
    assert judge(runs[0], runs[1]).grade == "exact", judge(runs[0], runs[1])
    assert judge(runs[0], runs[2]).grade == "exact", judge(runs[0], runs[2])
    digests_of_steps = [step.samples for step in runs[0].steps]
    assert len(set(digests_of_steps)) == len(digests_of_steps)  # masks of the second pass are others


def test_a_run_ends_after_the_last_step_with_the_schedule_of_the_whole() -> None:
    whole = recorded(make_trainer())
    for engine in ("native", "accelerate", "lightning"):
        begun = recorded(make_trainer(), engine=engine, last_step=5)
        assert [step.parameters for step in begun.steps] == [step.parameters for step in whole.steps[:5]]


def test_workers_that_read_the_data_change_nothing_that_is_recorded() -> None:
    alone, helped = recorded(make_trainer()), recorded(make_trainer({"dataloader_num_workers": 1}))
    assert [step.samples for step in alone.steps] == [step.samples for step in helped.steps]


# The steps of several ranks, put together.

STEP = Step(1, 0.5, 1.0, 2.0, 0.1, "a", 4, "r", "p", 3.0, 0.5, 100)


def test_the_steps_of_ranks_are_put_together() -> None:
    other = replace(
        STEP,
        loss=2.0,
        samples="b",
        random="s",
        parameters=None,
        parameter_norm=None,
        seconds=0.7,
        memory_bytes=90,
    )
    (found,) = merge([[STEP], [other, replace(other, step=2)]])
    assert (found.loss, found.rows, found.seconds, found.memory_bytes) == (1.5, 8, 0.7, 100)
    assert (found.parameters, found.parameter_norm, found.grad_norm) == ("p", 3.0, 2.0)
    (turned,) = merge([[other], [STEP]])
    assert found.samples != turned.samples  # whose rows they are counts


def test_of_one_rank_they_stay_as_they_are() -> None:
    assert merge([[STEP]]) == [STEP]


def test_a_loss_that_is_no_number_stays_one() -> None:
    assert math.isnan(merge([[replace(STEP, loss=math.nan)], [STEP]])[0].loss)


def test_rows_of_several_sets_in_one_step_are_one() -> None:
    rows = [{"step": 3, "eval_a_loss": 1.0}, {"step": 3, "eval_b_loss": 2.0}, {"step": 6, "eval_a_loss": 0.5}]
    assert merge_metrics(rows) == [{"step": 3, "eval_a_loss": 1.0, "eval_b_loss": 2.0}, rows[2]]


def test_the_table_names_all_that_is_written() -> None:
    table = record.__doc__ or ""
    for field in fields(Step):
        assert re.search(rf"^\s*{field.name}  ", table, re.MULTILINE), field.name


# Digests.


def test_a_digest_differs_with_name_shape_value_and_order() -> None:
    ids = torch.arange(6).view(2, 3)
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1])}
    same = {"labels": torch.tensor([0, 1]), "input_ids": ids.clone()}
    assert digests.of_micro_batch(batch) == digests.of_micro_batch(same)
    others = [
        {**batch, "labels": torch.tensor([1, 0])},
        {**batch, "input_ids": ids.view(3, 2)},
        {"input_ids": ids, "label": batch["labels"]},
        {**batch, "n": 3},
    ]
    found = {digests.of_micro_batch(other) for other in others}
    assert len(found | {digests.of_micro_batch(batch)}) == 5


def test_floats_that_an_engine_has_cast_have_the_same_digest() -> None:
    values = torch.rand(3, 4)
    cast = {"pixel_values": values.to(torch.bfloat16)}
    assert digests.of_micro_batch({"pixel_values": values}) == digests.of_micro_batch(cast)


def test_one_bit_of_a_parameter_changes_its_digest() -> None:
    weights = torch.rand(3, 4)
    digest, norm = digests.of_parameters([("w", weights)], is_first=True) or ("", 0.0)
    assert norm == pytest.approx(weights.double().norm().item())
    weights[2, 3] = torch.nextafter(weights[2, 3], torch.tensor(2.0))
    assert digests.of_parameters([("w", weights)], is_first=True) != (digest, norm)
    assert digests.of_parameters([("w", weights)], is_first=False) is None

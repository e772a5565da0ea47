"""Faults are planted, one at a time, in a run of the native Trainer; each has to be named."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from hfbridge.compare.causes import Run
from hfbridge.compare.verdict import Verdict, judge
from tests.compare.planted import At, as_if_set_like, make_trainer, recorded, reseed
from tests.tiny import make_rows


@pytest.fixture(scope="module")
def sound() -> Callable[[], Run]:
    """Give the run without a fault, made once."""
    made: list[Run] = []

    def run() -> Run:
        made[:] = made or [recorded(make_trainer())]
        return made[0]

    return run


def scaled(name: str, factor: float) -> Callable[[Any], None]:
    """Have a method of the Trainer, or of its accelerator, give or take so many times as much."""

    def plant(trainer: Any) -> None:
        if name == "backward":
            backward = trainer.accelerator.backward
            trainer.accelerator.backward = lambda loss, **named: backward(factor * loss, **named)
        else:
            method = getattr(trainer, name)

            def times(*given: Any, **named: Any) -> Any:
                found = method(*given, **named)
                return found if isinstance(found, tuple) else factor * found  # an evaluation's is left alone

            setattr(trainer, name, times)

    return plant


def notes_clipped_norm(trainer: Any) -> None:
    clip = trainer.accelerator.clip_grad_norm_
    trainer.accelerator.clip_grad_norm_ = lambda parameters, limit: clip(parameters, limit).clamp(max=limit)


def clears_nothing(trainer: Any) -> None:
    trainer.model.zero_grad = lambda *given, **named: None


def steps_schedule(lr_scheduler: Any, **kwargs: Any) -> None:
    with warnings.catch_warnings():  # of torch, that this is a mistake
        warnings.simplefilter("ignore")
        lr_scheduler.step()


def nothing(trainer: Any) -> None:
    pass


ROWS = make_rows("distilbert", 46)
RATE, AHEAD = "learning_rate", At("on_train_begin", steps_schedule)
IN_TURN, BY_THREE = {"train_sampling_strategy": "sequential"}, {"per_device_train_batch_size": 3}
PLANTED = [
    ({"settings": IN_TURN}, nothing, 1, "samples", "order of samples: other rows"),
    ({"settings": BY_THREE}, nothing, 1, "rows", "order of samples: the step has 12 rows"),
    ({}, scaled("compute_loss", 3.0), 1, "loss", "3 times native's, which is gradient_accumulation_steps=3"),
    ({}, scaled("compute_loss", 1 / 3), 1, "loss", "which is one by gradient_accumulation_steps=3"),
    ({}, scaled("compute_loss", 1.7), 1, "loss", "loss scale: loss and gradient norm are 1.7 times native's"),
    ({}, scaled("training_step", 3.0), 1, "loss", "only what is logged is scaled"),
    ({}, scaled("backward", 3.0), 1, "grad_norm", "the loss is equal and the gradient norm 3 times"),
    ({"dropout": 0.0}, nothing, 1, "loss", "dropout: "),
    ({"callbacks": [At("on_step_begin", reseed, step=2)]}, nothing, 3, "loss", "dropout: "),
    ({"settings": {"warmup_steps": 4}}, nothing, 2, RATE, "schedule: "),
    ({"settings": {RATE: 2e-2}}, nothing, 2, RATE, "schedule: the learning rate is 2"),
    ({"callbacks": [AHEAD]}, nothing, 1, RATE, "ours are one step ahead"),
    ({"settings": {"max_grad_norm": 0.7}}, nothing, None, "parameters", "no step before was clipped"),
    ({"settings": {"max_grad_norm": 0.0}}, nothing, None, "parameters", "clipping: "),
    ({}, notes_clipped_norm, None, "grad_norm", "clipping: one of the two notes the norm after clipping"),
    ({}, clears_nothing, 2, "grad_norm", "gradients: "),
    ({"settings": {"bf16": True}}, nothing, 1, "loss", "precision: rows and random states are the same"),
    ({"seed": 8}, nothing, 0, "parameters", "weights: "),
]  # fmt: skip


@pytest.mark.parametrize(("job", "plant", "step", "quantity", "cause"), PLANTED)
def test_a_planted_fault_is_named(
    sound: Callable[[], Run],
    job: dict[str, Any],
    plant: Callable[[Any], None],
    step: int | None,
    quantity: str,
    cause: str,
) -> None:
    theirs = sound()
    found = judge(theirs, as_if_set_like(recorded(make_trainer(**job), change=plant), theirs))
    assert (found.grade, found.quantity) == ("differs", quantity)
    assert cause in str(found.cause)
    if step is None:  # the first step that is clipped
        assert theirs.steps[0].grad_norm <= 0.5  # type: ignore[operator]
        step = next(one.step for one in theirs.steps if one.grad_norm > 0.5)  # type: ignore[operator]
    assert found.first_step == step


def test_without_a_fault_there_is_no_cause(sound: Callable[[], Run]) -> None:
    found = judge(sound(), as_if_set_like(recorded(make_trainer()), sound()))
    assert (found.grade, found.cause, found.first_step) == ("exact", None, None)
    assert set(found.largest.values()) == {0.0}


def test_samples_that_are_trained_in_another_step_are_found_there() -> None:
    in_turn = {"settings": {"train_sampling_strategy": "sequential"}}
    theirs = recorded(make_trainer(**in_turn, rows=ROWS))
    ours = recorded(make_trainer(**in_turn, rows=ROWS[12:] + ROWS[:12]))
    found = judge(theirs, as_if_set_like(ours, theirs))
    assert "what ours trains in step 1, native trains in step 2" in str(found.cause)


def test_weight_decay_is_the_optimizers() -> None:
    unclipped = {"max_grad_norm": 100.0}
    theirs = recorded(make_trainer(unclipped))
    ours = recorded(make_trainer({**unclipped, "weight_decay": 0.0}))
    found = judge(theirs, as_if_set_like(ours, theirs))
    assert (found.first_step, found.quantity) == (2, "parameters")  # in the first the learning rate is 0
    assert "optimizer: " in str(found.cause)


def test_a_schedule_that_moves_on_once_for_each_rank_is_named() -> None:
    steps = {"lr_scheduler_type": "cosine", "warmup_steps": 0}
    theirs = recorded(make_trainer(steps))
    again = [At("on_step_end", steps_schedule)]
    ours = recorded(make_trainer(steps, callbacks=again))
    two = {**theirs.settings, "ranks": 2}
    found = judge(_with(theirs, two), _with(ours, two))
    assert "schedule: it moves on 2 times in a step, once for each rank" in str(found.cause)


def test_known_settings_are_named_where_they_differ() -> None:
    theirs = recorded(make_trainer())
    in_bf16, clipped = recorded(make_trainer({"bf16": True})), recorded(make_trainer({"max_grad_norm": 0.7}))
    assert "mixed precision is no in one and bf16 in the other" in str(judge(theirs, in_bf16).cause)
    assert "max_grad_norm is 0.5 in one and 0.7 in the other" in str(judge(theirs, clipped).cause)


def test_metrics_that_differ_alone_are_the_evaluations(sound: Callable[[], Run]) -> None:
    trainer = make_trainer()
    trainer.eval_dataset = make_rows("distilbert", 11, seed=6)
    found = judge(sound(), as_if_set_like(recorded(trainer), sound()))
    assert (found.grade, found.first_step, found.quantity) == ("differs", 3, "eval_loss")
    assert "evaluation: " in str(found.cause)


def test_a_run_that_ends_early_is_told_by_its_length(sound: Callable[[], Run]) -> None:
    found = judge(sound(), as_if_set_like(recorded(make_trainer(), last_step=5), sound()))
    assert (found.grade, found.first_step, found.quantity) == ("differs", 6, "steps")
    assert (found.theirs_value, found.ours_value) == (8, 5)


def _with(run: Run, settings: dict[str, Any]) -> Run:
    return Run(run.engine, run.steps, run.metrics, run.first_parameters, settings)


def test_the_verdict_says_where_and_by_how_much(sound: Callable[[], Run]) -> None:
    ours = recorded(make_trainer(), change=scaled("compute_loss", 3.0))
    found: Verdict = judge(sound(), as_if_set_like(ours, sound()))
    assert found.ours_value == pytest.approx(3 * float(found.theirs_value or 0), rel=1e-6)
    assert found.largest["loss"] == pytest.approx(2 / 3, rel=1e-2)
    assert found.why.startswith("loss differs first in step 1: ")

"""Grades of records made by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest

from hfbridge.compare.causes import Run, relative_difference
from hfbridge.compare.record import Step
from hfbridge.compare.verdict import CLOSE, first_difference, judge

FP32 = {"mixed precision": "no", "parameters' dtype": "float32", "device": "cpu", "ranks": 1}


def make_run(engine: str = "native", steps: int = 40, **given: Any) -> Run:
    found = [
        Step(n, n / 10, 2.0 / n, 1.0 / n, 1e-3 / n, f"s{n}", 8, f"r{n}", f"p{n}", 10.0 - n / 100, 0.1, 100)
        for n in range(1, steps + 1)
    ]
    return Run(engine, found, settings={**FP32, **given})


def changed(run: Run, factors: dict[str, Any], *, engine: str = "lightning", first: int = 0) -> Run:
    """Multiply quantities of all steps from `first` on by factors, or by functions of the index."""

    def change(index: int, step: Step) -> Step:
        if index < first:
            return step
        values = {
            name: getattr(step, name) * (factor(index) if callable(factor) else factor)
            for name, factor in factors.items()
        }
        return replace(step, parameters=f"{step.parameters}'", **values)

    steps = [change(index, step) for index, step in enumerate(run.steps)]
    return replace(run, engine=engine, steps=steps)


def wave(size: float) -> Any:
    return lambda index: 1 + size * (-1) ** index


def drift(size: float) -> Any:
    return lambda index: 1 + size * index


def test_equal_runs_are_exact() -> None:
    found = judge(make_run(), replace(make_run(), engine="lightning"))
    assert (found.grade, found.first_step, found.cause, found.tolerance) == ("exact", None, None, None)
    assert "All 40 steps are equal to the bit" in found.why


def test_rounding_is_close_and_is_told_where_it_begins() -> None:
    run = make_run(ranks=2)
    found = judge(run, changed(run, {"loss": wave(3e-7), "parameter_norm": wave(1e-9)}, first=4))
    assert (found.grade, found.first_step, found.quantity) == ("close", 5, "loss")
    assert found.tolerance == CLOSE
    assert "Sums over ranks are taken in another order" in found.why
    assert found.largest["loss"] == pytest.approx(3e-7, rel=0.1)
    assert found.largest["grad_norm"] == 0


@pytest.mark.parametrize(("theirs", "ours"), [("ddp", "deepspeed"), ("fsdp2", "single")])
def test_where_one_shares_the_gradients_their_norm_is_told_of(theirs: str, ours: str) -> None:
    run = make_run(ranks=2, strategy=theirs)
    other = replace(run, settings={**run.settings, "strategy": ours})
    found = judge(run, changed(other, {"grad_norm": wave(3e-6)}))
    assert (found.grade, found.quantity) == ("close", "grad_norm")
    assert "each sums the squares of its part, and these sums are added" in found.why
    alike = judge(other, changed(other, {"grad_norm": wave(3e-6)}))
    assert "squares" not in alike.why


def test_a_norm_that_differs_alone_is_that_of_shards_where_there_are_some() -> None:
    """Also where it is near to max_grad_norm, as one after clipping would be."""

    def run(engine: str, strategy: str, norm: float) -> Run:
        made = make_run(engine, ranks=2, max_grad_norm=0.5, strategy=strategy)
        return replace(made, steps=[replace(step, grad_norm=norm) for step in made.steps])

    theirs = run("native", "ddp", 0.51)
    found = judge(theirs, run("lightning:fsdp2", "fsdp2", 0.5005))
    assert (found.grade, found.quantity) == ("differs", "grad_norm")
    cause = str(found.cause)
    assert cause.startswith(
        "norm of shards: loss and samples are equal, and the gradient norms are 1.9e-02 apart"
    )
    assert "In native each rank has the whole gradient" in cause
    assert "clipping" not in cause
    assert str(judge(theirs, run("lightning", "ddp", 0.5005)).cause).startswith("clipping: one of the two")
    assert str(judge(theirs, run("lightning:fsdp2", "fsdp2", 0.9)).cause).startswith("gradients: ")


def test_rounding_in_one_process_is_close_too() -> None:
    run = make_run()
    found = judge(run, changed(run, {"loss": wave(3e-7)}))
    assert found.grade == "close"
    assert "another order" in found.why


def test_rounding_that_grows_is_the_same_trajectory_on_several_ranks_only() -> None:
    run = make_run(ranks=2)
    grown = changed(run, {"loss": lambda i: 1 + 1e-7 * 1.3**i * (-1) ** i})
    found = judge(run, grown)
    assert (found.grade, found.tolerance) == ("same trajectory", 1e-2)
    alone = make_run()
    assert judge(alone, replace(grown, settings=alone.settings)).grade == "differs"


def test_less_than_float32_has_a_wider_tolerance() -> None:
    run = make_run(**{"mixed precision": "bf16"})
    found = judge(run, changed(run, {"loss": wave(2e-2), "grad_norm": wave(5e-2)}))
    assert (found.grade, found.tolerance) == ("same trajectory", 5e-2)
    assert "rounded to bf16" in found.why
    assert judge(run, changed(run, {"loss": wave(8e-2)})).grade == "differs"


def test_a_gpu_has_it_too() -> None:
    run = make_run(device="cuda")
    assert judge(run, changed(run, {"loss": wave(2e-2)})).grade == "same trajectory"


def test_what_drifts_to_one_side_is_no_rounding() -> None:
    run = make_run(ranks=2)
    within = {"loss": drift(2e-4)}  # 8e-3 in the last step, within its tolerance
    found = judge(run, changed(run, within))
    assert (found.grade, found.quantity) == ("differs", "loss")
    weights = judge(run, changed(run, {"parameter_norm": drift(2e-6)}))
    assert (weights.grade, weights.quantity) == ("differs", "parameters")


def test_behind_rounding_the_first_larger_difference_is_told() -> None:
    run = make_run(ranks=2)
    noisy = changed(run, {"loss": wave(1e-7)})
    found = judge(run, changed(noisy, {"loss": 2.0, "grad_norm": 2.0}, first=16))
    assert (found.grade, found.first_step, found.quantity) == ("differs", 17, "loss")
    assert "the number of ranks, 2" in str(found.cause)


def test_an_update_that_differs_alone_is_no_rounding_of_sums() -> None:
    """Gradients that were summed in another order would show in their norm."""
    run = make_run(ranks=2)
    found = judge(run, changed(run, {"parameter_norm": lambda index: 1 + 3e-5 * (index + 1)}))
    assert (found.grade, found.first_step, found.quantity) == ("differs", 1, "parameters")
    rounded = {"grad_norm": wave(1e-7), "parameter_norm": lambda index: 1 + 3e-5 * (index + 1)}
    assert judge(run, changed(run, rounded)).first_step == 4  # where the norm is beyond its tolerance


def test_after_steps_that_are_equal_the_first_difference_is_told_however_small() -> None:
    run = make_run(ranks=2)
    begun = changed(run, {"parameter_norm": 1 + 1e-8}, first=9)
    found = judge(run, changed(begun, {"loss": 1.5}, first=10))
    assert (found.first_step, found.quantity) == (10, "parameters")


@pytest.mark.parametrize("name", ["samples", "learning_rate"])
def test_samples_and_learning_rates_are_never_rounding(name: str) -> None:
    run = make_run(ranks=2)
    other = "x" if name == "samples" else 1e-3 * (1 + 1e-6)
    steps = [replace(step, **{name: other}) if step.step == 1 else step for step in run.steps]
    found = judge(run, replace(run, engine="lightning", steps=steps))
    assert (found.grade, found.first_step, found.quantity) == ("differs", 1, name)


def test_other_weights_in_the_beginning_come_before_all_else() -> None:
    run = make_run()
    ours = replace(changed(run, {"loss": 2.0}), first_parameters="b")
    found = judge(replace(run, first_parameters="a"), ours)
    assert (found.first_step, found.quantity, found.theirs_value, found.ours_value) == (
        0,
        "parameters",
        "a",
        "b",
    )
    assert "weights: " in str(found.cause)
    half = replace(ours, settings={**FP32, "parameters' dtype": "bfloat16"})
    assert "precision: the parameters are float32" in str(
        judge(replace(run, first_parameters="a"), half).cause
    )


def test_a_failed_run_has_a_verdict() -> None:
    failed = Run("accelerate", failure="Traceback\nValueError: no")
    found = judge(make_run(), failed)
    assert (found.grade, found.why) == ("failed", "accelerate has failed: ValueError: no")
    assert judge(failed, make_run()).grade == "failed"
    both = judge(Run("native", failure="KeyError: 3"), failed)
    assert both.why == "native has failed: KeyError: 3; accelerate has failed: ValueError: no"


def test_a_loss_that_is_no_number_differs_from_one_that_is() -> None:
    run = make_run()
    nan = changed(run, {"loss": math.nan}, first=3)
    found = judge(run, nan)
    assert (found.grade, found.first_step) == ("differs", 4)
    assert found.largest["loss"] == math.inf
    assert judge(nan, replace(nan, engine="lightning")).grade == "exact"


def test_metrics_are_compared() -> None:
    theirs = replace(
        make_run(), metrics=[{"step": 10, "epoch": 1.0, "eval_loss": 0.5, "eval_accuracy": 0.75}]
    )
    same = replace(theirs, engine="lightning")
    assert judge(theirs, same).largest["metrics"] == 0
    rounded = replace(same, metrics=[{**theirs.metrics[0], "eval_loss": 0.5 + 1e-7}])
    assert judge(theirs, rounded).grade == "close"
    other = replace(same, metrics=[{**theirs.metrics[0], "eval_accuracy": 0.5}])
    found = judge(theirs, other)
    assert (found.grade, found.first_step, found.quantity) == ("differs", 10, "eval_accuracy")
    assert (found.theirs_value, found.ours_value) == (0.75, 0.5)
    missing = judge(theirs, replace(same, metrics=[]))
    assert (missing.grade, missing.ours_value) == ("differs", None)


def test_a_shorter_run_differs() -> None:
    found = judge(make_run(), replace(make_run(steps=30), engine="lightning"))
    assert (found.grade, found.first_step, found.quantity) == ("differs", 31, "steps")
    assert "ends after 40 steps, lightning after 30" in str(found.cause)


def test_what_cannot_be_told_apart_is_not_named() -> None:
    assert first_difference(make_run().steps, make_run().steps) is None


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        (1.0, 2.0, 0.5),
        (0.0, 0.0, 0.0),
        (None, None, 0.0),
        (None, 1.0, math.inf),
        (math.nan, math.nan, 0.0),
        (math.nan, 1.0, math.inf),
        (math.inf, 1.0, math.inf),
        (-1.0, 1.0, 2.0),
    ],
)
def test_differences_are_relative(theirs: float | None, ours: float | None, expected: float) -> None:
    assert relative_difference(theirs, ours) == expected


def test_a_row_has_what_the_report_reads() -> None:
    assert list(judge(make_run(), make_run("lightning")).as_row()) == [
        "theirs",
        "ours",
        "grade",
        "first_step",
        "quantity",
        "theirs_value",
        "ours_value",
        "largest",
        "tolerance",
        "why",
        "cause",
    ]

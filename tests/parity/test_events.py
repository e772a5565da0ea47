"""Exact parity of the TrainerCallback events: order, flags, arguments, and what callbacks can do to a run."""

from collections import Counter
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.parity.engines import Job, Record, run_both

WINDOWS = {"gradient_accumulation_steps": 3, "num_train_epochs": 2}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 2}


def run_with(
    *callbacks: Any, kind: str = "distilbert", rows: int = 46, **settings: Any
) -> tuple[Record, Record]:
    """Run a job with further callbacks on both engines; each engine has its own copies."""

    def make() -> list[Any]:
        return [make_one() for make_one in callbacks]

    return run_both(Job(kind, {**WINDOWS, **settings}, callbacks=make, rows=rows))


def test_every_event() -> None:
    """All events and their numbers, spelled out for one job."""
    _, ours = run_both(Job("distilbert", {**WINDOWS, **EVALUATION, "eval_on_start": True}))
    # 46 rows: 12 micro-batches, 4 windows an epoch. 11 rows to evaluate: 3 batches, at the start and 4 times.
    assert Counter(ours.event_names) == {
        "on_init_end": 1,
        "on_train_begin": 1,
        "on_epoch_begin": 2,
        "on_step_begin": 8,
        "on_substep_end": 16,
        "on_pre_optimizer_step": 8,
        "on_optimizer_step": 8,
        "on_step_end": 8,
        "on_prediction_step": 15,
        "on_evaluate": 5,
        "on_log": 8 + 5 + 1,
        "on_epoch_end": 2,
        "on_train_end": 1,
    }
    step = ["on_step_begin", "on_substep_end", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"]
    evaluation = ["on_prediction_step"] * 3 + ["on_log", "on_evaluate"]
    one, two = [*step, "on_step_end", "on_log"], [*step, "on_step_end", "on_log", *evaluation]
    epoch = ["on_epoch_begin", *one, *two, *one, *two, "on_epoch_end"]
    assert ours.event_names == [
        "on_init_end",
        "on_train_begin",
        *evaluation,
        *epoch,
        *epoch,
        "on_log",
        "on_train_end",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"logging_strategy": "no"},
        {"logging_strategy": "no", "logging_first_step": True},
        {"logging_strategy": "epoch"},
        {"logging_strategy": "epoch", "eval_strategy": "epoch", "logging_first_step": True},
        {"logging_steps": 3, "logging_first_step": True},
        {"logging_steps": 500, "logging_first_step": True, "eval_strategy": "epoch"},
        {"logging_steps": 0.3},
        {"logging_steps": 0.3, "eval_strategy": "steps"},
        {"logging_steps": 0.25, "eval_strategy": "steps", "eval_steps": 0.4},
        {"eval_strategy": "steps", "eval_steps": 3, "eval_delay": 5},
        {"eval_strategy": "epoch", "eval_delay": 1.5},
        {"eval_strategy": "epoch", "eval_delay": 2, "eval_on_start": True},
        {"eval_on_start": True, "logging_strategy": "no"},
        {"max_steps": 7, "eval_strategy": "steps", "eval_steps": 4, "logging_steps": 2},
        {"max_steps": 1, "logging_strategy": "epoch", "eval_strategy": "epoch"},
        {"max_steps": 20, "eval_strategy": "epoch", "logging_steps": 7},
        {"num_train_epochs": 1.4, "eval_strategy": "epoch", "logging_strategy": "epoch"},
        {"num_train_epochs": 0.3, "eval_strategy": "steps", "eval_steps": 0.5},
        {"num_train_epochs": 5, "gradient_accumulation_steps": 5, "eval_strategy": "epoch"},
        {"num_train_epochs": 3, "dataloader_drop_last": True, "logging_steps": 5},
        {"gradient_accumulation_steps": 40, "num_train_epochs": 2, "eval_strategy": "epoch"},
    ],
    ids=str,
)
def test_moments(settings: dict[str, Any]) -> None:
    """When to log and evaluate; the last window of an epoch is short."""
    theirs, _ = run_both(Job("distilbert", {**WINDOWS, **settings}, rows=42))
    assert theirs.event_names[-2:] == ["on_log", "on_train_end"]


@pytest.mark.parametrize("kind", ["llama", "bert-qa", "bert-mlm"])
def test_events_of_other_kinds(kind: str) -> None:
    run_both(Job("bert-token" if kind == "bert-mlm" else kind, {**WINDOWS, **EVALUATION, "max_steps": 5}))


class StopAtStep(TrainerCallback):
    """Stop the run, or the epoch, when a step has been taken."""

    def __init__(self, step: int, flag: str = "should_training_stop", event: str = "on_step_end") -> None:
        self.step = step
        setattr(self, event, self._ask)
        self.flag = flag

    def _ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            setattr(control, self.flag, True)


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_stop_the_run_at_a_step(step: int) -> None:
    _, ours = run_with(lambda: StopAtStep(step), **EVALUATION)
    assert ours.state["global_step"] == step


@pytest.mark.parametrize("step", [1, 4, 6])
def test_stop_the_epoch_at_a_step(step: int) -> None:
    """The next epoch begins at once; 4 is the last step of its epoch anyway."""
    _, ours = run_with(lambda: StopAtStep(step, "should_epoch_stop"), **EVALUATION)
    assert ours.state["global_step"] == {1: 5, 4: 8, 6: 6}[step]


def test_stop_the_epoch_with_evaluation_by_epoch() -> None:
    run_with(
        lambda: StopAtStep(2, "should_epoch_stop"), eval_strategy="epoch", logging_steps=3, num_train_epochs=3
    )


@pytest.mark.parametrize("flag", ["should_training_stop", "should_epoch_stop"])
@pytest.mark.parametrize(
    "event",
    [
        "on_train_begin",
        "on_epoch_begin",
        "on_step_begin",
        "on_pre_optimizer_step",
        "on_optimizer_step",
        "on_evaluate",
        "on_log",
        "on_prediction_step",
        "on_epoch_end",
    ],
)
def test_stop_from_another_event(event: str, flag: str) -> None:
    step = {"on_train_begin": 0, "on_epoch_begin": 4, "on_epoch_end": 4}.get(event, 2)
    run_with(lambda: StopAtStep(step, flag, event), **EVALUATION)


class StopWithinWindow(TrainerCallback):
    """Stop after some substeps of the run."""

    def __init__(self, substep: int, flag: str) -> None:
        self.left, self.flag = substep, flag

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            setattr(control, self.flag, True)


@pytest.mark.parametrize("substep", [1, 2, 3, 6, 8, 9])
@pytest.mark.parametrize("flag", ["should_training_stop", "should_epoch_stop"])
def test_stop_within_a_window(flag: str, substep: int) -> None:
    """A window that is left is not stepped; its gradients stay and join the next epoch's first window."""
    run_with(lambda: StopWithinWindow(substep, flag), **EVALUATION)


def test_stop_within_a_window_with_rows_by_epoch() -> None:
    run_with(
        lambda: StopWithinWindow(3, "should_epoch_stop"),
        eval_strategy="epoch",
        logging_strategy="epoch",
        num_train_epochs=3,
    )


class LogAtSecondEpochEnd(TrainerCallback):
    """Ask for a row at the end of the second epoch only."""

    def __init__(self) -> None:
        self.epochs = 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epochs += 1
        if self.epochs == 2:
            control.should_log = True


@pytest.mark.parametrize("substep", [9, 11])
def test_row_after_an_epoch_left_within_a_window(substep: int) -> None:
    """An epoch left in its first window has no gradient norm; its rate is the schedule's next one."""
    theirs, _ = run_with(
        lambda: StopWithinWindow(substep, "should_epoch_stop"), LogAtSecondEpochEnd, logging_steps=100
    )
    row = next(row for row in theirs.log_history if "loss" in row)
    assert ("grad_norm" in row) is (substep == 11)


class Ask(TrainerCallback):
    """Ask for something whenever one event comes at one of some steps."""

    def __init__(self, event: str, flags: tuple[str, ...], steps: tuple[int, ...]) -> None:
        self.flags, self.steps = flags, steps
        setattr(self, event, self._ask)

    def _ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            for flag in self.flags:
                setattr(control, flag, True)


@pytest.mark.parametrize("flags", [("should_evaluate",), ("should_log",), ("should_log", "should_evaluate")])
@pytest.mark.parametrize(
    "event",
    [
        "on_train_begin",
        "on_epoch_begin",
        "on_step_begin",
        "on_substep_end",
        "on_pre_optimizer_step",
        "on_optimizer_step",
        "on_step_end",
        "on_log",
        "on_epoch_end",
    ],
)
def test_ask_at_odd_moments(event: str, flags: tuple[str, ...]) -> None:
    steps = (0, 3, 4, 7, 8)
    run_with(lambda: Ask(event, flags, steps), logging_steps=3, rows=38, num_train_epochs=2)


class HalveLearningRate(TrainerCallback):
    """Change the optimizer's learning rate; the schedule's own next value overwrites it, or not."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._halve)

    def _halve(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.5


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_epoch_begin"])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_change_the_learning_rate(event: str, schedule: str) -> None:
    run_with(lambda: HalveLearningRate(event), lr_scheduler_type=schedule)


class ScaleGradients(TrainerCallback):
    """Change gradients after clipping, before the step."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        for parameter in model.parameters():
            parameter.grad *= 0.25


class FreezeAfter(TrainerCallback):
    """Freeze the embeddings after the first epoch, and change the schedule."""

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        for parameter in model.get_input_embeddings().parameters():
            parameter.requires_grad = False
        lr_scheduler.base_lrs = [0.5 * rate for rate in lr_scheduler.base_lrs]


def test_change_gradients() -> None:
    run_with(ScaleGradients)


def test_change_model_and_schedule() -> None:
    run_with(FreezeAfter)


class EarlyStop(TrainerCallback):
    """Stop when the evaluation loss has not improved twice."""

    def __init__(self) -> None:
        self.best, self.waited = float("inf"), 0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        if metrics["eval_loss"] < self.best:
            self.best, self.waited = metrics["eval_loss"], 0
        else:
            self.waited += 1
        if self.waited >= 2:
            control.should_training_stop = True


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_early_stopping(strategy: str) -> None:
    settings = {"eval_strategy": strategy, "num_train_epochs": 6, "learning_rate": 0.1}
    _, ours = run_with(EarlyStop, rows=22, **settings, **({"eval_steps": 1} if strategy == "steps" else {}))
    assert ours.state["global_step"] < 12


class AddToLogs(TrainerCallback):
    """Add a value to each row while it is logged, and to the metrics of an evaluation."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        logs["added"] = float(len(logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        metrics["eval_added"] = 1.0


def test_change_rows() -> None:
    run_with(AddToLogs, AddToLogs, **EVALUATION)


class NewControl(TrainerCallback):
    """Return a control of one's own, as the interface allows."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        import copy

        control = copy.copy(control)
        control.should_log = state.global_step % 2 == 0
        return control


def test_return_another_control() -> None:
    run_with(NewControl, **EVALUATION)


def test_a_class_is_made_into_a_callback() -> None:
    """A callback given as a class is made once by each engine."""
    run_both(Job("distilbert", {**WINDOWS, **EVALUATION}, callbacks=lambda: [EarlyStop, AddToLogs]))

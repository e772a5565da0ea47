"""TrainerCallbacks of transformers and of its users run unmodified: native events, rows and numbers.

Grade: exact. What is compared stands in tests/parity/engines.py; what callbacks may ask for: test_events.py.
"""

import logging
from ast import literal_eval
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback

import hfbridge
from tests.parity.engines import BASE, Job, Record, run_both, run_ours, run_theirs
from tests.tiny import PadRows, make_dataset, make_model

SETTINGS = {
    "gradient_accumulation_steps": 3,
    "num_train_epochs": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
}


def run_with(*makers: Callable[[], Any], rows: int = 30, **settings: Any) -> tuple[Record, Record]:
    """Run with further callbacks, made anew for each engine."""
    job = Job(
        "distilbert", {**SETTINGS, **settings}, rows=rows, callbacks=lambda: [make() for make in makers]
    )
    return run_both(job)


# Early stopping.


@pytest.mark.parametrize("greater", [True, False, None])
@pytest.mark.parametrize("threshold", [0.0, 0.004])
@pytest.mark.parametrize("patience", [1, 2])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_early_stopping(strategy: str, patience: int, threshold: float, greater: bool | None) -> None:
    run_with(
        lambda: EarlyStoppingCallback(patience, threshold),
        eval_strategy=strategy,
        num_train_epochs=6,
        learning_rate=0.02,
        metric_for_best_model="loss" if greater is None else "mean",
        greater_is_better=greater,
    )


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_early_stopping_stops(strategy: str) -> None:
    theirs, _ = run_with(
        lambda: EarlyStoppingCallback(2, early_stopping_threshold=10.0),
        eval_strategy=strategy,
        num_train_epochs=6,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        rows=22,
    )
    evaluations = [row for row in theirs.log_history if "eval_loss" in row]
    assert len(evaluations) == 3  # the first is the best, and two bring no improvement of 10
    assert theirs.state["global_step"] == evaluations[-1]["step"] < theirs.state["max_steps"]


def test_early_stopping_says_what_it_lacks() -> None:
    job = Job("distilbert", SETTINGS, rows=8, callbacks=lambda: [EarlyStoppingCallback()])
    for run in (run_theirs, run_ours):
        with pytest.raises(AssertionError, match="EarlyStoppingCallback requires"):
            run(job)


# The learning rate.


class LogLearningRate(TrainerCallback):
    """Keep the rate of every step, and add the last one to each row of training."""

    def __init__(self) -> None:
        self.rates: list[tuple[int, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any, **kwargs: Any) -> None:
        self.rates.append((state.global_step, lr_scheduler.get_last_lr()[0]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if "learning_rate" in logs:
            logs["rate of the next step"] = self.rates[-1][1]
            logs["learning_rate"] = f"{logs['learning_rate']:.2e}"


def test_log_the_learning_rate() -> None:
    made: list[LogLearningRate] = []

    def make() -> LogLearningRate:
        made.append(LogLearningRate())
        return made[-1]

    theirs, _ = run_with(make, lr_scheduler_type="cosine")
    assert made[0].rates == made[1].rates
    assert len(made[0].rates) == 6
    shown = [event[-1] for event in theirs.events if event[0] == "on_log"]
    assert "rate of the next step" not in shown[0]  # the recorder comes first, and rows are copied before
    assert not any("rate of the next step" in row for row in theirs.log_history)


class SeeRows(TrainerCallback):
    """Keep what the rows are when they come to this callback."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        self.rows.append(
            {name: v for name, v in logs.items() if "runtime" not in name and "per_s" not in name}
        )


def test_a_row_goes_from_callback_to_callback() -> None:
    made: list[SeeRows] = []

    def make() -> SeeRows:
        made.append(SeeRows())
        return made[-1]

    run_with(LogLearningRate, make)
    theirs, ours = made
    assert theirs.rows == ours.rows
    assert sum("rate of the next step" in row for row in ours.rows) == 6


class DropRates(TrainerCallback):
    """Change the learning rate of every parameter group at one event."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._drop)

    def _drop(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] *= 0.5 + number / 4


@pytest.mark.parametrize(
    "event",
    ["on_train_begin", "on_substep_end", "on_optimizer_step", "on_log", "on_evaluate", "on_epoch_end"],
)
@pytest.mark.parametrize("schedule", ["linear", "constant", "reduce_lr_on_plateau"])
def test_change_the_learning_rates(event: str, schedule: str) -> None:
    run_with(lambda: DropRates(event), lr_scheduler_type=schedule, metric_for_best_model="loss")


# State and control.


class Counted(TrainerCallback, ExportableState):
    """Count events, and export the count."""

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.count = start

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"start": self.start}, "attributes": {"count": self.count}}


def test_exported_states() -> None:
    theirs, _ = run_with(lambda: EarlyStoppingCallback(9), Counted, metric_for_best_model="loss")
    kept = theirs.state["stateful_callbacks"]
    assert sorted(kept) == ["Counted", "EarlyStoppingCallback", "TrainerControl"]
    assert kept["Counted"]["attributes"] == {"count": 1}  # states are exported when training begins


def test_two_callbacks_of_one_class() -> None:
    theirs, _ = run_with(Counted, lambda: Counted(7))
    assert [one["args"]["start"] for one in theirs.state["stateful_callbacks"]["Counted"]] == [0, 7]


def test_callbacks_given_as_classes() -> None:
    job = Job("distilbert", SETTINGS, rows=16, callbacks=lambda: [Counted, LogLearningRate, ProgressCallback])
    theirs, ours = run_both(job)
    assert "Counted" in ours.state["stateful_callbacks"]
    native = [type(callback).__name__ for callback in theirs.engine.callback_handler.callbacks]
    assert [type(cb).__name__ for cb in ours.module.host.handler.callbacks] == native


class Replace(TrainerCallback):
    """Return a new control at one event, with one flag set."""

    def __init__(self, event: str, flag: str) -> None:
        self.flag = flag
        setattr(self, event, self._replace)

    def _replace(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return type(control)(**{**vars(control), self.flag: state.global_step == 3})


@pytest.mark.parametrize(
    "flag", ["should_log", "should_evaluate", "should_training_stop", "should_epoch_stop"]
)
@pytest.mark.parametrize("event", ["on_init_end", "on_train_begin", "on_step_begin", "on_step_end", "on_log"])
def test_return_a_new_control(event: str, flag: str) -> None:
    run_with(lambda: Replace(event, flag), logging_steps=2)


class SeeArguments(TrainerCallback):
    """Keep which arguments each event is given, and of which kinds."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}
        for event in EVENTS:
            setattr(self, event, self._keep(event))

    def _keep(self, event: str) -> Callable[..., None]:
        def keep(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"]
            self.seen[event] = (
                {name: value is None for name, value in kwargs.items()},
                type(kwargs["model"]),
                type(getattr(optimizer, "optimizer", optimizer)),
                type(state),
                args.to_dict(),
                state.max_steps,
            )

        return keep


EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_epoch_begin",
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_log",
    "on_prediction_step",
    "on_evaluate",
    "on_epoch_end",
    "on_train_end",
)


def test_every_event_has_the_native_arguments() -> None:
    made: list[SeeArguments] = []

    def make() -> SeeArguments:
        made.append(SeeArguments())
        return made[-1]

    run_with(make)
    theirs, ours = made
    assert set(theirs.seen) == set(EVENTS)
    for event in EVENTS:
        assert ours.seen[event] == theirs.seen[event], event


# Failures.


class Boom(TrainerCallback):
    """Raise at one event of the third step, or at the event's only time."""

    def __init__(self, event: str, error: BaseException) -> None:
        self.event, self.error = event, error
        setattr(self, event, self._raise)

    def _raise(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        once = ("on_init_end", "on_train_begin", "on_epoch_begin", "on_train_end")
        if self.event in once or state.global_step >= 2:
            raise self.error


@pytest.mark.parametrize("event", EVENTS)
def test_an_exception_reaches_the_user(event: str) -> None:
    error = ZeroDivisionError("mine")
    model = make_model("distilbert")
    job = Job(
        "distilbert",
        {**SETTINGS, "bf16": True, "neftune_noise_alpha": 5.0},
        rows=30,
        callbacks=lambda: [Boom(event, error)],
    )
    with pytest.raises(ZeroDivisionError) as theirs:
        run_theirs(job)
    with pytest.raises(ZeroDivisionError) as ours:
        run_ours(Job(**{**vars(job), "model": lambda: model}))
    assert theirs.value is ours.value is error
    assert "forward" not in vars(model)
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("event", EVENTS)
def test_an_exhausted_iterator_does_not_end_the_run_silently(event: str) -> None:
    """Lightning's loops would take a StopIteration for the end of the data."""
    job = Job("distilbert", SETTINGS, rows=30, callbacks=lambda: [Boom(event, StopIteration())])
    with pytest.raises(StopIteration):
        run_theirs(job)
    with pytest.raises(RuntimeError, match=f"raised StopIteration in {event}"):
        run_ours(job)


# Transformers' own printers, and Lightning's callbacks.


def lines(text: str) -> list[str]:
    """Read printed rows, without times."""
    rows = [literal_eval(line) for line in text.splitlines() if line.startswith("{")]
    return [
        str({name: v for name, v in row.items() if "runtime" not in name and "per_second" not in name})
        for row in rows
    ]


@pytest.mark.parametrize("given", [[], [PrinterCallback], [PrinterCallback, PrinterCallback]], ids=len)
def test_printed_rows(given: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """`disable_tqdm` prints every row, each further printer once more, without the operations' total."""
    job = Job("distilbert", SETTINGS, rows=30, callbacks=lambda: given)
    run_theirs(job)
    theirs = capsys.readouterr().out
    _, ours = run_ours(job), capsys.readouterr().out
    assert lines(ours) == lines(theirs)
    assert len(lines(ours)) == (1 + len(given)) * (6 + 3 + 1)
    final = ours.splitlines()[-1]
    assert final.startswith("{'train_runtime': ")
    assert "total_flos" not in final


def test_a_native_bar_takes_the_place_of_ours(capfd: pytest.CaptureFixture[str]) -> None:
    job = Job("distilbert", {**SETTINGS, "disable_tqdm": False}, rows=30)
    theirs = run_theirs(job)
    native = capfd.readouterr()
    ours = run_ours(Job(**{**vars(job), "callbacks": lambda: [ProgressCallback]}))
    bridged = capfd.readouterr()
    assert ours.engine.progress_bar_callback is None
    assert lines(bridged.out + bridged.err) == lines(native.out + native.err)
    assert theirs.log_history == ours.log_history


def test_quiet_transformers_print_rows_instead_of_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    job = Job("distilbert", {**SETTINGS, "disable_tqdm": None}, rows=30)
    run_theirs(job)
    theirs = capsys.readouterr().out
    ours = run_ours(job)
    assert lines(capsys.readouterr().out) == lines(theirs)
    assert ours.engine.progress_bar_callback is None


def test_callbacks_of_both_worlds_keep_their_hooks_and_order() -> None:
    heard: list[str] = []

    class Native(TrainerCallback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            heard.append(f"{self.name} {state.global_step}")

    class Lightning(pl.Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_batch_end(self, trainer: Any, *hook: Any) -> None:
            heard.append(f"{self.name} {trainer.global_step}")

    trainer = hfbridge.Trainer(
        {**BASE, "max_steps": 2},
        callbacks=[Native("a"), Lightning("L1"), Native("b"), Lightning("L2"), Native("c")],
        logger=False,
        enable_model_summary=False,
    )
    data = hfbridge.HFDataModule(train_dataset=make_dataset("distilbert", 8), data_collator=PadRows())
    trainer.fit(hfbridge.HFModule(make_model("distilbert")), data)
    assert heard == [f"{name} {step}" for step in (1, 2) for name in ("L1", "L2", "a", "b", "c")]


# After training.


def test_evaluating_after_training_goes_to_the_same_callbacks() -> None:
    made: list[SeeRows] = []

    class Kept(SeeRows):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    job = Job("distilbert", SETTINGS, rows=16, callbacks=lambda: [Kept])
    run_theirs(job).engine.evaluate()
    ours = run_ours(job)
    _, evaluation = job.datasets()
    data = hfbridge.HFDataModule(eval_dataset=evaluation, data_collator=job.make_collator())
    ours.engine.validate(ours.module, data, verbose=False)
    assert len(made) == 2
    assert made[0].rows == made[1].rows
    assert "eval_loss" in made[0].rows[-1]
    assert made[0].rows[-1]["epoch"] == 2.0


def test_another_trainer_begins_with_its_own_callbacks() -> None:
    job = Job("distilbert", SETTINGS, rows=16, callbacks=lambda: [Counted])
    ours = run_ours(job)
    first = ours.module.host
    _, evaluation = job.datasets()
    data = hfbridge.HFDataModule(eval_dataset=evaluation, data_collator=job.make_collator())
    other = hfbridge.Trainer(job.arguments(), callbacks=[Counted], logger=False)
    other.validate(ours.module, data, verbose=False)
    assert ours.module.host is not first
    assert [sorted(row) for row in other.log_history] == [
        sorted({"step", *(name for name in other.log_history[0] if name.startswith("eval_"))} | {"epoch"})
    ]


# Verbosity.


@pytest.mark.parametrize("level", ["passive", "debug", "info", "warning", "error", "critical", "detail"])
@pytest.mark.parametrize("replica", [False, True])
def test_the_log_level_is_the_native_one(level: str, replica: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments
    from transformers.utils import logging as native

    if level == "detail" and level not in native.log_levels:
        level = "critical"
    monkeypatch.setattr(TrainingArguments, "should_log", property(lambda args: not replica))
    settings = {"log_level": level, "log_level_replica": "error" if level != "error" else "info"}
    found = []
    for run in (run_theirs, run_ours):
        native.set_verbosity(logging.WARNING)
        run(Job("distilbert", {**settings, "log_on_each_node": False}, rows=8, eval_rows=0))
        found.append(native.get_verbosity())
    assert found[0] == found[1]


# NaN.


class Poison(torch.nn.Module):
    """A model whose loss is NaN or infinite at some forwards of training."""

    def __init__(self, bad: dict[int, float]) -> None:
        super().__init__()
        self.inner, self.bad, self.calls = make_model("distilbert", dropout=0.0), bad, 0
        self.config = self.inner.config

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        outputs = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        if self.training:
            self.calls += 1
            outputs.loss = outputs.loss + (0.0 * outputs.loss + self.bad.get(self.calls, 0.0)).detach()
        return outputs


@pytest.mark.parametrize("nan_filter", [True, False])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_no_numbers(value: float, every: int, nan_filter: bool) -> None:
    settings = {
        **SETTINGS,
        "eval_strategy": "no",
        "logging_steps": every,
        "logging_nan_inf_filter": nan_filter,
        "max_grad_norm": 0.0,
    }
    bad = {2: value, 7: value, 8: value, 9: value}
    theirs, _ = run_both(Job("distilbert", settings, rows=30, model=lambda: Poison(bad)))
    losses = [row["loss"] for row in theirs.log_history if "loss" in row]
    assert all(torch.isfinite(torch.tensor(losses))) is nan_filter

"""train() of hfbridge.dropin.Trainer beside transformers', live: numbers, state, events, files and errors."""

import inspect
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, TrainerCallback

from tests.dropin.sides import LOGGED, OURS, THEIRS, Side, compare, events_of, look, make
from tests.parity.engines import Recorder, same, without_times
from tests.tiny import make_dataset, make_model, make_tokenizer

EVALUATES = {"eval_strategy": "steps", "eval_steps": 3}
SAVES = {**EVALUATES, "save_strategy": "steps", "save_steps": 3}


def test_a_run_leaves_the_trainer_as_natively() -> None:
    def user_code(side: Side) -> Any:
        recorder = Recorder()
        trainer = make(side.trainer, arguments=EVALUATES, callbacks=[recorder])
        output = trainer.train()
        return look(trainer, output), events_of(recorder), recorder.steps

    facts, events, steps = compare(user_code)
    assert facts["state"]["global_step"] == len(steps) - 1 == 8
    assert [event[0] for event in events].count("on_evaluate") == 3


def test_checkpoints_and_the_best_model_are_the_native_ones() -> None:
    def user_code(side: Side) -> Any:
        best = {"load_best_model_at_end": True, "metric_for_best_model": "mean", "save_total_limit": 2}
        trainer = make(side.trainer, arguments={**SAVES, **best}, processing_class=make_tokenizer())
        output = trainer.train()
        trainer.save_model("final")
        trainer.save_state()
        trainer.save_metrics("train", output.metrics)
        return look(trainer, output)

    facts = compare(user_code)
    assert facts["state"]["best_model_checkpoint"] is not None


@pytest.mark.parametrize(
    "arguments",
    [
        {"label_smoothing_factor": 0.1, "max_steps": 3},
        {"bf16": True, "eval_strategy": "epoch"},
        {"eval_on_start": True, "eval_strategy": "epoch", "logging_first_step": True},
        {"include_num_input_tokens_seen": "all", "logging_strategy": "epoch", "neftune_noise_alpha": 5.0},
        pytest.param(
            {"skip_memory_metrics": False, "eval_strategy": "epoch", "max_steps": 1, "logging_steps": 5},
            marks=pytest.mark.long,  # the tracker's thread takes a core
        ),
        {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss", **EVALUATES},
        {"save_strategy": "best", "metric_for_best_model": "mean", "greater_is_better": False, **EVALUATES},
        {"max_grad_norm": 0.0, "optim": "sgd", "data_seed": 6, "train_sampling_strategy": "group_by_length"},
        {"enable_jit_checkpoint": True, "save_strategy": "epoch"},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_settings_do_what_they_do_natively(arguments: dict[str, Any]) -> None:
    def user_code(side: Side) -> Any:
        trainer = make(side.trainer, arguments=arguments)
        return look(trainer, trainer.train()), without_times(trainer.evaluate())

    compare(user_code)


def test_evaluations_and_predictions_around_a_run() -> None:
    def user_code(side: Side) -> Any:
        trainer = make(side.trainer, arguments={"bf16": True, **EVALUATES})
        before = trainer.evaluate(metric_key_prefix="before")
        trainer.train()
        after = trainer.evaluate({"a": trainer.eval_dataset, "b": make_dataset("distilbert", 5, seed=6)})
        predicted = trainer.predict(make_dataset("distilbert", 7, seed=7))
        numbers = [predicted.predictions.tolist(), predicted.label_ids.tolist()]
        rows = [without_times(row) for row in (before, after, predicted.metrics)]
        return look(trainer), rows, numbers

    compare(user_code)


def test_a_second_run_goes_on_with_weights_and_optimizer() -> None:
    def user_code(side: Side) -> Any:
        trainer = make(side.trainer, arguments={"num_train_epochs": 1})
        first = look(trainer, trainer.train())
        trainer.evaluate()
        torch.rand(3)
        trainer.args.num_train_epochs = 2
        return first, look(trainer, trainer.train())

    compare(user_code)


@pytest.mark.parametrize("names_it", [True, False])
def test_a_run_is_resumed_in_the_middle_of_an_epoch(names_it: bool) -> None:
    def user_code(side: Side) -> Any:
        arguments = {**SAVES, "logging_steps": 4}
        make(side.trainer, arguments={**arguments, "max_steps": 3}).train()
        recorder = Recorder()
        trainer = make(side.trainer, arguments={**arguments, "max_steps": 7}, callbacks=[recorder])
        output = trainer.train(resume_from_checkpoint="out/checkpoint-3" if names_it else True)
        return look(trainer, output), events_of(recorder), recorder.steps

    facts, _, steps = compare(user_code)
    assert facts["state"]["global_step"] == 7
    assert steps[0]["step"] == 4


@pytest.mark.filterwarnings("ignore:The checkpoint is of step")
@pytest.mark.parametrize(
    ("first", "again", "step"),
    [
        ({}, {}, 8),
        ({}, {"max_steps": 5}, 8),
        ({}, {"num_train_epochs": 1}, 8),
        ({}, {"num_train_epochs": 1}, 6),
        ({"max_steps": 6}, {"max_steps": 6}, 6),  # the HF Trainer takes another step
    ],
)
def test_a_run_that_was_complete_is_resumed(first: Any, again: Any, step: int) -> None:
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # not of the last step

    def user_code(side: Side) -> Any:
        make(side.trainer, arguments={**LOGGED, **best, **first}).train()
        recorder = Recorder()
        trainer = make(side.trainer, arguments={**LOGGED, **best, **again}, callbacks=[recorder])
        output = trainer.train(resume_from_checkpoint=f"out/checkpoint-{step}")
        return look(trainer, output), events_of(recorder), sorted(output.metrics)

    _, events, _ = compare(user_code)
    assert [event[0] for event in events][-2:] == ["on_log", "on_train_end"]


def test_a_native_run_goes_on_here() -> None:
    arguments = {"save_strategy": "steps", "save_steps": 3}
    make(THEIRS.trainer, arguments={**arguments, "output_dir": "first", "max_steps": 3}).train()
    looks = []
    for name, side in (("theirs", THEIRS), ("ours", OURS)):
        trainer = make(side.trainer, arguments={**arguments, "output_dir": name})
        output = trainer.train("first/checkpoint-3")
        looks.append(look(trainer, output))
    same("looks", *looks)


def test_early_stopping() -> None:
    def user_code(side: Side) -> Any:
        best = {"load_best_model_at_end": True, "metric_for_best_model": "mean", "greater_is_better": False}
        stopping = EarlyStoppingCallback(early_stopping_patience=1)
        trainer = make(
            side.trainer,
            arguments={**SAVES, **best, "eval_steps": 1, "save_steps": 1, "num_train_epochs": 9},
            callbacks=[stopping],
        )
        return look(trainer, trainer.train()), stopping.early_stopping_patience_counter

    facts, _ = compare(user_code)
    assert facts["state"]["global_step"] < facts["state"]["max_steps"]


class Meddler(TrainerCallback):
    """Use the Trainer in the middle of its run, as users' callbacks do."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        assert args is trainer.args
        assert state is trainer.state
        assert kwargs["model"] is trainer.model
        assert kwargs["optimizer"] is trainer.optimizer
        assert kwargs["lr_scheduler"] is trainer.lr_scheduler
        assert trainer.is_in_train
        loader = kwargs["train_dataloader"]
        self.seen.append([len(loader), loader.batch_size])
        self.seen += [without_times(row) for row in state.log_history[-1:]]
        if state.global_step == 2:
            self.seen.append(without_times(trainer.evaluate(metric_key_prefix="between")))
            trainer.log({"own": 1.0})
            trainer.save_model("between")
        if state.global_step == 3:
            control.should_save = control.should_log = control.should_evaluate = True
            trainer.add_callback(Listener())
        if state.global_step == 5:
            trainer._save_checkpoint(trainer.model, None)
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self.trainer.pop_callback(Listener).heard)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs["changed"] = state.global_step


class Listener(TrainerCallback):
    """Note two events."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.heard.append(f"step {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.heard.append(f"save {state.global_step}")


@pytest.mark.parametrize("bf16", [False, True])
def test_callbacks_use_the_trainer_in_the_middle_of_a_run(bf16: bool) -> None:
    def user_code(side: Side) -> Any:
        meddler = Meddler()
        trainer = make(side.trainer, arguments={"bf16": bf16}, callbacks=[meddler])
        meddler.trainer = trainer
        output = trainer.train()
        return look(trainer, output), [without_times(s) if isinstance(s, dict) else s for s in meddler.seen]

    facts, _ = compare(user_code)
    assert facts["state"]["global_step"] == 5


def test_callbacks_are_added_popped_and_removed() -> None:
    def user_code(side: Side) -> Any:
        first, second = Recorder(), EarlyStoppingCallback()
        trainer = make(side.trainer, arguments={"max_steps": 2}, callbacks=[first, second])
        trainer.remove_callback(EarlyStoppingCallback)
        popped = trainer.pop_callback(Recorder)
        trainer.add_callback(popped)
        trainer.add_callback(TrainerCallback)
        trainer.train()
        return look(trainer), popped is first, events_of(first)

    compare(user_code)


def test_model_init_makes_a_new_model_for_each_run() -> None:
    def user_code(side: Side) -> Any:
        made = []

        def make_it() -> Any:
            model = make_model("distilbert", seed=len(made) + 1)
            made.append(torch.rand(1).item())
            return model

        trainer = make(side.trainer, model_init=make_it, arguments={"num_train_epochs": 1})
        runs = [look(trainer, trainer.train()) for _ in range(2)]
        return runs, made

    _, made = compare(user_code)
    assert len(made) == 3


def test_optimizers_of_the_users() -> None:
    def user_code(side: Side) -> Any:
        model = make_model("distilbert")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = LambdaLR(optimizer, lambda step: 0.9**step)
        trainer = make(side.trainer, model=model, optimizers=(optimizer, schedule))
        first = look(trainer, trainer.train())
        return first, look(trainer, trainer.train()), innermost_is(trainer.optimizer, optimizer)

    *_, is_same = compare(user_code)
    assert is_same


def innermost_is(optimizer: Any, given: Any) -> bool:
    return getattr(optimizer, "optimizer", optimizer) is given


def test_an_optimizer_class_and_a_loss_of_the_users() -> None:
    def user_code(side: Side) -> Any:
        def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
            return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / 3

        given = {"compute_loss_func": loss, "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}
        trainer = make(side.trainer, **given)
        return look(trainer, trainer.train())

    compare(user_code)


def test_several_evaluation_sets_and_ignored_outputs() -> None:
    def user_code(side: Side) -> Any:
        sets = {"a": make_dataset("distilbert", 5, seed=5), "b": make_dataset("distilbert", 6, seed=6)}
        trainer = make(
            side.trainer,
            eval_dataset=sets,
            arguments={"eval_strategy": "epoch", "metric_for_best_model": "a_mean"},
        )
        plain = look(trainer, trainer.train())
        return plain, look(trainer, trainer.train(ignore_keys_for_eval=["hidden_states"]))

    compare(user_code)


def test_metrics_are_computed_as_often_as_natively() -> None:
    def user_code(side: Side) -> Any:
        calls: list[int] = []

        def compute(prediction: Any) -> dict[str, float]:
            calls.append(trainer.state.global_step)
            return {"calls": float(len(calls))}

        trainer = make(side.trainer, compute_metrics=compute, arguments=EVALUATES)
        return look(trainer, trainer.train()), calls

    _, calls = compare(user_code)
    assert calls == [3, 6, 8]


class OwnEvaluation:
    """What subclasses of users do to evaluations and rows."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Add a metric."""
        metrics = super().evaluate(*args, **kwargs)  # type: ignore[misc]
        metrics["eval_own"] = -metrics["eval_loss"]
        return metrics

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Halve the logits."""
        loss, logits, labels = super().prediction_step(*args, **kwargs)  # type: ignore[misc]
        return loss, None if logits is None else logits / 2, labels

    def log(self, logs: Any, *args: Any, **kwargs: Any) -> None:
        """Add a value to each row."""
        super().log({**logs, "own": 7}, *args, **kwargs)  # type: ignore[misc]


def test_a_subclass_with_an_evaluation_and_rows_of_its_own() -> None:
    def user_code(side: Side) -> Any:
        kind = type("Mine", (OwnEvaluation, side.trainer), {})
        best = {"metric_for_best_model": "own", "load_best_model_at_end": True, "greater_is_better": True}
        trainer = make(kind, arguments={**SAVES, **best, "eval_on_start": True})
        return look(trainer, trainer.train()), without_times(trainer.evaluate())

    facts, _ = compare(user_code)
    assert all(row["own"] == 7 for row in facts["history"])
    assert facts["state"]["best_metric"] is not None


class Failure(TrainerCallback):
    """Fail at the third step."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("own"), KeyboardInterrupt("own"), KeyError("own")])
def test_what_is_raised_in_a_run_passes_and_it_can_be_run_again(error: BaseException) -> None:
    def user_code(side: Side) -> Any:
        trainer = make(side.trainer, arguments=SAVES, callbacks=[Failure(error)])
        with pytest.raises(type(error), match="own"):
            trainer.train()
        stopped = look(trainer)
        stopped.pop("training")  # of the model: hfbridge gives it back as it was
        trainer.pop_callback(Failure)
        return stopped, look(trainer, trainer.train())

    compare(user_code)


def wrong(side: Side, change: Any) -> tuple[type, str]:
    """Run what fails; returns what it raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what is compared
        change(side)
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    "change",
    {
        "no set": lambda side: make(side.trainer, train_dataset=None).train(),
        "no checkpoint": lambda side: make(side.trainer).train(resume_from_checkpoint=True),
        "no such checkpoint": lambda side: make(side.trainer).train("out/checkpoint-9"),
        "no evaluation set": lambda side: make(side.trainer, eval_dataset=None, arguments=EVALUATES),
        "no set to evaluate": lambda side: make(side.trainer, eval_dataset=None).evaluate(),
        "no model": lambda side: make(side.trainer, model=None),
        "two models": lambda side: make(side.trainer, model=make_model("distilbert"), model_init=make_model),
        "wrong argument": lambda side: make(side.trainer, datasets=[]),
        "wrong setting": lambda side: make(side.trainer, arguments={"eval_strategy": "now"}),
        "no such metric": lambda side: make(
            side.trainer, arguments={**EVALUATES, "metric_for_best_model": "f1"}
        ).train(),
        "model_init": lambda side: make(side.trainer, model_init=lambda a, b: None),
    }.items(),
    ids=lambda change: change[0].replace(" ", "-"),
)
def test_errors_are_the_native_ones(change: tuple[str, Any]) -> None:
    same(change[0], wrong(THEIRS, change[1]), wrong(OURS, change[1]))


def test_signatures_and_names_are_the_native_ones() -> None:
    for theirs, ours in zip(THEIRS, OURS, strict=True):
        assert issubclass(ours, theirs)
        assert issubclass(ours, OURS.trainer)
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert ours.__name__ == theirs.__name__
    names = [name for name, value in vars(THEIRS.trainer).items() if callable(value)]
    for name in names:
        own = inspect.signature(getattr(OURS.trainer, name)).parameters
        native = inspect.signature(getattr(THEIRS.trainer, name)).parameters
        if name not in ("__init__", "hyperparameter_search"):
            assert [p for p in own if p != "gen_kwargs"] == list(native), name

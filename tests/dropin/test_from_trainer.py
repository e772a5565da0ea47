"""from_trainer calls what the native Trainer overrides: numbers, events and files are those of `train`."""

from types import MethodType
from typing import Any

import lightning.pytorch as pl
import pytest
import transformers
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother

import hfbridge
from hfbridge.errors import SettingsError
from tests.dropin.overriding import CASES, plain_loss
from tests.dropin.sides import LOGGED, THEIRS, Side, compare, events_of, look, make
from tests.parity.engines import Recorder
from tests.tiny import make_model

CALLED = [
    "compute_loss: popped labels",
    "training_step: two backwards",
    "get_train_dataloader",
    "create_optimizer",
    "create_scheduler",
    "log",
    "evaluate",
    "prediction_step",
    "_clip_grad_norm",
    "_maybe_log_save_evaluate",
    "_save_checkpoint",
    "_load_best_model",
]


def overriding(*cases: str) -> Any:
    return type("Mine", (*(CASES[case] for case in cases), transformers.Trainer), {})


def train(side: Side, native: Any, **arguments: Any) -> None:
    """Train as the HF Trainer does, or moved over."""
    if side is THEIRS:
        native.train(resume_from_checkpoint=arguments.get("ckpt_path"))
        return
    trainer, module, data = hfbridge.from_trainer(native)
    trainer.fit(module, data, **arguments)
    assert trainer.log_history is native.state.log_history
    assert module.to_native(data) is native


@pytest.mark.parametrize("case", CALLED)
def test_a_method_of_a_subclass_is_called(case: str) -> None:
    def code(side: Side) -> Any:
        recorder = Recorder()
        native = make(overriding(case), arguments=LOGGED, callbacks=[recorder])
        train(side, native)
        return [look(native), events_of(recorder)]

    compare(code)


class EvaluateEarly(TrainerCallback):
    """Evaluate after the first step, too."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate |= state.global_step == 1


class Heard(pl.Callback):
    """Count Lightning's hooks."""

    batches = 0

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.batches += 1


def test_methods_of_the_object_and_callbacks_of_both_libraries() -> None:
    def code(side: Side) -> Any:
        native = make(transformers.Trainer, arguments=LOGGED)
        native.compute_loss = MethodType(plain_loss, native)
        if side is THEIRS:
            native.add_callback(EvaluateEarly)
            native.train()
        else:
            heard = Heard()
            trainer, module, data = hfbridge.from_trainer(native, callbacks=[heard, EvaluateEarly])
            trainer.fit(module, data)
            assert heard.batches == 16
        return look(native)

    assert [row["step"] for row in compare(code)["history"] if "eval_loss" in row] == [1, 3, 6, 8]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoother", LabelSmoother(epsilon=0.2)),
        ("_train_batch_size", 3),
        ("_signature_columns", ["input_ids", "labels", "label"]),
        ("gather_function", lambda tensors: tensors),
    ],
)
def test_attributes_that_were_changed_on_the_object_are_read_there(name: str, value: Any) -> None:
    def code(side: Side) -> Any:
        native = make(transformers.Trainer, arguments=LOGGED)
        setattr(native, name, value)
        train(side, native)
        return look(native)

    compare(code)


def test_a_run_is_resumed_and_what_loads_it_is_called() -> None:
    def code(side: Side) -> Any:
        kind = overriding("_load_from_checkpoint", "training_step: gradients", "get_train_dataloader")
        train(side, make(kind, arguments=LOGGED))
        native = make(kind, arguments={**LOGGED, "output_dir": "again"})
        train(side, native, ckpt_path="out/checkpoint-3")
        return look(native)

    compare(code)


def test_a_model_init_and_a_second_training() -> None:
    def code(side: Side) -> Any:
        made = make(
            overriding("training_step: gradients"),
            model_init=lambda: make_model("distilbert"),
            arguments={"max_steps": 3, "skip_memory_metrics": False},
        )
        train(side, made)
        trained = make(overriding("create_optimizer"), arguments={"max_steps": 3})
        trained.train()
        train(side, trained)
        return [look(made), look(trained)]

    compare(code)


def test_the_native_trainer_evaluates_afterwards() -> None:
    def code(side: Side) -> Any:
        native = make(overriding("prediction_step"), arguments={"max_steps": 2, "bf16": True})
        if side is THEIRS:
            native.train()
        else:
            trainer, module, data = hfbridge.from_trainer(native)
            with pytest.raises(
                SettingsError, match=r"trainer\.validate would not call PredictionStep\.prediction_step"
            ):
                trainer.validate(module, data)
            trainer.fit(module, data)
        found = native.evaluate()
        return [found["eval_loss"], found["eval_predictions"], look(native)["history"]]

    compare(code)


def test_lightning_evaluates_where_only_training_is_overridden() -> None:
    native = make(overriding("create_optimizer"), arguments={"max_steps": 2})
    trainer, module, data = hfbridge.from_trainer(native)
    trainer.fit(module, data)
    (metrics,) = trainer.validate(module, data, verbose=False)
    assert metrics["eval_loss"] == native.evaluate()["eval_loss"]


def test_a_run_that_fails_leaves_the_trainer_out_of_train() -> None:
    class Failing(transformers.Trainer):
        fails = True

        def training_step(self, *arguments: Any, **named: Any) -> Any:
            if self.fails:
                raise KeyError("own")
            return super().training_step(*arguments, **named)

    native = make(Failing, arguments={"max_steps": 2})
    trainer, module, data = hfbridge.from_trainer(native)
    with pytest.raises(KeyError, match="own"):
        trainer.fit(module, data)
    assert not native.is_in_train
    native.fails = False
    trainer, module, data = hfbridge.from_trainer(native)
    trainer.fit(module, data)
    assert native.state.global_step == 2


class Whole(transformers.Trainer):
    """Overrides what Lightning does, and more."""

    def train(self, *arguments: Any, **named: Any) -> Any: ...

    def _inner_training_loop(self, *arguments: Any, **named: Any) -> Any: ...

    def compute_loss(self, *arguments: Any, **named: Any) -> Any: ...


def test_train_and_the_loop_are_refused_by_name_with_all_else() -> None:
    native = make(Whole, arguments={"optim": "adalomo"})
    native.hp_search_backend = "optuna"
    with pytest.raises(SettingsError, match="5 parts of this Whole are not supported on Lightning") as caught:
        hfbridge.from_trainer(native, loss_normalization="exact")
    problems = {problem.subject: problem.text for problem in caught.value.problems}
    assert set(problems) == {
        "Whole.train",
        "Whole._inner_training_loop",
        'loss_normalization = "exact"',
        'hp_search_backend = "optuna"',
        'optim = "adalomo"',
    }
    assert "trainer.fit trains in its place" in problems["Whole.train"]
    assert "Whole.compute_loss" in problems['loss_normalization = "exact"']
    assert native.hp_search_backend == "optuna"


def test_more_ranks_than_were_started_are_refused() -> None:
    native = make(overriding("compute_loss: super"))
    with pytest.raises(
        SettingsError, match=r"ScaledLoss\.compute_loss: called on a Trainer that was made for 1 proc"
    ):
        hfbridge.from_trainer(native, strategy="ddp", devices=2)

"""The names of Lightning without an underscore's promise that hfbridge touches are still there."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback, EarlyStoppingCallback

from hfbridge.callbacks.evaluation import Evaluator
from hfbridge.callbacks.trainer_state import CallbackHost
from tests.tiny import make_model


@pytest.mark.parametrize(
    ("path", "used_by"),
    [
        ("_logger_connector._first_loop_iter", "hfbridge.callbacks.trainer_state.run_validation"),
        ("fit_loop.epoch_loop.val_loop.inference_mode", "hfbridge.callbacks.connector.configure_trainer"),
        ("fit_loop.epoch_loop.val_loop.run", "hfbridge.callbacks.trainer_state.run_validation"),
        ("fit_loop.epoch_loop.batch_progress.is_last_batch", "hfbridge.callbacks.trainer_state.end_epoch"),
        ("fit_loop.epoch_loop._should_check_val_epoch", "hfbridge.callbacks.connector.configure_trainer"),
        ("fit_loop.epoch_loop.max_steps", "hfbridge.callbacks.connector.configure_trainer"),
        ("fit_loop.max_epochs", "hfbridge.callbacks.connector.configure_trainer"),
        ("fit_loop.min_epochs", "hfbridge.callbacks.connector.reset_fit_loop"),
        ("fit_loop.epoch_loop.min_steps", "hfbridge.callbacks.connector.reset_fit_loop"),
    ],
)
def test_lightning_still_has(path: str, used_by: str) -> None:
    found = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    for name in path.split("."):
        assert hasattr(found, name), f"lightning.Trainer has no {path} any more, which {used_by} uses"
        found = getattr(found, name)


class Parts:
    """What a host reads of its module."""

    trainer = SimpleNamespace(callbacks=[])
    model = make_model("distilbert")
    processing_class = None
    _user_optimizers = (None, None)


def attached(*callbacks: object) -> CallbackHost:
    host = CallbackHost(Evaluator(), callbacks)  # type: ignore[arg-type]
    Parts.trainer.callbacks = [host]
    host.attach(Parts(), TrainingArguments(output_dir="out", use_cpu=True))
    return host


def test_only_events_that_somebody_hears_are_fired() -> None:
    heard = []

    class Listener(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            heard.append(sorted(kwargs))

    host = attached(Listener)
    assert host._handled_events == {
        "on_substep_end",
        *(e for e in ("on_step_end", "on_epoch_end") if e in vars(DefaultFlowCallback)),
    }
    host.fire("on_substep_end")
    host.fire("on_pre_optimizer_step")
    Parts.trainer.callbacks = []  # as in a trial of one of Lightning's finders
    host.fire("on_substep_end")
    assert heard == [
        ["eval_dataloader", "lr_scheduler", "model", "optimizer", "processing_class", "train_dataloader"]
    ]


def test_a_method_put_on_the_instance_is_heard() -> None:
    callback = TrainerCallback()
    callback.on_step_begin = lambda *args, **kwargs: None  # type: ignore[method-assign]
    assert "on_step_begin" in attached(callback)._handled_events


def test_classes_and_instances_are_kept_in_their_order() -> None:
    host = attached(EarlyStoppingCallback(2), TrainerCallback)
    names = [type(cb).__name__ for cb in host.handler.callbacks]  # type: ignore[union-attr]
    assert names == ["DefaultFlowCallback", "EarlyStoppingCallback", "TrainerCallback"]

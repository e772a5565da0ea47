"""What callbacks change on a Trainer while it trains counts from then on, as with the HF Trainer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.dropin.sides import LOGGED, OURS, Side, compare, look, make
from tests.tiny import make_dataset


class Changes(TrainerCallback):
    """Call a function of the Trainer at an event of a step.

    Args:
        event: name of the event.
        change: the function.
        step: steps that were taken by then.
    """

    trainer: Any

    def __init__(self, event: str, change: Callable[[Any], None], step: int) -> None:
        def fire(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                change(self.trainer)

        setattr(self, event, fire)


def mean_square(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    loss: torch.Tensor = outputs.logits.pow(2).mean()
    return loss


def double_loss(trainer: Any) -> None:
    compute_loss = type(trainer).compute_loss

    def double(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss, outputs = compute_loss(trainer, model, inputs, True, num_items_in_batch)
        return (loss * 2, outputs) if return_outputs else loss * 2

    trainer.compute_loss = double


def replace_optimizer(trainer: Any) -> None:
    trainer.optimizer = trainer.accelerator.prepare(torch.optim.SGD(trainer.model.parameters(), lr=0.1))


def set_attribute(name: str, value: Any) -> Callable[[Any], None]:
    return lambda trainer: setattr(trainer, name, value)


def set_argument(name: str, value: Any) -> Callable[[Any], None]:
    return lambda trainer: setattr(trainer.args, name, value)


CHANGES = {
    "max_grad_norm": set_argument("max_grad_norm", 0.01),
    "no clipping": set_argument("max_grad_norm", 0.0),
    "compute_loss": double_loss,
    "compute_loss_func": set_attribute("compute_loss_func", mean_square),
    "label_smoother": set_attribute("label_smoother", None),
    "compute_metrics": set_attribute("compute_metrics", lambda prediction: {"one": 1.0}),
    "eval_dataset": lambda trainer: setattr(trainer, "eval_dataset", make_dataset("distilbert", 6, seed=8)),
    "per_device_eval_batch_size": set_argument("per_device_eval_batch_size", 3),
    "optimizer": replace_optimizer,
}


@pytest.mark.filterwarnings("ignore:Detected call of")  # the first optimizer never steps
@pytest.mark.parametrize(("event", "step"), [("on_train_begin", 0), ("on_step_end", 4)])
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_callback_changes(name: str, event: str, step: int) -> None:

    def code(side: Side) -> Any:
        callback = Changes(event, CHANGES[name], step)
        trainer = make(
            side.trainer, arguments={**LOGGED, "label_smoothing_factor": 0.1}, callbacks=[callback]
        )
        callback.trainer = trainer
        return look(trainer, trainer.train())

    compare(code)


def test_what_lightnings_loop_cannot_follow_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    callback = Changes("on_step_end", set_argument("gradient_accumulation_steps", 4), 2)
    callback.trainer = make(OURS.trainer, callbacks=[callback])
    callback.trainer.train()
    assert "A callback has changed gradient_accumulation_steps" in caplog.text

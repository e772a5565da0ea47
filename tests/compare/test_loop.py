"""The loop written with accelerate: what it does not do, and what it follows."""

from typing import Any

import pytest
from transformers import Trainer as NativeTrainer
from transformers import TrainingArguments

from hfbridge import SettingsError
from hfbridge.compare.verdict import judge
from tests.compare.planted import SETTINGS, At, make_trainer, recorded
from tests.tiny import PadRows, make_model, make_rows


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha = 5.0"),
        ({"activation_checkpointing": True, "torch_empty_cache_steps": 2}, "torch_empty_cache_steps = 2"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "no schedule that follows a metric"),
    ],
)
def test_what_the_loop_does_not_do_is_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match="leave the engine out") as caught:
        recorded(make_trainer(settings), engine="accelerate")
    assert said in str(caught.value)


def test_a_callback_that_ends_the_run_is_followed() -> None:
    def stop(**kwargs: Any) -> None:
        raise AssertionError("replaced below")

    runs = []
    for engine in ("native", "accelerate", "lightning"):
        callback = At("on_step_end", stop)
        callback.on_step_end = lambda args, state, control, **kwargs: setattr(  # type: ignore[method-assign]
            control, "should_training_stop", state.global_step == 3
        )
        runs.append(recorded(make_trainer(callbacks=[callback]), engine=engine))
    assert [len(run.steps) for run in runs] == [3, 3, 3]
    assert [judge(runs[0], run).grade for run in runs[1:]] == ["exact", "exact"]


def test_a_model_that_is_made_when_training_begins_is_the_native_one() -> None:
    runs = []
    for engine in ("native", "accelerate", "lightning"):
        trainer = NativeTrainer(
            model_init=lambda: make_model("distilbert"),
            args=TrainingArguments(**{**SETTINGS, "eval_on_start": True, "num_train_epochs": 1}),
            train_dataset=make_rows("distilbert", 46),
            eval_dataset=make_rows("distilbert", 11, seed=5),
            data_collator=PadRows(),
        )
        runs.append(recorded(trainer, engine=engine))
    assert [judge(runs[0], run).grade for run in runs[1:]] == ["exact", "exact"]
    assert [row["step"] for row in runs[1].metrics] == [0, 3, 4]

"""Values that depend on each other: what newly carried settings need, and what they exclude."""

import pytest

from hfbridge.errors import SettingsError
from hfbridge.settings import Settings

CHECKPOINTING = {"activation_checkpointing": True}


@pytest.mark.parametrize(
    ("values", "subject", "text"),
    [
        ({"tf32": True, "use_cpu": True}, "tf32", "has no effect on a CPU"),
        (
            {"torch_compile": False, "torch_compile_backend": "eager"},
            "torch_compile_backend",
            "switches compilation on",
        ),
        (
            {"torch_compile": False, "torch_compile_mode": "default"},
            "torch_compile_mode",
            "switches compilation on",
        ),
        (
            {"torch_compile_backend": "eager", "torch_compile_mode": "max-autotune"},
            "torch_compile_mode",
            "is read by inductor only, not by eager",
        ),
        (
            {"activation_checkpointing_kwargs": {"use_reentrant": True}},
            "activation_checkpointing_kwargs",
            "without activation_checkpointing=True",
        ),
        (
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "gradient_checkpointing_kwargs",
            "without activation_checkpointing=True",
        ),
        (
            {**CHECKPOINTING, "activation_checkpointing_kwargs": {"use_reentrent": True}},
            "activation_checkpointing_kwargs",
            "did you mean use_reentrant?",
        ),
        (
            {**CHECKPOINTING, "activation_checkpointing_kwargs": {"use_reentrant": "no"}},
            "activation_checkpointing_kwargs",
            "use_reentrant must be True or False, not 'no'",
        ),
        (
            {**CHECKPOINTING, "activation_checkpointing_kwargs": {"every_n_layers": 0}},
            "activation_checkpointing_kwargs",
            "every_n_layers must be a whole number, 1 or more, not 0",
        ),
        (
            {**CHECKPOINTING, "activation_checkpointing_kwargs": {"use_reentrant": True, "debug": True}},
            "activation_checkpointing_kwargs",
            "debug cannot be used with use_reentrant=True",
        ),
        ({"metric_for_best_model": "f1"}, "metric_for_best_model", "needs evaluations; set eval_strategy"),
        (
            {"metric_for_best_model": "f1", "eval_on_start": True},
            "metric_for_best_model",
            "needs evaluations",
        ),
        ({"greater_is_better": True}, "greater_is_better", "has no effect without metric_for_best_model"),
        ({"project": "mine"}, "project", 'set report_to=["trackio"]'),
        ({"trackio_space_id": "me/space", "report_to": "wandb"}, "trackio_space_id", "only trackio reads it"),
        ({"trackio_static_space_id": False}, "trackio_static_space_id", "only trackio reads it"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(values, subject, text):
    with pytest.raises(SettingsError) as caught:
        Settings(**values)
    (problem,) = caught.value.problems
    assert problem.subject.startswith(f"{subject} = ")
    assert text in problem.text


@pytest.mark.parametrize(
    "values",
    [
        {"tf32": False, "use_cpu": True},
        {"torch_compile": True, "torch_compile_mode": "max-autotune", "torch_compile_backend": "inductor"},
        {"torch_compile_backend": "eager", "torch_compile_mode": "default"},
        {"torch_compile": False},
        {"activation_checkpointing_kwargs": {}},
        {
            **CHECKPOINTING,
            "activation_checkpointing_kwargs": {"every_n_layers": 2, "offload": True, "use_reentrant": False},
        },
        {**CHECKPOINTING, "activation_checkpointing_kwargs": '{"preserve_rng_state": false}'},
        {"metric_for_best_model": "f1", "eval_strategy": "steps"},
        {"greater_is_better": True, "lr_scheduler_type": "greedy", "eval_strategy": "steps"},
        {"project": "mine", "report_to": "all"},
        {"project": "huggingface"},
        {"trackio_static_space_id": "me/space", "report_to": ["wandb", "trackio"]},
    ],
    ids=str,
)
def test_what_fits_together_is_carried(values):
    assert Settings(**values).given.keys() == values.keys()


@pytest.mark.parametrize(
    "unread",
    [
        {"metric_for_best_model": "loss", "greater_is_better": False},
        {"optim_target_modules": ["attn"]},
        {"optim_args": "rank=4"},
        {"liger_kernel_config": {"rope": True}},
        {"length_column_name": "lengths"},
        {"project": "mine"},
    ],
)
def test_values_that_nothing_reads_may_be_left_out(unread):
    kept = {"learning_rate": 0.1}
    with pytest.raises(SettingsError):
        Settings.of({**kept, **unread})
    assert Settings.of({**kept, **unread}, drops_unread=True) == Settings.of(kept)
    with pytest.raises(SettingsError, match="fp16"):
        Settings.of({**kept, **unread, "fp16": True, "bf16": True}, drops_unread=True)

"""A value without effect that is harmless and common is carried, and told of."""

import pytest

from hfbridge.settings import Settings

PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
GALORE = {"optim": "galore_adamw", "optim_target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"num_train_epochs": 3, "max_steps": 5}, "num_train_epochs has no effect: max_steps=5 decides"),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}},
            "lr_scheduler_kwargs has no effect with lr_scheduler_type='constant'",
        ),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 5},
            "warmup_steps has no effect with lr_scheduler_type='constant'",
        ),
        (
            {**PLATEAU, "warmup_steps": 5},
            "warmup_steps has no effect with lr_scheduler_type='reduce_lr_on_plateau'",
        ),
        ({"optim": "sgd", "adam_beta1": 0.8}, 'adam_beta1 has no effect with optim="sgd"'),
        ({"optim": "lion_8bit", "adam_epsilon": 0.8}, 'adam_epsilon has no effect with optim="lion_8bit"'),
        ({**GALORE, "weight_decay": 0.1}, 'weight_decay has no effect with optim="galore_adamw"'),
        ({"eval_steps": 5}, 'eval_steps has no effect with eval_strategy="no"'),
        (
            {"eval_steps": 5, "eval_strategy": "epoch"},
            'eval_steps has no effect with eval_strategy="epoch"',
        ),
        ({"eval_delay": 5}, 'eval_delay has no effect with eval_strategy="no"'),
        (
            {"logging_steps": 5, "logging_strategy": "epoch"},
            'logging_steps has no effect with logging_strategy="epoch"',
        ),
        (
            {"data_seed": 5, "train_sampling_strategy": "sequential"},
            'data_seed has no effect with train_sampling_strategy="sequential"',
        ),
        ({"dataloader_in_order": False}, "dataloader_in_order has no effect with fewer than two workers"),
        ({"run_name": "one"}, "run_name has no effect: no reporter in report_to reads it"),
        (
            {"run_name": "one", "report_to": "tensorboard"},
            "run_name has no effect: no reporter in report_to reads it",
        ),
        (
            {**PLATEAU, "metric_for_best_model": "f1"},
            "lr_scheduler_type='reduce_lr_on_plateau' waits for f1 to fall, and greater is better; "
            'lr_scheduler_kwargs={"mode": "max"} has it wait for a rise',
        ),
    ],
    ids=str,
)
def test_a_value_without_effect_leaves_one_note(values, note):
    assert Settings(save_strategy="no", **values).notes == (note,)


@pytest.mark.parametrize(
    "values",
    [
        {"num_train_epochs": 3},
        {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5},
        {"lr_scheduler_type": "constant", "optim": "schedule_free_adamw", "warmup_steps": 5},
        {"optim": "sgd", "adam_beta1": 0.9},
        {"optim": "lion_8bit", "adam_beta1": 0.8},
        {"optim": "ademamix", "adam_epsilon": 1e-6},
        {**GALORE, "weight_decay": 0.0},
        {"eval_steps": 5, "eval_strategy": "steps"},
        {"eval_delay": 5, "eval_strategy": "epoch"},
        {"logging_steps": 5, "logging_strategy": "epoch", "eval_strategy": "steps"},
        {"data_seed": 5},
        {"dataloader_in_order": False, "dataloader_num_workers": 2},
        {"run_name": "one", "report_to": "all"},
        {"run_name": "one", "report_to": ["tensorboard", "wandb"]},
        PLATEAU,
        {**PLATEAU, "metric_for_best_model": "f1", "lr_scheduler_kwargs": {"mode": "max"}},
        {**PLATEAU, "metric_for_best_model": "f1", "greater_is_better": False},
    ],
    ids=str,
)
def test_a_value_with_an_effect_leaves_none(values):
    assert Settings(save_strategy="no", **values).notes == ()


def test_notes_are_known_by_their_setting():
    settings = Settings(warmup_ratio=0.1, lr_scheduler_type="constant")
    assert settings.notes_on("warmup_steps") == (
        "warmup_ratio is now called warmup_steps",
        "warmup_steps has no effect with lr_scheduler_type='constant'",
    )
    assert settings.notes_on("seed") == ()

"""A schedule that settings accept can be built."""

import pytest
import torch
from transformers import SchedulerType, get_scheduler

from hfbridge.errors import SettingsError
from hfbridge.settings import Settings
from hfbridge.settings.schedulers import CONSTANT, FOLLOWING


def texts_of(name, kwargs, **values):
    """What is wrong with the arguments of a schedule."""
    more = {"eval_strategy": "epoch"} if name in FOLLOWING else {}
    with pytest.raises(SettingsError) as caught:
        Settings(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, **more, **values)
    assert {problem.subject.split(" ")[0] for problem in caught.value.problems} == {"lr_scheduler_kwargs"}
    return [problem.text for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("reduce_lr_on_plateau", {}),
        ("reduce_lr_on_plateau", {"mode": "max", "factor": 0.5, "patience": 0, "threshold_mode": "abs"}),
        ("reduce_lr_on_plateau", {"min_lr": [1e-6, 1e-7], "cooldown": 2, "eps": 0}),
        ("greedy", {}),
        ("greedy", {"smooth": True, "window_size": 5, "max_lr": [1.0, 2.0], "verbose": False}),
        ("warmup_stable_decay", {"num_decay_steps": 2, "num_stable_steps": None, "decay_type": "cosine"}),
        ("inverse_sqrt", {"timescale": None}),
    ],
)
def test_arguments_that_fit_are_carried(name, kwargs):
    settings = Settings(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, eval_strategy="epoch")
    assert settings.lr_scheduler_kwargs == kwargs


@pytest.mark.parametrize(
    ("name", "kwargs", "text"),
    [
        ("reduce_lr_on_plateau", {"patiense": 3}, "did you mean patience?"),
        ("reduce_lr_on_plateau", {"smooth": True}, "smooth is no argument of reduce_lr_on_plateau"),
        ("reduce_lr_on_plateau", {"mode": "up"}, "reduce_lr_on_plateau raises: mode up is unknown!"),
        ("reduce_lr_on_plateau", {"mode": 1}, "mode must be a string, not 1"),
        ("reduce_lr_on_plateau", {"factor": 1.0}, "raises: Factor should be < 1.0."),
        ("reduce_lr_on_plateau", {"factor": "half"}, "factor must be a number"),
        ("reduce_lr_on_plateau", {"min_lr": [1e-6]}, "raises: expected 2 min_lrs, got 1"),
        ("reduce_lr_on_plateau", {"min_lr": [1e-6, True]}, "min_lr must be a number"),
        ("reduce_lr_on_plateau", {"threshold_mode": "percent"}, "threshold mode percent is unknown!"),
        ("greedy", {"factor": 2}, "raises: Factor should be < 1.0."),
        ("greedy", {"smooth": 1}, "smooth must be True or False, not 1"),
        ("greedy", {"mode": "up"}, "mode up is unknown!"),
        ("cosine", {"num_cycles": float("nan")}, "num_cycles must be a finite number"),
        ("cosine", {"num_cycles": None}, "num_cycles must be a number, not None"),
        ("cosine", {"num_cycles": [1]}, "num_cycles must be a number, not [1]"),
        ("cosine", {"last_epoch": 5}, "cosine raises"),
        ("cosine_with_min_lr", {"min_lr": "1e-6"}, "1e-6 in YAML is a string, 1.0e-6 a number"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "log"}, "raises"),
        ("polynomial", {"lr_end": 1.0}, "lr_end=1.0 must be below learning_rate=5e-05"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name, kwargs, text):
    (said,) = texts_of(name, kwargs)
    assert text in said


def test_all_that_is_wrong_with_the_arguments_is_told():
    assert len(texts_of("greedy", {"patients": 1, "smooth": "yes", "factor": "x"})) == 3


def test_the_families_are_those_of_transformers():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    for kind in SchedulerType:
        takes_anything = kind.value in CONSTANT
        if takes_anything:
            get_scheduler(kind, optimizer, 0, 10, scheduler_specific_kwargs={"anything": 1})
        else:
            with pytest.raises(TypeError):
                get_scheduler(kind, optimizer, 0, 10, scheduler_specific_kwargs={"anything": 1})

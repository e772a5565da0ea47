"""Optimizer, schedule and clipping are the native Trainer's."""

import pytest
from transformers import Trainer, TrainingArguments

from hfbridge.models.optimizers import NativeParts
from tests.tiny import make_model


def arguments(folder, **values):
    return TrainingArguments(
        str(folder),
        **{"use_cpu": True, "report_to": "none", "weight_decay": 0.1, "learning_rate": 1e-3, **values},
    )


def groups(optimizer):
    return [
        ([id(p) for p in group["params"]], {k: v for k, v in group.items() if k != "params"})
        for group in optimizer.param_groups
    ]


def build_optimizer(model, args):
    return NativeParts(model, args).create_optimizer()


def freeze_encoder(model):
    for parameter in model.base_model.parameters():
        parameter.requires_grad = False
    return model


def only_biases(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias")
    return model


MODELS = {
    "tied weights": lambda: make_model("gpt2"),
    "untied": lambda: make_model("llama"),
    "encoder": lambda: make_model("bert-token"),
    "frozen": lambda: freeze_encoder(make_model("distilbert")),
    "nothing decays": lambda: only_biases(make_model("distilbert")),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_groups_and_class_are_the_native_ones(model, optim, tmp_path):
    model, args = MODELS[model](), arguments(tmp_path, optim=optim)
    theirs = Trainer(model, args).create_optimizer()
    ours = build_optimizer(model, args)
    assert type(ours) is type(theirs)
    assert groups(ours) == groups(theirs)
    assert len(ours.param_groups) == 2


def test_a_tied_weight_is_optimized_once(tmp_path):
    model = make_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    parameters = [p for g in build_optimizer(model, arguments(tmp_path)).param_groups for p in g["params"]]
    assert len(parameters) == len(set(map(id, parameters))) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out(tmp_path):
    model = freeze_encoder(make_model("distilbert"))
    parameters = [p for g in build_optimizer(model, arguments(tmp_path)).param_groups for p in g["params"]]
    assert parameters
    assert all(p.requires_grad for p in parameters)


def test_betas_and_epsilon_reach_the_optimizer(tmp_path):
    args = arguments(tmp_path, adam_beta1=0.7, adam_beta2=0.9, adam_epsilon=1e-3)
    group = build_optimizer(make_model("distilbert"), args).param_groups[1]
    assert (group["betas"], group["eps"], group["lr"]) == ((0.7, 0.9), 1e-3, 1e-3)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"warmup_steps": 3},
        {"warmup_steps": 0.25, "lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": 2.0}'},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2},
    ],
)
def test_the_schedule_is_the_native_one(values, tmp_path):
    model, args = make_model("distilbert"), arguments(tmp_path, **values)
    native = Trainer(model, args)
    native.create_optimizer_and_scheduler(num_training_steps=12)
    parts = NativeParts(model, args)
    optimizer = parts.create_optimizer()
    ours = parts.create_scheduler(num_training_steps=12)
    rates = []
    for scheduler, stepped in ((native.lr_scheduler, native.optimizer), (ours, optimizer)):
        rates.append([])
        for _ in range(12):
            rates[-1].append(scheduler.get_last_lr()[0])
            stepped.step()
            scheduler.step()
    assert rates[0] == rates[1]

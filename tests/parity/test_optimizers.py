"""Every optimizer and schedule that runs on a CPU: the native Trainer's rates, weights, states, to the bit.

Grade: exact. What is compared stands in tests/parity/engines.py.
"""

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn
from transformers import SchedulerType, TrainingArguments, get_linear_schedule_with_warmup, get_scheduler
from transformers import Trainer as NativeTrainer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.training_args import OptimizerNames

import hfbridge
from hfbridge.settings.optimizer_requirements import READERS
from hfbridge.settings.rules import RULES
from tests.parity.engines import Job, assert_identical, run_both, run_ours, run_theirs
from tests.tiny import make_model

LOW_RANK = {"optim_target_modules": ["attention", "lin"], "optim_args": "rank=4,update_proj_gap=2"}
# optim -> settings it needs, and the package that it comes from
OPTIMIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "adamw_torch": ({}, "torch"),
    "adamw_torch_fused": ({}, "torch"),
    "adafactor": ({}, "torch"),
    "sgd": ({"optim_args": "momentum=0.9,nesterov=True"}, "torch"),
    "adagrad": ({"optim_args": "lr_decay=0.1"}, "torch"),
    "rmsprop": ({"optim_args": "alpha=0.9, centered=True"}, "torch"),
    "schedule_free_radam": ({}, "schedulefree"),
    "schedule_free_adamw": ({"lr_scheduler_type": "constant"}, "schedulefree"),
    "schedule_free_sgd": ({"optim_args": "r=0.5"}, "schedulefree"),
    "stable_adamw": ({"optim_args": "max_lr=0.1"}, "optimi"),
    "grokadamw": ({"optim_args": "lamb=1.0"}, "grokadamw"),
    "adamw_torch_4bit": ({}, "torchao"),
    "adamw_torch_8bit": ({}, "torchao"),
    "galore_adamw": (LOW_RANK, "galore_torch"),
    "galore_adafactor": (LOW_RANK, "galore_torch"),
    "apollo_adamw": (LOW_RANK, "apollo_torch"),
    **{
        name: ({}, "bitsandbytes")
        for name in (
            "adamw_8bit",
            "adamw_bnb_8bit",
            "ademamix",
            "ademamix_8bit",
            "lion_32bit",
            "lion_8bit",
            "paged_adamw_32bit",
            "paged_adamw_8bit",
            "paged_ademamix_32bit",
            "paged_ademamix_8bit",
            "paged_lion_32bit",
            "paged_lion_8bit",
            "rmsprop_bnb",
            "rmsprop_bnb_32bit",
            "rmsprop_bnb_8bit",
        )
    },
}
NEEDS_GPU = ("galore_adamw_8bit",)
LAYERWISE = {"galore_adamw_layerwise": "galore_torch", "apollo_adamw_layerwise": "apollo_torch"}
KWARGS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
    "warmup_stable_decay": {"num_decay_steps": 3},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"lr_end": 1e-4, "power": 2.0},
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5, "threshold": 10.0},
    "greedy": {"patience": 0, "factor": 0.5, "min_lr": 1e-4, "max_lr": 1.0, "smooth": False},
}
BASE = {"gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 2}


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning")  # galore_torch
@pytest.mark.filterwarnings("ignore:.torch.cuda.amp.autocast.args.* is deprecated:FutureWarning")  # grokadamw
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torchao
@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported:UserWarning")  # grokadamw
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")  # bitsandbytes
def test_optimizer(optim: str) -> None:
    more, package = OPTIMIZERS[optim]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    theirs, _ = run_both(Job("distilbert", {**BASE, "optim": optim, **more}, rows=30))
    assert theirs.steps[0]["weights"] != theirs.steps[-2]["weights"]


def test_every_optimizer_is_tried_or_refused() -> None:
    refused = {name.value for name in OptimizerNames if not RULES["optim"].supports(name.value)}
    assert {name.value for name in OptimizerNames} == {*OPTIMIZERS, *NEEDS_GPU} | refused


@pytest.mark.parametrize("optim", LAYERWISE)
@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning")  # galore_torch
def test_a_layerwise_optimizer_natively_has_no_schedule_and_no_clipping(optim: str) -> None:
    if importlib.util.find_spec(LAYERWISE[optim]) is None:
        pytest.skip(f"{LAYERWISE[optim]} is not installed")
    job = Job("distilbert", {**LOW_RANK, "optim": optim, "gradient_accumulation_steps": 1}, rows=30)
    found = [
        run_theirs(job.with_settings(**settings)).weights
        for settings in (
            {"lr_scheduler_type": "linear", "max_grad_norm": 1.0},
            {"lr_scheduler_type": "constant", "max_grad_norm": 1e-9},
            {"lr_scheduler_type": "constant", "max_grad_norm": 1e-9, "learning_rate": 1e-5},
        )
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])
    with pytest.raises(hfbridge.SettingsError, match="neither schedule nor clipping"):
        run_ours(job)


def test_transformers_cannot_build_the_schedule_of_a_layerwise_optimizer() -> None:
    # The native Trainer does not notice: it asks for a schedule over accelerate's wrapper of the optimizer.
    weights = nn.Linear(2, 2)
    inner = {p: torch.optim.SGD([{"params": [p]}], lr=0.1) for p in weights.parameters()}
    with pytest.raises(ValueError, match="zip"):
        get_scheduler("linear", LayerWiseDummyOptimizer(inner, lr=0.1), 0, 10)


@pytest.mark.parametrize(
    ("optim", "ignored"),
    [
        ("sgd", {"optim_args": "weight_decay=0.5"}),
        ("adagrad", {"optim_args": "weight_decay=0.5"}),
        ("rmsprop", {"optim_args": "weight_decay=0.5"}),
        ("sgd", {"adam_beta1": 0.1, "adam_beta2": 0.2, "adam_epsilon": 0.3}),
        ("adafactor", {"adam_beta1": 0.1, "adam_beta2": 0.2, "adam_epsilon": 0.3, "optim_args": "a=1"}),
        ("adamw_torch", {"optim_args": "weight_decay=0.5,lr=3", "optim_target_modules": "all-linear"}),
        ("galore_adamw", {"weight_decay": 0.5, "adam_beta1": 0.1}),
        ("apollo_adamw", {"weight_decay": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning")  # galore_torch
def test_what_settings_say_has_no_effect_has_none_natively(optim: str, ignored: dict[str, Any]) -> None:
    if importlib.util.find_spec(OPTIMIZERS[optim][1]) is None:
        pytest.skip(f"{OPTIMIZERS[optim][1]} is not installed")
    needed = LOW_RANK if READERS[optim].is_low_rank else {}
    job = Job("distilbert", {"optim": optim, **needed}, rows=16, eval_rows=0)
    with_it, without = run_theirs(job.with_settings(**ignored)).weights, run_theirs(job).weights
    assert all(torch.equal(with_it[name], without[name]) for name in without)


@pytest.mark.parametrize(
    ("optim", "package", "optim_args"),
    [("rmsprop_bnb", "bitsandbytes", "alpha=0.9"), ("adamw_torch_4bit", "torchao", "block_size=128")],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torchao
def test_what_transformers_hands_over_as_text_fails_natively(
    optim: str, package: str, optim_args: str
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    wide = nn.Linear(64, 64)  # torchao divides 4096 and more numbers into blocks
    args = TrainingArguments(optim=optim, optim_args=optim_args, use_cpu=True)
    kind, arguments = NativeTrainer.get_optimizer_cls_and_kwargs(args)
    wide(torch.ones(1, 64)).sum().backward()
    with pytest.raises(TypeError):
        kind(wide.parameters(), **arguments).step()


def test_galore_adafactor_layerwise_cannot_be_built_natively() -> None:
    pytest.importorskip("galore_torch")
    settings = {**LOW_RANK, "optim": "galore_adafactor_layerwise", "gradient_accumulation_steps": 1}
    with pytest.raises(ValueError, match="relative_step"):
        run_theirs(Job("distilbert", settings, rows=8))


@pytest.mark.gpu
@pytest.mark.parametrize("optim", NEEDS_GPU)
def test_optimizer_of_a_gpu(optim: str) -> None:
    run_both(Job("distilbert", {**LOW_RANK, "optim": optim, "use_cpu": False}, rows=30))


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_schedule(name: str) -> None:
    settings = {**BASE, "lr_scheduler_type": name, "lr_scheduler_kwargs": KWARGS.get(name)}
    if name in ("reduce_lr_on_plateau", "greedy"):
        settings |= {"metric_for_best_model": "loss"}
    theirs, _ = run_both(Job("distilbert", settings, rows=30))
    rates = {row["learning_rate"] for row in theirs.log_history if "learning_rate" in row}
    assert len(rates) > 1 or name == "constant"


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_a_metric_by_epochs(name: str) -> None:
    settings = {
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": KWARGS[name],
        "eval_strategy": "epoch",
        "eval_on_start": True,
        "num_train_epochs": 3,
        "metric_for_best_model": "eval_mean",
        "greater_is_better": True,
    }
    run_both(Job("distilbert", settings, rows=14))


def own(model: nn.Module) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    return optimizer, get_linear_schedule_with_warmup(optimizer, 2, 9)


@pytest.mark.parametrize(
    "optimizers", [own, lambda model: (own(model)[0], None)], ids=["both", "optimizer only"]
)
def test_an_optimizer_of_ones_own(optimizers: Any) -> None:
    run_both(Job("distilbert", BASE, rows=30, optimizers=optimizers))


class Halver:
    """An optimizer factory, as transformers wants them: called without arguments, then with the model."""

    def __call__(self, model: nn.Module, *, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=lr / 2)


@pytest.mark.parametrize(
    "given", [(torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.2}), (Halver, {"lr": 0.1})], ids=str
)
def test_an_optimizer_class_of_ones_own(given: Any) -> None:
    run_both(Job("distilbert", BASE, rows=30, optimizer_cls_and_kwargs=given))


def test_an_optimizer_of_ones_own_is_given_back_as_it_was() -> None:
    model = make_model("distilbert")
    optimizer, schedule = own(model)
    run_ours(
        Job("distilbert", BASE, rows=30, model=lambda: model, optimizers=lambda _: (optimizer, schedule))
    )
    assert not optimizer._optimizer_step_pre_hooks


def test_an_exact_run_with_another_optimizer_is_native_without_accumulation() -> None:
    job = Job("llama", {"optim": "adafactor", "label_smoothing_factor": 0.1}, rows=16, eval_rows=0)
    theirs, ours = run_theirs(job), run_ours(job, loss_normalization="exact")
    assert_identical(theirs, ours)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"optim": "galore_adamw"}, "optim_target_modules"),
        ({**LOW_RANK, "optim": "galore_adamw", "optim_target_modules": ["nowhere"]}, "No target modules"),
    ],
)
def test_what_an_optimizer_refuses_is_a_settings_error(settings: Any, says: str) -> None:
    with pytest.raises(hfbridge.SettingsError, match=says):
        run_ours(Job("distilbert", settings, rows=8))

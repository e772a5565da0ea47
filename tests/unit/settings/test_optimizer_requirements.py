"""Each optimizer is given what it reads, and nothing else."""

import pytest
from transformers.training_args import OptimizerNames

from hfbridge.errors import SettingsError
from hfbridge.settings import RULES, Settings
from hfbridge.settings.machine import OPTIMIZER_PACKAGES
from hfbridge.settings.optimizer_requirements import READERS

LOW_RANK = {"optim_target_modules": "all-linear"}


def problem_of(**values):
    """The only problem of a construction, as (subject, text)."""
    with pytest.raises(SettingsError) as caught:
        Settings(**values)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0].subject, caught.value.problems[0].text


def test_every_optimizer_that_is_carried_has_a_reader():
    assert set(READERS) == {name.value for name in OptimizerNames if RULES["optim"].supports(name.value)}


def test_every_package_is_known_by_the_name_to_install():
    assert {reader.package for reader in READERS.values()} - {""} == OPTIMIZER_PACKAGES.keys()


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("sgd", "momentum=0.9,nesterov=True"),
        ("sgd", "momentum=0.9, dampening=0.1"),
        ("adagrad", "lr_decay=0.1,eps=1e-6"),
        ("rmsprop", "alpha=0.9, centered=yes"),
        ("ademamix", "beta3=0.99,t_alpha=5"),
        ("adamw_torch_4bit", "bf16_stochastic_round=True"),
        ("schedule_free_sgd", "r=0.5,weight_lr_power=2"),
        ("stable_adamw", "max_lr=0.1,decouple_lr=True"),
        ("grokadamw", "lamb=1.0"),
        ("galore_adamw", "rank=4,update_proj_gap=2,scale=0.1,proj_type=right"),
        ("apollo_adamw", "proj=svd,scale_type=tensor,rank=1"),
        ("adamw_torch", ""),
    ],
)
def test_arguments_that_are_read_are_carried(optim, optim_args):
    more = LOW_RANK if READERS[optim].is_low_rank else {}
    assert Settings(optim=optim, optim_args=optim_args, **more).optim_args == optim_args


@pytest.mark.parametrize(
    ("optim", "optim_args", "text"),
    [
        ("sgd", "momentum", "'momentum' is not of the form key=value; write \"key=value,key=value\""),
        ("sgd", "momentum=", "'momentum=' is not of the form"),
        ("sgd", "momentum=0.9=1", "'momentum=0.9=1' is not of the form"),
        ("sgd", "momentum=0.9,", "'' is not of the form"),
        ("sgd", "momentum:0.9", "is not of the form"),
        ("sgd", "momentum=0.9,momentum=0.8", "momentum occurs twice"),
        ("sgd", "momentun=0.9", "possible are momentum, dampening, nesterov; did you mean momentum?"),
        ("sgd", "momentum=high", "momentum must be a number, not 'high'"),
        ("sgd", "momentum=nan", "momentum must be a number, finite, not 'nan'"),
        ("sgd", "momentum=0.9,nesterov=maybe", "nesterov must be True or False, not 'maybe'"),
        ("sgd", "momentum=-1", "sgd raises: Invalid momentum value"),
        ("sgd", "nesterov=True", "sgd raises: Nesterov momentum requires"),
        ("sgd", "weight_decay=0.1", "weight_decay stands in the parameter groups and wins; use that"),
        ("rmsprop", "alpha=-1", "rmsprop raises: Invalid alpha"),
        ("adagrad", "lr_decay=-1", "adagrad raises: Invalid lr_decay"),
        ("adamw_torch", "betas=0.9", "adamw_torch does not read it"),
        ("adafactor", "scale_parameter=True", "adafactor does not read it"),
        ("lion_8bit", "beta1=0.9", "lion_8bit does not read it"),
        ("rmsprop_bnb", "alpha=0.9", "transformers passes it as text"),
        ("rmsprop_bnb", "beta=0.9", "there are none"),
        ("adamw_torch_8bit", "block_size=64", "transformers passes it as text"),
        ("stable_adamw", "kahan_sum=False", "to transformers any text means True, even False: leave it out"),
        ("galore_adamw", "rank=0", "rank must be a whole number, 1 or more, not '0'"),
        ("galore_adamw", "rank=2.5", "rank must be a whole number, 1 or more, not '2.5'"),
        ("galore_adamw", "proj_type=top", "must be one of std, reverse_std, right, left, full"),
        ("apollo_adamw", "proj=pca", "must be one of random, svd"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(optim, optim_args, text):
    more = LOW_RANK if READERS[optim].is_low_rank else {}
    subject, said = problem_of(optim=optim, optim_args=optim_args, **more)
    assert subject == f'optim_args = "{optim_args}"'
    assert text in said


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adafactor", "galore_adamw_8bit", "apollo_adamw"])
def test_low_rank_optimizers_need_target_modules(optim):
    assert problem_of(optim=optim) == (
        f'optim = "{optim}"',
        'needs optim_target_modules, such as "all-linear" or ["attn", "mlp"]',
    )
    for targets in ("all-linear", "all_linear", r".*attn.*", ["attn", "mlp"]):
        assert Settings(optim=optim, optim_target_modules=targets).optim_target_modules == targets


def test_other_optimizers_do_not_read_target_modules():
    assert problem_of(optim_target_modules=["attn"]) == (
        "optim_target_modules = ['attn']",
        "adamw_torch_fused does not read it, only galore_adamw, galore_adafactor, galore_adamw_8bit, "
        "apollo_adamw; leave it out",
    )


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        ("*attn", "is no regular expression: nothing to repeat"),
        (["attn", "("], "'(' is no regular expression"),
        ([], "empty, it matches no layer"),
        ("", "empty, it matches no layer"),
        ([1], "must be a string or a list of strings or None, not list"),
        (3, "must be a string or a list of strings or None, not int"),
    ],
)
def test_target_modules_that_match_nothing_are_refused(targets, text):
    assert text in problem_of(optim="galore_adamw", optim_target_modules=targets)[1]


def test_a_refused_optimizer_is_one_problem():
    assert problem_of(optim="galore_adamw_layerwise")[0] == 'optim = "galore_adamw_layerwise"'
    with pytest.raises(SettingsError) as caught:
        Settings(optim="adamw_torc", optim_args="a=1", optim_target_modules="x")
    assert [problem.subject for problem in caught.value.problems] == ['optim = "adamw_torc"']

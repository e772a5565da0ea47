"""Variables of accelerate's that ask for more than the settings do are refused by name."""

import pytest

import hfbridge
from hfbridge import Settings, SettingsError
from hfbridge.settings import require_environment

FSDP, DEEPSPEED = {"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_USE_DEEPSPEED": "true"}


def ask(monkeypatch, variables, strategy="ddp", **settings):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    require_environment(Settings(**settings), strategy)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ACCELERATE_MIXED_PRECISION=bf16 .*bf16=True"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION=fp8 .*leave it out"),
        (FSDP, "ACCELERATE_USE_FSDP=true .*fsdp=True"),
        (DEEPSPEED, "ACCELERATE_USE_DEEPSPEED=true .*deepspeed="),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, 'torch_compile_backend="inductor"'),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM=true .*not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "1"}, "ACCELERATE_USE_PARALLELISM_CONFIG"),
    ],
)
def test_what_is_switched_on_unsaid_is_refused(monkeypatch, variables, named):
    with pytest.raises(SettingsError, match=named):
        ask(monkeypatch, variables)


def test_all_are_named_at_once(monkeypatch):
    with pytest.raises(SettingsError) as caught:
        ask(monkeypatch, {**FSDP, "ACCELERATE_MIXED_PRECISION": "fp16"})
    assert [problem.subject for problem in caught.value.problems] == [
        "ACCELERATE_MIXED_PRECISION=fp16",
        "ACCELERATE_USE_FSDP=true",
    ]


@pytest.mark.parametrize(
    ("variables", "strategy", "settings"),
    [
        ({}, "single", {}),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, "ddp", {}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ddp", {"bf16": True}),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_CPU": "True"}, "ddp", {}),
        (FSDP, "fsdp2", {}),
        (DEEPSPEED, "HFDeepSpeedStrategy", {}),
        ({"ACCELERATE_DYNAMO_BACKEND": "inductor"}, "single", {"torch_compile": True}),
        # Under mpirun, or by Lightning's launcher, there are ranks.
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "ddp", {}),
        (
            {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "a", "MASTER_PORT": "1", "PMI_SIZE": "2"},
            "single",
            {},
        ),
    ],
)
def test_what_the_settings_say_as_well_is_right(monkeypatch, variables, strategy, settings):
    ask(monkeypatch, variables, strategy, **settings)


def test_a_process_that_accelerate_has_left_alone(monkeypatch):
    variables = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(SettingsError, match=r"started one(.|\n)*torchrun --nproc-per-node=2"):
        ask(monkeypatch, variables, "single")


def test_a_trainer_asks(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(SettingsError, match="ACCELERATE_MIXED_PRECISION"):
        hfbridge.Trainer({"use_cpu": True})

"""Configurations of DeepSpeed: read, compared with the settings, or refused by the value that is wrong."""

import base64
import json
import sys

import pytest

import hfbridge
from hfbridge import MissingDependencyError, Settings, SettingsError
from hfbridge.settings.deepspeed_config import check_config, check_name, is_offloaded, preset, read_config
from hfbridge.settings.strategy_choice import choose_strategy

STAGE_2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_what_names_stand_for_is_right_with_any_settings(stage, offload):
    config = preset(stage, offload=offload)
    check_config(config, Settings(bf16=True, max_grad_norm=3.0, per_device_train_batch_size=7))
    assert is_offloaded(config) == offload
    assert ("offload_param" in config["zero_optimization"]) == (offload and stage == 3)
    assert check_name(config, stage=stage, offload=offload) == ""


@pytest.mark.parametrize("form", ["dict", "path", "json", "base64"])
def test_a_configuration_is_read_from_each_form(form, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(STAGE_2))
    forms = {
        "dict": STAGE_2,
        "path": tmp_path / "ds.json",
        "json": json.dumps(STAGE_2),
        "base64": base64.urlsafe_b64encode(json.dumps(STAGE_2).encode()).decode(),
    }
    found = read_config(forms[form])
    assert found == STAGE_2
    assert found is not STAGE_2


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "there is no such file"), ("{", "is no JSON"), ("[1]", "holds a list")],
)
def test_what_cannot_be_read_is_named(content, told, tmp_path):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=told) as caught:
        read_config(path)
    assert "ds.json" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "subject", "told"),
    [
        ({}, "zero_optimization", "must be a dictionary with a stage"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage", "must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage", "must be 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cup"}}},
            "zero_optimization.offload_optimizer.device",
            "did you mean cpu",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param.device",
            "needs stage 3",
        ),
        ({**STAGE_2, "amp": {"enabled": True}}, "amp", "use bf16"),
        ({**STAGE_2, "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel", "leave it out"),
        ({**STAGE_2, "fp16": {"enabled": True}}, "fp16.enabled", "fp16=False"),
        ({**STAGE_2, "bf16": {"enabled": True}}, "bf16.enabled", "bf16=False"),
        ({**STAGE_2, "gradient_clipping": 0.5}, "gradient_clipping", "max_grad_norm=1.0"),
        (
            {**STAGE_2, "optimizer": {"params": {"betas": [0.8, 0.9]}}},
            "optimizer.params.betas",
            "adam_beta1+adam_beta2=[0.9, 0.999]",
        ),
    ],
)
def test_what_is_wrong_is_named(config, subject, told):
    with pytest.raises(SettingsError) as caught:
        check_config(config, Settings())
    (problem,) = caught.value.problems
    assert problem.subject.startswith(f"{subject} = ")
    assert told in problem.text


def test_all_differences_are_one_error_before_anything_starts():
    config = {**STAGE_2, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8}
    settings = {"deepspeed": config, "use_cpu": True, "torch_compile": True}
    with pytest.raises(SettingsError) as caught:
        hfbridge.Trainer(settings)
    assert {problem.subject for problem in caught.value.problems} == {
        "train_micro_batch_size_per_gpu = 4",
        "gradient_accumulation_steps = 8",
        "torch_compile = True",
    }


def test_a_file_is_compared_as_well(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({**STAGE_2, "bf16": {"enabled": True}}))
    with pytest.raises(SettingsError, match=r"bf16=False in the settings"):
        hfbridge.Trainer({"deepspeed": str(tmp_path / "ds.json"), "use_cpu": True})


@pytest.mark.deepspeed
def test_name_and_configuration_agree_or_are_told():
    settings = {"deepspeed": STAGE_2, "use_cpu": True}
    assert choose_strategy(Settings(**settings), "deepspeed_stage_2", has_several=True).kind == "deepspeed"
    with pytest.raises(SettingsError, match="stage is 2, and the strategy's name says 3"):
        hfbridge.Trainer(settings, strategy="deepspeed_stage_3")
    with pytest.raises(SettingsError, match="offloads nothing"):
        hfbridge.Trainer(settings, strategy="deepspeed_stage_2_offload")
    with pytest.raises(SettingsError, match="conflicts with `deepspeed="):
        hfbridge.Trainer(settings, strategy="ddp")


def test_a_missing_package_is_told_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "hfbridge\[deepspeed\]"'):
        hfbridge.Trainer({"use_cpu": True}, strategy="deepspeed_stage_2")


def test_the_native_arguments_do_not_get_it():
    assert Settings(deepspeed=STAGE_2, use_cpu=True).as_training_arguments().deepspeed is None

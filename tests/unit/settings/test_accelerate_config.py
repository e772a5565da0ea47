"""The file of `accelerate config`: each key is carried, told, or refused by name."""

import ast
import inspect
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config import cluster
from accelerate.commands.config.config_args import ClusterConfig, SageMakerConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import TorchDynamoPlugin
from accelerate.utils.constants import FSDP_STATE_DICT_TYPE

from hfbridge import Settings, SettingsError, Trainer
from hfbridge.settings.accelerate_config import (
    DEEPSPEED_KEYS,
    DYNAMO_KEYS,
    FSDP_KEYS,
    KEYS,
    AccelerateConfig,
    read_accelerate_config,
)

# What `accelerate config` writes for one machine without GPUs, and the answer NO to every question.
PLAIN: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "NO",
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 1,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": False,
}
FSDP: dict[str, Any] = {
    "fsdp_version": 2,
    "fsdp_reshard_after_forward": True,
    "fsdp_offload_params": False,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "BertLayer,Other",
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_activation_checkpointing": False,
}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a config that differs from the plain one, and return its path."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "config.yaml"
        said = {key: value for key, value in {**PLAIN, **changes}.items() if value is not None}
        path.write_text(yaml.safe_dump(said))
        return path

    return write


def asked(section: str) -> set[str]:
    """Keys of a section that `accelerate config` asks for."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(cluster))):
        is_target = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
        if is_target and ast.unparse(node.value) == section:  # type: ignore[attr-defined]
            key = node.slice  # type: ignore[attr-defined]
            constant = key.right if isinstance(key, ast.BinOp) else key
            found.add(constant.value)
    assert found, section
    return found


def launched(prefix: str) -> set[str]:
    """Options of `accelerate launch` that begin with a prefix."""
    names = {action.dest for action in launch_command_parser()._actions}
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def test_every_key_of_accelerate_has_a_row() -> None:
    assert {f.name for kind in (ClusterConfig, SageMakerConfig) for f in fields(kind)} == set(KEYS)
    bare = {key.removeprefix("fsdp_") for key in asked("fsdp_config")} | launched("fsdp_")
    bare.add("ignored_modules")  # which no question asks for, and launch reads
    assert bare == set(FSDP_KEYS)
    assert asked("dynamo_config") | launched("dynamo_") == set(DYNAMO_KEYS)
    names = {"zero_stage", "zero3_init_flag", "zero3_save_16bit_model"}
    names |= {f"offload_{name}" for name in launched("offload_")}
    names |= {f"deepspeed_{name}" for name in launched("deepspeed_")}
    names |= {"gradient_accumulation_steps", "gradient_clipping"}
    assert asked("deepspeed_config") | names == set(DEEPSPEED_KEYS)


def test_a_plain_config_says_nothing_but_one_process(write: Any) -> None:
    config = read_accelerate_config(write())
    assert (config.settings, config.arguments, config.environment) == ({}, {"devices": 1}, {})
    assert config.notes == []


SAYINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "several GPUs": ({"distributed_type": "MULTI_GPU", "num_processes": 4}, {}, {"devices": 4}, {}),
    "as many as there are": ({"distributed_type": "MULTI_GPU", "num_processes": -1}, {}, {}, {}),
    "several CPUs": (
        {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True},
        {"use_cpu": True},
        {"devices": 2},
        {},
    ),
    "two machines": (
        {
            "distributed_type": "MULTI_GPU",
            "num_processes": 8,
            "num_machines": 2,
            "machine_rank": 1,
            "main_process_ip": "10.0.0.1",
            "main_process_port": 29511,
        },
        {},
        {"devices": 4, "num_nodes": 2},
        {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29511"},
    ),
    "some GPUs": (
        {"distributed_type": "MULTI_GPU", "num_processes": 2, "gpu_ids": "1,3"},
        {},
        {"devices": [1, 3]},
        {},
    ),
    "a port": ({"main_process_port": 29600}, {}, {"devices": 1}, {"MASTER_PORT": "29600"}),
    "bf16": ({"mixed_precision": "bf16"}, {"bf16": True}, {"devices": 1}, {}),
    "compiling": (
        {"dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "max-autotune", "use_dynamic": True}},
        {"torch_compile_backend": "inductor", "torch_compile_mode": "max-autotune"},
        {"devices": 1},
        {"ACCELERATE_DYNAMO_USE_DYNAMIC": "True"},
    ),
    "compiling, in the old spelling": (
        {"dynamo_backend": "EAGER"},
        {"torch_compile_backend": "eager"},
        {"devices": 1},
        {},
    ),
    "FSDP2": (
        {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": FSDP},
        {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "reshard_after_forward": True,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": "BertLayer,Other",
                "state_dict_type": "FULL_STATE_DICT",
                "cpu_ram_efficient_loading": True,
            },
        },
        {"devices": 2},
        {},
    ),
    "FSDP, by number": (
        {
            "distributed_type": "FSDP",
            "num_processes": 2,
            "fsdp_config": {"fsdp_sharding_strategy": 2, "fsdp_offload_params": True},
        },
        {
            "fsdp": True,
            "fsdp_config": {"version": 1, "reshard_after_forward": "SHARD_GRAD_OP", "cpu_offload": True},
        },
        {"devices": 2},
        {},
    ),
    "a file of DeepSpeed's": (
        {
            "distributed_type": "DEEPSPEED",
            "num_processes": 2,
            "deepspeed_config": {"deepspeed_config_file": "ds.json", "zero3_init_flag": False},
        },
        {"deepspeed": "ds.json"},
        {"devices": 2},
        {},
    ),
}


@pytest.mark.parametrize("name", SAYINGS)
def test_what_a_config_says(name: str, write: Any) -> None:
    changes, settings, arguments, environment = SAYINGS[name]
    config = read_accelerate_config(write(**changes))
    assert config.settings == settings
    assert config.arguments == arguments
    assert config.environment == environment


def test_deepspeeds_answers_become_its_configuration(write: Any) -> None:
    answers = {
        "zero_stage": 3,
        "offload_optimizer_device": "nvme",
        "offload_optimizer_nvme_path": "/nvme",
        "offload_param_device": "cpu",
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "zero3_save_16bit_model": True,
        "zero3_init_flag": True,
        "deepspeed_moe_layer_cls_names": "MixtralSparseMoeBlock",
    }
    config = read_accelerate_config(write(distributed_type="DEEPSPEED", deepspeed_config=answers))
    zero = config.settings.pop("deepspeed")["zero_optimization"]
    assert zero == {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"},
        "offload_param": {"device": "cpu"},
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    assert config.settings == {"gradient_accumulation_steps": 4, "max_grad_norm": 0.5}
    assert config.environment == {"ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "MixtralSparseMoeBlock"}


def test_accelerate_itself_reads_the_variables_for_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DYNAMO_KEYS["use_fullgraph"], "True")
    monkeypatch.setenv(DYNAMO_KEYS["use_dynamic"], "True")
    plugin = TorchDynamoPlugin(backend="eager")
    assert (plugin.fullgraph, plugin.dynamic) == (True, True)


def test_what_has_no_effect_is_told(write: Any) -> None:
    trainer = Trainer(
        {"output_dir": "out", "use_cpu": True},
        accelerate_config=write(debug=True, enable_cpu_affinity=True),
    )
    shown = " ".join(trainer.plan.notes)
    assert "debug in the accelerate config has no effect" in shown
    assert "enable_cpu_affinity" in shown


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp16": ({"mixed_precision": "fp16"}, "there is no gradient scaler"),
    "fp16, in the old spelling": ({"mixed_precision": None, "fp16": True}, "mixed_precision"),
    "fp8": ({"mixed_precision": "fp8"}, "8-bit training"),
    "fp8's own": ({"fp8_config": {"backend": "TE"}}, "fp8_config"),
    "a precision that there is not": ({"mixed_precision": "fp64"}, "must be no or bf16"),
    "TPU": ({"distributed_type": "XLA"}, "TPUs are not supported"),
    "TPU pods": ({"tpu_name": "pod", "tpu_use_cluster": True}, "tpu_name"),
    "downcasting": ({"downcast_bf16": "yes"}, "downcast_bf16"),
    "Megatron": ({"distributed_type": "MEGATRON_LM"}, "Megatron-LM"),
    "Megatron's own": ({"megatron_lm_config": {"tp": 2}}, "megatron_lm_config"),
    "other devices": ({"distributed_type": "MULTI_NPU", "num_processes": 2}, "CPUs and CUDA devices"),
    "SageMaker": ({"compute_environment": "AMAZON_SAGEMAKER", "ec2_instance_type": "ml"}, "SageMaker"),
    "MPI": ({"mpirun_config": {"mpirun_hostfile": "hosts"}}, "torchrun"),
    "parts of layers": (
        {"parallelism_config": {"parallelism_config_tp_size": 2}},
        "tensor and sequence parallelism are not supported",
    ),
    "an unknown key": ({"num_procesess": 2}, "did you mean num_processes"),
    "no number": ({"num_processes": "two"}, "must be a number"),
    "several of one": ({"num_processes": 2}, "set MULTI_GPU or MULTI_CPU"),
    "uneven machines": (
        {
            "distributed_type": "MULTI_GPU",
            "num_processes": 3,
            "num_machines": 2,
            "main_process_ip": "a",
            "main_process_port": 1,
        },
        "cannot be divided evenly",
    ),
    "machines without a meeting place": (
        {"distributed_type": "MULTI_GPU", "num_processes": 2, "num_machines": 2, "main_process_port": 1},
        "main_process_ip",
    ),
    "torchrun's rendezvous": (
        {
            "distributed_type": "MULTI_GPU",
            "num_processes": 2,
            "num_machines": 2,
            "main_process_ip": "a",
            "main_process_port": 1,
            "rdzv_backend": "c10d",
        },
        "torchrun",
    ),
    "GPUs by name": ({"gpu_ids": "first"}, "gpu_ids"),
    "GPUs and processes": (
        {"distributed_type": "MULTI_GPU", "num_processes": 2, "gpu_ids": "0,1,2"},
        "3 devices for 2",
    ),
    "regions": ({"dynamo_config": {"dynamo_use_regional_compilation": True}}, "the full model is compiled"),
    "an unknown key of a section": (
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_ofload_params": True}},
        "did you mean offload_params",
    ),
    "ignored modules": (
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_ignored_modules": "a"}},
        "FSDP shards all modules",
    ),
    "DeepSpeed's launchers": (
        {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"deepspeed_multinode_launcher": "pdsh", "deepspeed_hostfile": "hosts"},
        },
        "standard",
    ),
    "DeepSpeed's file and more": (
        {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"deepspeed_config_file": "ds.json", "zero_stage": 2},
        },
        "belongs in the file",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_carried_is_named(name: str, write: Any) -> None:
    changes, text = REFUSED[name]
    with pytest.raises(SettingsError, match="of the accelerate config") as caught:
        read_accelerate_config(write(**changes))
    assert text in " ".join(str(caught.value).split())
    assert all(problem.subject for problem in caught.value.problems)


def test_everything_wrong_is_in_one_error(write: Any) -> None:
    with pytest.raises(SettingsError, match="3 values of the accelerate config"):
        read_accelerate_config(write(mixed_precision="fp16", distributed_type="XLA", tpu_name="pod"))


def test_a_file_that_is_no_config_is_named(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("learning_rate: 1e-3\n")
    with pytest.raises(SettingsError, match="is no accelerate config"):
        read_accelerate_config(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_accelerate_config(tmp_path / "missing.yaml")


CPU: dict[str, Any] = {"output_dir": "out", "use_cpu": True}


def test_what_is_said_twice_must_agree(write: Any) -> None:
    changes = {"mixed_precision": "bf16", "distributed_type": "MULTI_CPU", "num_processes": 2}
    path = write(**changes, main_process_port=29611)
    with pytest.raises(SettingsError) as caught:
        Trainer({**CPU, "bf16": False}, devices=3, accelerate_config=path)
    found = {problem.subject: problem.text for problem in caught.value.problems}
    assert "conflicts with `bf16=False` in the settings; set only one" in found["mixed_precision = bf16"]
    assert "conflicts with `Trainer(devices=3)`; set only one" in found["num_processes = 2"]
    assert "MASTER_PORT" not in os.environ, "nothing was started"


def test_the_environment_must_agree(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1234")
    with pytest.raises(SettingsError, match="`MASTER_PORT=1234` in the environment"):
        Trainer(CPU, accelerate_config=write(main_process_port=29611))


def test_a_trainer_is_made_of_a_config(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    path = write(
        mixed_precision="bf16",
        distributed_type="MULTI_CPU",
        num_processes=4,
        num_machines=2,
        machine_rank=1,
        main_process_ip="127.0.0.1",
        main_process_port=29612,
    )
    trainer = Trainer({**CPU, "bf16": True}, devices="auto", accelerate_config=path)
    assert trainer.settings.bf16
    assert (trainer.num_devices, trainer.num_nodes, trainer.world_size) == (2, 2, 4)
    assert trainer.plan.strategy.kind == "ddp"
    environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    assert (environment.node_rank(), environment.main_port) == (1, 29612)
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_sharding_and_deepspeed_become_strategies(write: Any) -> None:
    path = write(distributed_type="FSDP", num_processes=2, fsdp_config=FSDP)
    assert Trainer(CPU, accelerate_config=path).plan.strategy.kind == "fsdp2"
    answers = {"zero_stage": 2, "gradient_accumulation_steps": 2}
    path = write(distributed_type="DEEPSPEED", num_processes=2, deepspeed_config=answers)
    trainer = Trainer(CPU, accelerate_config=path)
    assert trainer.plan.strategy.kind == "deepspeed"
    assert trainer.settings.gradient_accumulation_steps == 2
    with pytest.raises(SettingsError, match="`gradient_accumulation_steps=4` in the settings"):
        Trainer({**CPU, "gradient_accumulation_steps": 4}, accelerate_config=path)
    with pytest.raises(SettingsError, match="strategy"):
        Trainer(CPU, strategy="fsdp2", accelerate_config=path)


def test_what_the_settings_refuse_is_named_with_the_file(write: Any) -> None:
    sharded = {**FSDP, "fsdp_state_dict_type": FSDP_STATE_DICT_TYPE[-1]}
    path = write(distributed_type="FSDP", num_processes=2, fsdp_config=sharded)
    with pytest.raises(SettingsError, match="accelerate config") as caught:
        Trainer(CPU, accelerate_config=path)
    assert "checkpoints hold full weights" in " ".join(str(caught.value).split())


def test_a_config_is_applied_without_changing_what_it_is_applied_to() -> None:
    settings, arguments = Settings(output_dir="out"), {"devices": "auto"}
    config = AccelerateConfig("config.yaml", {"bf16": True}, {"devices": 2}, sources={})
    changed, with_devices = config.applied_to(settings, arguments, environment={})
    assert (changed.bf16, with_devices) == (True, {"devices": 2})
    assert (settings.bf16, arguments) == (False, {"devices": "auto"})

"""The keys of `accelerate config`'s file, and what becomes of each; read by accelerate.py. Names only."""

from collections.abc import Mapping

TPU = "there is no TPU here; leave it out"
SAGEMAKER = "SageMaker starts and runs the processes itself; use a config of LOCAL_MACHINE"
DEVICES = "hfbridge runs on CPUs and CUDA devices; say MULTI_GPU, MULTI_CPU, FSDP, DEEPSPEED or NO"
MEGATRON = 'Megatron-LM is not carried; use FSDP ("fsdp2") or DeepSpeed'
FP8 = "8-bit training is not carried; use mixed_precision: bf16"
MPI = "processes are not started by MPI; start them by torchrun, or leave it out"
PARTS = "the layers and rows of a model are not cut; leave it out, and share the weights by fsdp_config"
LAUNCHER = "hfbridge is started on each machine by itself; say deepspeed_multinode_launcher: standard"
REGIONS = "a model is compiled whole, as by the native Trainer; leave it out"
IGNORED = "FSDP shares all modules here; leave it out"
OFFLOADED = "activations are computed again and not offloaded; say activation_checkpointing in the settings"

KEYS: Mapping[str, str] = {
    "compute_environment": "checked",
    "distributed_type": "carried",
    "mixed_precision": "carried",
    "use_cpu": "carried",
    "debug": "told: hfbridge's own collectives are checked by other means",
    "num_processes": "carried",
    "machine_rank": "carried",
    "num_machines": "carried",
    "gpu_ids": "carried",
    "main_process_ip": "carried",
    "main_process_port": "carried",
    "rdzv_backend": "checked",
    "same_network": "nothing",
    "main_training_function": "nothing",
    "enable_cpu_affinity": "told: processes are not bound to cores; use taskset or numactl",
    "fp8_config": f"refused: {FP8}",
    "deepspeed_config": "carried",
    "fsdp_config": "carried",
    "parallelism_config": "checked",
    "megatron_lm_config": f"refused: {MEGATRON}",
    "mpirun_config": f"refused: {MPI}",
    "downcast_bf16": f"refused: {TPU}",
    "tpu_name": f"refused: {TPU}",
    "tpu_zone": f"refused: {TPU}",
    "tpu_use_cluster": f"refused: {TPU}",
    "tpu_use_sudo": f"refused: {TPU}",
    "command_file": f"refused: {TPU}",
    "commands": f"refused: {TPU}",
    "tpu_vm": f"refused: {TPU}",
    "tpu_env": f"refused: {TPU}",
    "dynamo_config": "carried",
    **dict.fromkeys(
        (
            "additional_args",
            "base_job_name",
            "ec2_instance_type",
            "iam_role_name",
            "image_uri",
            "profile",
            "py_version",
            "pytorch_version",
            "region",
            "sagemaker_inputs_file",
            "sagemaker_metrics_file",
            "transformers_version",
        ),
        f"refused: {SAGEMAKER}",
    ),
}
"""Each key of a config, and what becomes of it."""

DEEPSPEED_KEYS: Mapping[str, str] = {
    "deepspeed_config_file": "deepspeed",
    "zero_stage": "zero_optimization.stage",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer.nvme_path",
    "offload_param_device": "zero_optimization.offload_param.device",
    "offload_param_nvme_path": "zero_optimization.offload_param.nvme_path",
    "zero3_save_16bit_model": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "zero3_init_flag": "nothing: a named model is always read in parts under stage 3",
    "deepspeed_moe_layer_cls_names": "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
    "deepspeed_multinode_launcher": "checked",
    "deepspeed_hostfile": f"refused: {LAUNCHER}",
    "deepspeed_exclusion_filter": f"refused: {LAUNCHER}",
    "deepspeed_inclusion_filter": f"refused: {LAUNCHER}",
}
"""Each key of `deepspeed_config`, and what becomes of it."""

FSDP_KEYS: Mapping[str, str] = {
    "activation_checkpointing": "activation_checkpointing",
    "activation_checkpointing_offload": f"refused: {OFFLOADED}",
    "auto_wrap_policy": "auto_wrap_policy",
    "backward_prefetch": "backward_prefetch",
    "cpu_ram_efficient_loading": "cpu_ram_efficient_loading",
    "forward_prefetch": "forward_prefetch",
    "ignored_modules": f"refused: {IGNORED}",
    "min_num_params": "min_num_params",
    "offload_params": "cpu_offload",
    "reshard_after_forward": "reshard_after_forward",
    "sharding_strategy": "reshard_after_forward",
    "state_dict_type": "state_dict_type",
    "sync_module_states": "sync_module_states",
    "transformer_layer_cls_to_wrap": "transformer_layer_cls_to_wrap",
    "use_orig_params": "use_orig_params",
    "version": "version",
}
"""Each key of `fsdp_config`, without "fsdp_" before it, and its name in the settings' `fsdp_config`."""

DYNAMO_KEYS: Mapping[str, str] = {
    "backend": "torch_compile_backend",
    "mode": "torch_compile_mode",
    "use_fullgraph": "ACCELERATE_DYNAMO_USE_FULLGRAPH",
    "use_dynamic": "ACCELERATE_DYNAMO_USE_DYNAMIC",
    "use_regional_compilation": f"refused: {REGIONS}",
}
"""Each key of `dynamo_config`, without "dynamo_" before it, and what becomes of it."""

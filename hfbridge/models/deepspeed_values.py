"""The configuration of DeepSpeed as transformers and accelerate complete it.

when                            what
the run is set up               "auto" is filled from the settings; from now on `from_pretrained` and
                                `from_config` build a sharded model under ZeRO-3
the engine is made              what depends on model and steps
the run ends                    models are built whole again
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

from hfbridge.errors import SettingsError
from hfbridge.models.optimizers import NativeParts, make_optimizer


class ZeroConfig:
    """DeepSpeed's configuration for one run, alive for transformers until it is closed.

    Args:
        config: what the user gave; left alone.
        args: the settings, made in the running process group.

    Attributes:
        is_sharded: each rank holds a part of the weights only.

    Mirrors: transformers.integrations.deepspeed.deepspeed_init
    Proved by: tests/distributed/test_deepspeed.py
    """

    def __init__(self, config: dict[str, Any], args: TrainingArguments) -> None:
        self._args = args
        self._filled = HfTrainerDeepSpeedConfig(config)
        self._filled.trainer_config_process(args)
        self._dtype: torch.dtype = self._filled.dtype()
        self.is_sharded: bool = self._filled.is_zero3()
        self._plugin = DeepSpeedPlugin(hf_ds_config=self._filled)
        self._plugin.set_mixed_precision(args.mixed_precision)
        self._plugin.set_deepspeed_weakref()  # what it refers to lives as long as this object

    def for_training(self, model: nn.Module, *, max_steps: int) -> dict[str, Any]:
        """Complete the configuration for an engine that trains.

        Args:
            model: the Hugging Face model; its hidden size fills bucket sizes.
            max_steps: optimizer steps of the run.

        Raises:
            SettingsError: a value that is not "auto" differs from what the settings say; all are named.
        """
        try:
            self._filled.trainer_config_finalize(self._args, model, max_steps)
        except ValueError as error:
            raise SettingsError(f"The DeepSpeed configuration does not fit: {error}") from error
        if "optimizer" not in self._filled.config:
            self._filled.config["zero_allow_untested_optimizer"] = True
        return self._completed(model)

    def for_evaluation(self, model: nn.Module) -> dict[str, Any]:
        """Complete the configuration for an engine that does not train."""
        for section in ("optimizer", "lr_scheduler", "scheduler"):
            self._filled.del_config_sub_tree(section)
        return self.for_training(model, max_steps=0)

    def cast(self, inputs: Any) -> Any:
        """Bring floating-point inputs to the dtype that the engine computes in.

        Mirrors: transformers.Trainer._prepare_input
        """
        if isinstance(inputs, Mapping):
            return type(inputs)({name: self.cast(value) for name, value in inputs.items()})  # type: ignore[call-arg]
        if isinstance(inputs, (tuple, list)):
            return type(inputs)(self.cast(value) for value in inputs)
        if isinstance(inputs, Tensor) and (inputs.is_floating_point() or inputs.is_complex()):
            return inputs.to(self._dtype)
        return inputs

    def close(self) -> None:
        """Let models be built whole again."""
        unset_hf_deepspeed_config()

    def _completed(self, model: nn.Module) -> dict[str, Any]:
        """Do what accelerate does before it makes an engine."""
        plugin, args = self._plugin, self._args
        plugin.fill_match(
            "gradient_accumulation_steps",
            must_match=False,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
        )
        plugin.set_moe_leaf_modules(model)
        if "train_batch_size" not in self._filled.config:
            self._filled.config.setdefault("train_micro_batch_size_per_gpu", args.per_device_train_batch_size)
        micro_batch = plugin.get_value("train_micro_batch_size_per_gpu", args.per_device_train_batch_size)
        plugin.deepspeed_config_process(
            must_match=False,
            **{
                "gradient_clipping": 1.0,
                "zero_optimization.stage3_gather_16bit_weights_on_model_save": False,
                "train_micro_batch_size_per_gpu": micro_batch,
                "train_batch_size": micro_batch
                * plugin.get_value("gradient_accumulation_steps")
                * args.world_size,
            },
        )
        completed: dict[str, Any] = plugin.deepspeed_config
        return completed


def to_cpu_optimizer(optimizer: Optimizer, config: dict[str, Any]) -> Optimizer:
    """Exchange an optimizer whose state is to live in the host's memory for DeepSpeed's own.

    Args:
        optimizer: as the settings name it.
        config: completed.

    Mirrors: accelerate.Accelerator._prepare_deepspeed
    """
    offload = config["zero_optimization"].get("offload_optimizer", {})
    if offload.get("device", "none") == "none" or not config.get("zero_force_ds_cpu_optimizer", True):
        return optimizer
    exchanged: Optimizer = map_pytorch_optim_to_deepspeed(optimizer)
    return exchanged


def build_engine(
    parts: NativeParts,
    zero: ZeroConfig,
    train: Callable[..., tuple[Optimizer, Any]],
    *,
    max_steps: int,
) -> tuple[Optimizer, Any, bool]:
    """Make optimizer, engine and schedule, in this order: the schedule is for the engine's optimizer.

    Args:
        parts: make what the configuration does not name.
        zero: the configuration.
        train: makes the engine of model, configuration, optimizer and a function that makes a schedule.
        max_steps: optimizer steps of the run.

    Returns:
        What stands for the engine's optimizer; the schedule; and whether the engine steps it.

    Raises:
        SettingsError: configuration or optimizer do not fit.

    Mirrors: transformers.integrations.deepspeed.deepspeed_optim_sched
    """
    model: Any = parts.model
    config = zero.for_training(model, max_steps=max_steps)
    has_optimizer, has_schedule = "optimizer" in config, "scheduler" in config
    optimizer = None if has_optimizer else to_cpu_optimizer(make_optimizer(parts), config)

    def make_schedule(of: Optimizer) -> Any:
        return parts.create_scheduler(num_training_steps=max_steps, optimizer=of)

    parts.optimizer, schedule = train(
        model, config, optimizer, make_schedule if has_optimizer and not has_schedule else None
    )
    if schedule is not None:
        return parts.optimizer, schedule, True
    return parts.optimizer, parts.create_scheduler(num_training_steps=max_steps), False

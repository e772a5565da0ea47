"""DeepSpeed's engine, seen from a loop that clips and steps after each backward.

As in the HF Trainer the engine steps inside the backward of a step's last micro-batch, and what the loop
calls afterwards finds everything done.
"""

import argparse
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from torch import Tensor, nn
from torch.optim import Optimizer

from hfbridge.errors import CheckpointError
from hfbridge.strategies.sharing import Sharing
from hfbridge.utilities.imports import require


class EngineSharing(Sharing):
    """How ranks share a model under DeepSpeed.

    Args:
        strategy: the strategy that it belongs to.
        config: of DeepSpeed, "auto" not yet filled.
        is_sharded: each rank holds a part of the weights only: stage 3.

    Attributes:
        engine: DeepSpeed's engine; `None` until a run has made one.
    """

    replaces_parameters = True  # those of the optimizer, by the parts of each rank

    def __init__(self, strategy: Any, *, config: dict[str, Any], is_sharded: bool) -> None:
        super().__init__(strategy)
        self.engine: Any = None
        self._destroy: Any = None
        self._is_last = True
        self._has_begun = False
        self._told = strategy
        self.is_sharded, self.zero_config = is_sharded, config
        self.save_parts = self._save_parts

    def autocasts(self, model: nn.Module, *, trains: bool) -> bool:
        """Whether bf16 is for autocast to do; an engine casts the weights, for evaluations after it, too."""
        return not trains and not self.is_sharded and self.forward_through(model) is model

    def train(
        self,
        model: nn.Module,
        config: dict[str, Any],
        optimizer: Optimizer | None,
        schedule: Callable[[Any], Any] | None,
    ) -> tuple[Optimizer, Any]:
        """Make an engine that trains.

        Args:
            model: the Hugging Face model.
            config: completed.
            optimizer: `None` has the engine make the one its configuration names.
            schedule: makes a schedule for the optimizer that the engine makes; the engine steps it.

        Returns:
            What stands for the engine's optimizer, and the schedule that the engine steps, if it has one.
        """
        parameters = None if optimizer is not None else [p for p in model.parameters() if p.requires_grad]
        engine = self._make(
            model, config, optimizer=optimizer, model_parameters=parameters, lr_scheduler=schedule
        )
        return EngineOptimizer(engine.optimizer), engine.lr_scheduler

    def init_inference(self, model: nn.Module, config: dict[str, Any]) -> None:
        """Make an engine that evaluates, where each rank has a part of the weights only and none is there."""
        if self.is_sharded and (self.engine is None or self.engine.module is not model):
            self._make(model, config)

    def forward_through(self, model: nn.Module) -> Any:
        """Return the engine."""
        return self.engine if self.wraps(model) else model

    def wraps(self, model: nn.Module) -> bool:
        """Whether the engine holds a model."""
        return self.engine is not None and self.engine.module is model

    def before_forward(self) -> None:
        """Prepare for the first forward that trains."""
        if not self._has_begun:
            self._has_begun = True
            self._forget_order()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Have the engine add gradients up, and not step."""
        self._is_last = False
        try:
            yield
        finally:
            self._is_last = True

    def backward(self, loss: Tensor, **arguments: Any) -> None:
        """Run a micro-batch's backward, and with the step's last one the optimizer step.

        Args:
            loss: scalar.
            **arguments: further ones of the engine's `backward`.

        Mirrors: accelerate.utils.deepspeed.DeepSpeedEngineWrapper.backward
        """
        self.engine.set_gradient_accumulation_boundary(is_boundary=self._is_last)
        self.engine.backward(loss, **{**arguments, "scale_wrt_gas": False})
        if self._is_last:
            self.engine.step()

    def clip(self, model: nn.Module, max_norm: float) -> Tensor | None:
        """Return the norm by which the engine has clipped, scalar; `None` if it has not looked.

        Mirrors: accelerate.Accelerator.clip_grad_norm_
        """
        norm = self.engine.get_global_grad_norm()
        return norm if norm is None or isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64)

    @contextmanager
    def full_params(self, model: nn.Module) -> Iterator[None]:
        """Hold all weights on each rank for a while, where forwards find them; all ranks enter and leave."""
        if not is_in_parts(model):
            yield
            return
        deepspeed = require("deepspeed", extra="deepspeed", for_='strategy="deepspeed"')
        offload = self._offload if self.wraps(model) else None
        if offload is not None:
            offload._remove_module_hooks()
            offload.forward_hooks, offload.backward_hooks = [], []
        try:
            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                yield
        finally:
            if offload is not None:
                offload.setup_zero_stage3_hooks()

    def weights(self, model: nn.Module) -> Mapping[str, Tensor] | None:
        """Gather the whole `state_dict` of the model on the first rank, layer by layer.

        Mirrors: accelerate.Accelerator.get_state_dict
        """
        if not is_in_parts(model):
            return copied(model.state_dict()) if self._told.local_rank == 0 else None
        found: Mapping[str, Tensor] | None = self.engine._zero3_consolidated_16bit_state_dict()
        return found

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Put whole weights, which every rank has read, into the model."""
        if is_in_parts(model):
            deepspeed = require("deepspeed", extra="deepspeed", for_='strategy="deepspeed"')
            with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
                if self._told.is_global_zero:
                    model.load_state_dict(weights)
            for name, buffer in model.named_buffers():
                if name in weights:
                    buffer.copy_(weights[name])
        else:
            model.load_state_dict(weights)

    @property
    def keeps_schedule(self) -> bool:  # type: ignore[override]
        """Whether the engine steps the schedule, and keeps its state."""
        return self.engine is not None and self.engine.lr_scheduler is not None

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
        """Return nothing: it is in the parts."""
        return None

    def load_parts(self, folder: str) -> None:
        """Have the engine read weights, optimizer and its schedule.

        Raises:
            CheckpointError: other ranks wrote it than there are, or it is not whole.

        Mirrors: transformers.integrations.deepspeed.deepspeed_load_checkpoint
        """
        latest = Path(folder, "latest")
        tag = latest.read_text().strip() if latest.exists() else ""
        wrote = len(list(Path(folder, tag).glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"))) if tag else 0
        if wrote != self._told.world_size:
            raise CheckpointError(
                f"{folder!r} holds the optimizer's parts of {wrote} ranks, and this run has "
                f"{self._told.world_size}. Resume with {wrote}, or begin a new run with its weights."
            )
        path, _ = self.engine.load_checkpoint(folder, load_module_strict=not _has_adapter(self.engine.module))
        if path is None:
            raise CheckpointError(f"DeepSpeed could not read {folder!r}; its messages say why.")

    def _save_parts(self, folder: Path) -> None:
        """Have the engine write what each rank holds."""
        self.engine.save_checkpoint(str(folder), exclude_frozen_parameters=_has_adapter(self.engine.module))

    @property
    def _offload(self) -> Any:
        """The part of an engine of stage 3 whose hooks fetch weights."""
        return getattr(self.engine.optimizer, "parameter_offload", self.engine.optimizer)

    def _forget_order(self) -> None:
        """Have stage 3 learn anew in which order weights are wanted; what was tried before was not it."""
        if self.is_sharded:
            coordinator = self._offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def _make(self, model: nn.Module, config: dict[str, Any], **parts: Any) -> Any:
        """Make an engine; one that an earlier run has left gives way."""
        self._end()
        deepspeed = require("deepspeed", extra="deepspeed", for_='strategy="deepspeed"')
        self._has_begun = False
        index = self._strategy.root_device.index
        self.engine, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=-1 if index is None else index),
            model=model,
            config_params=config,
            dist_init_required=False,
            **parts,
        )
        # Its hooks keep an engine, with model and buffers, alive for ever unless it is destroyed.
        self._destroy = weakref.finalize(self._strategy, self.engine.destroy)
        self._destroy.atexit = False
        return self.engine

    def _end(self) -> None:
        if self.engine is not None:
            self._destroy()
            self.engine = self._destroy = None


class EnginePrecision(Precision):
    """Have the engine run a backward, between Lightning's hooks; it scales what is to be scaled.

    Args:
        sharing: holds the engine.
    """

    def __init__(self, sharing: EngineSharing) -> None:
        self._sharing = sharing

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run the backward of one micro-batch, unless the module's `training_step` has done so."""
        if not getattr(model, "has_run_backward", False):
            self._sharing.backward(tensor, **kwargs)


class UndividedPrecision(DeepSpeedPrecision):
    """Lightning's precision for other modules; the engine divides nothing that Lightning has divided."""

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run the backward of one micro-batch."""
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class EngineOptimizer(Optimizer):
    """What stands for an engine's optimizer in a loop: the engine itself has stepped when `step` is called.

    Args:
        optimizer: of the engine, around the one that was given to it.

    Mirrors: accelerate.utils.deepspeed.DeepSpeedOptimizerWrapper
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.__setstate__({})  # hooks, without any groups of its own

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of the engine's optimizer."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """That of this rank's share."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Those of the optimizer that the engine was given."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        defaults: dict[str, Any] = inner.defaults
        return defaults

    def step(self, closure: Any = None) -> Any:
        """Run the closure, in which the engine steps."""
        return None if closure is None else closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: the engine has cleared the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Return the engine's state of this rank's share."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state


def _has_adapter(model: nn.Module) -> bool:
    return any(kind.__name__ == "PeftModel" for kind in type(model).__mro__)


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy weights out of the engine's flat buffers; what is tied stays tied."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in weights.values():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
    return {name: copies[tensor.data_ptr(), tensor.shape] for name, tensor in weights.items()}


def is_in_parts(model: nn.Module) -> bool:
    """Whether each rank holds a part of a model's weights only, by ZeRO-3."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())

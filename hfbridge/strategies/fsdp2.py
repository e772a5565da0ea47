"""FSDP2: every rank holds a slice of each weight, gradient and optimizer state.

when                  what
shard                 layers, then the input embedding, then final norm and head together, then the rest:
                      each is gathered when its forward or backward runs
a micro-batch         gradients are exchanged with the last one of a step
bf16                  weights are gathered, and gradients exchanged, in bfloat16; what is trained is float32
generate              gathers the model's own weights as a forward does
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import strategies
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from hfbridge.strategies.sharded import ShardedStrategy
from hfbridge.strategies.sharing import Sharing, is_shared_module
from hfbridge.strategies.wrap_policy import TRANSFORMER_BASED, find_units, has_no_tied_parameters, recompute


class FSDP2Strategy(ShardedStrategy, strategies.ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with all ranks data-parallel, and the HF Trainer's sharding.

    Args:
        reshard_after_forward: let go of a layer's weights after its forward, and gather them again for its
            backward.
        cpu_offload: keep weights, gradients and optimizer in CPU memory.
        auto_wrap_policy: what is gathered at a time: "TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP".
        transformer_layer_cls_to_wrap: names of layer classes; `None` for those the model names itself.
        min_num_params: of "SIZE_BASED_WRAP".
        activation_checkpointing: compute layers' activations again in the backward pass.
        process_group_backend: "gloo" or "nccl"; `None` is the device's.
        timeout: what a collective waits for the other ranks.

    Attributes:
        sharing: how the ranks share the model.

    Mirrors: accelerate.utils.fsdp_utils.fsdp2_prepare_model
    Proved by: tests/distributed/test_fsdp.py
    """

    def __init__(
        self,
        *,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        auto_wrap_policy: str = TRANSFORMER_BASED,
        transformer_layer_cls_to_wrap: Sequence[str] | None = None,
        min_num_params: int = 0,
        activation_checkpointing: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.sharing = FSDP2Sharing(
            self,
            reshards=reshard_after_forward,
            offloads=cpu_offload,
            units={
                "policy": auto_wrap_policy,
                "layer_classes": transformer_layer_cls_to_wrap,
                "min_num_params": min_num_params,
            },
            recomputes=activation_checkpointing,
        )
        self._offloads = cpu_offload

    def setup_environment(self) -> None:
        """Open the process group and name all its ranks data-parallel."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def teardown(self) -> None:
        """Give the model back with nothing gathered."""
        module: Any = self.lightning_module
        if is_shared_module(module) and module.is_built:
            reshard(module.model)
        super().teardown()

    def _get_process_group_backend(self) -> str:
        """Gradients that live in CPU memory are clipped there."""
        backend = super()._get_process_group_backend()
        return "cpu:gloo,cuda:nccl" if self._offloads and backend == "nccl" else backend


class FSDP2Sharing(Sharing):
    """A model of which every rank holds a slice of each weight.

    Args:
        strategy: the strategy that it belongs to.
        reshards: gathered layers are let go of after their forward.
        offloads: slices live in CPU memory.
        units: what is gathered at a time; arguments of `find_units`.
        recomputes: layers compute their activations again.
    """

    is_sharded = replaces_parameters = loads_sharded = True

    def __init__(
        self,
        strategy: strategies.ModelParallelStrategy,
        *,
        reshards: bool,
        offloads: bool,
        units: Mapping[str, Any],
        recomputes: bool,
    ) -> None:
        super().__init__(strategy)
        self._reshards, self._offloads, self._recomputes = reshards, offloads, recomputes
        self._units = units

    def autocasts(self, model: nn.Module, *, trains: bool) -> bool:
        """Leave bf16 to FSDP's own mixed precision, as the HF Trainer does."""
        return False

    def shard(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        """Cut the model into slices, in place; one that is cut already is left as it is."""
        if isinstance(model, FSDPModule):
            reshard(model)
            if not self._offloads:
                model.to(self._strategy.root_device)  # from where it was read to
            return
        strategy: Any = self._strategy
        mesh: DeviceMesh = strategy.device_mesh["data_parallel"]
        if dtype is not None:
            _keep_in_float32(model)
        policy = MixedPrecisionPolicy() if dtype is None else MixedPrecisionPolicy(dtype, dtype, dtype)
        offload: OffloadPolicy = OffloadPolicy()
        if self._offloads and mesh.device_type != "cpu":
            offload = CPUOffloadPolicy()
        given: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
        units = find_units(model, **self._units)
        if self._recomputes:
            recompute(units)
        for module in units:
            fully_shard(module, reshard_after_forward=self._reshards, **given)
        _shard_ends(model, reshards=self._reshards, given=given)
        fully_shard(model, **given)
        for module in model.modules():
            if hasattr(type(module), "generate"):
                module._is_fsdp_managed_module = True  # type: ignore[assignment]
        if hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")

    def forward_through(self, model: nn.Module) -> Any:
        """Return the model: its hooks gather what a forward needs."""
        return model

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Add gradients up on each rank, and do not exchange them."""
        module: Any = self._strategy.lightning_module
        module.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.model.set_requires_gradient_sync(True)

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Clip by the norm over all ranks' slices."""
        norm = super().clip(model, max_norm)
        assert norm is not None
        return _whole(norm)

    def weights(self, model: nn.Module) -> Mapping[str, Tensor] | None:
        """Gather the weights one by one; tied ones stay one tensor."""
        is_first = dist.get_rank() == 0
        whole: dict[int, Tensor] = {}
        found: dict[str, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in whole:
                gathered = _whole(tensor.detach())
                whole[id(tensor)] = gathered.cpu() if is_first else gathered.new_empty(0)
            if is_first:
                found[name] = whole[id(tensor)]
        return found if is_first else None

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Take this rank's slices of whole weights."""
        own = model.state_dict(keep_vars=True)
        model.load_state_dict({name: _slice_like(own.get(name), tensor) for name, tensor in weights.items()})

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
        """Gather every state one by one."""
        is_first = dist.get_rank() == 0
        state = optimizer.state_dict()

        def gather(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            gathered = _whole(value)
            return (
                gathered.cpu() if is_first and isinstance(value, DTensor) else gathered if is_first else None
            )

        found = {
            number: {name: gather(value) for name, value in of_one.items()}
            for number, of_one in state["state"].items()
        }
        return {"state": found, "param_groups": state["param_groups"]} if is_first else None

    def load_optimizer_state(self, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Take this rank's slices of whole states."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        sliced = {}
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state["state"]:
                sliced[number] = {
                    name: _slice_like(parameter, value) if _has_shape_of(parameter, value) else value
                    for name, value in state["state"][number].items()
                }
        optimizer.load_state_dict({**state, "state": sliced})


def reshard(model: nn.Module) -> None:
    """Let go of what a forward without a backward has left gathered: head, norm, and what is in no unit."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _shard_ends(model: nn.Module, *, reshards: bool, given: Mapping[str, Any]) -> None:
    """Have the embedding, and what runs last, gathered alone."""
    first, last = ([m for m in group if not _is_cut(m)] for group in _ends(model))
    if first and has_no_tied_parameters(model, first):
        fully_shard(first, reshard_after_forward=reshards, **given)
    if last and has_no_tied_parameters(model, last):
        fully_shard(last, reshard_after_forward=False, **given)


def _is_cut(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _ends(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Find the input embedding, and what runs last: final norm and head; a tied embedding is with them."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    prefix: str = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else model
    norms = [m for m in base.children() if "Norm" in type(m).__name__] if isinstance(base, nn.Module) else []
    first, last = ([] if module is None else [module] for module in (embedding, head))
    weight = getattr(embedding, "weight", None)
    if weight is not None and weight is getattr(head, "weight", None):
        return [], [*norms[-1:], *first, *last]
    return first, [*norms[-1:], *last]


def _keep_in_float32(model: nn.Module) -> None:
    """Train float32 weights when they are gathered in another dtype."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.to(torch.float32)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _slice_like(own: Tensor | None, whole: Tensor) -> Tensor:
    """Cut from a whole tensor what this rank holds of it; nothing is sent."""
    if not isinstance(own, DTensor) or isinstance(whole, DTensor):
        return whole
    device = own.device_mesh.device_type
    return distribute_tensor(whole.to(device), own.device_mesh, own.placements, src_data_rank=None)


def _has_shape_of(parameter: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0

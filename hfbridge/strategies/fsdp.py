"""FSDP, the first version: every rank holds a part of each unit's flattened weights.

when                  what
shard                 FullyShardedDataParallel around the Hugging Face model, and around its units inside;
                      the model's own calls go through the wrapper from then on
a micro-batch         gradients are exchanged with the last one of a step
bf16                  float32 weights are gathered, and gradients exchanged, in bfloat16; the forward runs
                      under autocast, too
generate              gathers the weights outside of the units; the units gather their own
weights               gathered unit by unit
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import strategies
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
    StateDictType,
)
from torch.optim import Optimizer

from hfbridge.errors import SettingsError
from hfbridge.strategies.sharded import ShardedStrategy
from hfbridge.strategies.sharing import Sharing, for_hfmodule
from hfbridge.strategies.wrap_policy import TRANSFORMER_BASED, find_units, recompute

_WRAPPER, _RECOMPUTED = "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."


@for_hfmodule("model_sharded_context")
class FSDPStrategy(ShardedStrategy, strategies.FSDPStrategy):  # type: ignore[misc]  # any precision plugin
    """Lightning's FSDPStrategy, with the Hugging Face model wrapped as by the HF Trainer, on GPUs and CPUs.

    Args:
        reshard_after_forward: the sharding strategy: "full_shard", "shard_grad_op", "no_shard",
            "hybrid_shard", "hybrid_shard_zero2".
        cpu_offload: keep weights, gradients and optimizer in CPU memory.
        auto_wrap_policy: what is gathered at a time: "TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP".
        transformer_layer_cls_to_wrap: names of layer classes; `None` for those the model names itself.
        min_num_params: of "SIZE_BASED_WRAP".
        activation_checkpointing: compute layers' activations again in the backward pass.
        sync_module_states: all ranks begin with the weights of the first.
        forward_prefetch: gather the next unit while one computes.
        backward_prefetch: "BACKWARD_PRE", "BACKWARD_POST" or "NO_PREFETCH": when a backward gathers the next.
        limit_all_gathers: keep ranks from gathering too far ahead.
        process_group_backend: "gloo" or "nccl"; `None` is the device's.
        timeout: what a collective waits for the other ranks.

    Attributes:
        sharing: how the ranks share the model.

    Mirrors: accelerate.Accelerator.prepare_model
    Proved by: tests/distributed/test_fsdp.py
    """

    def __init__(
        self,
        *,
        reshard_after_forward: str = "full_shard",
        cpu_offload: bool = False,
        auto_wrap_policy: str = TRANSFORMER_BASED,
        transformer_layer_cls_to_wrap: Sequence[str] | None = None,
        min_num_params: int = 0,
        activation_checkpointing: bool = False,
        sync_module_states: bool = True,
        forward_prefetch: bool = False,
        backward_prefetch: str = "NO_PREFETCH",
        limit_all_gathers: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.sharing = FSDPSharing(
            self,
            wrapping={
                "sharding_strategy": ShardingStrategy[reshard_after_forward.upper()],
                "sync_module_states": sync_module_states,
                "forward_prefetch": forward_prefetch,
                "backward_prefetch": BackwardPrefetch.__members__.get(backward_prefetch.upper()),
                "limit_all_gathers": limit_all_gathers,
            },
            offloads=cpu_offload,
            units={
                "policy": auto_wrap_policy,
                "layer_classes": transformer_layer_cls_to_wrap,
                "min_num_params": min_num_params,
            },
            recomputes=activation_checkpointing,
        )

    def model_sharded_context(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Do nothing: HFModule uses `sharing`."""
        return nullcontext()

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wrap a module that is no HFModule, as Lightning does."""
        if self.root_device.type == "cpu":
            raise SettingsError(
                f'strategy="fsdp" on CPUs trains an HFModule, and `{type(model).__name__}` is none. Use '
                '"fsdp2" or "ddp".'
            )
        return super()._setup_model(model)


class _Wrapper(FullyShardedDataParallel):
    """What gathers the weights that lie in no unit around each forward."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Run the model's forward."""
        model: Any = self.module
        with model.inside():
            return super().forward(*arguments, **named)


class ShardedModel(nn.Module):
    """What a Hugging Face model is besides its own class once it is sharded; all ranks call it together.

    It runs, generates, counts its weights, and gives and takes them as if it had them all.
    """

    _wrapper: _Wrapper
    _outline: dict[str, Tensor]  # the whole state_dict without any data; tied weights are one tensor
    _is_inside: bool

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be the model as it is, for its wrapper."""
        before, self.__dict__["_is_inside"] = self._is_inside, True
        try:
            yield
        finally:
            self.__dict__["_is_inside"] = before

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run a forward, with the weights gathered."""
        return (
            super().__call__(*arguments, **named) if self._is_inside else self._wrapper(*arguments, **named)
        )

    def generate(self, *arguments: Any, **named: Any) -> Any:
        """Generate; the weights that lie in no unit are gathered once."""
        whole = FullyShardedDataParallel.summon_full_params(self._wrapper, recurse=False, writeback=False)
        with whole, self.inside():
            return super().generate(*arguments, **named)  # type: ignore[misc]

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the elements of the whole weights.

        Mirrors: transformers.PreTrainedModel.num_parameters
        """
        is_embedding = {
            f"{_plain(name)}.weight" for name, m in self.named_modules() if isinstance(m, nn.Embedding)
        }
        return sum(
            self._outline[_plain(name)].numel()
            for name, parameter in self.named_parameters()
            if not (exclude_embeddings and _plain(name) in is_embedding)
            and (parameter.requires_grad or not only_trainable)
        )

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Name modules as if nothing was wrapped, as the whole `state_dict` does."""
        is_whole = memo is None and not self._is_inside
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if not is_whole:
                yield name, module
            elif not isinstance(module, FullyShardedDataParallel):
                yield f"{name}.".replace(_WRAPPER, "").removesuffix("."), module

    def named_parameters(self, *arguments: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Name parameters by the wrappers that they are in, as the HF Trainer's optimizers do."""
        with self.inside():
            return iter(list(super().named_parameters(*arguments, **named)))

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        """Gather the whole weights; with `keep_vars=True` say what there is, and gather nothing."""
        if self._is_inside or arguments or named.get("destination") is not None:
            return super().state_dict(*arguments, **named)
        if named.get("keep_vars"):
            return dict(self._outline)
        with _whole_states(self._wrapper, on_all_ranks=True):
            return self._wrapper.state_dict()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take this rank's parts of whole weights."""
        with _whole_states(self._wrapper, on_all_ranks=True), self.inside():
            return self._wrapper.load_state_dict(state_dict, strict=strict)


class GatheredSharing(Sharing):
    """How states are gathered where FullyShardedDataParallel is around the model, or around the HFModule."""

    is_sharded = replaces_parameters = True
    prefix = ""  # of the model's names in those of what is wrapped

    def wrapper(self, model: nn.Module) -> FullyShardedDataParallel:
        """Return what is around the model."""
        raise NotImplementedError

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Clip by the norm over all ranks' parts."""
        return self.wrapper(model).clip_grad_norm_(max_norm if max_norm > 0 else float("inf"))

    def weights(self, model: nn.Module) -> Mapping[str, Tensor] | None:
        """Gather the weights unit by unit; tied ones are one tensor."""
        wrapper = self.wrapper(model)
        with _whole_states(wrapper, on_all_ranks=False):
            found = wrapper.state_dict()
        if dist.get_rank() != 0:
            return None
        own = {n.removeprefix(self.prefix): t for n, t in found.items() if n.startswith(self.prefix)}
        whole: dict[int, Tensor] = {}
        identities = self._identities(model)
        return {name: whole.setdefault(identities.get(name, id(t)), t) for name, t in own.items()}

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Take this rank's parts of whole weights; those without data stay, as below adapters."""
        wrapper = self.wrapper(model)
        read = {f"{self.prefix}{name}": tensor for name, tensor in weights.items() if not tensor.is_meta}
        with _whole_states(wrapper, on_all_ranks=True):
            wrapper.load_state_dict(read, strict=False)

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
        """Gather every state, and number the parameters as the optimizer does by itself."""
        wrapper, names = self.wrapper(model), self._names(model, optimizer)
        with _whole_states(wrapper, on_all_ranks=False):
            found = FullyShardedDataParallel.optim_state_dict(wrapper, optimizer)
        if dist.get_rank() != 0:
            return None
        state = {number: found["state"][name] for number, name in enumerate(names) if name in found["state"]}
        return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}

    def load_optimizer_state(self, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Take this rank's parts of whole states."""
        wrapper, names = self.wrapper(model), iter(self._names(model, optimizer))
        groups: list[dict[str, Any]] = []
        name_of: dict[int, str] = {}
        for group in state["param_groups"]:
            name_of |= {number: next(names) for number in group["params"]}
            groups.append({**group, "params": [name_of[number] for number in group["params"]]})
        by_name = {name_of[number]: value for number, value in state["state"].items()}
        with _whole_states(wrapper, on_all_ranks=True):
            sharded = FullyShardedDataParallel.optim_state_dict_to_load(
                wrapper, optimizer, {"state": by_name, "param_groups": groups}
            )
        optimizer.load_state_dict(sharded)

    def _identities(self, model: nn.Module) -> dict[str, int]:
        """Give tied weights one number."""
        return {_plain(n): id(p) for n, p in model.named_parameters(remove_duplicate=False)}

    def _names(self, model: nn.Module, optimizer: Optimizer) -> list[str]:
        """Name an optimizer's parameters, in its order, as what is wrapped does."""
        names = {id(p): f"{self.prefix}{_plain(name)}" for name, p in model.named_parameters()}
        return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


class FSDPSharing(GatheredSharing):
    """A model of which every rank holds a part of each unit.

    Args:
        strategy: the strategy that it belongs to.
        wrapping: arguments of `FullyShardedDataParallel`.
        offloads: parts live in CPU memory.
        units: what is gathered at a time; arguments of `find_units`.
        recomputes: layers compute their activations again.
    """

    def __init__(
        self,
        strategy: strategies.FSDPStrategy,
        *,
        wrapping: Mapping[str, Any],
        offloads: bool,
        units: Mapping[str, Any],
        recomputes: bool,
    ) -> None:
        super().__init__(strategy)
        self._wrapping, self._offloads = wrapping, offloads
        self._units, self._recomputes = units, recomputes

    def shard(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        """Wrap units and model, in place; one that is wrapped already is left as it is."""
        if isinstance(model, ShardedModel):
            return
        if dtype is not None:
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(torch.float32)
        device = self._strategy.root_device
        outline = make_outline(model)
        units = find_units(model, **self._units)
        if self._recomputes:
            recompute(units)
        chosen = {id(module) for module in (*units, *_trained_layers(model))}

        def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
            return recurse or id(module) in chosen

        wrapping = dict(self._wrapping)
        if device.type == "cpu" and wrapping["sync_module_states"]:
            wrapping["sync_module_states"] = False  # requires weights on a GPU
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), src=0)
        for module in model.modules():
            if hasattr(type(module), "generate"):
                module._is_fsdp_managed_module = True  # type: ignore[assignment]
        wrapper = _Wrapper(
            model,
            auto_wrap_policy=policy,
            cpu_offload=CPUOffload(offload_params=self._offloads and device.type != "cpu"),
            mixed_precision=None if dtype is None else MixedPrecision(dtype, dtype, dtype),
            use_orig_params=True,
            device_id=device,
            **wrapping,
        )
        kind = type(model)
        bases = (ShardedModel, kind)
        model.__class__ = type(kind.__name__, bases, {"__module__": kind.__module__})
        # Past nn.Module, for which the wrapper would be a part of the model.
        model.__dict__ |= {"_wrapper": wrapper, "_outline": outline, "_is_inside": False}

    def forward_through(self, model: nn.Module) -> Any:
        """Return the wrapper."""
        return self.wrapper(model)

    def wrapper(self, model: nn.Module) -> FullyShardedDataParallel:
        """Return what is around the model."""
        assert isinstance(model, ShardedModel)
        return model._wrapper

    def no_sync(self) -> AbstractContextManager[Any]:
        """Add gradients up on each rank, and do not exchange them."""
        module: Any = self._strategy.lightning_module
        context: AbstractContextManager[Any] = self.wrapper(module.model).no_sync()
        return context

    def _identities(self, model: nn.Module) -> dict[str, int]:
        return {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


def make_outline(model: nn.Module) -> dict[str, Tensor]:
    """Describe a whole `state_dict` by tensors without data; tied weights are the same one."""
    made: dict[int, Tensor] = {}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_like(tensor, device="meta")
        found[name] = made[id(tensor)]
    return found


def _plain(name: str) -> str:
    return name.replace(_WRAPPER, "").replace(_RECOMPUTED, "")


def _trained_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Find the adapter layers of a PEFT model: frozen weights are not gathered with trained ones."""
    if not hasattr(model, "peft_config"):
        return
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not any(module.children()) and isinstance(weight, Tensor) and weight.requires_grad:
            yield module


@contextmanager
def _whole_states(wrapper: FullyShardedDataParallel, *, on_all_ranks: bool) -> Iterator[None]:
    """Have `state_dict` and its like gather whole tensors, on all ranks or on the first."""
    device = next(wrapper.parameters()).device
    to_cpu, first_only = device.type != "cpu", not on_all_ranks
    with FullyShardedDataParallel.state_dict_type(
        wrapper,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=to_cpu, rank0_only=first_only),
        FullOptimStateDictConfig(offload_to_cpu=to_cpu, rank0_only=first_only),
    ):
        yield

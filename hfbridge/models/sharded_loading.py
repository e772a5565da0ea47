"""A named model read in parts: no rank ever holds it whole.

`from_pretrained` builds a model without weights and reads for each of them what its rank needs, if the model
was sharded in between, which is the place where transformers' own parallel plans are applied. Weights that no
file holds, those of a new head, are drawn whole, one module's after the other, so that they are the ones that
a single process draws.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.models.auto.auto_factory import _BaseAutoModelClass

Shard = Callable[[nn.Module], None]


def load_sharded(
    auto_class: type[_BaseAutoModelClass], name: str, *, shard: Shard, arguments: Mapping[str, Any]
) -> nn.Module:
    """Load a model, each rank its part.

    Args:
        auto_class: the `AutoModelFor*` class.
        name: of the model, or its folder.
        shard: cuts a model without weights, in place.
        arguments: further ones of `from_pretrained`.

    Mirrors: transformers.PreTrainedModel.maybe_distribute_model
    Proved by: tests/distributed/test_fsdp.py
    """
    mapping = _ShardingMapping(auto_class._model_mapping, shard)
    sharding: Any = type(auto_class.__name__, (auto_class,), {"_model_mapping": mapping})
    model: nn.Module = sharding.from_pretrained(name, distributed_config=DistributedConfig(), **arguments)
    config: Any = model.config
    config.__dict__.pop("distributed_config", None)
    return model


class _ShardingMapping:
    """An auto class's models by their configurations, which shard themselves when they are loaded."""

    def __init__(self, mapping: Any, shard: Shard) -> None:
        self._mapping, self._shard = mapping, shard

    def __contains__(self, config: object) -> bool:
        return config in self._mapping

    def __iter__(self) -> Iterator[Any]:
        return iter(self._mapping)

    def __getitem__(self, config: Any) -> Any:
        found = self._mapping[config]
        if isinstance(found, (list, tuple)):
            return tuple(_sharding_class(kind, self._shard) for kind in found)
        return _sharding_class(found, self._shard)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mapping, name)


def _sharding_class(kind: type[PreTrainedModel], shard: Shard) -> type[PreTrainedModel]:
    """Make a class of the same name whose `from_pretrained` shards between building and reading."""

    def distribute(cls: Any, model: Any, *plans: Any) -> Any:
        model.tie_weights()
        shard(model)
        return model

    def initialize(self: Any, is_quantized: bool) -> None:
        with _whole_while_drawn(self):
            super(made, self)._initialize_missing_keys(is_quantized)

    made: Any = type(
        kind.__name__,
        (kind,),
        {
            "__module__": kind.__module__,
            "maybe_distribute_model": classmethod(distribute),
            "_initialize_missing_keys": initialize,
        },
    )
    sharding: type[PreTrainedModel] = made
    return sharding


@contextmanager
def _whole_while_drawn(model: nn.Module) -> Iterator[None]:
    """Have the weights that were in no file whole, and cut again."""
    missing: list[tuple[nn.Module, str, Any]] = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in _parameters_of(module)
        if isinstance(parameter, DTensor) and not getattr(parameter, "_is_hf_initialized", False)
        if not parameter.is_meta  # else it is tied to another, and drawn with it
    ]
    for module, name, parameter in missing:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype)
        module._parameters[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    yield
    for module, name, parameter in missing:
        drawn = module._parameters[name]
        assert drawn is not None
        part = distribute_tensor(
            drawn.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        module._parameters[name] = nn.Parameter(part, requires_grad=parameter.requires_grad)


def _parameters_of(module: nn.Module) -> list[tuple[str, Any]]:
    """List what a module holds itself."""
    return list(module._parameters.items())

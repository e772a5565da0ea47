"""Which modules of a model FSDP gathers at a time, as in the HF Trainer.

    auto_wrap_policy            units
    TRANSFORMER_BASED_WRAP      layers of the classes named, or of the model's own `_no_split_modules`
    SIZE_BASED_WRAP             modules with more parameters than `min_num_params`; none at 0
    NO_WRAP                     none

The model itself is always the last unit. A weight that two modules share lies in one unit, or in the model's.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from hfbridge.errors import ModelError

TRANSFORMER_BASED, SIZE_BASED, NONE = "TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"
_RECOMPUTED = "_hfbridge_recomputed"


def find_units(
    model: nn.Module, *, policy: str, layer_classes: Sequence[str] | None, min_num_params: int
) -> list[nn.Module]:
    """Find the modules that are gathered one by one, inner ones first.

    Args:
        model: the Hugging Face model, not sharded yet.
        policy: `auto_wrap_policy`.
        layer_classes: `transformer_layer_cls_to_wrap`; `None` for the model's own.
        min_num_params: for SIZE_BASED_WRAP.

    Raises:
        ModelError: a class is named that the model has no module of.

    Mirrors: accelerate.utils.fsdp_utils.fsdp2_prepare_auto_wrap_policy
    """
    inner = [module for module in reversed(list(model.modules())) if module is not model]
    if policy == TRANSFORMER_BASED:
        names = set(layer_classes or getattr(model, "_no_split_modules", None) or ())
        present = {type(module).__name__ for module in inner}
        if layer_classes and (unknown := sorted(names - present)):
            raise ModelError(
                f"fsdp_config: transformer_layer_cls_to_wrap names {', '.join(unknown)}, and "
                f"{type(model).__name__} has no such modules; its layers are of "
                f"{', '.join(sorted(_layer_classes(model)))}."
            )
        found = [module for module in inner if type(module).__name__ in names]
    elif policy == SIZE_BASED and min_num_params > 0:
        containers = (nn.ModuleList, nn.ModuleDict)  # they have no forward
        found = [m for m in inner if _size(m) > min_num_params and not isinstance(m, containers)]
    else:
        found = []
    return [module for module in found if has_no_tied_parameters(model, [module])]


def has_no_tied_parameters(model: nn.Module, group: Sequence[nn.Module]) -> bool:
    """Whether no weight in a group of modules is also one of a module outside of it.

    Args:
        model: all modules.
        group: some of them.
    """
    held = {inner for module in group for inner in module.modules()}
    owners: dict[int, set[bool]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(module in held)
    return all(len(places) == 1 for key, places in owners.items() if key != id(None))


def recompute(units: Sequence[nn.Module]) -> None:
    """Have layers compute their activations again in the backward pass, with the same dropout.

    It happens inside of what gathers their weights, which is done once for both.

    Mirrors: accelerate.utils.fsdp_utils.fsdp2_apply_ac
    """
    for module in units:
        has_inner = any(inner is not module and inner in units for inner in module.modules())
        if not has_inner and _RECOMPUTED not in module.__dict__:
            module.forward = _recomputed(module.forward)
            module.__dict__[_RECOMPUTED] = True


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*arguments: Any, **named: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    return run


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _layer_classes(model: nn.Module) -> Iterator[str]:
    """Name the classes of which a model has a list of modules."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            yield type(module[0]).__name__

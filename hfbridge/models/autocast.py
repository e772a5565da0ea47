"""Mixed precision around the Hugging Face forward and nothing else.

    setting      while a model's forward runs                    outside of it
    bf16=True    autocast to bfloat16 on the model's device      everything in float32, outputs included
    (none)       nothing                                         nothing

Weights keep their dtype. Loss code outside the model, the backward pass, metrics and collectives never see
autocast.
"""

from types import MethodType

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn

# Names on a wrapped model: that it is, and the forward that stood on the instance before.
_WRAPPED, _OWN_FORWARD = "_hfbridge_autocast", "_hfbridge_own_forward"


def wrap_forward(model: nn.Module, *, device_type: str, dtype: torch.dtype) -> None:
    """Run the model's forward under autocast and return its outputs in float32, until `unwrap_forward`.

    Args:
        model: the Hugging Face model; its `forward` is replaced on the instance.
        device_type: "cpu" or "cuda".
        dtype: what autocast casts to.

    Mirrors: accelerate.Accelerator.prepare_model
    """
    unwrap_forward(model)
    if "forward" in model.__dict__:
        model.__dict__[_OWN_FORWARD] = model.__dict__["forward"]
    cast = torch.autocast(device_type=device_type, dtype=dtype)
    forward = model.forward
    plain = getattr(forward, "__func__", None)
    if plain is None:
        model.forward = convert_outputs_to_fp32(cast(forward))
    else:
        model.forward = MethodType(convert_outputs_to_fp32(cast(plain)), model)
    model.__dict__[_WRAPPED] = True


def unwrap_forward(model: nn.Module) -> None:
    """Give the model back the forward it had; nothing happens where it was not replaced."""
    if _WRAPPED not in model.__dict__:
        return
    del model.__dict__[_WRAPPED], model.__dict__["forward"]
    if _OWN_FORWARD in model.__dict__:
        model.__dict__["forward"] = model.__dict__.pop(_OWN_FORWARD)

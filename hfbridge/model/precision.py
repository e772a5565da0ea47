"""Mixed precision around the Hugging Face forward and nothing else; knows Hugging Face.

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


def wrap_forward(model: nn.Module, *, device_type: str, dtype: torch.dtype) -> None:
    """Run the model's forward under autocast and return its outputs in float32, until `unwrap_forward`.

    Args:
        model: the Hugging Face model; its `forward` is replaced on the instance.
        device_type: "cpu" or "cuda".
        dtype: what autocast casts to.

    Mirrors: accelerate.Accelerator.prepare_model
    """
    cast = torch.autocast(device_type=device_type, dtype=dtype)
    forward = model.forward
    plain = getattr(forward, "__func__", None)
    if plain is None:
        model.forward = convert_outputs_to_fp32(cast(forward))
    else:
        model.forward = MethodType(convert_outputs_to_fp32(cast(plain)), model)


def unwrap_forward(model: nn.Module) -> None:
    """Give the model its class's forward back; nothing happens where it was not replaced."""
    model.__dict__.pop("forward", None)

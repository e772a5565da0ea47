"""The Hugging Face model of an HFModule, as its attributes: there, or not built yet."""

from typing import Any

from torch import nn

from hfbridge.errors import ModelError


def built_model(module: nn.Module) -> Any:
    """The Hugging Face model.

    Raises:
        ModelError: a named model, or one that a function makes, that no run has built yet.
    """
    found = module._modules.get("model")
    if found is None:
        raise ModelError(
            "The model is not built yet: HFModule builds a named model, or calls a factory, when a run "
            "begins. Call module.configure_model() to build it now."
        )
    return found


def is_built(module: nn.Module) -> bool:
    """Whether the model is there: a named one is built when a run begins, or by `configure_model()`."""
    return module._modules.get("model") is not None


def backbone(module: nn.Module) -> Any:
    """The model without its head, for Lightning's `BackboneFinetuning`.

    Raises:
        AttributeError: the model is not built yet.
    """
    model = module._modules.get("model")
    if model is None:
        raise AttributeError("backbone")
    return getattr(model, "base_model", model)

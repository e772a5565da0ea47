"""Weights of a checkpoint and the model they belong to: tied ones, missing ones; knows Hugging Face."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils.import_utils import is_peft_available

from hfbridge.errors import CheckpointError

_SHOWN = 3
_PROMPTS = "prompt_embeddings"  # PEFT's name of learned prompts, of whichever adapter


def outline_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Name a model's tensors as its whole `state_dict` does, and gather nothing; tied ones are one tensor.

    A model that FSDP is around has them without data, as they were before.
    """
    outline: Mapping[str, Tensor] | None = vars(model).get("_outline")
    return model.state_dict(keep_vars=True) if outline is None else outline


def complete_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Name tied weights by all their names, as the model's `state_dict` does.

    Args:
        model: the model.
        weights: by their names in the model; tied ones once or by each name. Those of PEFT's adapters may be
            without the model below them, with the adapter's name and a slash in front; without these they
            are the active one's.
        source: the file, for messages.

    Returns:
        One entry for each of the model's; what the model says is never saved stays as it is.

    Raises:
        CheckpointError: weights are missing, unknown or of another shape: they are another model's.
    """
    own = outline_of(model)
    if adapter := _with_adapter(model, weights):
        weights = adapter
    names_of: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names_of.setdefault(id(tensor), []).append(name)
    found: dict[str, Tensor] = {}
    missing = []
    never_saved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for name, tensor in own.items():
        saved_as = next((other for other in (name, *names_of[id(tensor)]) if other in weights), None)
        if saved_as is not None:
            found[name] = weights[saved_as]
        elif name in never_saved:
            found[name] = tensor.detach()
        else:
            missing.append(name)
    unknown = [name for name in weights if name not in own]
    shapes = {name: getattr(tensor, "ds_shape", tensor.shape) for name, tensor in own.items()}
    misshapen = [
        f"{name} {tuple(found[name].shape)} for {tuple(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name].shape != shape
    ]
    differences = (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
    told = [f"{len(listed)} {what}: {_listed(listed)}" for what, listed in differences if listed]
    if unknown == [_PROMPTS] and not missing:
        raise CheckpointError(
            f"{source} holds the prompts that an encoder has made, which is all that PEFT saves of "
            "such adapters, and not the encoder; neither engine can go on with its training. "
            "PeftModel.from_pretrained reads it."
        )
    if told:
        raise CheckpointError(
            f"{source} does not hold the weights of this {type(model).__name__}; {'; '.join(told)}. Is it "
            "the checkpoint of another model, or of one with other labels?"
        )
    return found


def saved_names(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Name the weights that a native checkpoint holds: of tied ones the first, and none that is not saved."""
    if not isinstance(model, PreTrainedModel):
        return list(weights)
    kept = remove_tied_weights_from_state_dict(dict(weights), model)
    never_saved = set(model._keys_to_ignore_on_save or ())
    return [name for name in kept if name not in never_saved]


@contextmanager
def prompts_of(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Have PEFT take learned prompts from weights, as all else, and not from what the model is by now.

    Prompts that an encoder makes are left to PEFT.

    Args:
        model: any model.
        weights: its `state_dict`.
    """
    name = "get_prompt_embedding_to_save"
    if not hasattr(model, name) or not hasattr(model, "prompt_encoder"):
        yield
        return
    own: Any = getattr(model, name)

    def prompts(adapter_name: str) -> Tensor:
        given = weights.get(f"prompt_encoder.{adapter_name}.embedding.weight")
        is_encoded = makes_prompts(model, adapter_name)
        found: Tensor = own(adapter_name) if given is None or is_encoded else given
        return found

    setattr(model, name, prompts)
    try:
        yield
    finally:
        delattr(model, name)


def makes_prompts(model: Any, adapter: str | None = None) -> bool:
    """Whether a prompt encoder has more weights than the prompts, which are all that PEFT saves of it."""
    encoders: Any = getattr(model, "prompt_encoder", None) or {}
    names = [adapter] if adapter is not None else list(encoders)
    return any([n for n, _ in encoders[name].named_parameters()] != ["embedding.weight"] for name in names)


def _with_adapter(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the weights of adapters beside those of the model below them; empty for any other model."""
    if not is_peft_available():
        return {}
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        return {}
    outline: dict[str, Tensor] = dict(outline_of(model))
    if not set(weights).isdisjoint(outline):
        return dict(weights)
    own, found = {id(tensor): name for name, tensor in outline.items()}, dict(outline)
    for folder in {saved.rpartition("/")[0] for saved in weights}:
        adapter, names = folder or model.active_adapters[0], dict[str, str]()
        if adapter in model.peft_config:
            with prompts_of(model, outline):
                tensors = get_peft_model_state_dict(model, dict(outline), adapter_name=adapter)
            names = {saved: own[id(tensor)] for saved, tensor in tensors.items() if id(tensor) in own}
        for saved, tensor in weights.items():
            in_folder, _, name = saved.rpartition("/")
            if in_folder == folder:
                found[names.get(name, saved)] = tensor
    return found


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

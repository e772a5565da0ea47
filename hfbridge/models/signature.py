"""What a model's class, config and parameters say of it, without a forward: labels, columns, sizes."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils.generic import find_labels

from hfbridge.distributed.consistency import Fact

_POSITIONS = {"position_embeddings", "position_embedding", "wpe", "embed_positions"}
_SAME_MODEL = "Build the same model on every rank."


def label_names_of(model: nn.Module) -> list[str]:
    """Name the forward parameters for labels, in the order of the signature.

    Mirrors: transformers.utils.generic.find_labels
    """
    names: list[str] = find_labels(unwrap_peft_model(model).__class__)
    return names


def hides_labels(model: nn.Module) -> bool:
    """Whether a model of the user's takes labels, if any, among arguments that its forward does not name."""
    forward: Any = type(unwrap_peft_model(model)).forward
    kinds = {parameter.kind for parameter in inspect.signature(forward).parameters.values()}
    is_theirs = str(forward.__module__).startswith("transformers.")
    return inspect.Parameter.VAR_KEYWORD in kinds and not is_theirs and not label_names_of(model)


def accepted_columns(model: nn.Module, label_names: Sequence[str]) -> list[str]:
    """List the dataset columns that the model's forward can take, labels included.

    Args:
        model: the Hugging Face model, not wrapped or compiled; of a PEFT model its base model is used.
        label_names: the names under which labels reach the model.

    Mirrors: transformers.Trainer._set_signature_columns_if_needed
    """
    get_base: Any = getattr(model, "get_base_model", None)
    base = model if get_base is None else get_base()
    names = list(inspect.signature(base.forward).parameters)
    return names + sorted({"label", "label_ids", *label_names} - set(names))


def vocabulary_of(model: nn.Module) -> int | None:
    """Count the rows of the embedding that ids are looked up in; `None` if that is not known."""
    get: Any = getattr(model, "get_input_embeddings", None)
    try:
        embedding = None if get is None else get()
    except (NotImplementedError, AttributeError):  # a model of images, say
        return None
    rows = int(getattr(embedding, "num_embeddings", 0))
    return rows if rows and rows == text_value(model, "vocab_size") else None


def positions_of(model: nn.Module) -> int | None:
    """Count the tokens that a row may have; `None` where no table bounds it, as with rotary positions."""
    found = []
    for name, module in model.named_modules():
        is_table = name.rpartition(".")[2] in _POSITIONS and isinstance(module, nn.Embedding)
        if is_table and not hasattr(module, "make_weight"):  # of FSMT: grows
            before = -1 if module.padding_idx is None else module.padding_idx
            found.append(module.num_embeddings - max(int(getattr(module, "offset", 0)), before + 1))
    named = text_value(model, "max_position_embeddings")
    return named if named in found else max(found, default=None)


def text_value(model: nn.Module, name: str) -> int | None:
    """Read an integer of the config, or of its text part; `None` if there is none."""
    config = getattr(model, "config", None)
    get: Any = getattr(config, "get_text_config", None)
    value = getattr(config if get is None else get(), name, None)
    return value if isinstance(value, int) else None


def facts_of_model(model: nn.Module) -> Iterator[Fact]:
    """Describe a model for comparing it with those of other ranks.

    One that FSDP has cut in an earlier run is described as it is as a whole.
    """
    parameters = getattr(model, "_outline", None) or dict(model.named_parameters())
    for name, parameter in parameters.items():
        shape: Any = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed holds it elsewhere
        kind = str(parameter.dtype).removeprefix("torch.")
        trained = "" if parameter.requires_grad else ", not trained"
        yield Fact(f"the parameter {name}", f"{list(shape)} {kind}{trained}", _SAME_MODEL)

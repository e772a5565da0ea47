"""Any `AutoModelFor*`, from a name, a folder or a factory.

model=                     built                       random state in which training starts
a model object             by the user                 just seeded
a name or folder           seeded, then built          seeded again (native `Trainer(model=...)`)
a factory                  seeded, then called         as the factory leaves it (native `model_init=`)

With peft_config= adapters are drawn when the model is there, and a model object is seeded for as a name is.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils.generic import can_return_loss, find_labels

from hfbridge.errors import ModelError
from hfbridge.models.peft import with_adapters
from hfbridge.models.quantization import naming_quantization
from hfbridge.models.sharded_loading import Shard, load_sharded

# Names of classes that some table of heads has, too: several models are one class, with a loss or without.
_HEADS = frozenset(
    name
    for table, names in vars(modeling_auto).items()
    if table.startswith("MODEL_FOR_") and table.endswith("_NAMES") and "TEXT_ENCODING" not in table
    for entry in names.values()
    for name in ([entry] if isinstance(entry, str) else entry)
)

# A module can be called, too; named by itself, LightningCLI's help would list all modules there are.
ModelSource = str | Path | Callable[..., Any]
"""A model, a function that returns one, or the name or folder of one."""


def check_function(name: str, given: Any, of: str, *, positional: int = 1, optional: str = "") -> None:
    """Check that a function takes what it is called with.

    Args:
        name: of the argument that it was passed as.
        given: the function.
        of: what it is called with, in words.
        positional: how many positional arguments.
        optional: a keyword argument that it may or, of a loss function, has to take.

    Raises:
        ModelError: it cannot be called that way.
    """
    if given is None:
        return
    if not callable(given):
        raise ModelError(f"{name} is {given!r}; it must be a function of {of}.")
    try:
        signature = inspect.signature(given.forward if isinstance(given, nn.Module) else given)
    except (TypeError, ValueError):  # of some compiled functions none is known
        return
    if inspect.Parameter.VAR_POSITIONAL in {p.kind for p in signature.parameters.values()}:
        return
    calls = [{optional: None}] if optional else []
    calls += [{}] if positional == 1 or not optional else []
    for named in calls:
        with suppress(TypeError):
            signature.bind(*[None] * positional, **named)
            return
    raise ModelError(
        f"{name} must be a function of {of}; {getattr(given, '__qualname__', type(given).__name__)} takes "
        f"{signature}."
    )


def check_source(
    model: object,
    auto_class: object,
    *,
    dtype: str | torch.dtype = "auto",
    model_kwargs: Mapping[str, Any] | None = None,
    has_function: bool = False,
) -> None:
    """See that a model can be had from what the user gave, without loading anything.

    Raises:
        ModelError: an unknown auto class, a folder that does not exist, no model at all, or arguments of
            `from_pretrained` beside a model that is not loaded by it.
    """
    if not isinstance(model, str | Path):
        said = {"auto_class": auto_class, "model_kwargs": model_kwargs or None}
        said["dtype"] = None if dtype == "auto" else dtype
        for name, value in said.items():
            if value is not None:
                kind = f"a {type(model).__name__}" if isinstance(model, nn.Module) else repr(model)
                raise ModelError(
                    f"{name}={value!r} goes with the name or folder of a model, and model= is {kind}. Leave "
                    f"{name} out, or build the model with it."
                )
    if isinstance(model, nn.Module):
        if not has_function:
            check_head(model)
    elif isinstance(model, str | Path):
        auto_class_of(auto_class)
        looks_local = isinstance(model, Path) or model.startswith((".", "/", "~")) or "\\" in model
        if looks_local and not Path(model).expanduser().exists():
            raise ModelError(
                f"The model folder {str(model)!r} does not exist (seen from {Path.cwd()}). Give a folder "
                "with a config.json and weights, or the name of a model on the hub."
            )
    elif isinstance(model, type) or not callable(model):
        raise ModelError(
            f"model= is {model!r}; it may be a model, a function that returns one, or the name or folder of "
            "one together with an auto class such as 'AutoModelForSequenceClassification'."
        )
    elif len(named := required_arguments(model)) > 1:
        raise ModelError(
            f"The model factory {model!r} needs the arguments {', '.join(named)}; it is called with none, "
            "or, like model_init of the HF Trainer, with None in place of a hyperparameter trial. Give it "
            "the others by functools.partial."
        )


def auto_class_of(auto_class: object) -> type[_BaseAutoModelClass]:
    """Resolve `AutoModelFor...`, given as a class or by name.

    Raises:
        ModelError: it is not an auto class with a head that transformers has.
    """
    heads = [name for name in dir(transformers) if name.startswith("AutoModelFor")]
    if isinstance(auto_class, type) and issubclass(auto_class, _BaseAutoModelClass):
        if auto_class.__name__.startswith("AutoModelFor"):
            return auto_class
        auto_class = auto_class.__name__
    if isinstance(auto_class, str):
        if auto_class in heads:
            found: type[_BaseAutoModelClass] = getattr(transformers, auto_class)
            return found
        near = difflib.get_close_matches(auto_class, heads, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(heads)}."
        raise ModelError(f"auto_class={auto_class!r} is not a class of transformers with a head; {hint}")
    raise ModelError(
        f"auto_class is {auto_class!r}; a model given by name or folder needs one, such as "
        "'AutoModelForSequenceClassification' or transformers.AutoModelForCausalLM."
    )


def build_model(
    source: ModelSource,
    *,
    auto_class: object,
    dtype: str | torch.dtype,
    model_kwargs: Mapping[str, Any],
    peft_config: Any = None,
    shard: Shard | None = None,
    has_function: bool = False,
) -> nn.Module:
    """Make the model from a name, folder or factory, or put adapters on one.

    Args:
        source: see the table at the top of this file.
        auto_class: for a name or folder, the `AutoModelFor*` class or its name.
        dtype: dtype of the weights of a named model; "auto" is the one they were saved in.
        model_kwargs: further arguments of `from_pretrained`.
        peft_config: of adapters to put on it; `None` for none.
        shard: cuts a named model without weights into the ranks' parts, and each rank reads its own; `None`
            reads it whole.
        has_function: the loss comes from a `compute_loss_func`, so that no head is needed.

    Raises:
        ModelError: the factory does not return a model, or the model has no head to train.
    """
    if isinstance(source, nn.Module):
        made: Any = source
    elif isinstance(source, str | Path):
        name = str(Path(source).expanduser()) if str(source).startswith("~") else str(source)
        kind, arguments = auto_class_of(auto_class), {"dtype": dtype, **model_kwargs}
        if shard is not None:
            return load_sharded(kind, name, shard=shard, arguments=arguments)
        with naming_quantization(arguments):
            made = kind.from_pretrained(name, **arguments)
    else:
        made = source(*(None for _ in required_arguments(source)))
        if not isinstance(made, nn.Module):
            raise ModelError(f"The model factory returned {made!r}; it must return a torch.nn.Module.")
        if not has_function:
            check_head(made)
    return made if peft_config is None else with_adapters(made, peft_config)


def required_arguments(factory: Callable[..., Any]) -> list[str]:
    """Name the arguments that a factory must be given by position; none if its signature cannot be read.

    Mirrors: transformers.Trainer.call_model_init
    """
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:
        return []
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in by_position and p.default is p.empty]


def check_head(model: nn.Module) -> None:
    """Refuse a bare encoder or decoder: without a head it has no loss.

    Raises:
        ModelError: the class is one of transformers' base models only, takes no labels and returns no
            loss.
    """
    kind = type(model)
    name = kind.__name__
    trains = name in _HEADS or can_return_loss(kind) or bool(find_labels(kind))
    if name in modeling_auto.MODEL_MAPPING_NAMES.values() and not trains:
        raise ModelError(
            f"{name} computes hidden states only: it takes no labels and has no loss. Use the class with a "
            f"head for your task, such as {name.removesuffix('Model')}ForSequenceClassification; for "
            "a loss of your own over its outputs pass compute_loss_func=... to HFModule."
        )


def weights_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Collect the floating-point dtypes of the parameters."""
    return {p.dtype for p in model.parameters() if p.is_floating_point()}


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

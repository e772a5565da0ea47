"""Match of a checkpoint's weights with a model: tied, missing, and of PEFT adapters."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils.import_utils import is_peft_available

from hfbridge.errors import BridgeWarning, CheckpointError

_SHOWN = 3
_PROMPTS = "prompt_embeddings"  # PEFT's name of learned prompts, of whichever adapter
_BASE = "base_model.model."  # before all names in a file of `model.add_adapter`
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class AdapterFiles(NamedTuple):
    """What PEFT writes of a model's adapters.

    Attributes:
        names: name in the files, with the folder's in front -> name in the model.
        made: tensors that the model does not hold, such as the prompts of an encoder, by name in the files.
    """

    names: dict[str, str]
    made: dict[str, Tensor]


def outline_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Return a model's tensors by the names of its full `state_dict`; tied ones are one tensor.

    Nothing is gathered. Under FSDP they are those from before wrapping, without data.
    """
    outline: Mapping[str, Tensor] | None = vars(model).get("_outline")
    return model.state_dict(keep_vars=True) if outline is None else outline


def complete_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Complete weights to one entry for each of the model's `state_dict`.

    Args:
        model: the model.
        weights: tied ones once or by each name. Those of PEFT's adapters may be named as in PEFT's files,
            with the folder's name and a slash in front, and come without the base model.
        source: the file, for messages.

    Returns:
        One entry for each of the model's; what is never saved (`_keys_to_ignore_on_save`) stays as it is.

    Raises:
        CheckpointError: weights are missing, unknown or of another shape.
    """
    own = outline_of(model)
    required = set(own)
    if writes_adapters(model):
        weights, required = _named_as_in_model(model, weights)
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
        elif name not in required:
            found[name] = tensor
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
    if _PROMPTS in unknown:
        raise CheckpointError(
            f"{source} holds the prompts that an encoder has made, but not the encoder, which PEFT does not "
            "save; training cannot be resumed from it. Read it by PeftModel.from_pretrained."
        )
    if wrong := [f"{len(names)} {what}: {_listed(names)}" for what, names in differences if names]:
        raise CheckpointError(
            f"{source} does not hold the weights of this {type(model).__name__}; {'; '.join(wrong)}. Is it "
            "the checkpoint of another model, of one with other labels, or of one with added tokens (call "
            "model.resize_token_embeddings before)?"
        )
    return found


def saved_names(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Name the weights that `save_pretrained` writes: of tied ones the first."""
    if not isinstance(model, PreTrainedModel):
        return list(weights)
    kept = remove_tied_weights_from_state_dict(dict(weights), model)
    never_saved = set(model._keys_to_ignore_on_save or ())
    return [name for name in kept if name not in never_saved]


@contextmanager
def prompts_of(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Have PEFT save learned prompts from `weights`, unless an encoder makes them.

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
        prompt = weights.get(f"prompt_encoder.{adapter_name}.embedding.weight")
        # An encoder has more weights than the prompts, which are all that PEFT saves of it.
        encoder = model.get_submodule(f"prompt_encoder.{adapter_name}")
        is_encoded = [n for n, _ in encoder.named_parameters()] != ["embedding.weight"]
        found: Tensor = own(adapter_name) if prompt is None or is_encoded else prompt
        return found

    setattr(model, name, prompts)
    try:
        yield
    finally:
        delattr(model, name)


def writes_adapters(model: nn.Module) -> bool:
    """Whether `save_pretrained` of a model writes its adapters, and not the model below them."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel) or bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_files(model: Any) -> AdapterFiles:
    """Map what PEFT writes of a model's adapters, by their configurations.

    Mirrors: peft.PeftModel.save_pretrained
    """
    found = AdapterFiles({}, {})
    adapters = list(model.peft_config) if is_peft_model(model) else model.active_adapters()[:1]
    for adapter in adapters:
        folder = "" if adapter == "default" or not is_peft_model(model) else f"{adapter}/"
        names, made = _adapter_file(model, adapter)
        found.names.update({f"{folder}{saved}": name for saved, name in names.items()})
        found.made.update({f"{folder}{saved}": tensor for saved, tensor in made.items()})
    return found


def trained_names(model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> set[str]:
    """Name the tensors of a model's `state_dict` that training changes: buffers and trained weights."""
    frozen: set[str] = set()
    trained: set[str] = set()
    optimized = {
        id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        is_trained = parameter.requires_grad or id(parameter) in optimized
        (trained if is_trained else frozen).add(name)
    own = set(outline_of(model))
    return own - frozen if trained <= own else own  # else a strategy has put parameters of its own in place


def check_is_saved(model: nn.Module, *, loads_best: bool) -> None:
    """Warn before training of trained weights that PEFT does not save.

    Args:
        model: any model.
        loads_best: the best checkpoint is loaded at the end.

    Raises:
        CheckpointError: prompts are made by an encoder, and the best cannot be loaded.
    """
    if not writes_adapters(model):
        return
    files, own = adapter_files(model), outline_of(model)
    buffers = {name for name, _ in model.named_buffers()}
    saved = {id(own[name]) for name in files.names.values()}
    lost = sorted(n for n in trained_names(model) - buffers if n in own and id(own[n]) not in saved)
    is_encoded = any(name.rpartition("/")[2] == _PROMPTS for name in files.made)
    if is_encoded and loads_best:
        raise CheckpointError(
            "load_best_model_at_end=True cannot be used: PEFT saves the prompts that the encoder of this "
            f"{type(model).__name__} makes, without the encoder. Leave it out, and read the best checkpoint "
            "by PeftModel.from_pretrained."
        )
    if lost:
        hint = "" if is_encoded else " Name their layers in modules_to_save, or resume from such a file."
        warnings.warn(
            f"{len(lost)} trained weights are not held by checkpoints of save_strategy, since PEFT does not "
            f"save them: {_listed(lost)}. Lightning's ModelCheckpoint saves them, for exact resumption."
            f"{hint}",
            BridgeWarning,
            stacklevel=2,
        )


def _adapter_file(model: Any, adapter: str, *, embeddings: Literal["auto", False] = "auto") -> AdapterFiles:
    """Map what PEFT writes of one adapter; by configuration, weights of the base model are among it."""
    from peft import get_peft_model_state_dict

    # Tied weights get a tensor for each name, so that one found again has one name.
    own = {n: t.detach() if isinstance(t, Tensor) else t for n, t in outline_of(model).items()}
    names = {id(tensor): name for name, tensor in model.named_parameters()}  # some encoders read these
    names |= {id(tensor): name for name, tensor in own.items()}
    with prompts_of(model, own), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_peft_model_state_dict(
            model, dict(own), adapter_name=adapter, save_embedding_layers=embeddings
        )
    prefix = "" if is_peft_model(model) else _BASE
    return AdapterFiles(
        {f"{prefix}{name}": names[id(tensor)] for name, tensor in found.items() if id(tensor) in names},
        {f"{prefix}{name}": tensor for name, tensor in found.items() if id(tensor) not in names},
    )


def _named_as_in_model(model: Any, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Return weights by their names in the model, and the required names: embeddings may be missing."""
    own = outline_of(model)
    folders = {saved.rpartition("/")[0] for saved in weights}
    active = model.active_adapters if is_peft_model(model) else model.active_adapters()
    found: dict[str, Tensor] = {}
    required: set[str] = set()
    for folder in folders:
        adapter = folder or ("default" if len(folders) > 1 else active[0])
        is_known = adapter in model.peft_config
        names = _adapter_file(model, adapter, embeddings=False).names if is_known else {}
        required |= set(names.values())
        for saved, tensor in weights.items():
            in_folder, _, name = saved.rpartition("/")
            if in_folder == folder:
                in_model = (name, names.get(name, name), name.removeprefix(_BASE))
                found[next((n for n in in_model if n in own), saved)] = tensor
    return found, required


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model is a `peft.PeftModel`; peft must be installed."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

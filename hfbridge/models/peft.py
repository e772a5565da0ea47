"""PEFT's adapters: made from a configuration or a dict of its fields, counted, merged."""

import copy
import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from hfbridge.errors import BridgeWarning, ModelError
from hfbridge.utilities.imports import require

_NAMED = 12  # of a model's layers, in messages
# By PEFT's names of tasks: the auto class, and transformers' table of the classes that it makes.
_TASKS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM"),
    "CAUSAL_LM": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "TOKEN_CLASSIFICATION"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "QUESTION_ANSWERING"),
}
_HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True)
class ParameterCounts:
    """How many of a model's parameters are trained; shared ones count once.

    Attributes:
        trained: parameters that get gradients.
        total: all, the trained ones among them.
    """

    trained: int
    total: int

    def __str__(self) -> str:
        """Format as PEFT's `print_trainable_parameters` does."""
        share = 100 * self.trained / max(self.total, 1)
        return f"trainable params: {self.trained:,} || all params: {self.total:,} || trainable%: {share:.4f}"


def count_parameters(model: nn.Module, whole: Mapping[str, Tensor] | None = None) -> ParameterCounts:
    """Count a model's parameters, those on other ranks included.

    Args:
        model: the model.
        whole: its parameters before a strategy replaced them.

    Mirrors: peft.PeftModel.get_nb_trainable_parameters
    Proved by: tests/unit/models/test_peft.py
    """
    trained = total = 0
    seen: set[int] = set()
    for parameter in (dict(model.named_parameters()) if whole is None else whole).values():
        if id(parameter) in seen or not isinstance(parameter, nn.Parameter):
            continue
        seen.add(id(parameter))
        count = parameter.numel()
        if count == 0:
            count = getattr(parameter, "ds_numel", 0)  # ZeRO-3 holds it elsewhere
        if type(parameter).__name__ == "Params4bit":  # two weights a byte
            count *= 2 * parameter.element_size()
        total += count
        trained += count if parameter.requires_grad else 0
    return ParameterCounts(trained, total)


def has_adapters(model: object) -> bool:
    """Whether PEFT has put adapters into a model, as a PeftModel or by `add_adapter`."""
    if not is_peft_available():
        return False
    from peft import PeftMixedModel, PeftModel

    kinds = (PeftModel, PeftMixedModel)
    return isinstance(model, kinds) or bool(getattr(model, "_hf_peft_config_loaded", False))


def read_peft_config(given: Any, model: object, auto_class: object) -> Any:
    """Copy or make a PEFT configuration, and check it against the model as far as that is known.

    Args:
        given: a `PeftConfig`, or a dict of its fields with "peft_type".
        model: HFModule's `model`.
        auto_class: a class or its name.

    Raises:
        ModelError: it is not a configuration, or the model has adapters already or is for another task.
        MissingDependencyError: PEFT is not installed.
    """
    peft = require("peft", extra="peft", for_="peft_config=")
    if isinstance(given, Mapping):
        config = _from_fields(given)
    elif isinstance(given, peft.PeftConfig):
        config = copy.deepcopy(given)
    else:
        raise ModelError(
            f"peft_config={given!r}; it may be a configuration of PEFT, such as peft.LoraConfig(r=8), or a "
            'dict of its fields with "peft_type".'
        )
    if config.peft_type is None:
        raise ModelError(
            f"peft_config is a {type(config).__name__} without peft_type. Use the class of the method, such "
            "as peft.LoraConfig."
        )
    if config.inference_mode:
        raise ModelError(
            "peft_config has inference_mode=True: its adapters would not be trained. Leave it out."
        )
    if isinstance(model, nn.Module):
        _check_no_adapters(model)
        _check_task(config, type(model).__name__)
    elif isinstance(model, (str, Path)):
        if (Path(model).expanduser() / ADAPTER_CONFIG_NAME).is_file():
            raise ModelError(
                f"{str(model)!r} holds an adapter, and peft_config would put another one on it. To train "
                "that adapter, pass PeftModel.from_pretrained(model, folder, is_trainable=True) as "
                "the model; for a new one, give the folder of the model below it."
            )
        _check_task(config, getattr(auto_class, "__name__", str(auto_class)))
    return config


def with_adapters(model: nn.Module, config: Any) -> nn.Module:
    """Put adapters into a model, drawn from the random state that is there.

    Args:
        model: changed in place.
        config: of the adapters.

    Raises:
        ModelError: the configuration does not fit the model.

    Mirrors: peft.get_peft_model
    Proved by: tests/parity/test_adapters.py
    """
    from peft import get_peft_model

    _check_no_adapters(model)
    _check_task(config, type(model).__name__)
    original = copy.deepcopy(config)
    names = [name for name, _ in model.named_modules() if name]
    try:
        adapted: nn.Module = get_peft_model(model, config)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(
            f"The adapters of {_name_of(original)} could not be put on {type(model).__name__}: {error}\n"
            f"Layers that it has: {', '.join(_layers_of(model))}."
        ) from error
    _warn_of_unmatched(original, names, type(model).__name__)
    _warn_of_frozen_head(original, adapted)
    return adapted


def merged(model: nn.Module) -> nn.Module:
    """Copy the base model with its adapters merged into the weights.

    Raises:
        ModelError: it has no adapters, or they cannot be merged.

    Mirrors: peft.tuners.tuners_utils.BaseTuner.merge_and_unload
    Proved by: tests/parity/test_adapters.py
    """
    if not has_adapters(model) or not hasattr(model, "peft_config"):
        raise ModelError(f"merge=True merges PEFT's adapters, and this {type(model).__name__} has none.")
    has_added = bool(getattr(model, "_hf_peft_config_loaded", False))  # by `model.add_adapter`
    if not has_added and not hasattr(model.base_model, "merge_and_unload"):
        configs: Any = model.peft_config
        kinds = {str(config.peft_type.value) for config in configs.values()}
        raise ModelError(
            f"merge=True: {', '.join(sorted(kinds))} adds to the inputs and changes no weights, so that "
            "there is nothing to merge. Leave merge out, which writes the adapter."
        )
    twin: Any = copy.deepcopy(model)
    try:
        plain: nn.Module = (_tuner_of(twin) if has_added else twin).merge_and_unload()
    except (ValueError, NotImplementedError, TypeError, AttributeError) as error:
        raise ModelError(f"merge=True: these adapters cannot be merged: {error}") from error
    if has_added:
        vars(plain)["_hf_peft_config_loaded"] = False
    return plain


def _tuner_of(model: Any) -> Any:
    """Make the tuner that PEFT has put an adapter into a model by, and that the model does not keep."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    kind: Any = PEFT_TYPE_TO_TUNER_MAPPING[model.peft_config[model.active_adapters()[0]].peft_type]
    tuner = kind.__new__(kind)
    nn.Module.__init__(tuner)
    tuner.model, tuner.peft_config = model, model.peft_config
    return tuner


def check_reentrant(model: Any, arguments: Mapping[str, Any]) -> None:
    """Raise if reentrant checkpointing would give the adapters no gradient: the embeddings are frozen.

    Raises:
        ModelError: that is so.
    """
    if not arguments.get("use_reentrant") or not has_adapters(model):
        return
    embeddings = unwrap_peft_model(model).get_input_embeddings()
    needs = any(p.requires_grad for p in embeddings.parameters())
    if not needs and not getattr(unwrap_peft_model(model), "_require_grads_hooks", None):
        raise ModelError(
            "activation_checkpointing_kwargs has use_reentrant=True, and the model's input embeddings are "
            "frozen: no gradient would reach the adapters. Leave use_reentrant out, or call "
            "model.enable_input_require_grads() on the model."
        )


def _from_fields(given: Mapping[str, Any]) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    types = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind: Any = given.get("peft_type")
    name = getattr(kind, "value", kind)
    if name not in types:
        near = difflib.get_close_matches(str(name).upper(), types, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(types))}."
        what = "has no peft_type" if name is None else f"has the unknown peft_type {name!r}"
        raise ModelError(f"peft_config {what}; {hint}")
    known = {entry.name for entry in fields(types[name]) if entry.init} - {"peft_type"}
    for entry in given.keys() - known - {"peft_type"}:
        near = difflib.get_close_matches(str(entry), known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(known))}."
        raise ModelError(f"peft_config has the unknown field {entry!r} for {name}; {hint}")
    try:
        return types[name](**{key: value for key, value in given.items() if key != "peft_type"})
    except (ValueError, TypeError) as error:
        raise ModelError(f"peft_config: {error}") from error


def _check_no_adapters(model: nn.Module) -> None:
    if has_adapters(model):
        raise ModelError(
            f"peft_config goes with a model without adapters, and this {type(model).__name__} has some "
            "already. Leave peft_config out to train those."
        )


def _tasks_of(class_name: str) -> list[str]:
    """Name PEFT's tasks that a class of models, or an auto class, is for; none for one of another task."""
    found = []
    for task, (auto_class, table) in _TASKS.items():
        entries = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values()
        several = (entry for entry in entries if isinstance(entry, tuple))
        if class_name == auto_class or class_name in entries or any(class_name in names for names in several):
            found.append(task)
    return found


def _check_task(config: Any, class_name: str) -> None:
    task, fitting = _task_of(config), _tasks_of(class_name)
    if task in _TASKS and fitting and task not in fitting:
        raise ModelError(
            f"peft_config has task_type={task!r}, and {class_name} is for {' or '.join(fitting)}: PEFT would "
            f"train another head, or none. Write task_type={fitting[0]!r}, or leave it out."
        )


def _task_of(config: Any) -> str | None:
    task: str | None = getattr(config.task_type, "value", config.task_type)
    return task


def _warn_of_unmatched(config: Any, names: list[str], class_name: str) -> None:
    """Warn of named layers that do not exist, which PEFT ignores."""
    for field in ("target_modules", "modules_to_save", "feedforward_modules"):
        layers = getattr(config, field, None)
        if not isinstance(layers, (list, set, tuple)):
            continue
        absent = sorted(a for a in layers if not any(n == a or n.endswith(f".{a}") for n in names))
        if absent:
            warnings.warn(
                f"peft_config: {field} names {', '.join(absent)}, which {class_name} does not have; PEFT "
                f"ignores them. Leave them out of {field}.",
                BridgeWarning,
                stacklevel=2,
            )


def _warn_of_frozen_head(config: Any, adapted: nn.Module) -> None:
    """Warn of a head that is not trained: PEFT freezes it without a task."""
    base: Any = unwrap_peft_model(adapted)
    has_task = _task_of(config) is not None or getattr(config, "modules_to_save", None) is not None
    head = [task for task in _tasks_of(type(base).__name__) if task in _HEADED]
    if has_task or not head:
        return
    below = f"{base.base_model_prefix}."
    rest = [parameter for name, parameter in base.named_parameters() if not name.startswith(below)]
    if rest and not any(parameter.requires_grad for parameter in rest):
        warnings.warn(
            f"peft_config has no task_type, so that the head of {type(base).__name__} is not trained. Write "
            f"task_type={head[0]!r}, or modules_to_save=[] if it is to stay as it is.",
            BridgeWarning,
            stacklevel=2,
        )


def _name_of(config: Any) -> str:
    targets = getattr(config, "target_modules", None)
    return f"{type(config).__name__}" + (f" (target_modules={targets!r})" if targets is not None else "")


def _layers_of(model: nn.Module) -> list[str]:
    """Name the kinds of layers that have a matrix, each once, by the last part of their names."""
    found = {
        name.rpartition(".")[2]: None
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "dim", lambda: 0)() == 2
    }
    listed = list(found)
    return [*listed[:_NAMED], "..."] if len(listed) > _NAMED else listed

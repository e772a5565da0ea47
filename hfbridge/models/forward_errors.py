"""Explain why a forward failed: which column, which value, which limit."""

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model

from hfbridge.errors import BridgeError, DataError, ModelError
from hfbridge.models.signature import positions_of, text_value, vocabulary_of

FAILURES = (IndexError, RuntimeError, ValueError)
"""What a forward raises for input that does not fit; a NotImplementedError is a RuntimeError."""

_IGNORED = -100
_NO_TRAINING = re.compile(r"train\w*\b.*\bnot\b|\bnot\b.*\btrain", re.IGNORECASE)


def explain_no_gradient(model: nn.Module, total: int) -> NoReturn:
    """Explain a loss without gradient: all `total` parameters are frozen, or it does not depend on them.

    Raises:
        ModelError: always.
    """
    if any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            f"The loss must depend on the parameters of {_name(model)}, and has no gradient. Leave "
            "out detach(), item(), numpy() and torch.no_grad() in compute_loss_func, compute_loss and the "
            "model's forward."
        )
    raise ModelError(
        f"Some parameters of {_name(model)} must be trained, and all {total:,} are frozen "
        "(requires_grad=False). Unfreeze some, such as those of the head: parameter.requires_grad_(True); or "
        "train adapters: HFModule(model, peft_config=...)."
    )


def check_vocabulary(model: nn.Module, processing_class: object) -> None:
    """Check that the model's embedding covers the tokenizer's vocabulary, without added tokens.

    Args:
        model: the Hugging Face model.
        processing_class: a tokenizer, or a processor that has one.

    Raises:
        ModelError: it does not.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    rows, words = vocabulary_of(model), getattr(tokenizer, "vocab_size", None)
    if rows is None or not isinstance(words, int) or words <= rows:
        return
    raise ModelError(
        f"The tokenizer ({type(tokenizer).__name__}) has {words} words, and the embedding of {_name(model)} "
        f"{rows}: they do not belong together. Load both from the same name or folder, or call "
        "model.resize_token_embeddings(len(tokenizer)) to train further rows."
    )


def unfit(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Describe what of a micro-batch the model cannot take; empty if nothing is found."""
    base: Any = unwrap_peft_model(model)
    needs = base.main_input_name if isinstance(base, PreTrainedModel) else None
    if needs is not None and not {needs, "inputs_embeds"}.intersection(inputs):
        return (
            f"it has the columns {', '.join(inputs)}, and {_name(model)} computes from {needs!r}. Have "
            "map_function or data_collator make that column: a tokenizer makes 'input_ids'."
        )
    rows = vocabulary_of(model)
    for name in ("input_ids", "decoder_input_ids"):
        wrong = None if rows is None else _outside(inputs.get(name), rows)
        if wrong is not None:
            return (
                f"column {name!r} holds the id {wrong}, and the embedding of {_name(model)} has the ids 0 to "
                f"{rows - 1 if rows else 0}. Use the tokenizer that belongs to the model, or, for tokens of "
                "your own, call model.resize_token_embeddings(len(tokenizer)) before training."
            )
    ids, positions = inputs.get("input_ids"), positions_of(model)
    if isinstance(ids, Tensor) and positions is not None and ids.shape[-1] > positions:
        return (
            f"column 'input_ids' has {ids.shape[-1]} tokens a sample, and {_name(model)} has {positions} "
            f"positions. Truncate: tokenizer(..., truncation=True, max_length={positions})."
        )
    misshapen = _misshapen_labels(model, inputs)
    if misshapen:
        return misshapen
    classes = _classes(model)
    wrong = None if classes is None else _outside(inputs.get("labels"), classes, ignored=_IGNORED)
    if wrong is not None:
        return (
            f"column 'labels' holds {wrong}, and {_name(model)} has the labels 0 to {(classes or 1) - 1} "
            f"({_IGNORED} is ignored). Build the model with more num_labels, or map the labels."
        )
    segments = text_value(model, "type_vocab_size")
    wrong = None if segments is None else _outside(inputs.get("token_type_ids"), segments)
    if wrong is not None and inputs["token_type_ids"].dim() == 2:
        return (
            f"column 'token_type_ids' holds {wrong}, and {_name(model)} has {segments} segments. Use the "
            "tokenizer that belongs to the model, or drop the column."
        )
    return ""


def _misshapen_labels(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Describe a wrong shape or type of labels; empty if nothing is found."""
    labels, ids, name = inputs.get("labels"), inputs.get("input_ids"), _name(model)
    if not isinstance(labels, Tensor):
        return ""
    is_of_tokens = name.endswith(("ForTokenClassification", "ForCausalLM", "LMHeadModel", "ForMaskedLM"))
    if is_of_tokens and isinstance(ids, Tensor) and labels.shape != ids.shape:
        return (
            f"column 'labels' has the shape {tuple(labels.shape)}, and 'input_ids' {tuple(ids.shape)}. Give "
            f"each token a label, those that do not count {_IGNORED}."
        )
    config: Any = getattr(model, "config", None)
    count, kind = getattr(config, "num_labels", 0), getattr(config, "problem_type", None)
    takes_classes = name.endswith(("SequenceClassification", "ImageClassification")) and count > 1
    is_float, is_several = labels.is_floating_point(), kind == "multi_label_classification"
    if not takes_classes or kind == "regression" or (is_float and labels.dim() == 2):
        return ""
    if not is_float and labels.dim() == 1 and not is_several:
        return ""
    held = "floats" if is_float else "integers"
    reset = " and set model.config.problem_type = None, which float labels had changed" if is_several else ""
    return (
        f"column 'labels' holds {held} of the shape {tuple(labels.shape)}. {name} with num_labels={count} "
        f"takes an integer of each sample, its class, or {count} floats, for several classes at once. Map "
        f"the labels to one of them{reset}."
    )


def explain(error: Exception, model: nn.Module, inputs: Mapping[str, Any]) -> BridgeError | None:
    """Explain an error of a forward over a micro-batch; `None` if no reason is found."""
    text = str(error)
    if _NO_TRAINING.search(text):
        return ModelError(
            f"{_name(model)} was given labels and does not train in the installed transformers, which says: "
            f"{text!r}. Pass compute_loss_func=..., which gets the outputs and the labels and "
            "returns the loss, or use a class that has a loss."
        )
    if "padding token" in text or "pad token" in text:
        return ModelError(
            f"{_name(model)} needs to know the pad token to find the end of a sequence, and its config has "
            "pad_token_id=None. Set model.config.pad_token_id, or pass as processing_class a "
            "tokenizer that has a pad_token."
        )
    try:
        found = unfit(model, inputs)
    except RuntimeError:  # a GPU whose kernel has failed accepts no more calls
        return None
    return DataError(f"A batch does not fit the model: {found}") if found else None


def _name(model: nn.Module) -> str:
    return type(unwrap_peft_model(model)).__name__


def _classes(model: nn.Module) -> int | None:
    """Count the classes of a head that has them, or the words of a language model."""
    config, name = getattr(model, "config", None), _name(model)
    if "Classification" in name:
        given = getattr(config, "problem_type", None) in ("regression", "multi_label_classification")
        classes = getattr(config, "num_labels", None)
        return None if given or not isinstance(classes, int) or classes < 2 else classes
    if name.endswith(("LM", "LMHeadModel", "ConditionalGeneration")):
        return text_value(model, "vocab_size")
    return None


def _outside(values: Any, limit: int, *, ignored: int | None = None) -> int | None:
    """Find an integer that is not in [0, limit)."""
    if not isinstance(values, Tensor) or values.is_floating_point() or not values.numel():
        return None
    wrong = (values < 0) | (values >= limit)
    if ignored is not None:
        wrong &= values != ignored
    return int(values[wrong][0]) if bool(wrong.any()) else None

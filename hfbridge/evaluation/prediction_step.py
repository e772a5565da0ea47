"""Run one evaluation batch."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_pt_utils import nested_detach

from hfbridge.errors import BridgeWarning

Batch = Mapping[str, Any]
_OBJECTS = (
    "Predictions hold the outputs of {} that are tensors, without others such as caches. To choose, pass "
    "preprocess_logits_for_metrics=lambda logits, labels: logits[0], say."
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The results of one evaluation batch.

    Attributes:
        loss: mean loss, scalar; `None` without labels.
        weight: items that the loss is a mean of.
        logits: outputs other than the loss: a tensor or a tuple of them; `None` if not kept.
        labels: a tensor or a tuple of them; `None` if not kept or missing.
    """

    loss: Tensor | None
    weight: int
    logits: Any
    labels: Any


@torch.no_grad()
def predict_batch(
    model: nn.Module,
    batch: Batch,
    *,
    loss_of: Callable[[nn.Module, Batch], tuple[Tensor, Any, int]],
    label_names: Sequence[str],
    has_own_loss: bool,
    keeps_logits: bool,
    keeps_objects: bool = False,
) -> Prediction:
    """Run one evaluation batch.

    Args:
        model: the Hugging Face model, in eval mode.
        batch: inputs and labels, on the model's device.
        loss_of: computes loss, outputs and items of a batch with labels.
        label_names: a loss is computed if the batch has all of these.
        has_own_loss: the model returns a loss without labels; a batch's `return_loss` takes precedence.
        keeps_logits: return logits and labels.
        keeps_objects: keep outputs that are no tensors, such as caches, among the logits.

    Mirrors: transformers.Trainer.prediction_step
    """
    return_loss = batch.get("return_loss")
    has_own_loss = has_own_loss if return_loss is None else bool(return_loss)
    has_loss = all(batch.get(name) is not None for name in label_names) if label_names else has_own_loss
    labels = nested_detach(tuple(batch.get(name) for name in label_names)) if has_loss else None
    if has_loss:
        loss, outputs, weight = loss_of(model, batch)
        loss = loss.detach().mean()
    else:
        loss, outputs, weight = None, model(**batch), 0
    if not keeps_logits:
        return Prediction(loss, weight, None, None)
    if labels is not None and len(labels) == 1:
        labels = labels[0]
    logits = logits_in(outputs, model, has_loss=has_loss)
    if isinstance(logits, tuple) and not keeps_objects and not _holds_tensors(logits):
        logits = tuple(filter(_holds_tensors, logits))
        logits = logits[0] if len(logits) == 1 else logits
        warnings.warn(_OBJECTS.format(type(model).__name__), BridgeWarning, stacklevel=2)
    return Prediction(loss, weight, logits, labels)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_holds_tensors, value.values()))
    return all(map(_holds_tensors, value)) if isinstance(value, list | tuple) else isinstance(value, Tensor)


def logits_in(outputs: Any, model: nn.Module, *, has_loss: bool) -> Any:
    """Return a model's outputs, detached, without the loss and caches.

    Returns:
        A tensor if there is only one, else a tuple.

    Mirrors: transformers.Trainer.prediction_step
    """
    config = getattr(model, "config", None)
    default = [] if config is None else ["past_key_values"]
    ignored = set(getattr(config, "keys_to_ignore_at_inference", default))
    if isinstance(outputs, Mapping):
        dropped = ignored | {"loss"} if has_loss else ignored
        logits = tuple(value for key, value in outputs.items() if key not in dropped)
    else:
        logits = outputs[1:] if has_loss else outputs
    logits = nested_detach(logits)
    return logits[0] if len(logits) == 1 else logits


def cast_for_evaluation(model: nn.Module, args: TrainingArguments) -> None:
    """Cast the weights for `bf16_full_eval` or `fp16_full_eval`, for good; not called while training.

    Mirrors: transformers.Trainer.evaluation_loop
    """
    if args.fp16_full_eval:
        model.to(dtype=torch.float16)
    elif args.bf16_full_eval:
        model.to(dtype=torch.bfloat16)

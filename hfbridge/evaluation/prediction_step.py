"""One evaluation batch through the model; knows Hugging Face."""

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
    "Predictions hold the outputs of {} that are tensors; the others, such as caches, are left out. To "
    "choose, pass preprocess_logits_for_metrics=lambda logits, labels: logits[0], say."
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one evaluation batch gave.

    Attributes:
        loss: mean loss, scalar; `None` without labels.
        weight: items the loss is a mean of.
        logits: outputs other than the loss: a tensor or a tuple of them; `None` if not kept.
        labels: a tensor or a tuple of them; `None` if not kept or not there.
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
        loss_of: computes loss, outputs and items of a batch that has labels.
        label_names: the labels the batch must have all of for a loss to be computed.
        has_own_loss: the model returns a loss without any labels; a batch's `return_loss` wins.
        keeps_logits: hand logits and labels back.
        keeps_objects: leave outputs that are no tensors, such as caches, among the logits.

    Mirrors: transformers.Trainer.prediction_step
    """
    asked = batch.get("return_loss")
    has_own_loss = has_own_loss if asked is None else bool(asked)
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
    """Take what is neither the loss nor a cache out of a model's outputs, detached.

    Returns:
        A tensor if there is only one, else a tuple.

    Mirrors: transformers.Trainer.prediction_step
    """
    config = getattr(model, "config", None)
    ignored = (
        set() if config is None else set(getattr(config, "keys_to_ignore_at_inference", ["past_key_values"]))
    )
    if isinstance(outputs, Mapping):
        dropped = ignored | {"loss"} if has_loss else ignored
        logits = tuple(value for key, value in outputs.items() if key not in dropped)
    else:
        logits = outputs[1:] if has_loss else outputs
    logits = nested_detach(logits)
    return logits[0] if len(logits) == 1 else logits


def cast_for_evaluation(model: nn.Module, args: TrainingArguments) -> None:
    """Cast the weights for `bf16_full_eval` or `fp16_full_eval`; as natively, they are not cast back.

    While training, evaluations leave the weights alone.

    Mirrors: transformers.Trainer.evaluation_loop
    """
    if args.fp16_full_eval:
        model.to(dtype=torch.float16)
    elif args.bf16_full_eval:
        model.to(dtype=torch.bfloat16)

"""What a loss counts: the items of a micro-batch and of its optimizer step.

labels                                          items
integers                                        those that are not ignored (-100)
integers of a causal language model             the same, without the first of each sample
floats, regression targets, or no "labels"      samples
of CTC and TDT                                  samples
no labels, but masked patches                   masked patches
no labels, but answers                          answers within the batch's length
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_TDT_MAPPING_NAMES,
)
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils.generic import can_return_loss

from hfbridge.models.probing import Inputs

IGNORED = -100
_CAUSAL_LM_NAMES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())

_FEW = 64  # labels that a list counts faster than an array

_CTC_NAMES = frozenset((*MODEL_FOR_CTC_MAPPING_NAMES.values(), *MODEL_FOR_TDT_MAPPING_NAMES.values()))


@dataclass(frozen=True)
class LossTraits:
    """What a model's class says about its loss, before it has computed one.

    Attributes:
        takes_items: `forward` accepts `num_items_in_batch`; nearly every class does, not every one uses it.
        counts_natively: the HF Trainer counts items, for the forward or for `compute_loss_func`.
        native_shift: the HF Trainer counts `labels[..., 1:]`.
        shift: the loss predicts the next token, so a sample's first label is never counted.
        rows_only: samples are counted, not labels.
        ignore_index: label value that is not counted.
        returns_loss_alone: the model returns a loss without any labels.
    """

    takes_items: bool
    counts_natively: bool
    native_shift: bool
    shift: bool
    rows_only: bool
    ignore_index: int
    returns_loss_alone: bool


def read_traits(model: nn.Module, *, has_function: bool = False) -> LossTraits:
    """Read from a model's class and config how its loss is counted.

    Args:
        model: the Hugging Face model.
        has_function: the loss comes from a `compute_loss_func`.

    Mirrors: transformers.Trainer.__init__
    """
    base = unwrap_peft_model(model)
    if hasattr(base, "accepts_loss_kwargs"):
        takes_items = bool(base.accepts_loss_kwargs)
    else:
        kinds = [p.kind for p in inspect.signature(base.forward).parameters.values()]
        takes_items = inspect.Parameter.VAR_KEYWORD in kinds
    config = getattr(base, "config", None)
    is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    loss_type: Any = getattr(base, "loss_type", None)
    by_loss = LOSS_MAPPING.get(loss_type) is ForCausalLMLoss and not is_encoder_decoder
    # By ancestors, too: FSDP2 gives a sharded model a class of its own.
    is_causal = any(kind.__name__ in _CAUSAL_LM_NAMES for kind in type(base).__mro__)
    is_regression = (
        getattr(config, "problem_type", None) == "regression" or getattr(config, "num_labels", 2) == 1
    )
    return LossTraits(
        takes_items=takes_items,
        counts_natively=takes_items or has_function,
        native_shift=by_loss,
        shift=by_loss or (is_causal and not is_encoder_decoder),
        rows_only=(is_regression and "Token" not in type(base).__name__) or loss_is_ctc(base),
        ignore_index=int(getattr(config, "semantic_loss_ignore_index", IGNORED)),
        returns_loss_alone=bool(can_return_loss(type(base))),
    )


@dataclass(frozen=True, slots=True)
class StepItems:
    """What the losses of one optimizer step are divided by.

    Attributes:
        per_micro_batch: items of each micro-batch.
        total: items of the step on all ranks, float32 scalar on the model's device; `None` where the HF
            Trainer does not count.
    """

    per_micro_batch: tuple[int, ...]
    total: Tensor | None


def over_ranks(items: StepItems) -> StepItems:
    """Sum a step's items over all ranks, by one collective."""
    if items.total is None or not dist.is_available() or not dist.is_initialized():
        return items
    dist.all_reduce(items.total)
    return items


def native_items(micro_batches: Sequence[Inputs], traits: LossTraits, device: torch.device) -> StepItems:
    """Count an optimizer step's items as the HF Trainer does.

    Mirrors: transformers.Trainer._get_num_items_in_batch
    """
    if not micro_batches or "labels" not in micro_batches[0] or not traits.counts_natively:
        return StepItems((), None)
    try:
        counts = tuple(_count_kept(_native_labels(b, traits), IGNORED) for b in micro_batches)
    except (TypeError, AttributeError):  # lists of dicts (detection), which the HF Trainer does not count
        return StepItems((), None)
    return StepItems(counts, torch.full((), float(sum(counts)), device=device))


def _count_kept(labels: Tensor, ignored: int) -> int:
    """Count the labels that are not ignored; on a CPU not by torch, which takes the longest."""
    if not labels.is_cpu or labels.is_floating_point():
        return int(labels.ne(ignored).sum())
    if labels.numel() <= _FEW:
        values = labels.flatten().tolist()
        return len(values) - values.count(ignored)
    return int(np.count_nonzero(labels.numpy() != ignored))


def _native_labels(inputs: Inputs, traits: LossTraits) -> Tensor:
    labels: Tensor = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"]
    return labels[..., 1:] if traits.native_shift and "shift_labels" not in inputs else labels


def true_items(micro_batches: Sequence[Inputs], traits: LossTraits, device: torch.device) -> StepItems:
    """Count the items that the model's own mean averages over, micro-batch by micro-batch."""
    counts = tuple(count_items(inputs, traits) for inputs in micro_batches)
    return StepItems(counts, torch.full((), float(sum(counts)), device=device))


def count_items(inputs: Inputs, traits: LossTraits) -> int:
    """Count the items of one micro-batch: labels that are not ignored, or samples."""
    if "shift_labels" in inputs:
        return _count_kept(inputs["shift_labels"], IGNORED)
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or traits.rows_only:
        return _count_without_labels(inputs) if labels is None else int(find_batch_size(inputs) or 0)
    if traits.shift:
        labels = labels[..., 1:]
    return _count_kept(labels, traits.ignore_index)


def _count_without_labels(inputs: Inputs) -> int:
    """Count masked patches, answers, or samples; models ignore answers beyond the batch's length."""
    patches, starts, ids = (inputs.get(n) for n in ("bool_masked_pos", "start_positions", "input_ids"))
    if isinstance(patches, Tensor):
        return int(patches.sum())
    if isinstance(starts, Tensor) and isinstance(ids, Tensor):
        return int((starts < ids.shape[-1]).sum())
    return int(find_batch_size(inputs) or 0)


def loss_is_ctc(model: nn.Module) -> bool:
    """Whether a class's loss is a mean of its samples' losses, each divided by its own length."""
    return any(kind.__name__ in _CTC_NAMES for kind in type(model).__mro__)

"""The loss of a micro-batch within its window, in two normalisations; knows Hugging Face.

"exact"    the gradient of a window is that of the mean over all its items, however it is cut
"native"   what `transformers.Trainer` 5.23 computes, to the bit

how the model's class computes its loss      "native"                   "exact"
divides its sum by num_items_in_batch        items as native counts     items as the model counts
(Llama, GPT-2)
mean, ignores num_items_in_batch (BERT)      sum of the micro-means     micro-means weighted by items
mean, does not take it, or no "labels"       mean of the micro-means    micro-means weighted by items
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hfbridge.model.criterion import OWN_LOSS, Criterion
from hfbridge.model.items import Inputs, LossTraits, WindowItems, native_items, true_items


class NativeLoss:
    """The native Trainer's normalisation, with the factors it has for some models.

    Proved by: tests/parity/test_steps.py
    """

    name: Literal["native"] = "native"

    def __init__(self, traits: LossTraits, criterion: Criterion = OWN_LOSS) -> None:
        self.traits, self.criterion = traits, criterion

    def count(self, micro_batches: Sequence[Inputs], device: torch.device) -> WindowItems:
        """Count what the losses of a window are divided by; micro-batches may still be on the CPU."""
        return native_items(micro_batches, self.traits, device)

    def train(self, model: nn.Module, inputs: Inputs, items: WindowItems, index: int, size: int) -> Tensor:
        """Compute the share of micro-batch `index` in its window's loss, scalar.

        Mirrors: transformers.Trainer.training_step
        """
        loss, _ = self.criterion(model, inputs, items.total, traits=self.traits)
        is_scaled = self.criterion.function is not None or (
            self.traits.takes_items and items.total is not None
        )
        return loss if is_scaled else loss / size

    def evaluate(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Any, int]:
        """Compute the loss of an evaluation batch.

        Returns:
            The loss (scalar), the model's outputs, and the items the loss is a mean of.
        """
        items = native_items([inputs], self.traits, device_of(model))
        loss, outputs = self.criterion(model, inputs, items.total, traits=self.traits)
        return loss, outputs, sum(items.per_micro_batch)


class ExactLoss:
    """The mean over all items of a window, however it is cut into micro-batches.

    Args:
        traits: how the model counts.
        divides: the loss is a sum divided by `num_items_in_batch`; found by `probe`.
        criterion: where the loss comes from.

    Proved by: tests/properties/test_split_law.py
    """

    name: Literal["exact"] = "exact"

    def __init__(self, traits: LossTraits, *, divides: bool, criterion: Criterion = OWN_LOSS) -> None:
        self.traits, self.criterion = traits, criterion
        self.divides = divides

    def count(self, micro_batches: Sequence[Inputs], device: torch.device) -> WindowItems:
        """Count what the losses of a window are divided by; micro-batches may still be on the CPU."""
        return true_items(micro_batches, self.traits, device)

    def train(self, model: nn.Module, inputs: Inputs, items: WindowItems, index: int, size: int) -> Tensor:
        """Compute the share of micro-batch `index` in its window's loss, scalar.

        A micro-batch without items contributes 0, where the model's own mean would be NaN.
        """
        held, total = items.per_micro_batch[index], items.total
        assert total is not None
        number = total if self.divides and held else None
        loss, outputs = self.criterion(model, inputs, number, traits=self.traits)
        if held == 0:
            return _zero_from(outputs, loss)
        return loss if self.divides or size == 1 else loss * (held / total)

    def evaluate(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Any, int]:
        """Compute the mean loss over the items of an evaluation batch.

        Returns:
            The loss (scalar; 0 for a batch without items), the model's outputs, and the items it is a mean
            of.
        """
        items = true_items([inputs], self.traits, device_of(model))
        held = items.per_micro_batch[0]
        number = items.total if self.divides and held else None
        loss, outputs = self.criterion(model, inputs, number, traits=self.traits)
        return (loss if held else torch.zeros_like(loss)), outputs, held


Loss = NativeLoss | ExactLoss


def _zero_from(outputs: Any, loss: Tensor) -> Tensor:
    """Make a zero that depends on the outputs, so that every parameter still gets a (zero) gradient."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    tensors = [v for v in values if isinstance(v, Tensor) and v is not loss and v.requires_grad]
    return sum((t.sum() * 0.0 for t in tensors), start=loss.new_zeros(()))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU for a model without any."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device

"""The loss of a micro-batch within its optimizer step.

how the model's class computes its loss      "native"                   "exact"
divides its sum by num_items_in_batch        items as native counts     items as the model counts
(Llama, GPT-2)
mean, ignores num_items_in_batch (BERT)      sum of the micro-means     micro-means weighted by items
mean, does not take it, or no "labels"       mean of the micro-means    micro-means weighted by items

Strategies average gradients over the ranks, so a loss divided by what all ranks count is multiplied by their
number.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hfbridge.losses.criterion import OWN_LOSS, Criterion
from hfbridge.losses.item_counts import LossTraits, StepItems, native_items, over_ranks, true_items
from hfbridge.models.probing import Inputs, device_of

_FEW_DIGITS, _ROUNDING = 2**12, 2.0**-21  # of a scale, and the errors of a division and a product in float32


class NativeLoss:
    """The loss of `transformers.Trainer` 5.23, to the bit.

    Args:
        traits: how the model counts.
        criterion: computes the loss.
        ranks: ranks whose gradients are averaged.
        counts_all: `average_tokens_across_devices`.

    Proved by: tests/parity/test_steps.py
    """

    name: Literal["native"] = "native"

    def __init__(
        self, traits: LossTraits, criterion: Criterion = OWN_LOSS, *, ranks: int = 1, counts_all: bool = True
    ) -> None:
        self.traits, self.criterion = traits, criterion
        self._ranks, self._counts_all = ranks, counts_all and ranks > 1

    def count(self, micro_batches: Sequence[Inputs], device: torch.device) -> StepItems:
        """Count what a step's losses are divided by; micro-batches may still be on the CPU."""
        items = native_items(micro_batches, self.traits, device)
        return over_ranks(items) if self._counts_all else items

    def train(self, model: nn.Module, inputs: Inputs, items: StepItems, index: int, size: int) -> Tensor:
        """Compute the share of micro-batch `index` in its step's loss, scalar.

        Mirrors: transformers.Trainer.training_step
        """
        loss, outputs = self._scaled(model, inputs, items)
        self.criterion.check(loss, outputs, model)
        calls_function = self.criterion.function is not None and self.criterion.hook is None
        is_scaled = calls_function or (self.traits.takes_items and items.total is not None)
        return loss if is_scaled else loss / size

    def evaluate(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Any, int]:
        """Return an evaluation batch's loss (scalar), the model's outputs, and the items of the loss."""
        items = self.count([inputs], device_of(model))
        loss, outputs = self._scaled(model, inputs, items)
        return loss, outputs, sum(items.per_micro_batch)

    def _scaled(self, model: nn.Module, inputs: Inputs, items: StepItems) -> tuple[Tensor, Any]:
        """Compute loss and outputs; a loss divided by the items of all ranks counts for all of them."""
        loss, outputs = self.criterion(model, inputs, items.total, traits=self.traits)
        if self._counts_all and items.total is not None:
            loss = loss * self._ranks
        return loss, outputs


class ExactLoss:
    """The mean over all items of an optimizer step, however it is split into micro-batches.

    Args:
        traits: how the model counts.
        divides: the loss is a sum divided by `num_items_in_batch`; found by `probe`.
        criterion: computes the loss.
        ranks: ranks whose gradients are averaged.

    Proved by: tests/properties/test_split_law.py
    """

    name: Literal["exact"] = "exact"

    def __init__(
        self, traits: LossTraits, *, divides: bool, criterion: Criterion = OWN_LOSS, ranks: int = 1
    ) -> None:
        self.traits, self.criterion = traits, criterion
        self.divides, self._ranks = divides, ranks

    def count(self, micro_batches: Sequence[Inputs], device: torch.device) -> StepItems:
        """Count what a step's losses are divided by; micro-batches may still be on the CPU."""
        return over_ranks(true_items(micro_batches, self.traits, device))

    def train(self, model: nn.Module, inputs: Inputs, items: StepItems, index: int, size: int) -> Tensor:
        """Compute the share of micro-batch `index` in its step's loss, scalar.

        A micro-batch without items contributes 0, where the model's own mean would be NaN.
        """
        held, total = items.per_micro_batch[index], items.total
        assert total is not None
        number = total if self._takes_number(held) else None
        loss, outputs = self.criterion(model, inputs, number, traits=self.traits)
        self.criterion.check(loss, outputs, model)
        if held == 0:
            return _zero_from(outputs, loss)
        if not self.divides and (size > 1 or self._ranks > 1):
            loss = loss * (held / total)
        return loss if self._ranks == 1 else loss * self._ranks

    def evaluate(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Any, int]:
        """Return an evaluation batch's mean loss (0 without items), the model's outputs, and the items."""
        items = true_items([inputs], self.traits, device_of(model))
        held = items.per_micro_batch[0]
        number = items.total if self._takes_number(held) else None
        loss, outputs = self.criterion(model, inputs, number, traits=self.traits)
        return (loss if held else torch.zeros_like(loss)), outputs, held

    def _takes_number(self, held: int) -> bool:
        """Whether the loss gets `num_items_in_batch`; a `compute_loss_func` always does."""
        return self.criterion.function is not None or bool(self.divides and held)


Loss = NativeLoss | ExactLoss


def scale_for_accumulation(loss: Tensor, accumulation: int) -> Tensor:
    """Multiply a loss so that Lightning's division by `accumulation` restores its gradient to the bit.

    In float32 `(1 / n) * n` is not always 1, first at n = 41.

    Returns:
        The product, in the dtype of a loss in float32 or float64, else in float64.

    Proved by: tests/unit/losses/test_step_loss.py
    """
    if loss.dtype in (torch.float32, torch.float64):
        scaled: Tensor = _ScaledLoss.apply(loss, accumulation)  # type: ignore[no-untyped-call]
        return scaled
    return loss.double() * accumulation  # halves have too few digits; in float64 (1 / n) * n rounds to 1


class _ScaledLoss(torch.autograd.Function):
    """A product whose gradient, divided by the factor before, is rounded to the number that it came from."""

    # That is 1, or the scale of a gradient scaler: a number of few binary digits.

    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return loss * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        product = gradients[0] * ctx.factor
        mantissa, exponent = torch.frexp(product)
        nearest = torch.ldexp((mantissa * _FEW_DIGITS).round() / _FEW_DIGITS, exponent)
        is_near = (product - nearest).abs() <= product.abs() * _ROUNDING
        return torch.where(is_near, nearest, product), None


def _zero_from(outputs: Any, loss: Tensor) -> Tensor:
    """Make a zero that depends on the outputs, so that every parameter still gets a (zero) gradient."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    tensors = [v for v in values if isinstance(v, Tensor) and v is not loss and v.requires_grad]
    return sum((t.sum() * 0.0 for t in tensors), start=loss.new_zeros(()))

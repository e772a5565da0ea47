"""Which normalization a run's losses need, measured on the first optimizer step.

A class's signature does not say whether a model divides by `num_items_in_batch`: BERT ignores it.
Nor does it say whether the loss is a mean over items at all, which "exact" needs: contrastive losses, object
detection and sums of means over different items are not.
"""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import unwrap_peft_model

from hfbridge.errors import name_of
from hfbridge.losses.criterion import OWN_LOSS, Criterion
from hfbridge.losses.item_counts import LossTraits, count_items, native_items
from hfbridge.losses.step_loss import ExactLoss, Loss, NativeLoss
from hfbridge.models.probing import Inputs, device_of, halves, noise_of, probe_mode


@dataclass(frozen=True)
class Probe:
    """What a model does with `num_items_in_batch`, measured.

    Attributes:
        divides: it divides its summed loss by that number.
        shift: it does not count the first label of a sample.
    """

    divides: bool
    shift: bool


def probe(
    model: nn.Module,
    inputs: Inputs,
    traits: LossTraits,
    criterion: Criterion = OWN_LOSS,
    *,
    alone: bool = False,
) -> Probe:
    """Measure by two forwards whether a loss uses `num_items_in_batch`, and by a third what it counts.

    The model runs in eval mode; random generators, gradients and train modes are restored. Errors are left
    to training.

    Args:
        model: the Hugging Face model on its device.
        inputs: one micro-batch on the model's device.
        traits: what the class says.
        criterion: computes the loss.
        alone: no other rank runs the same forwards, so two or three samples come first.
    """
    guessed = Probe(divides=False, shift=traits.shift)
    if "labels" not in inputs:
        return guessed
    found, few = None, _few_samples(inputs, traits) if alone else inputs
    for given in (inputs,) if few is inputs else (few, inputs):
        with suppress(Exception):  # if not for the size of the batch, it is raised again in training
            found = found or _measure(model, given, traits, criterion, alone=alone)
    return found or guessed


def _few_samples(inputs: Inputs, traits: LossTraits) -> Inputs:
    """Halve a micro-batch down to two or three samples, those with the most items."""
    while (find_batch_size(inputs) or 0) > 3 and (parts := halves(inputs)) is not None:
        inputs = max(parts, key=lambda part: count_items(part, traits))
    return inputs


def _measure(
    model: nn.Module, inputs: Inputs, traits: LossTraits, criterion: Criterion, *, alone: bool
) -> Probe | None:
    """Compare the losses for one number and for twice as much; `None` if they are 0."""
    number = torch.tensor(float(max(count_items(inputs, traits), 1)), device=device_of(model))

    def loss_of(given: Tensor, inputs: Inputs) -> float:
        loss, outputs = criterion(model, inputs, given, traits=traits)
        criterion.check(loss, outputs, model)
        return float(loss)

    firsts, shift = _first_labels_alone(inputs, traits), traits.shift
    once = twice = 1.0
    with probe_mode(model):
        if traits.counts_natively:
            once, twice = loss_of(number, inputs), loss_of(2 * number, inputs)
        if firsts is not None or not alone:  # several ranks run the same forwards
            with suppress(Exception):
                counted = loss_of(number, inputs if firsts is None else firsts)
                shift = shift if firsts is None else counted == 0 or math.isnan(counted)
    return None if once == 0 else Probe(divides=abs(twice) < 0.75 * abs(once), shift=shift)


def _first_labels_alone(inputs: Inputs, traits: LossTraits) -> Inputs | None:
    """Ignore all labels but the first of each sample; `None` if none is left, or they are not of tokens."""
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point() or traits.rows_only:
        return None
    firsts = torch.full_like(labels, traits.ignore_index)
    firsts[..., 0] = labels[..., 0]
    is_ignored = bool((firsts == traits.ignore_index).all())
    return None if is_ignored or "shift_labels" in inputs else {**inputs, "labels": firsts}


def native_factor(
    probed: Probe, micro_batches: Sequence[Inputs], traits: LossTraits, *, world_size: int
) -> tuple[float, float]:
    """Return the least and the largest factor of "native" over "exact" among a step's micro-batches.

    Args:
        probed: what the model does with the number of items.
        micro_batches: of the step; only labels and sizes are read.
        traits: how the model counts.
        world_size: ranks.
    """
    counts = [count_items(inputs, traits) for inputs in micro_batches]
    total, size = sum(counts), len(counts)
    if not total:
        return 1.0, 1.0
    native = native_items(micro_batches, traits, torch.device("cpu"))
    if probed.divides:
        factor = total / float(native.total) if native.total else 1.0
        return factor, factor
    weight = float(world_size) if native.total is not None else 1.0 / size
    factors = [weight * total / held for held in counts if held]
    return min(factors), max(factors)


class Normalization:
    """Choose a run's loss on the first optimizer step that has labels, and compare the two normalizations.

    Args:
        name: "exact" or "native".
        traits: what the model's class says of its loss.
        criterion: computes the loss.
        ranks: ranks that share the optimizer step.
        counts_all: `average_tokens_across_devices`, for "native".
    """

    def __init__(
        self,
        name: Literal["exact", "native"],
        traits: LossTraits,
        criterion: Criterion = OWN_LOSS,
        *,
        ranks: int = 1,
        counts_all: bool = True,
    ) -> None:
        self.name, self._ranks, self._counts_all = name, ranks, counts_all
        self.traits, self._criterion = traits, criterion
        self._loss: Loss | None = None
        self._probe: Probe | None = None
        self._split = ""

    @property
    def is_settled(self) -> bool:
        """Whether the model was probed already."""
        return self._loss is not None

    def loss_for(self, model: nn.Module, micro_batches: Sequence[Inputs]) -> Loss:
        """Return the loss to use, probing the model with the first micro-batch that has items.

        Args:
            model: the Hugging Face model on its device.
            micro_batches: of a step, or one evaluation batch, on the model's device.
        """
        if self._loss is not None:
            return self._loss
        if self.name == "native" and not self._calls_transformers_alone(model):
            self._loss = self._make(divides=False)
            return self._loss
        counted = next((inputs for inputs in micro_batches if count_items(inputs, self.traits)), None)
        first_rank = _first_rank_with(counted is not None, self._ranks, device_of(model))
        if first_rank is None:
            return self._make(divides=False)
        inputs = counted or micro_batches[0]  # all ranks run the same forwards
        probed = probe(model, inputs, self.traits, self._criterion, alone=self._ranks == 1)
        self._probe = _broadcast_from(first_rank, self._ranks, probed)
        self.traits = dataclasses.replace(self.traits, shift=self._probe.shift)
        self._loss = self._make(divides=self._probe.divides)
        is_compared = self._criterion.hook is None and (len(micro_batches) > 1 or self._ranks > 1)
        if isinstance(self._loss, ExactLoss) and is_compared:
            parts = halves(inputs)
            if not _all_ranks_have(parts is not None, self._ranks, device_of(model)):
                parts = None
            self._split = _describe_split(model, inputs, parts, self._loss)
        return self._loss

    def loss_for_evaluation(self, model: nn.Module, batch: Inputs) -> Loss:
        """Return the loss to use for an evaluation batch, probing the model only where it can matter."""
        labels = batch.get("labels")
        one_a_sample = isinstance(labels, Tensor) and labels.dim() == 1
        if self._loss is None and (self.name == "native" or (one_a_sample and self._criterion.is_own)):
            return self._make(divides=False)
        return self.loss_for(model, [batch])

    def compare(self, micro_batches: Sequence[Inputs]) -> str:
        """Describe by which factor the two normalizations differ, and a loss that is no mean over items.

        Empty where they are the same.
        """
        if self._probe is None:
            return ""
        least, most = native_factor(self._probe, micro_batches, self.traits, world_size=self._ranks)
        if abs(least - 1) < 1e-9 and abs(most - 1) < 1e-9:
            return self._split
        factor = f"{most:.4g}" if most - least < 1e-9 else f"{least:.4g} to {most:.4g} (by micro-batch)"
        return (
            f'loss_normalization="{self.name}" is used. In "native" the loss and gradient of the first '
            f'optimizer step are {factor} times those of "exact", which is the mean over all its items.'
            f"{' ' if self._split else ''}{self._split}"
        )

    def _calls_transformers_alone(self, model: nn.Module) -> bool:
        """Whether a probe would call no code of the user's, which may count its calls."""
        forward: Any = type(unwrap_peft_model(model)).forward
        is_theirs = str(forward.__module__).startswith("transformers.")
        return is_theirs and self._criterion.function is None and self._criterion.hook is None

    def _make(self, *, divides: bool) -> Loss:
        if self.name == "native":
            return NativeLoss(self.traits, self._criterion, ranks=self._ranks, counts_all=self._counts_all)
        return ExactLoss(self.traits, divides=divides, criterion=self._criterion, ranks=self._ranks)


def _first_rank_with(has_items: bool, ranks: int, device: torch.device) -> int | None:
    """Find the first rank whose step has items; all ranks run the same forwards, or none does."""
    if ranks == 1:
        return 0 if has_items else None
    flags = torch.zeros(ranks, device=device)
    flags[dist.get_rank()] = float(has_items)
    dist.all_reduce(flags)
    having = flags.nonzero().flatten().tolist()
    return int(having[0]) if having else None


def _all_ranks_have(has: bool, ranks: int, device: torch.device) -> bool:
    """Whether something holds on all ranks, which then run the same forwards."""
    if ranks == 1:
        return has
    flag = torch.tensor(float(has), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _broadcast_from(rank: int, ranks: int, found: Probe) -> Probe:
    """Return what one rank has found."""
    if ranks == 1:
        return found
    held: list[Any] = [found]
    dist.broadcast_object_list(held, src=rank)
    agreed: Probe = held[0]
    return agreed


def _describe_split(
    model: nn.Module, inputs: Inputs, parts: tuple[Inputs, Inputs] | None, loss: ExactLoss
) -> str:
    """Describe that the loss of a micro-batch is not the mean of those of its halves; empty if it is.

    Args:
        model: the Hugging Face model on its device.
        inputs: the micro-batch.
        parts: its halves; `None` if it cannot be split.
        loss: counts and divides.
    """
    whose = type(unwrap_peft_model(model)).__name__
    if loss.criterion.function is not None:
        whose = f"compute_loss_func ({name_of(loss.criterion.function)})"
    if loss.criterion.function is None and (
        "class_labels" in inputs or isinstance(inputs.get("labels"), (list, tuple))
    ):
        return _note(whose, "it is divided by the number of objects in the batch")
    if parts is None:
        return ""
    try:
        with probe_mode(model):
            full, again, *halved = (
                (float(value), held)
                for value, _, held in (loss.evaluate(model, given) for given in (inputs, inputs, *parts))
            )
    except Exception:  # if not for the size of the batch, it is raised again in training
        return ""
    items = sum(held for _, held in halved)
    if not items or full != again:  # a forward with random numbers in eval mode cannot be compared
        return ""
    mean = sum(value * held for value, held in halved) / items
    distance = abs(mean - full[0]) / max(abs(full[0]), 1e-12)
    if not distance > noise_of(model):
        return ""
    return _note(whose, f"here they differ by {distance:.2g} of it")


def _note(whose: str, how: str) -> str:
    return (
        f"The loss of {whose} over a batch is not the mean of the losses of its parts; {how}. It compares "
        "samples with each other, matches objects, or adds means over different items, so that the gradient "
        'depends on the split into micro-batches also in "exact". Where that matters, use one micro-batch: '
        "gradient_accumulation_steps=1 with a larger per_device_train_batch_size."
    )

"""Which normalisation a run's losses need, found out on its first window.

A class's signature does not tell whether a model divides by `num_items_in_batch`: BERT accepts the number and
ignores it. So the model is asked.
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

from hfbridge.losses.criterion import OWN_LOSS, Criterion
from hfbridge.losses.item_counts import LossTraits, count_items, native_items
from hfbridge.losses.step_loss import ExactLoss, Loss, NativeLoss
from hfbridge.models.probing import Inputs, device_of, halves, noise_of, probe_mode


@dataclass(frozen=True)
class Probe:
    """What a model does with `num_items_in_batch`, measured.

    Attributes:
        divides: it returns its summed loss divided by the number it is given.
        shift: it does not count the first label of a row.
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
    """Find out by two forwards whether a loss uses `num_items_in_batch`, and by a third what it counts.

    A class's signature does not tell: BERT accepts the number and ignores it. A `compute_loss_func` must
    accept it, and may ignore it as well. The model runs in eval mode on one micro-batch; random generators,
    gradients and train modes are as before. A `compute_loss_func` gets what training gives it, and its errors
    are left to training.

    Args:
        model: the Hugging Face model on its device.
        inputs: one micro-batch on the model's device; one without items tells nothing, and runs all the same.
        traits: what the class says.
        criterion: where the loss comes from.
        alone: no other rank has to run the same forwards, so that two or three rows are asked first, and
            no more than is needed.
    """
    guessed = Probe(divides=False, shift=traits.shift)
    if "labels" not in inputs:
        return guessed
    found, few = None, _few_rows(inputs, traits) if alone else inputs
    for given in (inputs,) if few is inputs else (few, inputs):
        with suppress(Exception):  # if not for the size of the batch, it is raised again in training
            found = found or _ask(model, given, traits, criterion, alone=alone)
    return found or guessed


def _few_rows(inputs: Inputs, traits: LossTraits) -> Inputs:
    """Halve a micro-batch down to two rows or three, those with the most items."""
    while (find_batch_size(inputs) or 0) > 3 and (parts := halves(inputs)) is not None:
        inputs = max(parts, key=lambda part: count_items(part, traits))
    return inputs


def _ask(
    model: nn.Module, inputs: Inputs, traits: LossTraits, criterion: Criterion, *, alone: bool
) -> Probe | None:
    """Compare the losses for one number and for twice as much; `None` if they are 0, which tells nothing."""
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
    """Say how many times too large native's weights of a window's micro-batches are, least and most.

    Args:
        probed: what the model does with the number of items.
        micro_batches: the window; only labels and sizes are read.
        traits: how the model counts.
        world_size: ranks; native sums the means of models that ignore the number over these, too.
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
    """Settle a run's loss on the first window that has labels, and say what the other choice would do.

    Args:
        name: "exact" or "native".
        traits: what the model's class says of its loss.
        criterion: where the loss comes from.
        ranks: ranks that share the optimizer step.
        counts_all: `average_tokens_across_devices`, which "native" alone asks.
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
            micro_batches: a window, or one evaluation batch, on the model's device.
        """
        if self._loss is not None:
            return self._loss
        if self.name == "native" and not self._calls_transformers_alone(model):
            self._loss = self._make(divides=False)
            return self._loss
        telling = next((inputs for inputs in micro_batches if count_items(inputs, self.traits)), None)
        found = _agreed(telling is not None, self._ranks, device_of(model))
        if found is None:
            return self._make(divides=False)
        self._probe = _from_rank(
            found,
            self._ranks,
            probe(
                model,
                telling or micro_batches[0],
                self.traits,
                self._criterion,
                alone=self._ranks == 1,
            ),
        )
        self.traits = dataclasses.replace(self.traits, shift=self._probe.shift)
        self._loss = self._make(divides=self._probe.divides)
        is_compared = self._criterion.hook is None and (len(micro_batches) > 1 or self._ranks > 1)
        if isinstance(self._loss, ExactLoss) and is_compared:
            inputs = telling or micro_batches[0]
            parts = halves(inputs)
            if not _all_have(parts is not None, self._ranks, device_of(model)):
                parts = None
            self._split = describe_split(model, inputs, parts, self._loss)
        return self._loss

    def loss_for_evaluation(self, model: nn.Module, batch: Inputs) -> Loss:
        """Return the loss to use for an evaluation batch.

        Nobody is asked where it cannot matter: in "native", and where a model's own loss has one label a row,
        so that it is a mean over rows.

        Args:
            model: the Hugging Face model on its device.
            batch: on the model's device.
        """
        labels = batch.get("labels")
        one_a_row = isinstance(labels, Tensor) and labels.dim() == 1
        if self._loss is None and (self.name == "native" or (one_a_row and self._criterion.is_own)):
            return self._make(divides=False)
        return self.loss_for(model, [batch])

    def compare(self, micro_batches: Sequence[Inputs]) -> str:
        """Say by which factor native's gradient of a window differs from the exact one, if it does.

        Where the loss is no mean over items, that is said as well.

        Args:
            micro_batches: the window; only labels and sizes are read.
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


def _agreed(has_items: bool, ranks: int, device: torch.device) -> int | None:
    """Find the first rank whose window has items; all ranks run the same forwards, or none does."""
    if ranks == 1:
        return 0 if has_items else None
    told = torch.zeros(ranks, device=device)
    told[dist.get_rank()] = float(has_items)
    dist.all_reduce(told)
    having = told.nonzero().flatten().tolist()
    return int(having[0]) if having else None


def _all_have(has: bool, ranks: int, device: torch.device) -> bool:
    """Whether something holds on all ranks, which then run the same forwards."""
    if ranks == 1:
        return has
    told = torch.tensor(float(has), device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MIN)
    return bool(told)


def _from_rank(rank: int, ranks: int, found: Probe) -> Probe:
    """Take over what one rank has found."""
    if ranks == 1:
        return found
    told: list[Any] = [found]
    dist.broadcast_object_list(told, src=rank)
    agreed: Probe = told[0]
    return agreed


def matches_objects(inputs: Inputs) -> bool:
    """Whether rows have objects of their own, with losses divided by the number of objects in a batch."""
    return "class_labels" in inputs or isinstance(inputs.get("labels"), (list, tuple))


def describe_split(
    model: nn.Module, inputs: Inputs, parts: tuple[Inputs, Inputs] | None, loss: ExactLoss
) -> str:
    """Say that the loss of a micro-batch is not the mean of those of its halves; empty if it is.

    Objects that are matched are known by their labels. Other losses are computed: whole and in halves.

    Args:
        model: the Hugging Face model on its device.
        inputs: the micro-batch.
        parts: its halves; `None` if it cannot be cut.
        loss: how the run counts and divides.
    """
    whose = _name_of(model, loss)
    if loss.criterion.function is None and matches_objects(inputs):
        return _note(whose, "it is divided by the number of objects in the batch")
    if parts is None:
        return ""
    try:
        with probe_mode(model):
            whole, again, *cut = (
                (float(value), held)
                for value, _, held in (loss.evaluate(model, given) for given in (inputs, inputs, *parts))
            )
    except Exception:  # if not for the size of the batch, it is raised again in training
        return ""
    items = sum(held for _, held in cut)
    if not items or whole != again:  # a forward that draws in eval mode cannot be compared
        return ""
    mean = sum(value * held for value, held in cut) / items
    distance = abs(mean - whole[0]) / max(abs(whole[0]), 1e-12)
    if not distance > noise_of(model):
        return ""
    return _note(whose, f"here they differ by {distance:.2g} of it")


def _name_of(model: nn.Module, loss: ExactLoss) -> str:
    if loss.criterion.function is None:
        return type(unwrap_peft_model(model)).__name__
    return f"compute_loss_func ({loss.criterion.function_name})"


def _note(whose: str, how: str) -> str:
    return (
        f"The loss of {whose} over a batch is not the mean of the losses of its parts; {how}. It compares "
        "rows with each other, matches objects, or adds means over different items, so that the gradient "
        'depends on the cut into micro-batches also in "exact". Where that matters, use one micro-batch: '
        "gradient_accumulation_steps=1 with a larger per_device_train_batch_size."
    )

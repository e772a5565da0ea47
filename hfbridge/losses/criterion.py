"""Where a loss comes from: the model, smoothed labels, or the user's function or method.

A subclass's `HFModule.compute_loss` gets the outputs and the batch, and returns the loss. Without one:

compute_loss_func    label_smoothing_factor    labels reach    loss
given                -                         the function    what the function returns
-                    above 0                   the smoother    smoothed cross-entropy over the logits
-                    0                         the model       the model's own; with `chunked_loss` without
                                                              logits: chunked.py
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import unwrap_peft_model

from hfbridge.errors import ModelError, name_of
from hfbridge.losses.chunked import ChunkedLoss
from hfbridge.losses.item_counts import LossTraits
from hfbridge.models.forward_errors import FAILURES, explain
from hfbridge.models.probing import Inputs

LossFunction = Callable[..., Any]
LossHook = Callable[[Any, Any], Any]
"""`HFModule.compute_loss`: a function of outputs and batch."""


@dataclass(frozen=True)
class Criterion:
    """Compute a micro-batch's loss.

    Attributes:
        function: the user's `compute_loss_func`, called with the model's outputs, the labels and
            `num_items_in_batch`.
        smoother: of transformers; used where there is no function.
        shifts: the smoother compares logits with the next token's label.
        forgets_shift: not while a compiled model trains: the HF Trainer looks up the wrapper's name.
        hook: a subclass's `compute_loss`; wins over all the others, which it may call.
        drops_labels: the model does not take the labels that the hook gets.
        is_own: the loss is the one that the model returns.

    Mirrors: transformers.Trainer.compute_loss
    """

    function: LossFunction | None = None
    smoother: LabelSmoother | None = None
    shifts: bool = False
    forgets_shift: bool = False
    chunked: ChunkedLoss | None = None
    hook: LossHook | None = None
    drops_labels: bool = False
    is_own: bool = field(init=False)

    def __post_init__(self) -> None:
        """Compute `is_own` once: every micro-batch reads it."""
        is_own = self.function is None and self.smoother is None and self.hook is None
        object.__setattr__(self, "is_own", is_own)

    def __call__(
        self, model: nn.Module, inputs: Inputs, number: Tensor | None, *, traits: LossTraits
    ) -> tuple[Tensor, Any]:
        """Return the loss (scalar) and the model's outputs of a micro-batch.

        Args:
            model: the Hugging Face model.
            inputs: the micro-batch; not changed.
            number: `num_items_in_batch`; `None` for the micro-batch's own mean.
            traits: whether the model takes the number.

        Raises:
            ModelError: there is no loss, or the class does not train.
            DataError: the micro-batch does not fit the model.
        """
        batch = inputs
        if self.function is not None or self.smoother is not None or self.drops_labels:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if traits.takes_items and number is not None:
            inputs = {**inputs, "num_items_in_batch": number}
        if self.chunked is None:
            outputs = _forward(model, inputs)
        else:
            outputs = self.chunked.run(partial(_forward, model, inputs), inputs)
        if self.is_own:
            return loss_in(outputs, inputs, model), outputs
        if self.hook is None:
            return self.loss_of(model, outputs, batch, number), outputs
        loss = self.hook(outputs, batch)
        if not isinstance(loss, Tensor):
            raise ModelError(f"compute_loss returned {loss!r}; it must return the loss, a scalar tensor.")
        return loss, outputs

    def loss_of(self, model: nn.Module, outputs: Any, batch: Inputs, number: Tensor | None = None) -> Tensor:
        """Compute the loss, scalar, from a forward's outputs and the micro-batch with its labels.

        Raises:
            ModelError: there is none.
        """
        labels = batch.get("labels")
        if self.function is not None:
            loss = self.function(outputs, labels, num_items_in_batch=number)
            if isinstance(loss, Tensor):
                return loss
            raise ModelError(
                f"compute_loss_func ({name_of(self.function)}) returned {loss!r}; it must return the loss, a "
                "scalar tensor."
            )
        if self.smoother is not None and labels is not None:
            shifts = self.shifts and not (self.forgets_shift and isinstance(model, OptimizedModule))
            smoothed: Tensor = self.smoother(outputs, labels, shift_labels=shifts, num_items_in_batch=number)
            return smoothed
        return loss_in(outputs, batch, model)

    def check(self, loss: Tensor, outputs: Any, model: nn.Module) -> None:
        """Check that a training loss is one number.

        Raises:
            ModelError: it is not, or the model returned a bare tensor, whose first value is no loss.
        """
        is_bare = self.is_own and isinstance(outputs, Tensor)
        if loss.numel() == 1 and not (is_bare and outputs.numel() > 1):
            return
        shape, what = tuple((outputs if is_bare else loss).shape), "a bare tensor" if is_bare else "a loss"
        if self.hook is not None or self.function is not None:
            name = (
                "compute_loss" if self.hook is not None else f"compute_loss_func ({name_of(self.function)})"
            )
            raise ModelError(
                f"{name} must return one number, got a loss of shape {shape}. Return loss.mean(), or with "
                "num_items_in_batch loss.sum() / num_items_in_batch."
            )
        raise ModelError(
            f"{type(unwrap_peft_model(model)).__name__} returned {what} of shape {shape}; training needs one "
            "number. Pass compute_loss_func=..., which gets the outputs and returns it: "
            "lambda outputs, labels, num_items_in_batch: outputs.loss.mean(), say. Or override compute_loss."
        )


OWN_LOSS = Criterion()
"""The loss that the model returns."""


def criterion_of(
    model: nn.Module,
    *,
    smoothing: float,
    function: LossFunction | None,
    forgets_shift: bool = False,
    chunked: ChunkedLoss | None = None,
    hook: LossHook | None = None,
) -> Criterion:
    """Choose a run's criterion; see the table at the top of this file.

    Args:
        model: the Hugging Face model; smoothing shifts the labels of causal LMs.
        smoothing: `label_smoothing_factor`.
        function: `compute_loss_func`.
        forgets_shift: of the criterion.
        chunked: of the criterion.
        hook: of the criterion.

    Raises:
        ModelError: smoothing for a multi-label classifier, whose labels are no class ids.

    Mirrors: transformers.Trainer.compute_loss
    """
    drops = hook is not None and not _takes_labels(model)
    if function is not None or not smoothing:
        return Criterion(function=function, chunked=chunked, hook=hook, drops_labels=drops)
    if getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification":
        raise ModelError(
            f"label_smoothing_factor={smoothing} does not fit a multi-label classifier; the HF Trainer "
            "switches it off with a warning. Leave it out, or pass compute_loss_func."
        )
    shifts = type(unwrap_peft_model(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    smoother = LabelSmoother(epsilon=smoothing)
    return Criterion(
        smoother=smoother, shifts=shifts, forgets_shift=forgets_shift, hook=hook, drops_labels=drops
    )


def _takes_labels(model: nn.Module) -> bool:
    return "labels" in inspect.signature(unwrap_peft_model(model).forward).parameters


def _forward(model: nn.Module, inputs: Inputs) -> Any:
    try:
        return model(**inputs)
    except FAILURES as error:
        explained = explain(error, model, inputs)
        if explained is None:
            raise
        raise explained from error


def loss_in(outputs: Any, inputs: Inputs, model: nn.Module) -> Tensor:
    """Take the loss out of what a forward returned, scalar.

    Raises:
        ModelError: there is none.

    Mirrors: transformers.Trainer.compute_loss
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(loss, Tensor):
        got = type(outputs).__name__
        if isinstance(outputs, Mapping):
            got = ", ".join(name for name, value in outputs.items() if value is not None)
        raise ModelError(
            f"{type(model).__name__} returned no loss, only {got}. It was given {', '.join(inputs)}. A "
            "model returns a loss when it has a head and gets labels: use an AutoModelFor... class of your "
            "task, and see that the dataset or the data_collator makes a 'labels' column; for a model "
            "without a loss of its own pass compute_loss_func=..."
        )
    return loss

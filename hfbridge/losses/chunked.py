"""The loss of a language model without its logits.

Logits have as many values as tokens times words: with a large vocabulary they are what fills the memory.
Here the head hands its hidden states on, and the loss function, which gets them in the logits' place,
multiplies them by the head's weights a few rows at a time and keeps gradients instead. All else in a forward
is the model's own, and runs where it ran: a router's loss, hooks, what a strategy has put around it.

a model                                                     is
whose loss function is that of causal or masked LMs, and
  gets what a linear head returned, as it is                taken, tied or with a bias
that caps or scales its logits, or adds to their loss       refused, by a forward of one row
whose head is anything else, adapters of PEFT included      refused
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy, pad
from transformers import TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.trainer_utils import unwrap_peft_model

from hfbridge.distributed.collectives import raise_on_all_ranks
from hfbridge.errors import ModelError
from hfbridge.losses.item_counts import IGNORED
from hfbridge.models.forward_errors import FAILURES
from hfbridge.models.probing import Inputs, halves, noise_of, probe_mode

CHUNK_VALUES = 2**22
"""Logits that exist at a time, at least: fewer make no faster chunks, and 16 MiB are no burden."""

_SHIFTS = {ForCausalLMLoss: True, ForMaskedLMLoss: False}
_INSTEAD = "Leave chunked_loss out."


class ChunkedLoss:
    """Put in the place of a model's head and loss function, until `undo`; used only while `run` runs.

    Args:
        model: the Hugging Face model, not yet cut into the ranks' parts.
        args: the settings, some of which change what the loss is.
        is_sharded: no rank holds the head's weights outside of its forward (ZeRO-3).

    Attributes:
        keeps_logits: somebody asks for them, so that the model is left to itself.

    Raises:
        ModelError: the loss of this model, or with these settings, is another.

    Proved by: tests/properties/test_chunked_loss.py
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, *, is_sharded: bool = False) -> None:
        self._model = model
        self._base: Any = unwrap_peft_model(model)
        self._name = type(self._base).__name__
        self._refuse_settings(args, is_sharded=is_sharded)
        self._own_loss: Callable[..., Any] = getattr(self._base, "loss_function", None)  # type: ignore[assignment]
        if self._own_loss not in _SHIFTS:
            raise self._refusal("its loss is not transformers' own for causal or masked language models")
        self._head = self._find_head()
        self._own_forward = self._head.forward
        self._undo = _replaced(self._head, "forward", self._forward_of_head)
        self._undo_loss = _replaced(self._base, "_loss_function", self._loss)
        self._mode: Literal["own", "listens", "chunks"] = "own"
        self._is_tried = self.keeps_logits = False
        self._passed: Tensor | None = None
        self._sum: Tensor | None = None

    def run(self, forward: Callable[[], Any], inputs: Inputs) -> Any:
        """Run a forward so that its loss is computed in chunks.

        Args:
            forward: calls the model, or what is around it, with labels.
            inputs: the micro-batch; the first one is what the model is tried with.

        Returns:
            The model's outputs, if `keeps_logits`; else "loss", the sum that it is a part of, and the hidden
            states, by their names.

        Raises:
            ModelError: the loss is not computed of what the head returns.
        """
        if self.keeps_logits or inputs.get("labels") is None:
            return forward()
        self.check(inputs)
        outputs = self._run(forward, "chunks")
        found = {"loss": _loss_in(outputs), "summed_loss": self._sum, "hidden_states": self._passed}
        self._sum = self._passed = None
        return found

    def check(self, inputs: Inputs) -> None:
        """Try the model with a micro-batch; a second call does nothing.

        Raises:
            ModelError: the loss is not computed of what the head returns.
        """
        if not self._is_tried and inputs.get("labels") is not None:
            with raise_on_all_ranks():
                self._try(inputs)
            self._is_tried = True

    def undo(self) -> None:
        """Give the model its head and loss function back; a second call does nothing."""
        self._undo()
        self._undo_loss()

    def _refuse_settings(self, args: TrainingArguments, *, is_sharded: bool) -> None:
        reason = ""
        if args.label_smoothing_factor:
            reason = f"label_smoothing_factor={args.label_smoothing_factor} smooths over all logits"
        elif args.use_liger_kernel:
            reason = "use_liger_kernel=True puts a loss without logits of its own in"
        elif is_sharded:
            reason = "under DeepSpeed's stage 3 the weights of the head are there in its own forward only"
        if reason:
            raise self._refusal(reason)

    def _find_head(self) -> nn.Linear:
        get: Any = getattr(self._base, "get_output_embeddings", None)
        head = None if get is None else get()
        if head is None:
            raise self._refusal("it has no head over a vocabulary (get_output_embeddings)")
        if type(head) is not nn.Linear:
            raise self._refusal(f"its head is a {type(head).__module__}.{type(head).__name__}, not nn.Linear")
        return head

    def _try(self, inputs: Inputs) -> None:
        """See that loss and logits of one row are connected as they have to be, and the loss is the same."""
        inputs = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
        while (parts := halves(inputs)) is not None:
            inputs = max(parts, key=lambda part: int(part["labels"].ne(IGNORED).sum()))
        with probe_mode(self._model):
            own = float(_loss_in(self._run(lambda: self._model(**inputs), "listens")))
            try:
                chunked = float(_loss_in(self._run(lambda: self._model(**inputs), "chunks")))
            except ModelError:
                raise
            except FAILURES as error:
                raise self._refusal("its forward does more with the logits than compute a loss") from error
        tolerance = max(noise_of(self._model), 1e-5) * max(abs(own), 1.0)
        if own == own and not abs(own - chunked) <= tolerance:  # without any labels both are NaN
            raise self._refusal(f"the loss of a row would be {chunked:.6g}, and its own is {own:.6g}")

    def _run(self, forward: Callable[[], Any], mode: Literal["listens", "chunks"]) -> Any:
        self._mode, self._sum, self._passed = mode, None, None
        try:
            outputs = forward()
            if self._sum is None:
                raise self._refusal("its forward does not call its loss_function")
        finally:
            self._mode = "own"
        return outputs

    def _forward_of_head(self, hidden: Tensor) -> Tensor:
        """Return what the head returns, or the hidden states themselves."""
        if self._mode == "chunks":
            self._passed = hidden
            return hidden
        logits: Tensor = self._own_forward(hidden)
        if self._mode == "listens":
            self._passed = logits
        return logits

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        *more: Any,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **named: Any,
    ) -> Any:
        """Compute the model's own loss, or the same in chunks."""
        if self._mode != "own" and logits is not self._passed:
            raise self._refusal("its forward changes the logits (caps, scales or cuts them) before the loss")
        if self._mode != "chunks":
            named |= {"ignore_index": ignore_index, "shift_labels": shift_labels}
            loss = self._own_loss(logits, labels, vocab_size, *more, **named)
            self._sum = loss if self._mode == "listens" else None
            return loss
        if _SHIFTS[self._own_loss]:
            padded = pad(labels, (0, 1), value=ignore_index)
            labels = padded[..., 1:] if shift_labels is None else shift_labels
        number = more[0] if more else named.get("num_items_in_batch")
        targets = labels.flatten().to(self._head.weight.device)
        self._sum = self._summed(logits, targets, ignore_index)
        return self._sum / (targets.ne(ignore_index).sum() if number is None else number)

    def _summed(self, hidden: Tensor, targets: Tensor, ignored: int) -> Tensor:
        """Sum the cross-entropy of the counted rows, scalar; hidden is [..., features], targets [rows]."""
        head, device = self._head, hidden.device.type
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        is_whole = weight.shape == (head.out_features, head.in_features)
        if not is_whole or type(weight) not in (Tensor, nn.Parameter):
            raise self._refusal("the strategy holds the weights of the head as a unit of their own")
        rows = hidden.flatten(0, -2)
        if torch.is_autocast_enabled(device):  # as it would cast for the head
            dtype = torch.get_autocast_dtype(device)
            rows, weight = rows.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if rows.dtype in (torch.float16, torch.bfloat16):  # linear_cross_entropy would round the loss to it
            rows, weight = rows.float(), weight.float()
            bias = None if bias is None else bias.float()
        options = LinearCrossEntropyOptions(
            batch_chunk_size=rows_at_a_time(*rows.shape, classes=len(weight)),
            allow_retain_graph=torch.compiler.is_compiling(),
        )
        with torch.autocast(device, enabled=False):
            return linear_cross_entropy(
                rows,
                weight,
                targets,
                linear_bias=bias,
                reduction="sum",
                ignore_index=ignored,
                options=options,
            )

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(f"chunked_loss=True cannot be used with {self._name}: {reason}. {_INSTEAD}")


def rows_at_a_time(rows: int, features: int, *, classes: int) -> int:
    """Choose how many rows have logits at a time: as many as take the memory of the hidden states, or more.

    Args:
        rows: of the hidden states.
        features: of each.
        classes: words of the vocabulary.
    """
    return max(1, min(rows, max(CHUNK_VALUES // classes, rows * features // classes)))


def check_chunked(chunked_loss: object, *, has_function: bool) -> None:
    """See that HFModule's `chunked_loss` may be used with its other arguments.

    Raises:
        ModelError: it is no bool, or the loss is another than the model's own.
    """
    if not isinstance(chunked_loss, bool):
        raise ModelError(f"chunked_loss={chunked_loss!r}; it may be True or False.")
    if chunked_loss and has_function:
        raise ModelError(
            "chunked_loss=True computes the model's own loss without logits, and compute_loss_func is given "
            "logits to compute another, as an overridden compute_loss is. Leave one of them out."
        )


@contextmanager
def logits_kept(chunked: ChunkedLoss | None, *, keeps: bool) -> Iterator[None]:
    """Have losses computed with logits, for those who ask for these.

    Args:
        chunked: of the run; `None` where losses have logits anyway.
        keeps: somebody asks.
    """
    if chunked is None:
        yield
        return
    before, chunked.keeps_logits = chunked.keeps_logits, keeps
    try:
        yield
    finally:
        chunked.keeps_logits = before


def _loss_in(outputs: Any) -> Tensor:
    loss: Tensor = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
    return loss


def _replaced(owner: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of an instance; returns what gives it back what it had, once."""
    held = vars(owner)
    before = {name: held[name]} if name in held else {}
    held[name] = value

    def undo() -> None:
        if held.get(name) == value:
            del held[name]
            held.update(before)

    return undo

"""The loss of a language model without its logits.

The head returns its hidden states, and the loss function multiplies them by the head's weights in chunks. The
rest of the forward is the model's own: a router's loss, hooks, the strategy's wrapper.

Supported are models whose loss function is transformers' for causal or masked LMs and gets the output of an
`nn.Linear` head unchanged; a forward of one sample checks that.
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
"""Logits that exist at a time, at least: 16 MiB in float32; smaller chunks are slower."""

_SHIFTS = {ForCausalLMLoss: True, ForMaskedLMLoss: False}
_INSTEAD = "Leave chunked_loss out."


class ChunkedLoss:
    """Replace a model's head and loss function until `undo`; active only inside `run`.

    Args:
        model: the Hugging Face model, not yet sharded.
        args: the settings.
        is_sharded: the head's weights exist only during its forward (ZeRO-3).

    Attributes:
        keeps_logits: logits are needed, so the model's own forward runs.

    Raises:
        ModelError: the model or a setting uses another loss.

    Proved by: tests/properties/test_chunked_loss.py
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, *, is_sharded: bool = False) -> None:
        self._model = model
        self._base: Any = unwrap_peft_model(model)
        self._name = type(self._base).__name__
        self._check_settings(args, is_sharded=is_sharded)
        self._own_loss: Callable[..., Any] = getattr(self._base, "loss_function", None)  # type: ignore[assignment]
        if self._own_loss not in _SHIFTS:
            raise self._refusal("its loss is not transformers' own for causal or masked language models")
        self._head = self._find_head()
        self._own_forward = self._head.forward
        self._undo = _replaced(self._head, "forward", self._forward_of_head)
        self._undo_loss = _replaced(self._base, "_loss_function", self._loss)
        self._mode: Literal["own", "record", "chunks"] = "own"
        self._is_tried = self.keeps_logits = False
        self._passed: Tensor | None = None
        self._sum: Tensor | None = None

    def run(self, forward: Callable[[], Any], inputs: Inputs) -> Any:
        """Run a forward with its loss computed in chunks.

        Args:
            forward: calls the model, or its wrapper, with labels.
            inputs: the micro-batch; the model is checked with the first one.

        Returns:
            The model's outputs with `keeps_logits`; else a dict of "loss", "summed_loss" and "hidden_states".

        Raises:
            ModelError: the loss is not computed from the head's output.
        """
        if self.keeps_logits or inputs.get("labels") is None:
            return forward()
        self.check(inputs)
        outputs = self._run(forward, "chunks")
        found = {"loss": _loss_in(outputs), "summed_loss": self._sum, "hidden_states": self._passed}
        self._sum = self._passed = None
        return found

    def check(self, inputs: Inputs) -> None:
        """Check the model with a micro-batch, once.

        Raises:
            ModelError: the loss is not computed from the head's output.
        """
        if not self._is_tried and inputs.get("labels") is not None:
            with raise_on_all_ranks():
                self._try(inputs)
            self._is_tried = True

    def undo(self) -> None:
        """Restore the model's head and loss function; a second call does nothing."""
        self._undo()
        self._undo_loss()

    def _check_settings(self, args: TrainingArguments, *, is_sharded: bool) -> None:
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
        """Check on one sample that the loss in chunks equals the model's own."""
        inputs = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
        while (parts := halves(inputs)) is not None:
            inputs = max(parts, key=lambda part: int(part["labels"].ne(IGNORED).sum()))
        with probe_mode(self._model):
            own = float(_loss_in(self._run(lambda: self._model(**inputs), "record")))
            try:
                chunked = float(_loss_in(self._run(lambda: self._model(**inputs), "chunks")))
            except ModelError:
                raise
            except FAILURES as error:
                raise self._refusal("its forward does more with the logits than compute a loss") from error
        tolerance = max(noise_of(self._model), 1e-5) * max(abs(own), 1.0)
        if own == own and not abs(own - chunked) <= tolerance:  # without any labels both are NaN
            raise self._refusal(f"the loss of a sample would be {chunked:.6g}, and its own is {own:.6g}")

    def _run(self, forward: Callable[[], Any], mode: Literal["record", "chunks"]) -> Any:
        self._mode, self._sum, self._passed = mode, None, None
        try:
            outputs = forward()
            if self._sum is None:
                raise self._refusal("its forward does not call its loss_function")
        finally:
            self._mode = "own"
        return outputs

    def _forward_of_head(self, hidden: Tensor) -> Tensor:
        if self._mode == "chunks":
            self._passed = hidden
            return hidden
        logits: Tensor = self._own_forward(hidden)
        if self._mode == "record":
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
            self._sum = loss if self._mode == "record" else None
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
    """Choose how many rows have logits at a time: these take at least the memory of the hidden states."""
    return max(1, min(rows, max(CHUNK_VALUES // classes, rows * features // classes)))


def check_chunked(chunked_loss: object, *, has_function: bool) -> None:
    """Check `chunked_loss` against HFModule's other arguments.

    Raises:
        ModelError: it is no bool, or the loss is not the model's own.
    """
    if not isinstance(chunked_loss, bool):
        raise ModelError(f"chunked_loss={chunked_loss!r}; it must be True or False.")
    if chunked_loss and has_function:
        raise ModelError(
            "chunked_loss=True computes the model's own loss without logits, and compute_loss_func is given "
            "logits to compute another, as an overridden compute_loss is. Leave one of them out."
        )


@contextmanager
def logits_kept(chunked: ChunkedLoss | None, *, keeps: bool) -> Iterator[None]:
    """Set `keeps_logits` for a while; `chunked` is `None` in a run with logits."""
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
    """Set an attribute of an instance, and return a function that restores it."""
    held = vars(owner)
    before = {name: held[name]} if name in held else {}
    held[name] = value

    def undo() -> None:
        if held.get(name) == value:
            del held[name]
            held.update(before)

    return undo

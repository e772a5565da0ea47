"""Count what a model processes: floating-point operations and input tokens."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from transformers.trainer_pt_utils import distributed_broadcast_scalars

from hfbridge.models.probing import device_of

logger = logging.getLogger(__name__)


class FlopsCounter:
    """Count each micro-batch's operations and tokens as the HF Trainer does.

    Args:
        model: the Hugging Face model.
        tokens: `include_num_input_tokens_seen`.
        pad_token_id: marks padding where there is no attention mask.
        ranks: ranks that count.

    Attributes:
        flops: floating-point operations since the last `drain_flops`: six for each parameter outside the
            embeddings and each element of the main input.

    Mirrors: transformers.Trainer.floating_point_ops
    Mirrors: transformers.Trainer._track_num_input_tokens
    """

    def __init__(
        self,
        model: Any,
        *,
        tokens: Literal["no", "all", "non_padding"],
        pad_token_id: int | None,
        ranks: int = 1,
    ) -> None:
        self._ranks, self._device = ranks, device_of(model)
        self._main = getattr(model, "main_input_name", "input_ids")
        self._model = model
        # Under ZeRO-3 the HF Trainer counts the parameters that are gathered after a backward.
        self._changes = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        self._pending = 0
        self._flops_per_element = self._count_parameters()
        self._tokens, self._pad_token_id = tokens, pad_token_id
        self._has_warned = False
        self.flops = 0

    def add(self, inputs: Mapping[str, Any]) -> int:
        """Count a micro-batch and return its tokens on all ranks; 0 if tokens are not counted."""
        tokens = self._count(inputs)
        if self._tokens == "no" or self._ranks == 1:
            return tokens
        return int(self._over_ranks(tokens))

    def _count(self, inputs: Mapping[str, Any]) -> int:
        main = inputs.get(self._main)
        if not isinstance(main, Tensor):
            if self._tokens != "no":
                self._warn_once(f"The micro-batches hold no {self._main!r}: input tokens are not counted.")
            return 0
        if self._changes:
            self._pending += main.numel()
        else:
            self.flops += self._flops_per_element * main.numel()
        if self._tokens == "no":
            return 0
        if self._tokens == "non_padding":
            if "attention_mask" in inputs:
                return int(inputs["attention_mask"].sum())
            if self._pad_token_id is not None:
                return int((main != self._pad_token_id).sum())
            self._warn_once(
                "There is neither attention mask nor padding token: all input tokens are counted."
            )
        return main.numel()

    def finish_backward(self) -> None:
        """Count the operations of the micro-batch whose backward is finished."""
        if self._pending:
            self.flops += self._count_parameters() * self._pending
            self._pending = 0

    def drain_flops(self) -> float:
        """Return all ranks' operations since the last call; called by all ranks."""
        flops, self.flops = float(self.flops), 0
        return self.of_all_ranks(flops)

    def of_all_ranks(self, flops: float) -> float:
        """Sum the operations over all ranks; called by all ranks."""
        return flops if self._ranks == 1 else float(self._over_ranks(flops))

    def _over_ranks(self, number: float) -> float:
        return distributed_broadcast_scalars([number], device=self._device).sum().item()

    def _count_parameters(self) -> int:
        has_count = hasattr(self._model, "num_parameters")
        return 6 * self._model.num_parameters(exclude_embeddings=True) if has_count else 0

    def _warn_once(self, text: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(text)

"""What a log row of training tells: the loss since the last row, and the last step."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class LoggedLoss:
    """Sum the micro-batches' losses on their device, as the native Trainer does between two log rows.

    Args:
        device: where the model computes; on a GPU nothing waits for it until a row is due.
        drop_non_finite: count NaN and infinite losses as the mean of those before them
            (`logging_nan_inf_filter`).

    Attributes:
        sum: the losses since the last row; never changed in place.

    Mirrors: transformers.Trainer._run_epoch
    Proved by: tests/unit/losses/test_running_loss.py
    """

    def __init__(self, device: torch.device, *, drop_non_finite: bool) -> None:
        self.sum = torch.zeros((), device=device)
        self._drop_non_finite = drop_non_finite
        self._drained = 0.0
        self._last_logged_step = 0
        self._first_step = 0

    def resume(self, global_step: int, record: Mapping[str, Any] | None) -> None:
        """Go on at a step of a run that was stopped.

        Args:
            global_step: optimizer steps that are behind.
            record: what `record` returned; without one, as natively, nothing of the steps behind is counted.
        """
        if record is None:
            self._last_logged_step = self._first_step = global_step
            return
        self.sum = self.sum + record["sum"].to(self.sum.device)
        self._drained, self._last_logged_step = record["drained"], record["last_logged_step"]
        self._first_step = record["first_step"]

    def record(self, total: Tensor | None = None) -> dict[str, Any]:
        """Return what has to be known to go on.

        Args:
            total: an earlier `sum` since the last row, to go on from there.
        """
        return {
            "sum": (self.sum if total is None else total).detach().cpu().clone(),
            "drained": self._drained,
            "last_logged_step": self._last_logged_step,
            "first_step": self._first_step,
        }

    def add(self, loss: Tensor, *, global_step: int) -> None:
        """Take in the loss of one micro-batch.

        Args:
            loss: scalar, already divided as its gradient is.
            global_step: optimizer steps completed before this micro-batch.
        """
        before = self.sum
        if self._drop_non_finite:
            steps = 1 + global_step - self._last_logged_step
            if before.device.type == "cpu":
                loss = loss if math.isfinite(loss.item()) else before / steps
            else:  # the same values without waiting for the device
                loss = torch.where(torch.isfinite(loss), loss, before / steps)
        self.sum = (before + loss).to(before.dtype)  # a new tensor: a save may need that of the step's begin

    def is_due(self, global_step: int) -> bool:
        """Tell whether a step has been taken since the last row."""
        return global_step > self._last_logged_step

    def drain(self, global_step: int) -> float:
        """Return the mean loss per optimizer step and rank since the last row, and begin anew."""
        value = _mean_over_ranks(self.sum)
        self.sum = self.sum - self.sum
        mean = value / (global_step - self._last_logged_step)
        self._drained += value
        self._last_logged_step = global_step
        return mean

    def mean(self, global_step: int) -> float:
        """Return the mean loss per optimizer step of the whole run, as far as it is known.

        Of the steps since the last row only this rank's loss counts, as natively.

        Mirrors: transformers.Trainer._finalize_training
        """
        return (self._drained + self.sum.item()) / max(global_step - self._first_step, 0.001)


def _mean_over_ranks(value: Tensor) -> float:
    """Average a scalar over the ranks."""
    if not dist.is_available() or not dist.is_initialized():
        return value.item()
    found = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value)
    return torch.stack(found).mean().item()

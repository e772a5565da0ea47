"""The loss of training's log entries."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class LoggedLoss:
    """Sum the micro-batches' losses on their device, as the HF Trainer does between two log entries.

    Args:
        device: of the model; a GPU is synchronized only when an entry is due.
        drop_non_finite: `logging_nan_inf_filter`: replace NaN and infinity by the mean loss so far.

    Attributes:
        sum: the losses since the last entry; never changed in place.

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
        """Resume at a completed optimizer step.

        Args:
            global_step: completed optimizer steps.
            record: what `record` returned; without one, as in the HF Trainer, earlier losses are not counted.
        """
        if record is None:
            self._last_logged_step = self._first_step = global_step
            return
        self.sum = self.sum + record["sum"].to(self.sum.device)
        self._drained, self._last_logged_step = record["drained"], record["last_logged_step"]
        self._first_step = record["first_step"]

    def record(self, total: Tensor | None = None) -> dict[str, Any]:
        """Return what `resume` needs; `total` is an earlier `sum` since the last entry to resume from."""
        return {
            "sum": (self.sum if total is None else total).detach().cpu().clone(),
            "drained": self._drained,
            "last_logged_step": self._last_logged_step,
            "first_step": self._first_step,
        }

    def add(self, loss: Tensor, *, global_step: int) -> None:
        """Add the loss of one micro-batch, divided as its gradient is; `global_step` steps are completed."""
        before = self.sum
        if self._drop_non_finite:
            steps = 1 + global_step - self._last_logged_step
            if before.device.type == "cpu":
                loss = loss if math.isfinite(loss.item()) else before / steps
            else:  # the same values without waiting for the device
                loss = torch.where(torch.isfinite(loss), loss, before / steps)
        self.sum = (before + loss).to(before.dtype)  # a new tensor: a save may need that of the step's start

    def is_due(self, global_step: int) -> bool:
        """Return whether a step was completed since the last entry."""
        return global_step > self._last_logged_step

    def drain(self, global_step: int) -> float:
        """Return the mean loss per optimizer step and rank since the last entry, and reset it."""
        value = _mean_over_ranks(self.sum)
        self.sum = self.sum - self.sum
        mean = value / (global_step - self._last_logged_step)
        self._drained += value
        self._last_logged_step = global_step
        return mean

    def mean(self, global_step: int) -> float:
        """Return the mean loss per optimizer step of the run; since the last entry only this rank's counts.

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

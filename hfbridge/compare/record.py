"""What is recorded of each optimizer step, alike on all engines, without a change of their numbers.

A line of `<slug>/steps.jsonl`, as the ranks' lines are put together:

    key              what it is                                                        of several ranks
    step             completed optimizer steps, from 1
    epoch            completed epochs
    loss             of this step alone, as `logging_steps=1` logs it; a NaN as it is  their mean
    grad_norm        2-norm of all gradients before clipping                           the first's
    learning_rate    with which the step was taken                                     the first's
    samples          digest of the micro-batches as they reached the model             all, in order
    rows             of these micro-batches                                            their sum
    random           digest of the random states when the gradients were there         all, in order
    parameters       digest of all parameters after the step                           the whole ones
    parameter_norm   their 2-norm                                                      the whole ones
    seconds          of the step, its data included; recording, logging, evaluating    the slowest's
                     and saving left out
    memory_bytes     in use by the process after the step; on a GPU, at most on it     the fullest's

A line of `<slug>/metrics.jsonl` is an evaluation: `step`, and its metrics without times.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_pt_utils import find_batch_size

from hfbridge.compare.digests import joined, of_micro_batch, of_parameters, of_random_states
from hfbridge.distributed import collectives
from hfbridge.models.optimizers import learning_rate_of

_TIMES = ("_runtime", "_per_second", "_preparation_time", "_mem_")
Metrics = dict[str, float | int | str]


@dataclass(frozen=True)
class Step:
    """One optimizer step; the module docstring explains each field.

    `grad_norm` is `None` if it was not computed, `parameters` and `parameter_norm` except on the first rank.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float | None
    learning_rate: float
    samples: str
    rows: int
    random: str
    parameters: str | None
    parameter_norm: float | None
    seconds: float
    memory_bytes: int

    def as_row(self) -> dict[str, Any]:
        """Return what is written."""
        return asdict(self)


def merge(of_ranks: Sequence[Sequence[Step]]) -> list[Step]:
    """Merge the steps of all ranks, in their order, as far as all have recorded them."""
    if len(of_ranks) == 1:
        return list(of_ranks[0])
    found = []
    for steps in zip(*of_ranks, strict=False):
        first = steps[0]
        loss = torch.tensor([step.loss for step in steps]).mean().item()  # in float32, as in the HF Trainer
        together = {
            "loss": loss,
            "samples": joined(step.samples for step in steps),
            "random": joined(step.random for step in steps),
            "rows": sum(step.rows for step in steps),
            "seconds": max(step.seconds for step in steps),
            "memory_bytes": max(step.memory_bytes for step in steps),
        }
        found.append(Step(**{**first.as_row(), **together}))
    return found


def merge_metrics(entries: Sequence[Metrics]) -> list[Metrics]:
    """Merge the entries of one step, of several evaluation sets, into one."""
    found: dict[Any, Metrics] = {}
    for entry in entries:
        found.setdefault(entry["step"], {}).update(entry)
    return list(found.values())


class Recorder(TrainerCallback):
    """Record each optimizer step of an engine that calls transformers' events.

    The engine adds what no event has: `add_micro_batch`, and `grad_norm` before the step.

    Args:
        keep: called with each step.
        keep_metrics: called with each evaluation's entry.
        on_begin: called with the number of steps of the run when training begins.
        last_step: the run is ended after this step; `None` lets it end by itself.

    Attributes:
        connect: called when training begins, for an engine whose parts are not there before.
        grad_norm: returns the norm of the current step.
        measure: digest and norm of a model's parameters, called by all ranks; `None` but on the first.
        first_parameters: digest of the initial parameters; `None` on ranks other than the first.
        seconds: from the beginning of training to its end, without recording.
        started: when training began, in seconds since 1970; 0 before.

    Proved by: tests/compare/test_record.py
    """

    def __init__(
        self,
        keep: Callable[[Step], None],
        *,
        keep_metrics: Callable[[Metrics], None],
        on_begin: Callable[[int], None],
        last_step: int | None = None,
    ) -> None:
        self._keep, self._keep_metrics, self._on_begin = keep, keep_metrics, on_begin
        self._last_step = last_step
        self.grad_norm: Callable[[], Tensor | float | None] = _nothing
        self.connect: Callable[[], object] = _nothing
        self.measure: Callable[[nn.Module], tuple[str, float] | None] = measure
        self.first_parameters: str | None = None
        self.seconds = self.started = 0.0
        self._samples: list[str] = []
        self._rows = 0
        self._loss: Tensor | None = None
        self._random, self._rate = "", 0.0
        self._norm: float | None = None
        self._mark_s = self._recording_s = 0.0

    def add_micro_batch(self, digest: str, rows: int, loss: Tensor) -> None:
        """Add a micro-batch of the current step.

        Args:
            digest: of the model's inputs.
            rows: in it.
            loss: its share, scalar, as its gradient is scaled.
        """
        self._samples.append(digest)
        self._rows += rows
        share = loss.detach()
        begun = torch.zeros((), device=share.device) if self._loss is None else self._loss
        self._loss = begun + share  # summed in float32, as in the HF Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the initial parameters."""
        self.connect()
        found = self.measure(kwargs["model"])
        self.first_parameters = None if found is None else found[0]
        self._on_begin(min(state.max_steps, self._last_step or state.max_steps))
        self.started = time.time()
        self._begin_s = self._mark_s = time.perf_counter()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to measure a step here: logging, saving and the end of an epoch are no part of it."""
        self._mark_s = time.perf_counter()

    on_log = on_save = on_epoch_begin

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record norm and random states, after all forwards and backwards of the step."""
        norm = self.grad_norm()
        self._norm = None if norm is None else float(norm)
        self._random = of_random_states()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the learning rate before the schedule steps."""
        self._rate = learning_rate_of(kwargs["optimizer"], kwargs["lr_scheduler"]) or 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the step, and end the run after the last one."""
        now = time.perf_counter()
        assert self._loss is not None
        memory_bytes = memory_of(self._loss.device)
        found = self.measure(kwargs["model"])
        self._keep(
            Step(
                step=state.global_step,
                epoch=float(state.epoch),
                loss=self._loss.item(),
                grad_norm=self._norm,
                learning_rate=self._rate,
                samples=joined(self._samples),
                rows=self._rows,
                random=self._random,
                parameters=None if found is None else found[0],
                parameter_norm=None if found is None else found[1],
                seconds=now - self._mark_s,
                memory_bytes=memory_bytes,
            )
        )
        self._samples, self._rows, self._loss = [], 0, None
        if self._last_step is not None and state.global_step >= self._last_step:
            control.should_training_stop = True
        self._mark_s = time.perf_counter()
        self._recording_s += self._mark_s - now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record an evaluation."""
        numbers = {
            name: value
            for name, value in kwargs["metrics"].items()
            if isinstance(value, (int, float, str)) and not any(time in name for time in _TIMES)
        }
        self._keep_metrics({"step": state.global_step, **numbers})
        self._mark_s = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record how long training took."""
        self.seconds = time.perf_counter() - self._begin_s - self._recording_s


def _nothing() -> None:
    return None


def measure(model: nn.Module) -> tuple[str, float] | None:
    """Digest the parameters of a model that every rank has in full."""
    return of_parameters(model.named_parameters(), is_first=collectives.rank() == 0)


def described(inputs: Mapping[str, Any]) -> tuple[str, int]:
    """Digest and rows of a micro-batch."""
    return of_micro_batch(inputs), int(find_batch_size(inputs) or 0)


def memory_of(device: torch.device) -> int:
    """Return the bytes in use: by this process, or, at most since it began, on its GPU."""
    if device.type == "cuda":  # pragma: no cover
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)

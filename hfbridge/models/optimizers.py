"""Parameter groups, optimizer and schedule, by the HF Trainer's own methods.

Lightning steps the schedule after each optimizer step; CallbackHost steps reduce_lr_on_plateau and greedy
after each evaluation, with its metric.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers import Trainer as NativeTrainer
from transformers import TrainingArguments
from transformers.optimization import GreedyLR

from hfbridge.errors import ModelError, SettingsError

Optimizers = tuple[Optimizer | None, Any]
OptimizerClass = tuple[Any, Mapping[str, Any]]


@dataclass(slots=True)
class StepRecord:
    """What the last optimizer step left for the log.

    Attributes:
        grad_norm: 2-norm of all gradients before clipping, scalar; `None` before the first step.
        learning_rate: of the step; `None` before the first.
        is_updating: the optimizer is changing the weights.
        is_updated: it has changed them, and the step is not counted yet.
    """

    grad_norm: Tensor | None = None
    learning_rate: float | None = None
    is_updating: bool = False
    is_updated: bool = False

    def forget(self) -> None:
        """Forget the last step."""
        self.grad_norm = self.learning_rate = None


class NativeParts(NativeTrainer):
    """The HF Trainer's methods that make optimizer and schedule, without the rest of it.

    Args:
        model: the Hugging Face model.
        args: the settings.
        optimizers: the user's optimizer and schedule; either may be `None`.
        optimizer_cls_and_kwargs: an optimizer class with arguments, in place of `optim` and `optim_args`.

    Mirrors: transformers.Trainer.create_optimizer
    Mirrors: transformers.Trainer.create_scheduler
    Proved by: tests/parity/test_optimizers.py
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        optimizers: Optimizers = (None, None),
        optimizer_cls_and_kwargs: OptimizerClass | None = None,
    ) -> None:
        self.model, self.args = model, args
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = None
        if optimizer_cls_and_kwargs is not None:
            kind, arguments = optimizer_cls_and_kwargs
            self.optimizer_cls_and_kwargs = (kind, dict(arguments))
        self.is_deepspeed_enabled = False  # what that changes here, hfbridge/models/deepspeed_values.py does


def check_optimizers(model: object, optimizers: Any, optimizer_cls_and_kwargs: Any) -> None:
    """Check HFModule's arguments for the optimizer.

    Raises:
        ModelError: they do not fit together.

    Mirrors: transformers.Trainer._validate_args
    """
    if not isinstance(optimizers, tuple) or len(optimizers) != 2:
        raise ModelError(
            f"optimizers={optimizers!r}; it must be a pair (optimizer, schedule), either of which may be "
            "None."
        )
    if optimizers == (None, None):
        return
    if optimizer_cls_and_kwargs is not None:
        raise ModelError("optimizers and optimizer_cls_and_kwargs are both given; choose one.")
    if not isinstance(model, nn.Module):
        raise ModelError(
            "optimizers holds the parameters of a model, and HFModule is to build its model when the run "
            "begins. Pass the model itself, or optimizer_cls_and_kwargs=(class, arguments)."
        )


def build_optimizer(parts: NativeParts, *, max_steps: int) -> tuple[Optimizer, Any]:
    """Make or take over optimizer and schedule.

    Raises:
        SettingsError: the optimizer does not accept the settings.
    """
    optimizer = make_optimizer(parts)
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        optimizer.load_state_dict(optimizer.state_dict())  # as accelerate; a wrapper's groups may be replaced
    is_given = parts.lr_scheduler is not None
    schedule = parts.create_scheduler(num_training_steps=max_steps)
    if type(schedule) is LambdaLR and not is_given:
        schedule.__class__ = OfItsGroups
    return optimizer, schedule


class OwnSchedule(LRScheduler):
    """A user's schedule with `step`, `get_last_lr` and `state_dict` that is no torch `LRScheduler`."""

    def __init__(self, schedule: Any, optimizer: Optimizer) -> None:
        self.schedule, self.optimizer = schedule, optimizer

    def step(self, epoch: int | None = None) -> None:
        """Set the rates of the next step."""
        self.schedule.step()

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the rates."""
        rates: list[float | Tensor] = self.schedule.get_last_lr()
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's state."""
        state: dict[str, Any] = self.schedule.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the schedule's state."""
        self.schedule.load_state_dict(state_dict)


def as_torch(schedule: Any, optimizer: Optimizer) -> LRScheduler:
    """Return a schedule as one of torch's."""
    return schedule if isinstance(schedule, LRScheduler) else OwnSchedule(schedule, optimizer)


class OfItsGroups(LambdaLR):
    """A `LambdaLR` that leaves the groups alone that were added to its optimizer later.

    Lightning's finetuning callbacks add them, and choose their learning rate.
    """

    def get_lr(self) -> list[float | Tensor]:
        """Compute the rates of the schedule's groups; the others keep theirs."""
        rates = super().get_lr()
        return rates + [group["lr"] for group in self.optimizer.param_groups[len(rates) :]]


def make_optimizer(parts: NativeParts) -> Optimizer:
    """Make the optimizer, or take the user's.

    Raises:
        SettingsError: the optimizer does not accept the settings.
    """
    args, is_given = parts.args, parts.optimizer is not None
    try:
        optimizer = parts.create_optimizer()
    except (ValueError, TypeError) as error:
        given = f"optim={str(args.optim)!r}, optim_args={args.optim_args!r}"
        raise SettingsError(f"The optimizer cannot be made ({given}): {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise SettingsError(
            f"The optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer, which "
            "Lightning can step and save."
        )
    if not is_given and "weight_decay" in getattr(optimizer, "defaults", ()):
        optimizer.defaults["weight_decay"] = args.weight_decay  # of groups that callbacks add later
    return optimizer


def run_closures_first(optimizer: Optimizer, record: StepRecord) -> Callable[[], None]:
    """Run a step's closure before the step and set `record.is_updating`; returns a function that undoes it.

    Some optimizers read their parameters first, or never call the closure.
    """

    def begin(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.pop("closure", None)
        if closure is not None:
            closure()
        record.is_updating = True
        return args, kwargs

    if hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return optimizer.register_step_pre_hook(begin).remove
    # A wrapper that has not called Optimizer.__init__.
    own, step = vars(optimizer).get("step"), optimizer.step

    @functools.wraps(step)  # and what a schedule of torch's has marked
    def begin_and_step(closure: Any = None, **arguments: Any) -> Any:
        begin(optimizer, (), {"closure": closure})
        return step(**arguments)

    def undo() -> None:
        if own is None:
            del optimizer.step
        else:
            optimizer.step = own  # type: ignore[method-assign]

    optimizer.step = begin_and_step  # type: ignore[method-assign]
    return undo


def follows_metric(schedule: object) -> bool:
    """Return whether a schedule is stepped with an evaluation's metric."""
    return isinstance(schedule, (ReduceLROnPlateau, GreedyLR))


def learning_rate_of(optimizer: Optimizer, schedule: Any) -> float | None:
    """Read the rate of the first parameter group; `None` without an optimizer, which has no groups.

    Mirrors: transformers.Trainer._get_learning_rate
    """
    if not optimizer.param_groups:
        return None
    reads_optimizer = schedule is None or follows_metric(schedule)
    rate = optimizer.param_groups[0]["lr"] if reads_optimizer else schedule.get_last_lr()[0]
    return float(rate)

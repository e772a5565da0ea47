"""Parameter groups, optimizer and schedule: the methods the native Trainer calls; knows Hugging Face.

schedule                                stepped
all others                              after each optimizer step, by Lightning
reduce_lr_on_plateau, greedy            after each evaluation, with its metric, by CallbackHost
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import Trainer as NativeTrainer
from transformers import TrainingArguments
from transformers.optimization import GreedyLR

from hfbridge.errors import ModelError, SettingsError
from hfbridge.model.logged import StepRecord

Optimizers = tuple[Optimizer | None, Any]
OptimizerClass = tuple[Any, Mapping[str, Any]]


class NativeParts(NativeTrainer):
    """The native Trainer's methods that make optimizer and schedule, without the Trainer around them.

    They are called as they are, since what agrees today may not tomorrow. What they read of the Trainer is
    set here.

    Args:
        model: the Hugging Face model.
        args: names and numbers.
        optimizers: optimizer and schedule of the user's; either may be `None`.
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
        self.is_deepspeed_enabled = False  # what that changes here, hfbridge/model/zero.py does


def check_optimizers(model: object, optimizers: Any, optimizer_cls_and_kwargs: Any) -> None:
    """See that what was given to make the optimizer of fits together.

    Raises:
        ModelError: it does not.

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
    """Make the optimizer, or take the user's, and its schedule.

    Returns:
        The optimizer, whose `step` runs a closure it is given before anything else (some optimizers look at
        their parameters first, or never call it), and the schedule.

    Raises:
        SettingsError: the optimizer refuses the settings.
    """
    optimizer = make_optimizer(parts)
    is_given = parts.lr_scheduler is not None
    schedule = parts.create_scheduler(num_training_steps=max_steps)
    if type(schedule) is LambdaLR and not is_given:
        schedule.__class__ = OfItsGroups
    return optimizer, schedule


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
        SettingsError: the optimizer refuses the settings.
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
    if "weight_decay" in optimizer.defaults and not is_given:
        optimizer.defaults["weight_decay"] = args.weight_decay  # of groups that callbacks add later
    return optimizer


class ClosureFirst:
    """Run the closure of a step before the step, and note that: a hook for `register_step_pre_hook`.

    Args:
        record: of the steps.
    """

    def __init__(self, record: StepRecord) -> None:
        self._record = record

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it."""
        closure = kwargs.pop("closure", None)
        if closure is not None:
            closure()
        self._record.is_updating = True
        return args, kwargs


def follows_metric(schedule: object) -> bool:
    """Tell whether a schedule is stepped by an evaluation's metric and not by optimizer steps."""
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

"""Parameter groups, optimizer and schedule: the functions the native Trainer calls; knows Hugging Face."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer as NativeTrainer
from transformers import TrainingArguments, get_scheduler


def build_optimizer(model: nn.Module, args: TrainingArguments) -> Optimizer:
    """Make the optimizer with native's two groups: decayed parameters, and biases and norms without decay.

    Both groups are there even when one is empty, so that the state of `optimizer.pt` fits either engine.

    Mirrors: transformers.Trainer.create_optimizer
    """
    # The two methods read nothing of the Trainer but what is handed to them.
    decayed = set(NativeTrainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trainable if name in decayed], "weight_decay": args.weight_decay},
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer_class, arguments = NativeTrainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    optimizer: Optimizer = optimizer_class(groups, **arguments)
    return optimizer


def build_scheduler(optimizer: Optimizer, args: TrainingArguments, *, max_steps: int) -> LRScheduler:
    """Make the learning-rate schedule, stepped once per optimizer step.

    Args:
        optimizer: what `build_optimizer` made.
        args: schedule type, its arguments and the warm-up.
        max_steps: optimizer steps of the whole run.

    Mirrors: transformers.Trainer.create_scheduler
    """
    # A JSON string became a dict when the arguments were made.
    schedule_arguments: Any = args.lr_scheduler_kwargs
    schedule: LRScheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(max_steps),
        num_training_steps=max_steps,
        scheduler_specific_kwargs=schedule_arguments,
    )
    return schedule


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Clip by the global 2-norm of all gradients and return that norm as it was before, scalar.

    Args:
        model: its parameters' gradients are scaled in place.
        max_norm: 0 measures without clipping.

    Mirrors: transformers.Trainer._clip_grad_norm
    Mirrors: transformers.Trainer._get_grad_norm
    """
    if max_norm > 0:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

"""What the ranks of a pool do with subclasses of both Trainers that override a method."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import set_seed

from tests.dropin.overriding import CASES
from tests.dropin.sides import OURS, THEIRS, make
from tests.parity.engines import without_times

SETTINGS: dict[str, Any] = {"logging_steps": 1, "num_train_epochs": 1, "eval_strategy": "epoch"}


def train(case: str, side: str, settings: dict[str, Any], strategy: str) -> dict[str, Any]:
    """Train a subclass on all ranks; returns the log history and the weights.

    Args:
        case: of tests/dropin/overriding.py.
        side: "native" or "hfbridge".
        settings: beside those of tests/dropin.
        strategy: of hfbridge's Trainer.
    """
    base = THEIRS.trainer if side == "native" else OURS.trainer
    set_seed(1)
    trainer = make(type("Mine", (CASES[case], base), {}), arguments={**SETTINGS, **settings})
    if side == "hfbridge":
        trainer.strategy = strategy
    trainer.train()
    with _whole(trainer.model):
        weights = {name: _full(tensor).clone() for name, tensor in trainer.model.state_dict().items()}
    return {
        "history": [without_times(row) for row in trainer.state.log_history],
        "weights": {name: tensor.double().sum().item() for name, tensor in weights.items()},
        "first": torch.cat([tensor.flatten()[:3].double() for tensor in weights.values()]).tolist(),
    }


def _whole(model: torch.nn.Module) -> AbstractContextManager[Any]:
    """Gather the parameters that DeepSpeed has cut."""
    parts = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not parts:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parts)
    return gathered


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()

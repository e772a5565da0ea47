"""From a choice of strategy to the object that Lightning is given."""

from typing import Any

from lightning.pytorch.strategies import Strategy

from hfbridge.strategies.ddp import DDPStrategy
from hfbridge.strategies.deepspeed import DeepSpeedStrategy
from hfbridge.strategies.fsdp import FSDPStrategy
from hfbridge.strategies.fsdp2 import FSDP2Strategy


def make_strategy(kind: str, **options: Any) -> Strategy:
    """Make a strategy.

    Args:
        kind: "ddp", "fsdp", "fsdp2" or "deepspeed".
        **options: arguments of its class.
    """
    classes: dict[str, type[Strategy]] = {
        "ddp": DDPStrategy,
        "deepspeed": DeepSpeedStrategy,
        "fsdp": FSDPStrategy,
        "fsdp2": FSDP2Strategy,
    }
    return classes[kind](**options)

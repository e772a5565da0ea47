"""Moving over from `transformers.Trainer`, and back; knows both worlds."""

from hfbridge.migrate.carry import carry_over
from hfbridge.migrate.move import from_trainer

__all__ = ["carry_over", "from_trainer"]

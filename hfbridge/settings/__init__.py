"""What the user asked for, by the names of `transformers.TrainingArguments`, and its translation."""

from hfbridge.settings.fields import NO_CHECKPOINTS, RULES, Rule
from hfbridge.settings.settings import Settings
from hfbridge.settings.translate import Plan, Row, translate

__all__ = ["NO_CHECKPOINTS", "RULES", "Plan", "Row", "Rule", "Settings", "translate"]

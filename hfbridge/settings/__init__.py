"""What the user asked for, by the names of `transformers.TrainingArguments`, and its translation."""

from hfbridge.settings.fields import RULES, Rule
from hfbridge.settings.machine import require_machine, require_packages
from hfbridge.settings.plan import Plan, Row
from hfbridge.settings.settings import Settings, SettingsSource
from hfbridge.settings.translate import translate

__all__ = [
    "RULES",
    "Plan",
    "Row",
    "Rule",
    "Settings",
    "SettingsSource",
    "require_machine",
    "require_packages",
    "translate",
]

"""Settings by the names of `transformers.TrainingArguments`, and their translation to Lightning."""

from hfbridge.settings.accelerate_config import AccelerateConfig, read_accelerate_config
from hfbridge.settings.environment import require_environment
from hfbridge.settings.machine import require_machine, require_packages
from hfbridge.settings.plan import UNDECIDED, Plan, Row
from hfbridge.settings.rules import RULES, Rule
from hfbridge.settings.settings import Settings, SettingsSource
from hfbridge.settings.strategy_choice import Launched, StrategyChoice
from hfbridge.settings.to_lightning import translate

__all__ = [
    "RULES",
    "UNDECIDED",
    "AccelerateConfig",
    "Launched",
    "Plan",
    "Row",
    "Rule",
    "Settings",
    "SettingsSource",
    "StrategyChoice",
    "read_accelerate_config",
    "require_environment",
    "require_machine",
    "require_packages",
    "translate",
]

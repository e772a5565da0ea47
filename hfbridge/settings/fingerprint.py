"""The settings as facts that must be equal on all ranks."""

import hashlib
from collections.abc import Iterator

from hfbridge.distributed.consistency import Fact
from hfbridge.settings import Settings
from hfbridge.settings.rules import DEFAULTS, is_same, show

# Scripts set these on the first rank only, or by the time of day, without effect on training.
_MAY_DIFFER = ("disable_tqdm", "log_level", "log_level_replica", "output_dir", "report_to", "run_name")
_HINT = "Give all ranks the same: no times, ranks or random names in it."


def facts_of_settings(settings: Settings) -> Iterator[Fact]:
    """List every setting that is not the default, for comparing it with those of other ranks."""
    for name in DEFAULTS:
        value = getattr(settings, name)
        if name not in _MAY_DIFFER and not is_same(value, DEFAULTS[name]):
            text = show(name, value).partition(" = ")[2]
            if text.endswith("..."):  # shortened: two long values may begin alike
                text += f" (digest {hashlib.sha256(repr(value).encode()).hexdigest()[:12]})"
            yield Fact(f"the setting {name}", text, _HINT)

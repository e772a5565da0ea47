"""Locks that killed builds of torch extensions leave."""

import os
import time
import warnings
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from hfbridge.errors import BridgeWarning

_LONG_S = 600.0  # the longest of DeepSpeed's builds take a few minutes


def warn_of_old_locks() -> None:
    """Warn of old locks of extension builds, for which torch waits without a message and forever.

    A lock is old if no file beside it has changed for a while.

    Mirrors: torch.utils.cpp_extension._jit_compile
    """
    configured = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder, pattern = (
        (Path(configured), "*/lock") if configured else (Path(get_default_build_root()), "*/*/lock")
    )
    for lock in sorted(folder.glob(pattern)):
        still_s = time.time() - max(
            (path.stat().st_mtime for path in lock.parent.iterdir() if path.is_file()), default=time.time()
        )
        if still_s >= _LONG_S:
            warnings.warn(
                f"{lock} has been there for {still_s / 60:.0f} minutes: something compiles {lock.parent.name}"
                ", or was killed at it, and other runs wait for it forever. If no other run is "
                f"compiling, delete it: rm '{lock}'",
                BridgeWarning,
                stacklevel=2,
            )

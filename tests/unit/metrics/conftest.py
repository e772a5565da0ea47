"""Metrics keep their files out of the user's cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hfbridge.metrics import hub


@pytest.fixture(scope="module", autouse=True)
def metrics_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder that stands for `evaluate`'s caches."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_METRICS_CACHE", folder / "metrics")
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr(hub, "HF_MODULES_CACHE", str(folder / "modules"))
        yield folder

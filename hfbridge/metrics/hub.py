"""Metric scripts of `evaluate` that lie on this machine."""

import os
from pathlib import Path
from typing import Any

import evaluate
from datasets import DownloadConfig
from evaluate.config import HF_MODULES_CACHE


def is_script(path: str) -> bool:
    """Whether a path is a metric script, or a folder with one of the folder's name."""
    return (os.path.isfile(path) and path.endswith(".py")) or (Path(path) / f"{Path(path).name}.py").is_file()


def is_cached(name: str) -> bool:
    """Whether the script of a metric has been loaded from the hub before."""
    folder = Path(HF_MODULES_CACHE) / "evaluate_modules" / "metrics" / f"evaluate-metric--{name}"
    return any(folder.glob(f"*/{name}.py"))


def load_script(path: str, config_name: str | None, **kwargs: Any) -> evaluate.EvaluationModule:
    """Load a script by path or, from the cache or the hub, by name."""
    return evaluate.load(
        path, config_name, module_type="metric", download_config=DownloadConfig(max_retries=0), **kwargs
    )

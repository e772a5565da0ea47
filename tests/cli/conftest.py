"""A small project in the current directory: a module with functions, and a YAML that names them."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

NAME = "cli_project"
SOURCE = """\
from tests.tiny import make_dataset, make_model, make_tokenizer

def build():
    return make_model("distilbert")

def train(count=22):
    return make_dataset("distilbert", count, seed=3)

def evaluation():
    return make_dataset("distilbert", 7, seed=4)

def tokenizer():
    return make_tokenizer()

def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

def shorten(rows):
    return {name: [ids[:5] for ids in rows[name]] for name in ("input_ids", "attention_mask")}
"""
SETTINGS: dict[str, Any] = {
    "output_dir": "out",
    "max_steps": 4,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "seed": 11,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Write the project into the current directory; returns the config, which is config.yaml, too."""
    (tmp_path / f"{NAME}.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    config = {
        "trainer": {"settings": dict(SETTINGS), "enable_model_summary": False},
        "model": {
            "model": f"{NAME}.build",
            "processing_class": f"{NAME}.tokenizer",
            "compute_metrics": f"{NAME}.accuracy",
        },
        "data": {
            "train_dataset": f"{NAME}.train",
            "eval_dataset": f"{NAME}.evaluation",
            "predict_dataset": {"class_path": f"{NAME}.train", "init_args": {"count": 5}},
            "map_function": f"{NAME}.shorten",
        },
    }
    write("config.yaml", config)
    yield config
    sys.modules.pop(NAME, None)


def write(path: str, config: dict[str, Any]) -> None:
    """Write a config as YAML."""
    Path(path).write_text(yaml.safe_dump(config, sort_keys=False))


@pytest.fixture
def hfbridge(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Do a command in this process; returns what it ends with, and what it has written to both streams."""
    from hfbridge.cli import main

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        return (code, *capfd.readouterr())

    return run

"""What the ranks of a pool run for tests/distributed/test_chunked_loss.py."""

from typing import Any

import torch

import hfbridge
from hfbridge.losses.chunked import ChunkedLoss
from tests.tiny import IGNORED, PadRows, make_model, make_rows


def train(
    strategy: str, chunked_loss: bool, kind: str = "gpt2", more: dict[str, Any] | None = None
) -> list[float]:
    """Train, with a micro-batch that has no labels on one rank; returns the loss of each step."""
    rows = make_rows(kind, 32)
    for row in rows[:2]:
        row["labels"] = [IGNORED] * len(row["labels"])
    settings = {
        "output_dir": "out",
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        **(more or {}),
    }
    module = hfbridge.HFModule(make_model(kind, dropout=0.0), chunked_loss=chunked_loss)
    data = hfbridge.HFDataModule(train_dataset=rows, data_collator=PadRows())
    trainer = hfbridge.Trainer(settings, strategy=strategy, logger=False, enable_model_summary=False)
    seen: list[torch.Size] = []
    own = ChunkedLoss._summed

    def summed(self: Any, hidden: Any, *more: Any) -> Any:
        seen.append(hidden.shape)
        return own(self, hidden, *more)

    ChunkedLoss._summed = summed  # type: ignore[method-assign]
    try:
        trainer.fit(module, data)
    finally:
        ChunkedLoss._summed = own  # type: ignore[method-assign]
    assert bool(seen) == chunked_loss
    return [row["loss"] for row in trainer.log_history if "loss" in row]


def refuse(strategy: str, settings: dict[str, Any]) -> str:
    """Try what cannot be; returns why."""
    try:
        train(strategy, True, "llama", settings)
    except hfbridge.ModelError as error:
        return str(error)
    return ""

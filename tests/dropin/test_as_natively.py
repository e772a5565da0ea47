"""What transformers' own suite looks at beside numbers and events: logs, odd checkpoints, idle settings."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from tests.dropin.sides import BASE, Side, compare, look, make

SAVES = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
SIZES = (
    "***** Running training",
    "  Num ",
    "  Instantaneous",
    "  Total ",
    "  Gradient",
    "  Number",
    "  Resuming",
)


class Numbered(Dataset[Any]):
    """Samples whose first feature is their number."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor([float(index), 1.0, -1.0]), "labels": index % 2}


class Noisy(nn.Module):
    """Draw from Python's, numpy's and torch's generators; take whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 2)

    def forward(self, x: Any, labels: Any = None, **others: Any) -> Any:
        noise = torch.randn(1) + np.random.rand() + random.random()
        logits = self.line(x) * (1 + noise / 20)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_model_that_draws_from_all_generators() -> None:
    def code(side: Side) -> Any:
        found = []
        for checkpoint in (None, "out/checkpoint-3"):
            torch.manual_seed(4)
            given = {"train_dataset": Numbered(), "eval_dataset": None, "data_collator": None}
            trainer = make(side.trainer, arguments=SAVES, model=Noisy(), compute_metrics=None, **given)
            found.append(look(trainer, trainer.train(resume_from_checkpoint=checkpoint)))
        return found

    whole, resumed = compare(code)
    assert torch.equal(whole["weights"]["line.bias"], resumed["weights"]["line.bias"])


@pytest.mark.parametrize(
    "unread",
    [
        {"metric_for_best_model": "accuracy", "greater_is_better": True},
        {"greater_is_better": False},
        {"optim_target_modules": [r".*attn.*"]},
        {"length_column_name": "lengths"},
        {"activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"liger_kernel_config": {"rope": False}},
    ],
    ids=lambda unread: next(iter(unread)),
)
def test_settings_that_nothing_reads_are_ignored(unread: dict[str, Any]) -> None:
    def code(side: Side) -> Any:
        trainer = make(side.trainer, arguments={**SAVES, **unread, "max_steps": 3})
        facts = look(trainer, trainer.train())
        assert {name: getattr(trainer.args, name) for name in unread} == unread
        return facts

    assert compare(code)["state"]["best_model_checkpoint"] is None
    assert BASE.keys().isdisjoint(unread)

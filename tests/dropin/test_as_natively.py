"""What transformers' own suite looks at beside numbers and events: logs, odd checkpoints, idle settings."""

import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from tests.dropin.sides import Side, compare, look, make

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

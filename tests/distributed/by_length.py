"""What the ranks of a pool run for tests/distributed/test_by_length.py."""

from typing import Any

import numpy as np

import hfbridge
from tests.parity.test_eval_by_length import CountTokens, evaluate
from tests.tiny import make_model, make_rows


def train(strategy: str, regroup: Any) -> tuple[list[tuple[float, float]], int]:
    """Train in "exact"; returns loss and gradient norm of each step, and the tokens of this rank."""
    settings = {
        "output_dir": "out",
        "use_cpu": True,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "remove_unused_columns": False,
    }
    collator = CountTokens()
    module = hfbridge.HFModule(make_model("bert-token", dropout=0.0))
    rows = make_rows("bert-token", 43)
    data = hfbridge.HFDataModule(train_dataset=rows, data_collator=collator, regroup=regroup)
    trainer = hfbridge.Trainer(settings, strategy=strategy, logger=False, enable_model_summary=False)
    trainer.fit(module, data)
    found = [(row["loss"], row["grad_norm"]) for row in trainer.log_history if "loss" in row]
    return found, collator.tokens


def evaluate_both_ways() -> list[Any]:
    """Evaluate and predict in the order of the set and by length; returns metrics, predictions, tokens."""
    found = []
    for by_length in (False, True):
        seen = evaluate("distilbert", eval_by_length=by_length)
        numbers = {k: v for k, v in seen["metrics"].items() if k.endswith(("loss", "rows", "Accuracy"))}
        output = seen["output"]
        found.append((numbers, np.asarray(output.predictions).tolist(), output.label_ids.tolist()))
    return found

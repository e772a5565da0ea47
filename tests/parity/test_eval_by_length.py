"""`HFDataModule(eval_by_length=True)`: the metrics and predictions of the set's order, with less padding."""

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

import hfbridge
from hfbridge import DataError, SettingsError
from tests.tiny import PadRows, make_model, make_rows

SETTINGS = {
    "output_dir": "out",
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "per_device_eval_batch_size": 5,
    "logging_steps": 1,
}
CLOSE = 1e-6  # padding changes the order of sums in float32


class CountTokens(PadRows):
    """A collator that counts the tokens of its batches, padding included."""

    tokens = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        self.tokens += batch["input_ids"].numel()
        return batch


def evaluate(kind: str, *, eval_by_length: bool, **settings: Any) -> dict[str, Any]:
    """Evaluate two sets, and predict one."""
    seen: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append((prediction.predictions, prediction.label_ids, prediction.inputs))
        return {"rows": float(len(prediction.label_ids))}

    module = hfbridge.HFModule(
        make_model(kind),
        compute_metrics=compute_metrics,
        metrics=MulticlassAccuracy(num_classes=2) if kind == "distilbert" else None,
    )
    collator = CountTokens()
    rows = make_rows(kind, 43, seed=5)
    trainer = hfbridge.Trainer({**SETTINGS, **settings}, logger=False, enable_model_summary=False)
    data = hfbridge.HFDataModule(
        train_dataset=rows[:4],
        eval_dataset={"a": rows, "b": datasets.Dataset.from_list(rows[:21])},
        predict_dataset=rows,
        data_collator=collator,
        eval_by_length=eval_by_length,
    )
    (metrics,) = trainer.validate(module, data, verbose=False)
    output = trainer.predict_dataset(module, data)
    tokens = collator.tokens
    batches = trainer.predict(module, data)
    return {"metrics": metrics, "seen": seen, "output": output, "tokens": tokens, "batches": batches}


@pytest.mark.parametrize("kind", ["distilbert", "bert-token", "t5"])
def test_metrics_and_predictions_are_those_of_the_sets_order(kind: str) -> None:
    asked = {"include_for_metrics": ["inputs", "loss"]}
    plain = evaluate(kind, eval_by_length=False, **asked)
    ours = evaluate(kind, eval_by_length=True, **asked)
    for name, value in plain["metrics"].items():
        if not name.endswith(("runtime", "per_second", "preparation_time")):
            assert ours["metrics"][name] == pytest.approx(value, rel=CLOSE), name
    for mine, theirs in zip(ours["seen"], plain["seen"], strict=True):
        assert np.array_equal(mine[1], theirs[1]), "labels"
        np.testing.assert_array_equal(*(np.where(given == -100, 0, given) for given in (mine[2], theirs[2])))
        counts = slice(None) if kind == "distilbert" else theirs[1] != -100  # what is padded has no label
        for one, other in zip(logits_of(mine[0]), logits_of(theirs[0]), strict=True):
            np.testing.assert_allclose(one[counts], other[counts], rtol=CLOSE, atol=CLOSE)
    assert ours["tokens"] < 0.9 * plain["tokens"]
    for mine, theirs in zip(ours["batches"], plain["batches"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(mine), tensors_of(theirs), strict=True))


def logits_of(predictions: Any) -> list[Any]:
    """The decoder's logits of T5, whose encoder states differ where rows are padded."""
    return [predictions[0]] if isinstance(predictions, tuple) else [predictions]


def tensors_of(batch: Any) -> list[torch.Tensor]:
    return list(batch) if isinstance(batch, (tuple, list)) else [batch]


def test_what_cannot_be_put_back_is_refused_in_one_error() -> None:
    module = hfbridge.HFModule(make_model("distilbert"), loss_normalization="native")
    settings = {**SETTINGS, "batch_eval_metrics": True, "eval_do_concat_batches": False}
    trainer = hfbridge.Trainer(settings, logger=False, enable_model_summary=False)
    stream = datasets.Dataset.from_list(make_rows("distilbert", 8, seed=1)).to_iterable_dataset()
    data = hfbridge.HFDataModule(eval_dataset=stream, data_collator=PadRows(), eval_by_length=True)
    with pytest.raises(SettingsError, match=r"(?s)loss_norm.*batch_eval.*eval_do_concat.*a stream"):
        trainer.validate(module, data)


def test_rows_without_lengths_are_refused() -> None:
    module = hfbridge.HFModule(make_model("distilbert"))
    trainer = hfbridge.Trainer(SETTINGS, logger=False, enable_model_summary=False)
    rows = [{"words": "a b", "label": 0}] * 4
    data = hfbridge.HFDataModule(eval_dataset=rows, data_collator=PadRows(), eval_by_length=True)
    with pytest.raises(DataError, match=r"needs numbers in a column 'length'"):
        trainer.validate(module, data)

"""metrics=: the numbers of a `compute_metrics` that computes the same of all predictions at once.

Grade: exact, since the metrics count. What is compared stands in tests/parity/engines.py.
"""

import gc
import math
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MultilabelF1Score
from torchmetrics.text import Perplexity, SacreBLEUScore
from transformers import BertConfig, BertForSequenceClassification

import hfbridge
from hfbridge import MetricsError, decode
from hfbridge.evaluation.collector import Collector, Part
from tests.parity.engines import (
    BASE,
    Job,
    Record,
    assert_identical,
    make_ours,
    record_ours,
    run_theirs,
    without_times,
)
from tests.parity.test_evaluation_options import STEPS, ByBatch
from tests.parity.test_streams import Plain, streamed
from tests.tiny import IGNORED, VOCABULARY, PadRows, make_model, make_rows, make_tokenizer

CLASSES = {"distilbert": 2, "bert-token": 5, "llama": VOCABULARY, "t5": VOCABULARY}


def metrics_for(kind: str) -> dict[str, Metric]:
    """Make metrics whose states are counts, so that the order of batches does not show in them."""
    classes = CLASSES[kind]
    return {
        "accuracy": MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED),
        "f1": MulticlassF1Score(classes, ignore_index=IGNORED),
        "of_class": MulticlassF1Score(classes, average="none", ignore_index=IGNORED),
    }


def at_once(kind: str) -> Any:
    """Make a `compute_metrics` that gives these metrics all predictions."""

    def compute(prediction: Any) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        logits = logits[0] if isinstance(logits, tuple) else logits
        if kind == "llama":
            logits, labels = logits[:, :-1], labels[:, 1:]
        if logits.ndim > labels.ndim:
            logits = logits.reshape(-1, logits.shape[-1])
        found: dict[str, float] = {}
        for name, metric in metrics_for(kind).items():
            metric.update(torch.as_tensor(logits), torch.as_tensor(labels).reshape(logits.shape[:1]))
            values = metric.compute()
            found |= {name: values.item()} if values.ndim == 0 else _by_class(name, values)
        return found

    return compute


def _by_class(name: str, values: Tensor) -> dict[str, float]:
    return {f"{name}_{number}": value for number, value in enumerate(values.tolist())}


def job(kind: str = "distilbert", settings: dict[str, Any] | None = None, **given: Any) -> Job:
    """Make a job with two evaluations while it trains."""
    return Job(kind, {**STEPS, **(settings or {})}, **{"rows": 30, "compute_metrics": None, **given})


def made(asked: Job, metrics: Any, *, loss_normalization: str = "native") -> Any:
    """Make Trainer, module, data, recorder and collator of a job with `metrics=`."""
    arguments = ([asked.make_model()], {"metrics": metrics})
    return make_ours(replace(asked, module_arguments=arguments), loss_normalization=loss_normalization)


def run_ours(asked: Job, metrics: Any) -> Record:
    """Run a job with `metrics=`."""
    trainer, module, data, *rest = made(asked, metrics)
    trainer.fit(module, data)
    return record_ours(trainer, module, *rest)


def run_both(asked: Job, kind: str) -> tuple[Record, Record]:
    """Run a job natively with `compute_metrics`, and here with `metrics=`; all that they did is the same."""
    theirs = run_theirs(replace(asked.with_settings(output_dir="theirs"), compute_metrics=at_once(kind)))
    ours = run_ours(asked.with_settings(output_dir="ours"), metrics_for(kind))
    for record in (theirs, ours):
        record.state["best_model_checkpoint"] = None  # a path
    assert_identical(theirs, ours)
    return theirs, ours


@pytest.mark.parametrize("kind", CLASSES)
def test_as_computed_at_once(kind: str) -> None:
    theirs, ours = run_both(job(kind), kind)
    assert {"eval_accuracy", "eval_f1", "eval_of_class_1"} <= theirs.log_history[2].keys()
    assert ours.engine.callback_metrics["eval_f1"] == ours.module.eval_metrics["eval_f1"]


def test_of_several_sets_and_the_best_model() -> None:
    settings = {
        "metric_for_best_model": "b_f1",
        "greater_is_better": True,
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_on_start": True,
    }
    theirs, _ = run_both(job(settings=settings, eval_keys=["a", "b"]), "distilbert")
    assert theirs.state["best_metric"] is not None


def test_beside_compute_metrics_and_preprocessed_logits() -> None:
    """compute_metrics gets what it natively gets; the running metrics see the same preprocessed logits."""
    asked = job(preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1))
    counted = lambda prediction: {"ones": int(prediction.predictions.sum())}  # noqa: E731
    theirs = run_theirs(
        replace(
            asked,
            compute_metrics=lambda p: {**counted(p), "hits": float(np.mean(p.predictions == p.label_ids))},
        )
    )
    ours = run_ours(replace(asked, compute_metrics=counted), {"hits": MulticlassAccuracy(2, average="micro")})
    for their, our in zip(theirs.log_history, ours.log_history, strict=True):
        assert our == pytest.approx(their, rel=1e-7)  # numpy's mean is float64
    assert "eval_hits" in ours.log_history[2]


def test_beside_metrics_by_batch() -> None:
    settings = {"batch_eval_metrics": True}
    theirs = run_theirs(job(settings=settings, compute_metrics=ByBatch()))
    ours = run_ours(job(settings=settings, compute_metrics=ByBatch()), metrics_for("distilbert"))
    rows = [
        {n: v for n, v in row.items() if "f1" not in n and "acc" not in n and "of_" not in n}
        for row in ours.log_history
    ]
    assert rows == theirs.log_history
    assert "eval_f1" in ours.log_history[2]


def test_early_stopping_by_a_running_metric() -> None:
    stop = EarlyStopping(monitor="eval_f1", patience=0, mode="min", stopping_threshold=2.0)
    asked = job(settings={"num_train_epochs": 3}, callbacks=lambda: [stop])
    ours = run_ours(asked, metrics_for("distilbert"))
    assert stop.stopped_epoch == 0
    assert ours.engine.global_step == 2


@pytest.mark.parametrize("loss_normalization", ["native", "exact"])
def test_validation_and_prediction_by_themselves(loss_normalization: Any) -> None:
    asked = job(compute_metrics=at_once("distilbert"))
    trainer, module, data, *_ = make_ours(asked, loss_normalization=loss_normalization)
    rows = data._raw["eval"]
    (expected,) = trainer.validate(module, data, verbose=False)
    output = trainer.predict_dataset(
        module, hfbridge.HFDataModule(predict_dataset=rows, data_collator=data.data_collator)
    )
    trainer, module, data, *_ = made(job(), metrics_for("distilbert"), loss_normalization=loss_normalization)
    asking = hfbridge.HFDataModule(predict_dataset=rows, data_collator=data.data_collator)
    (found,) = trainer.validate(module, data, verbose=False)
    assert without_times(found) == without_times(expected)
    predicted = trainer.predict_dataset(module, asking)
    assert without_times(predicted.metrics) == without_times(output.metrics)
    assert "test_f1" in predicted.metrics
    np.testing.assert_array_equal(predicted.predictions, output.predictions)


def test_rows_without_labels_are_predicted() -> None:
    trainer, module, data, *_ = made(job(), metrics_for("distilbert"))
    rows = [{name: v for name, v in row.items() if name != "label"} for row in make_rows("distilbert", 5)]
    asking = hfbridge.HFDataModule(predict_dataset=rows, data_collator=data.data_collator)
    output = trainer.predict_dataset(module, asking)
    assert set(without_times(output.metrics)) == set()
    assert output.predictions.shape == (5, 2)


def test_perplexity_is_that_of_the_loss() -> None:
    """The shift to the next token is that of the model's own loss."""
    metrics = MetricCollection({"perplexity": Perplexity(ignore_index=IGNORED), **metrics_for("llama")})
    trainer, module, data, *_ = made(job("llama"), metrics, loss_normalization="exact")
    (found,) = trainer.validate(module, data, verbose=False)
    assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]), rel=1e-5)
    assert "eval_accuracy" in found


def test_regression_and_several_labels_a_row() -> None:
    trainer, module, data, *_ = made(job("bert-regression"), MeanSquaredError(), loss_normalization="exact")
    (found,) = trainer.validate(module, data, verbose=False)
    assert found["eval_MeanSquaredError"] == pytest.approx(found["eval_loss"], rel=1e-6)

    def flags() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY, num_labels=3, problem_type="multi_label_classification", **sizes
            )
        )

    rows = [
        {**row, "label": [float(number % 2), 1.0, float(number % 3 == 0)]}
        for number, row in enumerate(make_rows("distilbert", 9))
    ]
    asked = job(model=flags, train_rows=rows, validation_rows=rows)
    ours = run_ours(asked, {"f1": MultilabelF1Score(3)})
    assert 0 <= ours.log_history[2]["eval_f1"] <= 1


# Streams, and texts.


@pytest.mark.parametrize("make", [Plain, streamed])
def test_a_stream_is_evaluated(make: Any) -> None:
    run_both(job(settings={"max_steps": 6}, rows=22, as_dataset=make), "distilbert")


@pytest.mark.parametrize(("make", "steps"), [(list, 0), (Plain, 2)])
def test_a_metric_that_does_not_fit_is_told_before_training(make: Any, steps: int) -> None:
    """With a stream, which may be read once, nothing is tried: it is told when that is evaluated."""
    given = {"good": MulticlassAccuracy(2), "bad": MeanSquaredError()}
    trainer, module, data, *_ = made(job(settings={"max_steps": 2}, as_dataset=make), given)
    with pytest.raises(MetricsError, match="metrics=: bad does not take"):
        trainer.fit(module, data)
    assert trainer.global_step == steps


class Bleu(SacreBLEUScore):
    """BLEU of generated token ids."""

    def update(self, tokens: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """Take in a batch."""
        tokenizer = make_tokenizer()
        super().update(decode(tokens, tokenizer), [[text] for text in decode(labels, tokenizer)])


def bleu(prediction: Any) -> dict[str, float]:
    """Compute BLEU of all predictions at once."""
    metric = Bleu(n_gram=2)
    metric.update(prediction.predictions, prediction.label_ids)
    return {"bleu": metric.compute().item()}


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
def test_texts_that_are_generated() -> None:
    """A Metric of one's own decodes token ids; they are given as they are, and so are the labels."""
    settings = {"predict_with_generate": True, "generation_max_length": 9}
    asked = job("t5", settings, processing_class=make_tokenizer())
    theirs = run_theirs(replace(asked, compute_metrics=bleu))
    ours = run_ours(asked, {"bleu": Bleu(n_gram=2)})
    assert_identical(theirs, ours)
    assert "eval_bleu" in theirs.log_history[2]


# Nothing accumulates.


class Weight(Callback):
    """Weigh what lives at the end of the third evaluation batch, and of the last one.

    Python's tracer sees what numpy holds, and some hundred bytes a batch that torch's own objects leave
    behind, in any loop over a model.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.tensors_bytes: list[int] = []
        self.traced_bytes: list[int] = []

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx not in (2, self.batches - 1):  # the first ones make what is kept for good
            return
        gc.collect()
        self.traced_bytes.append(tracemalloc.get_traced_memory()[0])
        found = {
            one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
            for one in gc.get_objects()
            if type(one) is Tensor
        }
        self.tensors_bytes.append(sum(found.values()))


def growth_of(rows: int, normalization: Any, **given: Any) -> tuple[int, int]:
    """Evaluate a causal language model; returns by how many bytes its tensors and the rest of Python grow."""
    weight = Weight(rows // 4)
    settings = {**BASE, "eval_accumulation_steps": given.pop("moves", None)}
    trainer = hfbridge.Trainer(settings, callbacks=[weight], logger=False, enable_model_summary=False)
    module = hfbridge.HFModule(make_model("llama"), loss_normalization=normalization, **given)
    data = hfbridge.HFDataModule(eval_dataset=make_rows("llama", 1) * rows, data_collator=PadRows())
    tracemalloc.start()
    try:
        trainer.validate(module, data, verbose=False)
    finally:
        tracemalloc.stop()
    (tensors, last_tensors), (traced, last_traced) = weight.tensors_bytes, weight.traced_bytes
    return last_tensors - tensors, last_traced - traced


@pytest.mark.parametrize("normalization", ["native", "exact"])
def test_memory_is_flat_in_the_size_of_the_set(normalization: str) -> None:
    """What grows are losses: in "native" four bytes a row, in "exact" one number and its items a batch."""
    few, many = 16, 128
    metrics = {
        "accuracy": MulticlassAccuracy(VOCABULARY, ignore_index=IGNORED),
        "perplexity": Perplexity(ignore_index=IGNORED),
    }
    logits_bytes = len(make_rows("llama", 1)[0]["input_ids"]) * VOCABULARY * 4  # of a row
    small, large = (growth_of(rows, normalization, metrics=metrics) for rows in (few, many))
    assert large[0] - small[0] <= (many - few) * 4
    assert large[1] - small[1] <= (many - few) * 0.25 * logits_bytes
    # With compute_metrics it is not, on the device or off it.
    moves, index = (None, 0) if normalization == "exact" else (1, 1)
    collected = growth_of(many, normalization, compute_metrics=lambda prediction: {}, moves=moves)
    assert collected[index] - large[index] > 0.7 * (many - few) * logits_bytes


def test_losses_wait_in_blocks() -> None:
    """In "exact" a batch's loss and items take a few bytes, and not the hundreds of a tensor."""
    collector = Collector(move_every=None, keeps=())
    values = torch.arange(1000.0)
    for value in values:
        collector.add(Part(None, None, None, None, mean=value.clone(), items=2))
    assert sum(block.numel() for block in collector._blocks) <= 1024
    found = collector.finish()
    assert found.means is not None
    assert found.means.tolist() == values.tolist()
    assert found.items.tolist() == [2] * 1000

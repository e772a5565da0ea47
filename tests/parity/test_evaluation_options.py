"""What settings and functions do to evaluation and prediction: the native Trainer's numbers, to the bit.

Grade: exact. What is compared stands in tests/parity/engines.py.
"""

import math
import time
from collections.abc import Callable
from typing import Any, Literal

import datasets
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling

import hfbridge
from hfbridge import MetricsError
from hfbridge.models import model_run
from tests.parity.engines import (
    Job,
    arrays_in,
    assert_identical,
    digest,
    digest_metrics,
    make_ours,
    make_theirs,
    run_both,
    run_ours,
    run_theirs,
    same,
    without_times,
)
from tests.tiny import PadRows, make_model, make_rows, make_tokenizer

STEPS = {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2}


def job(kind: str = "distilbert", settings: dict[str, Any] | None = None, **given: Any) -> Job:
    """Make a job with two evaluations while it trains."""
    return Job(kind, {**STEPS, **(settings or {})}, **{"rows": 30, **given})


def parts_digest(prediction: Any) -> dict[str, float]:
    """Digest all that `compute_metrics` is given: types, shapes and bytes, in lists and tuples."""
    found = digest_metrics(prediction) if not isinstance(prediction.predictions, list) else {}
    for index, part in enumerate(prediction):
        found[f"part_{index}"] = float(int(digest(*_tensors_in(part)), 16))
        found[f"kind_{index}"] = float(len(_kinds_in(part)))
    return found


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors_in(part)]
    if hasattr(value, "values") and not isinstance(value, Tensor):
        return [tensor for _, part in sorted(value.items()) for tensor in _tensors_in(part)]
    return [torch.as_tensor(value)]


def _kinds_in(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({','.join(map(_kinds_in, value))})"
    return f"{type(value).__name__}{getattr(value, 'dtype', '')}"


class ByBatch:
    """A `compute_metrics` that is called for every batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float] | None:
        self.seen += [float(int(digest(*_tensors_in(part)), 16)) for part in prediction]
        self.seen += [float(len(_kinds_in(part))) for part in prediction]
        self.seen.append(float(torch.rand(())))  # at the native moment, between collations
        if not compute_result:
            return None
        found = {f"seen_{index}": value for index, value in enumerate(self.seen)}
        self.seen = []
        return found


# Several sets.


@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_several_sets(kind: str) -> None:
    theirs, ours = run_both(job(kind, {"eval_on_start": True}, eval_keys=["a", "b"], eval_rows=13))
    assert theirs.event_names.count("on_evaluate") == 2 * theirs.event_names.count("on_epoch_end") * 3
    assert {"eval_a_loss", "eval_b_loss"} <= ours.engine.callback_metrics.keys()


def test_a_dict_of_one_set_names_it() -> None:
    theirs, _ = run_both(job(eval_keys=["only"]))
    assert "eval_only_loss" in theirs.log_history[2]


@pytest.mark.parametrize(
    "settings", [{"dataloader_drop_last": True}, {"eval_accumulation_steps": 1}], ids=str
)
def test_several_sets_and(settings: dict[str, Any]) -> None:
    run_both(job(settings=settings, eval_keys=["a", "b", "c"], eval_rows=23))


def test_several_sets_whose_batches_are_drawn() -> None:
    """Evaluations draw from the generators of the training; each begins when the last has ended."""

    def collator() -> Any:
        return DataCollatorForLanguageModeling(make_tokenizer(), mlm_probability=0.3)

    rows = [{"input_ids": row["input_ids"]} for row in make_rows("bert-mlm", 30)]

    def draws(prediction: Any) -> dict[str, float]:
        return {"drawn": float(torch.rand(())), **digest_metrics(prediction)}

    run_both(
        job(
            "bert-mlm",
            collator=collator,
            train_rows=rows,
            validation_rows=rows[:11],
            eval_keys=["a", "b"],
            compute_metrics=draws,
        )
    )


def test_the_best_metric_of_one_of_several_sets() -> None:
    theirs, _ = run_both(job(settings={"metric_for_best_model": "a_mean"}, eval_keys=["a", "b"]))
    assert theirs.state["best_metric"] is not None


def test_early_stopping_by_one_of_several_sets() -> None:
    stop = EarlyStopping(monitor="eval_b_loss", patience=0, mode="max")
    seen: list[Any] = []

    class Watch(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(
                (trainer.callback_metrics["eval_b_loss"].item(), trainer.log_history[-1]["eval_b_loss"])
            )

    asked = job(settings={"num_train_epochs": 3}, eval_keys=["a", "b"], callbacks=lambda: [stop, Watch()])
    run_ours(asked)
    assert stop.stopped_epoch or stop.wait_count
    assert all(shown == logged for shown, logged in seen)
    assert len(seen) >= 2


# What compute_metrics gets.


@pytest.mark.parametrize("kind", ["distilbert", "llama", "bert-qa"])
@pytest.mark.parametrize("included", [["inputs"], ["loss"], ["loss", "inputs"]], ids=str)
def test_more_for_metrics(kind: str, included: list[str]) -> None:
    settings = {"include_for_metrics": included}
    theirs, _ = run_both(job(kind, settings, compute_metrics=parts_digest))
    assert f"eval_part_{1 + len(included)}" in theirs.log_history[2]


@pytest.mark.parametrize("kind", ["distilbert", "llama", "bert-qa"])
@pytest.mark.parametrize("every", [None, 2])
def test_batches_that_are_not_joined(kind: str, every: int | None) -> None:
    settings = {
        "eval_do_concat_batches": False,
        "eval_accumulation_steps": every,
        "include_for_metrics": ["inputs", "loss"],
    }
    run_both(job(kind, settings, compute_metrics=parts_digest))


@pytest.mark.parametrize("kind", ["distilbert", "llama", "bert-qa"])
@pytest.mark.parametrize("included", [[], ["inputs", "loss"]], ids=str)
@pytest.mark.parametrize("rows", [11, 12])
def test_metrics_by_batch(kind: str, included: list[str], rows: int) -> None:
    settings = {"batch_eval_metrics": True, "include_for_metrics": included, "eval_accumulation_steps": 1}
    # one object for each side: it keeps what it has seen
    theirs = run_theirs(job(kind, settings, compute_metrics=ByBatch(), eval_rows=rows))
    ours = run_ours(job(kind, settings, compute_metrics=ByBatch(), eval_rows=rows))
    assert_identical(theirs, ours)
    assert "eval_seen_3" in theirs.log_history[2]


def test_metrics_by_batch_of_several_sets() -> None:
    settings = {"batch_eval_metrics": True}
    run_both(job(settings=settings, compute_metrics=ByBatch(), eval_keys=["a", "b"]))


def test_metrics_by_batch_may_end_with_nothing() -> None:
    def silent(prediction: Any, compute_result: bool) -> None:
        return None

    theirs, _ = run_both(job(settings={"batch_eval_metrics": True}, compute_metrics=silent))
    assert set(theirs.log_history[2]) == {"eval_loss", "epoch", "step"}


@pytest.mark.parametrize("kind", ["distilbert", "llama", "bert-qa"])
@pytest.mark.parametrize("rows", [9, 11, 12])
@pytest.mark.parametrize("several", [(), ("a", "b")], ids=str)
def test_gathered_as_objects(kind: str, rows: int, several: tuple[str, ...]) -> None:
    """With one row in the last batch, the first evaluation natively loses one of the two logits of QA."""
    settings = {"eval_use_gather_object": True}
    run_both(job(kind, settings, eval_rows=rows, eval_keys=several))


def test_only_losses() -> None:
    run_both(job(settings={"prediction_loss_only": True, "include_for_metrics": ["inputs", "loss"]}))


def classes(logits: Any, labels: Any) -> Tensor:
    """Keep the class of each row."""
    found: Tensor = logits.argmax(-1)
    assert labels is None or len(labels) == len(found)
    return found


def halves(logits: Any, labels: Any) -> Any:
    """Make two predictions of one, and one of two."""
    return (logits, logits.sum()) if isinstance(logits, Tensor) else logits[0] + logits[1]


@pytest.mark.parametrize(
    "settings", [{}, {"batch_eval_metrics": True}, {"eval_do_concat_batches": False}], ids=str
)
@pytest.mark.parametrize(
    ("kind", "function"), [("distilbert", classes), ("llama", classes), ("bert-qa", halves)]
)
def test_preprocessed_logits(kind: str, function: Any, settings: dict[str, Any]) -> None:
    by_batch = "batch_eval_metrics" in settings
    run_both(
        job(
            kind,
            settings,
            preprocess_logits_for_metrics=function,
            compute_metrics=ByBatch() if by_batch else parts_digest,
        )
    )


def with_more_outputs() -> nn.Module:
    """Make a model that returns hidden states, too, and says that they are no predictions."""
    model = make_model("distilbert")
    model.config.output_hidden_states = True
    model.config.keys_to_ignore_at_inference = ["hidden_states"]
    return model


def test_outputs_that_are_no_predictions() -> None:
    theirs, _ = run_both(job(model=with_more_outputs))
    plain = run_theirs(job())
    assert theirs.log_history[2] == plain.log_history[2]


def with_bad_rows() -> list[dict[str, Any]]:
    """Make rows of which one batch has a loss that is not a number."""
    rows = make_rows("bert-regression", 11, seed=5)
    rows[5]["label"] = math.nan
    return rows


@pytest.mark.parametrize("drops", [True, False])
def test_losses_that_are_not_finite(drops: bool) -> None:
    settings = {"logging_nan_inf_filter": drops}
    theirs, _ = run_both(job("bert-regression", settings, validation_rows=with_bad_rows()))
    assert math.isnan(theirs.log_history[2]["eval_loss"]) != drops


@pytest.mark.parametrize("flag", ["bf16_full_eval", "fp16_full_eval"])
def test_weights_are_not_cast_while_training(flag: str) -> None:
    theirs, _ = run_both(job(settings={flag: True}))
    assert_identical(theirs, run_theirs(job()))


# Evaluations and predictions by themselves.


Act = Literal["train", "evaluate", "predict"]


def act(asked: Job, *acts: Act, prefix: str = "test", rows: Any = None) -> tuple[list[Any], Any]:
    """Do the same on both engines, one after the other; see that all they return and report is the same.

    The native side is done first: the arguments of a second Trainer take the first one's accelerator away.

    Returns:
        What the native Trainer returned, act by act, and our module.
    """
    theirs, their_recorder, _ = make_theirs(asked)
    rows = theirs.eval_dataset if rows is None else rows
    do = {
        "train": theirs.train,
        "evaluate": theirs.evaluate,
        "predict": lambda: theirs.predict(rows, metric_key_prefix=prefix),
    }
    expected = [do[name]() for name in acts]
    torch.manual_seed(99)
    trainer, module, data, our_recorder, _ = make_ours(asked)
    given = {"train": "train_dataset", "eval": "eval_dataset"}
    known = {given[split]: found for split, found in data._raw.items() if split in given}
    asked_for = rows if "predict" in acts else None
    asking = hfbridge.HFDataModule(**known, predict_dataset=asked_for, data_collator=data.data_collator)
    do = {
        "train": lambda: trainer.fit(module, data),
        "evaluate": lambda: trainer.validate(module, data, verbose=False)[0],
        "predict": lambda: trainer.predict_dataset(module, asking, metric_key_prefix=prefix),
    }
    for name, their in zip(acts, expected, strict=True):
        our: Any = do[name]()
        if name == "evaluate":
            assert list(their) == list(our)
            same("metrics", without_times(their), without_times(our))
        elif name == "predict":
            same_arrays(their.predictions, our.predictions)
            same_arrays(their.label_ids, our.label_ids)
            assert list(their.metrics) == list(our.metrics)
            same("metrics", without_times(their.metrics), without_times(our.metrics))
    same("events", their_recorder.events, our_recorder.events)
    same("weights", dict(theirs.model.state_dict()), dict(module.model.state_dict()))
    same(
        "rows",
        [without_times(row) for row in theirs.state.log_history],
        [without_times(row) for row in module.log_history],
    )
    return expected, module


def same_arrays(their: Any, our: Any) -> None:
    """Compare arrays, and lists and tuples of them."""
    assert type(their) is type(our)
    for left, right in zip(arrays_in(their), arrays_in(our), strict=True):
        np.testing.assert_array_equal(left, right)
        assert getattr(left, "dtype", None) == getattr(right, "dtype", None)


OPTIONS = [
    pytest.param({}, {}, id="plain"),
    pytest.param({}, {"eval_keys": ["a", "b"]}, id="several"),
    pytest.param({"bf16": True}, {}, id="bf16"),
    pytest.param({"bf16_full_eval": True}, {}, id="bf16-weights"),
    pytest.param({"fp16_full_eval": True}, {"eval_keys": ["a", "b"]}, id="fp16-weights"),
    pytest.param({"batch_eval_metrics": True}, {"compute_metrics": ByBatch()}, id="by-batch"),
    pytest.param({"include_num_input_tokens_seen": "all"}, {"compute_metrics": None}, id="tokens"),
]


@pytest.mark.parametrize(("settings", "given"), OPTIONS)
@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_validate_is_evaluate(kind: str, settings: dict[str, Any], given: dict[str, Any]) -> None:
    (metrics, _), _ = act(job(kind, settings, **given), "evaluate", "evaluate")
    assert any("model_preparation_time" in name for name in metrics)
    (_, metrics, _), _ = act(job(kind, settings, **given), "train", "evaluate", "evaluate")
    assert not any("model_preparation_time" in name for name in metrics)


def _slowly(do: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*given: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return do(*given, **named)

    return slow


def test_the_preparation_that_is_told_is_what_native_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put around the model counts, on both sides; building it and reading its data do not."""
    named, asked = "eval_model_preparation_time", job()
    native, _, _ = make_theirs(asked)
    native.data_collator = _slowly(native.data_collator, 0.2)
    native.accelerator.prepare_model = _slowly(native.accelerator.prepare_model, 0.4)
    trainer, module, data, _, _ = make_ours(asked)
    data.data_collator = _slowly(data.data_collator, 0.2)
    module = hfbridge.HFModule(_slowly(lambda: make_model("distilbert"), 0.5))
    monkeypatch.setattr(model_run, "Preparation", _slowly(model_run.Preparation, 0.4))
    for metrics in (native.evaluate(), trainer.validate(module, data, verbose=False)[0]):
        assert 0.4 <= metrics[named] < 0.5


def test_an_evaluation_of_a_model_that_has_not_trained_draws_as_natively() -> None:
    def collator() -> Any:
        return DataCollatorForLanguageModeling(make_tokenizer(), mlm_probability=0.3)

    rows = [{"input_ids": row["input_ids"]} for row in make_rows("bert-mlm", 30)]
    asked = job("bert-mlm", collator=collator, train_rows=rows, validation_rows=rows[:11])
    act(asked, "evaluate", "evaluate")


@pytest.mark.parametrize("given", [{}, {"eval_keys": ["a", "b"]}], ids=str)
def test_training_after_an_evaluation(given: dict[str, Any]) -> None:
    act(job(**given), "evaluate", "train", "evaluate")


def test_training_after_a_cast_goes_on_in_the_low_precision() -> None:
    _, module = act(job(settings={"bf16_full_eval": True}), "evaluate", "train", "evaluate")
    assert module.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "given"), [*OPTIONS, pytest.param({"prediction_loss_only": True}, {}, id="losses")]
)
@pytest.mark.parametrize("kind", ["distilbert", "bert-qa"])
def test_predict_dataset_is_predict(kind: str, settings: dict[str, Any], given: dict[str, Any]) -> None:
    rows = make_rows(kind, 9)
    act(job(kind, settings, **given), "predict", "predict", rows=rows)
    act(job(kind, settings, **given), "train", "predict", "evaluate", rows=rows)


@pytest.mark.parametrize("kind", ["distilbert", "llama", "bert-qa"])
def test_rows_without_labels_are_predicted(kind: str) -> None:
    names = ("label", "labels", "start_positions", "end_positions")
    rows = [{n: v for n, v in row.items() if n not in names} for row in make_rows(kind, 11)]
    (expected,), module = act(job(kind), "predict", rows=rows, prefix="mine")
    assert expected.label_ids is None
    assert "mine_runtime" in expected.metrics
    data = hfbridge.HFDataModule(predict_dataset=rows, data_collator=PadRows())
    batches = module.trainer.predict(module, data)
    assert len(batches) == 3  # Lightning's own way goes on to give logits batch by batch


# Memory.


@pytest.mark.parametrize("several", [(), ("a", "b")], ids=str)
def test_memory_is_reported_under_the_native_names(several: tuple[str, ...]) -> None:
    asked = job(settings={"skip_memory_metrics": False}, eval_keys=several)
    (_, metrics), module = act(asked, "train", "evaluate")
    row = next(row for row in module.log_history if "train_loss" in row)
    assert {"before_init_mem_cpu", "init_mem_cpu_alloc_delta", "train_mem_cpu_alloc_delta"} <= row.keys()
    assert "eval_mem_cpu_peaked_delta" in metrics


def test_memory_of_a_first_evaluation_and_prediction() -> None:
    asked = job(settings={"skip_memory_metrics": False})
    (metrics, output), _ = act(asked, "evaluate", "predict")
    assert "before_init_mem_cpu" in metrics
    assert "test_mem_cpu_alloc_delta" in output.metrics


def test_memory_is_no_longer_measured_after_an_error() -> None:
    class Boom(Callback):
        def on_train_batch_end(self, *hook: Any) -> None:
            raise RuntimeError("boom")

    asked = job(settings={"skip_memory_metrics": False}, callbacks=lambda: [Boom()])
    trainer, module, data, _, _ = make_ours(asked)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module, data)
    assert module.evaluator.memory.peak_monitoring is False


# "exact" weighs by items, whatever the options.


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({}, {"eval_keys": ["a", "b"]}),
        (
            {"eval_do_concat_batches": False, "include_for_metrics": ["inputs", "loss"]},
            {"compute_metrics": parts_digest},
        ),
        ({"batch_eval_metrics": True}, {"compute_metrics": ByBatch()}),
        ({"eval_accumulation_steps": 1}, {"preprocess_logits_for_metrics": classes}),
        ({"eval_use_gather_object": True}, {}),
    ],
)
def test_exact_keeps_its_weights(settings: dict[str, Any], given: dict[str, Any]) -> None:
    asked = job("llama", {**settings, "learning_rate": 0.0}, **given)
    ours = run_ours(asked, loss_normalization="exact")
    plain = run_ours(job("llama", {"learning_rate": 0.0}), loss_normalization="exact")
    row = ours.log_history[2]
    if "eval_keys" not in given:
        assert row["eval_loss"] == plain.log_history[2]["eval_loss"]
        return
    model, sets = plain.module.model.eval(), asked.datasets()[1]
    for key, rows in sets.items():
        total = items = 0
        for one in rows:
            labels = torch.tensor([one["labels"]])
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([one["input_ids"]]), labels=labels).loss
            held = int((labels[:, 1:] != -100).sum())
            total, items = total + float(loss) * held, items + held
        found = [row[f"eval_{key}_loss"] for row in ours.log_history if f"eval_{key}_loss" in row]
        assert found[0] == pytest.approx(total / items, rel=1e-6)


# What is wrong is told before the first step.


def refused(asked: Job, *, match: str, kind: type[Exception] = MetricsError) -> None:
    """See that a run ends before its first step; in "native" it ends where the HF Trainer does."""
    trainer, module, data, recorder, _ = make_ours(asked, loss_normalization="exact")
    with pytest.raises(kind, match=match):
        trainer.fit(module, data)
    assert not recorder.steps


def nothing(logits: Any, labels: Any) -> None:
    """Forget to return."""


def test_preprocessing_that_returns_nothing() -> None:
    refused(
        job(preprocess_logits_for_metrics=nothing),
        match=r"preprocess_logits_for_metrics \(nothing\) returned None",
    )


def test_preprocessing_that_is_no_function() -> None:
    with pytest.raises(hfbridge.ModelError, match="preprocess_logits_for_metrics"):
        hfbridge.HFModule(make_model("distilbert"), preprocess_logits_for_metrics=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_metrics_by_batch_without_compute_result(strategy: str) -> None:
    asked = job(settings={"batch_eval_metrics": True, "eval_strategy": strategy})
    refused(asked, match=r"digest_metrics\) takes prediction\. It must take compute_result")


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({}, {}),
        ({}, {"compute_metrics": None}),
        ({}, {"eval_keys": ["a", "b"]}),
        ({"eval_on_start": True}, {}),
    ],
    ids=str,
)
def test_a_best_metric_that_is_not_computed(settings: dict[str, Any], given: dict[str, Any]) -> None:
    names = {"metric_for_best_model": "accuracy" if "eval_keys" not in given else "loss"}
    refused(
        job(settings={**settings, **names}, **given), match="is no metric of the evaluation, which has eval_"
    )


def test_a_best_metric_that_the_first_rows_do_not_show() -> None:
    """A metric named after what occurs in the set: a whole evaluation is asked; nothing else changes."""

    def by_length(prediction: Any) -> dict[str, float]:
        return {**digest_metrics(prediction), f"of_{len(prediction.label_ids)}": 1.0}

    run_both(
        job(settings={"metric_for_best_model": "of_11", "greater_is_better": True}, compute_metrics=by_length)
    )


def test_metrics_that_need_more_rows_than_a_rehearsal_has() -> None:
    def needs_all(prediction: Any) -> dict[str, float]:
        if len(prediction.label_ids) < 11:
            raise ValueError("too few")
        return {"f1": float(np.mean(prediction.predictions))}

    run_both(job(settings={"metric_for_best_model": "f1"}, compute_metrics=needs_all))


@pytest.mark.parametrize("named", [["labels"], ["inputs", "losses"]], ids=str)
def test_names_that_cannot_be_included(named: list[str]) -> None:
    with pytest.raises(hfbridge.SettingsError, match='must be a list of "inputs" and "loss"'):
        hfbridge.Settings(include_for_metrics=named)


def test_two_casts_at_once() -> None:
    with pytest.raises(hfbridge.SettingsError, match="contradicts bf16_full_eval=True"):
        hfbridge.Settings(bf16_full_eval=True, fp16_full_eval=True)


def test_another_set_is_mapped_and_collated_as_those_of_the_datamodule() -> None:
    trainer, module, data, _, _ = make_ours(job())
    rows = make_rows("distilbert", 7, seed=9)
    named = trainer.predict_dataset(
        module, hfbridge.HFDataModule(predict_dataset=rows, data_collator=PadRows())
    )
    raw = datasets.Dataset.from_list([{"words": row["input_ids"], "label": row["label"]} for row in rows])

    def rename(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": row["words"], "attention_mask": [1] * len(row["words"])}

    mapping = {"map_function": rename, "map_kwargs": {"batched": False, "remove_columns": ["words"]}}
    mapped = hfbridge.HFDataModule(train_dataset=raw, data_collator=PadRows(), **mapping)
    for output in (trainer.predict_dataset(module, data, rows), trainer.predict_dataset(module, mapped, raw)):
        assert (output.predictions == named.predictions).all()
        assert (output.label_ids == named.label_ids).all()
    with pytest.raises(hfbridge.DataError, match=r"got a list. A set comes after it"):
        trainer.predict_dataset(module, rows)


def test_only_an_hfmodule_is_predicted() -> None:
    trainer, module, data, _, _ = make_ours(job())
    with pytest.raises(hfbridge.ModelError, match=r"`predict_dataset` expects an `HFModule`, got `Distil"):
        trainer.predict_dataset(module.model, data)

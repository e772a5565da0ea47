"""Shipped metrics give what the libraries give, on random and degenerate rows, or raise as they do."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from seqeval import metrics as seqeval_metrics
from sklearn import metrics as sklearn_metrics
from tokenizers.pre_tokenizers import WhitespaceSplit

import hfbridge
from tests import tiny

few = settings(max_examples=25, deadline=None)
classes = st.integers(0, 3)
pairs_of_classes = st.one_of(
    st.lists(st.tuples(classes, classes), max_size=12),
    st.lists(st.tuples(st.just(1), st.just(1)), max_size=3),  # one class
    st.lists(st.tuples(st.just(0), classes), max_size=6),  # constant predictions
)
numbers = st.floats(-100, 100, width=32)
pairs_of_numbers = st.one_of(
    st.lists(st.tuples(numbers, numbers), max_size=12),
    st.lists(st.tuples(st.just(0.5), numbers), max_size=6),
    st.lists(st.tuples(st.sampled_from([math.nan, 1.0]), numbers), max_size=4),
)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the class of what it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both sides warn of what is undefined
        try:
            return call()
        except (ValueError, TypeError) as error:
            return type(error)


def check(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, type):
        assert ours is theirs
    else:
        np.testing.assert_array_equal(ours, theirs)  # NaN equals NaN


AVERAGES: list[dict[str, Any]] = [{}, *({"average": name} for name in ("micro", "macro", "weighted", None))]


def compute(name: str, predictions: Any, references: Any, **arguments: Any) -> Any:
    """Compute a metric anew; an error leaves nothing behind in the next one."""
    metric = hfbridge.load_metric(name)
    return metric.compute(predictions=predictions, references=references, **arguments)[name]


@pytest.mark.parametrize("arguments", AVERAGES, ids=str)
@pytest.mark.parametrize("name", ["f1", "precision", "recall"])
@settings(max_examples=12, deadline=None)
@given(pairs=pairs_of_classes)
def test_averages_of_classes(name: str, arguments: dict[str, Any], pairs: list[tuple[int, int]]) -> None:
    predicted, true = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    theirs = outcome(lambda: getattr(sklearn_metrics, f"{name}_score")(true, predicted, **arguments))
    if getattr(theirs, "size", 0) == 1:
        theirs = float(theirs.item())  # so do the scripts of `evaluate`
    check(outcome(lambda: compute(name, predicted, true, **arguments)), theirs)


@few
@given(pairs=pairs_of_classes)
def test_accuracy_and_matthews(pairs: list[tuple[int, int]]) -> None:
    predicted, true = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for name, function in (
        ("accuracy", sklearn_metrics.accuracy_score),
        ("matthews_correlation", sklearn_metrics.matthews_corrcoef),
    ):
        theirs = outcome(lambda function=function: function(true, predicted))
        check(outcome(lambda name=name: compute(name, predicted, true)), theirs)


@few
@given(pairs=pairs_of_numbers)
def test_numbers(pairs: list[tuple[float, float]]) -> None:
    predicted, true = ([np.float32(pair[side]) for pair in pairs] for side in (0, 1))
    # Columns of `evaluate` are float32, and handed on as Python numbers.
    wide_predicted, wide_true = list(map(float, predicted)), list(map(float, true))
    for name, function in (
        ("mse", sklearn_metrics.mean_squared_error),
        ("mae", sklearn_metrics.mean_absolute_error),
        ("pearsonr", lambda x, y: stats.pearsonr(x, y)[0]),
        ("spearmanr", lambda x, y: stats.spearmanr(x, y)[0]),
    ):
        theirs = outcome(lambda function=function: function(wide_true, wide_predicted))
        check(outcome(lambda name=name: compute(name, predicted, true)), theirs)


@few
@given(rows=st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1, width=32)), max_size=10))
def test_roc_auc(rows: list[tuple[int, float]]) -> None:
    true, scores = [row[0] for row in rows], [row[1] for row in rows]
    metric = hfbridge.load_metric("roc_auc")
    ours = outcome(lambda: metric.compute(references=true, prediction_scores=scores)["roc_auc"])
    check(ours, outcome(lambda: sklearn_metrics.roc_auc_score(true, scores)))


tags = st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
sentences = st.lists(st.lists(st.tuples(tags, tags), min_size=1, max_size=6), min_size=1, max_size=4)


@few
@given(rows=sentences)
def test_entities(rows: list[list[tuple[str, str]]]) -> None:
    predicted, true = ([[pair[side] for pair in row] for row in rows] for side in (0, 1))
    metric = hfbridge.load_metric("seqeval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scores = metric.compute(predictions=predicted, references=true)
        except ValueError:  # seqeval itself fails where no entity occurs on either side
            assert all(tag == "O" for row in rows for pair in row for tag in pair)
            return
        expected = {
            "overall_precision": seqeval_metrics.precision_score(true, predicted),
            "overall_recall": seqeval_metrics.recall_score(true, predicted),
            "overall_f1": seqeval_metrics.f1_score(true, predicted),
            "overall_accuracy": seqeval_metrics.accuracy_score(true, predicted),
        }
    assert {name: scores[name] for name in expected} == expected
    assert all(
        set(scores[name]) == {"precision", "recall", "f1", "number"} for name in set(scores) - set(expected)
    )


words = st.lists(st.sampled_from(["a", "cat", "The", "sat", "on.", "mat"]), max_size=7).map(" ".join)


@few
@given(rows=st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_texts(rows: list[tuple[str, str]]) -> None:
    predicted, true = [row[0] for row in rows], [row[1] for row in rows]
    bleu = hfbridge.load_metric("sacrebleu").compute(predictions=predicted, references=true)
    assert bleu["score"] == sacrebleu.corpus_bleu(predicted, [true]).score
    rouge = hfbridge.load_metric("rouge").compute(
        predictions=predicted, references=true, use_aggregator=False, rouge_types=["rouge2", "rougeL"]
    )
    scorer = RougeScorer(["rouge2", "rougeL"])
    found = [scorer.score(reference, text) for text, reference in rows]
    assert rouge == {name: [score[name].fmeasure for score in found] for name in ("rouge2", "rougeL")}
    assert compute("exact_match", predicted, true) == np.mean([text == reference for text, reference in rows])


def test_answers() -> None:
    def truth(number: int, *texts: str) -> dict[str, Any]:
        return {"id": str(number), "answers": {"text": list(texts), "answer_start": [0] * len(texts)}}

    answers = ["The cat!", "cat on mat", "", "dog"]
    metric = hfbridge.load_metric("squad")
    scores = metric.compute(
        predictions=[{"id": str(index), "prediction_text": text} for index, text in enumerate(answers)],
        references=[truth(0, "a cat"), truth(1, "dog", "the mat"), truth(2, "the"), truth(3, "cat")],
    )
    # The third answer and its reference are both empty without articles: a match that shares no word.
    assert scores == {"exact_match": 50.0, "f1": 100 * (1 + 0.5 + 0 + 0) / 4}
    other = [{"id": "another", "prediction_text": "cat"}]
    missing = metric.compute(predictions=other, references=[truth(0, "cat")])
    assert missing == {"exact_match": 0.0, "f1": 0.0}
    with pytest.raises(ValueError, match="at least one"):
        metric.compute(predictions=[], references=[])


def test_perplexity_is_that_of_each_text_alone(tmp_path: Path) -> None:
    model, tokenizer = tiny.make_model("llama").eval(), tiny.make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    known = [word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens]
    texts = [" ".join(known[:3]), " ".join(known[5:12]), " ".join(known[2:4])]
    metric = hfbridge.load_metric("perplexity")
    given = {"model_id": str(tmp_path), "add_start_token": False, "batch_size": 2, "device": "cpu"}
    found = metric.compute(predictions=texts, **given)
    alone = []
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            alone.append(math.exp(model(input_ids=ids, labels=ids).loss))
    # Padding and batching take sums in another order.
    assert found["perplexities"] == pytest.approx(alone, rel=1e-5)
    assert found["mean_perplexity"] == np.mean(found["perplexities"])
    with pytest.raises(ValueError, match="needs 2 or more"):
        metric.compute(predictions=[known[0]], **given)

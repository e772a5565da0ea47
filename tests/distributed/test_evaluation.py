"""Evaluation and prediction on several ranks: the native Trainer's numbers, to the bit; in "exact" those of one."""

import pytest

from tests.distributed.evaluations import (
    act_on_both,
    act_without_labels,
    classes,
    evaluate_by_batch_on_both,
    evaluate_on_both,
    job,
    rows_of_many_lengths,
    with_sum,
)
from tests.parity.test_evaluation_options import parts_digest
from tests.tiny import make_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

EVERYTHING = {"include_for_metrics": ["inputs", "loss"]}


@pytest.mark.parametrize("kind", ["distilbert", "llama", "bert-qa", "t5"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eval_accumulation_steps": 1},
        {"eval_do_concat_batches": False},
        {"eval_do_concat_batches": False, "eval_accumulation_steps": 2},
    ],
    ids=str,
)
def test_what_metrics_are_given(ranks, kind, settings):
    asked = job(kind, {**EVERYTHING, **settings}, compute_metrics=parts_digest)
    first, second = ranks(2).run(evaluate_on_both, asked)
    assert first == second


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_ranks_that_pad_to_different_lengths(ranks, n, kind):
    """Twelve-odd lengths, of which no two ranks have the same longest one; labels of t5 differ apart."""
    rows = rows_of_many_lengths(kind, 13)
    asked = job(kind, EVERYTHING, compute_metrics=parts_digest, validation_rows=rows)
    ranks(n).run(evaluate_on_both, asked)


@pytest.mark.parametrize(("n", "rows"), [(2, 1), (2, 3), (2, 5), (2, 8), (2, 9), (3, 2), (3, 12), (3, 17)])
def test_sets_of_any_size(ranks, n, rows):
    found = ranks(n).run(
        evaluate_on_both, job(settings=EVERYTHING, compute_metrics=parts_digest, eval_rows=rows)
    )
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("kind", ["distilbert", "llama", "bert-qa"])
@pytest.mark.parametrize("included", [[], ["inputs", "loss"]], ids=str)
def test_metrics_by_batch(ranks, kind, included):
    """With inputs each rank is given those of its own batch, as natively."""
    settings = {"batch_eval_metrics": True, "include_for_metrics": included}
    first, second = ranks(2).run(evaluate_by_batch_on_both, job(kind, settings))
    names = ["eval_seen_0", "eval_seen_1"]
    assert [first[2][name] for name in names] == [second[2][name] for name in names]
    assert not included or first[2]["eval_seen_2"] != second[2]["eval_seen_2"]


@pytest.mark.parametrize(
    ("kind", "settings", "given"),
    [
        ("distilbert", {"eval_on_start": True}, {"eval_keys": ["a", "b"]}),
        ("llama", {"dataloader_drop_last": True}, {"eval_keys": ["a", "b"], "eval_rows": 23}),
        ("distilbert", {"accelerator_config": {"split_batches": True}, **EVERYTHING}, {}),
        ("distilbert", {"accelerator_config": {"split_batches": True}}, {"eval_rows": 12}),
        ("distilbert", {"train_sampling_strategy": "group_by_length"}, {"eval_rows": 23}),
        ("distilbert", {"train_sampling_strategy": "batch_rebalance"}, {}),
        ("distilbert", {"prediction_loss_only": True, **EVERYTHING}, {}),
        ("llama", {}, {"compute_metrics": None}),
        ("llama", {"average_tokens_across_devices": False}, {}),
        ("llama", {"label_smoothing_factor": 0.1}, {}),
        ("llama", {}, {"preprocess_logits_for_metrics": classes}),
        ("t5", {}, {"preprocess_logits_for_metrics": classes}),
        ("distilbert", {}, {"preprocess_logits_for_metrics": with_sum}),
        ("bert-token", {"dataloader_num_workers": 1}, {}),
        ("distilbert", {"metric_for_best_model": "mean"}, {}),
    ],
    ids=str,
)
def test_other_options(ranks, kind, settings, given):
    ranks(2).run(evaluate_on_both, job(kind, settings, **{"compute_metrics": parts_digest, **given}))


@pytest.mark.parametrize("kind", ["distilbert", "bert-qa", "t5"])
@pytest.mark.parametrize(
    ("settings", "acts"),
    [
        ({}, ("evaluate", "predict")),
        ({}, ("train", "predict", "evaluate")),
        ({"eval_do_concat_batches": False}, ("predict",)),
        ({"batch_eval_metrics": True}, ("predict",)),
    ],
    ids=str,
)
def test_evaluating_and_predicting_by_themselves(ranks, kind, settings, acts):
    given = {"compute_metrics": None} if "batch_eval_metrics" in settings else {}
    if "predict" in acts:
        given["eval_rows"] = 13
    ranks(2).run(act_on_both, job(kind, {"eval_strategy": "no", **settings}, **given), *acts)


def test_rows_without_labels_are_predicted(ranks):
    rows = [{name: v for name, v in row.items() if name != "label"} for row in make_rows("distilbert", 9)]
    for rank in ranks(2).run(act_without_labels, job(settings={"eval_strategy": "no"}), rows):
        ((predictions, labels),) = rank
        assert predictions.shape == (9, 2)
        assert labels is None

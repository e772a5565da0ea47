"""Evaluation and prediction on several ranks: native's numbers, and in "exact" those of one process.

Grade: exact. What is compared with native stands in tests/parity/engines.py.
"""

import re

import numpy as np
import pytest
import torch

from tests.distributed.evaluations import (
    ByRank,
    DigestsByBatch,
    act_on_both,
    act_without_labels,
    classes,
    error_of_fit,
    errors_on_both,
    evaluate_by_batch_on_both,
    evaluate_exactly,
    evaluate_on_both,
    job,
    logits_by_batch,
    names_its_rows,
    rows_of_many_lengths,
    unheard_of,
    warnings_of_fit,
    with_sum,
)
from tests.parity.test_evaluation_options import parts_digest
from tests.tiny import PadRows, make_model, make_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

EVERYTHING = {"include_for_metrics": ["inputs", "loss"]}


def shown(value):
    """Name a parameter without the address of a function."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


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
    ids=shown,
)
def test_other_options(ranks, kind, settings, given):
    ranks(2).run(evaluate_on_both, job(kind, settings, **{"compute_metrics": parts_digest, **given}))


@pytest.mark.parametrize("kind", ["distilbert", "bert-qa", "t5"])
@pytest.mark.parametrize(
    ("settings", "acts"),
    [
        ({}, ("evaluate", "predict")),
        ({}, ("train", "predict", "evaluate")),
        ({"bf16_full_eval": True}, ("evaluate", "predict")),
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


@pytest.mark.parametrize("kind", ["distilbert", "bert-qa"])
@pytest.mark.parametrize("rows", [11, 16])
def test_gathered_as_objects(ranks, kind, rows):
    """Natively several ranks' lists of rows are joined row by row; what comes of it is the same here."""
    asked = job(kind, {"eval_use_gather_object": True}, eval_rows=rows, compute_metrics=parts_digest)
    ranks(2).run(evaluate_on_both, asked)


def test_gathered_as_objects_a_single_round_has_no_loss(ranks):
    asked = job(settings={"eval_use_gather_object": True}, eval_rows=5, compute_metrics=None)
    for theirs, ours in ranks(2).run(errors_on_both, asked):
        assert theirs == "ValueError: zero-dimensional arrays cannot be concatenated"
        assert ours.startswith("MetricsError: eval_use_gather_object=True")


# "exact": as many ranks as one likes, the same numbers, to the bit.


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kind", ["distilbert", "llama", "bert-qa", "t5", "bert-token"])
def test_exact_is_that_of_one_process(ranks, n, kind):
    """Sets of any size, of rows that pad differently: what metrics are given, row by row, and the loss."""
    jobs = [
        job(kind, EVERYTHING, validation_rows=rows_of_many_lengths(kind, rows), compute_metrics=parts_digest)
        for rows in (1, 4, 11, 13, 24)
    ]
    alone = evaluate_exactly(jobs)
    for rank in ranks(n).run(evaluate_exactly, jobs):
        assert rank == alone


@pytest.mark.parametrize("n", [2, 3])
def test_exact_with_any_option_is_that_of_one_process(ranks, n):
    given = {"validation_rows": rows_of_many_lengths("llama", 18), "compute_metrics": parts_digest}
    jobs = [
        job("llama", {**EVERYTHING, "eval_do_concat_batches": False}, **given),
        job("llama", {"eval_do_concat_batches": False, "eval_accumulation_steps": 2}, **given),
        job("llama", {"eval_use_gather_object": True}, **given),
        job("llama", {"train_sampling_strategy": "group_by_length"}, **given),
        job("llama", EVERYTHING, **given, preprocess_logits_for_metrics=classes),
        job("llama", EVERYTHING, **given, preprocess_logits_for_metrics=with_sum),
        job(
            "llama",
            {**EVERYTHING, "batch_eval_metrics": True},
            **{**given, "compute_metrics": DigestsByBatch()},
        ),
        job("llama", {"prediction_loss_only": True}, **given),
        job("llama", {"eval_do_concat_batches": False}, eval_rows=23, compute_metrics=parts_digest),
    ]
    alone = evaluate_exactly(jobs)
    for rank in ranks(n).run(evaluate_exactly, jobs):
        assert rank == alone


@pytest.mark.parametrize("kind", ["llama", "bert-token"])
def test_the_exact_loss_is_the_mean_over_all_items_of_the_set(ranks, kind):
    rows = rows_of_many_lengths(kind, 13)
    total = items = 0
    model, shift = make_model(kind).eval(), kind == "llama"
    for row in rows:
        batch = PadRows()([row])
        held = int((batch["labels"][:, shift:] != -100).sum())
        with torch.no_grad():
            total, items = total + float(model(**batch).loss) * held, items + held
    jobs = [job(kind, validation_rows=rows, compute_metrics=None)]
    (metrics, _, _), *_ = ranks(3).run(evaluate_exactly, jobs)[2]
    assert metrics["eval_loss"] == pytest.approx(total / items, rel=1e-6)


def test_lightning_does_not_warn_of_metrics_that_are_the_same_on_all_ranks(ranks):
    for told, shown in ranks(2).run(warnings_of_fit, job(compute_metrics=unheard_of)):
        assert not [message for message in told if "sync_dist" in message]
        assert shown == 0.5


# What Lightning calls prediction.


def test_each_rank_predicts_its_own_batches(ranks):
    asked = job(eval_rows=13)
    alone = logits_by_batch(asked)
    first, second = ranks(2).run(logits_by_batch, asked)
    assert [len(batch) for batch in (*first, *second)] == [4, 4, 4, 1]
    taking_turns = [batch for both in zip(first, second, strict=True) for batch in both]
    together, expected = (np.concatenate(batches) for batches in (taking_turns, alone))
    np.testing.assert_allclose(together, expected, rtol=1e-5)  # other batches, other padding


# What is wrong on one rank is told on all, before the first step.


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"compute_metrics": ByRank(None)}, r"compute_metrics \(ByRank|<.*ByRank.*\) returned None"),
        (
            {"compute_metrics": parts_digest, "preprocess_logits_for_metrics": ByRank(None)},
            "preprocess_logits_for_metrics .* returned None",
        ),
        (
            {
                "settings": {"metric_for_best_model": "f1", "greater_is_better": True},
                "compute_metrics": ByRank({"other": 0.5}),
            },
            "metric_for_best_model='f1' is no metric of the evaluation",
        ),
    ],
    ids=["metrics", "logits", "best"],
)
def test_a_mistake_of_one_rank_is_told_on_all(ranks, given, text):
    for kind, message, steps in ranks(2).run(error_of_fit, job(**given)):
        assert (kind, steps) == ("MetricsError", 0)
        assert re.search(text, message)


def test_an_error_of_one_rank_ends_the_evaluation_on_all(ranks):
    """In the rehearsal it is none: metrics may need more than a few rows."""
    found = ranks(2).run(error_of_fit, job(compute_metrics=ByRank(ValueError("too few classes"))))
    assert [kind for kind, _, _ in found] == ["RankError", "ValueError"]
    assert found[0][1] == "On rank 1: ValueError: too few classes"
    assert found[0][2] == found[1][2] == 2


def test_a_best_metric_that_the_first_rows_do_not_show(ranks):
    settings = {"metric_for_best_model": "of_11", "greater_is_better": True}
    ranks(2).run(evaluate_on_both, job(settings=settings, compute_metrics=names_its_rows))

"""Running metrics: what they are given, what comes of it, and what is told of those that do not fit."""

import copy

import numpy as np
import pytest
import torch
from torchmetrics import MeanMetric, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassROC,
)
from torchmetrics.retrieval import RetrievalMAP
from torchmetrics.text import Perplexity
from torchmetrics.utilities.data import dim_zero_cat

import hfbridge
from hfbridge.errors import MetricsError
from hfbridge.evaluation.metrics import join_metrics
from hfbridge.evaluation.torchmetrics import RunningMetrics, flattened, numbers_of, pair_of
from tests.tiny import make_model
from tests.unit.evaluation.test_evaluation_loop import BATCHES, evaluation, run

LOGITS = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 4.0]])
LABELS = torch.tensor([0, 1, 0])


class Seen(Metric):
    """Keep what it was given, and count the rows."""

    def __init__(self):
        super().__init__()
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")
        self.given = []

    def update(self, outputs, labels):
        self.given.append((outputs, labels))
        self.rows += len(labels[0] if isinstance(labels, tuple) else labels)

    def compute(self):
        return self.rows


def update(metrics, outputs=LOGITS, labels=LABELS, **changed):
    metrics.update(outputs, labels, **{"rows": 3, "shifts": False, "are_flags": False, **changed})


def computed(given, *batches, **changed):
    metrics = RunningMetrics(given)
    metrics.begin(ranks=1)
    for batch in batches or [(LOGITS, LABELS)]:
        update(metrics, *batch, **changed)
    return metrics.compute(is_trial=False)


# Names.


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (MulticlassAccuracy(2), ["MulticlassAccuracy"]),
        (MetricCollection([MulticlassAccuracy(2), MulticlassF1Score(2)], prefix="my_"),
         ["my_MulticlassAccuracy", "my_MulticlassF1Score"]),
        ({"f1": MulticlassF1Score(2), "acc": MulticlassAccuracy(2)}, ["acc", "f1"]),
        ({"a": MetricCollection([MulticlassAccuracy(2)])}, ["a_MulticlassAccuracy"]),
        (MulticlassF1Score(2, average="none"), ["MulticlassF1Score_0", "MulticlassF1Score_1"]),
        ({"m": MulticlassConfusionMatrix(2)}, ["m_0_0", "m_0_1", "m_1_0", "m_1_1"]),
    ],
    ids=["one", "collection", "dict", "nested", "classes", "matrix"],
)  # fmt: skip
def test_names(given, names):
    assert list(computed(given)) == names


def test_numbers_are_those_of_the_metric_itself():
    metric = MulticlassF1Score(2, average="none")
    metric.update(LOGITS, LABELS)
    expected = metric.compute().tolist()
    found = computed(
        {"f1": MulticlassF1Score(2, average="none")}, (LOGITS[:1], LABELS[:1]), (LOGITS[1:], LABELS[1:])
    )
    assert list(found.values()) == expected
    assert all(type(value) is float for value in found.values())


def test_metrics_of_other_thresholds_do_not_share_their_states():
    """A collection may join metrics whose states are alike after one batch; a dict of them is not joined."""
    given = {name: BinaryAccuracy(threshold=at) for name, at in (("low", 0.2), ("high", 0.8))}
    ones = torch.ones(2, dtype=torch.long)
    batches = [(torch.tensor([0.9, 0.9]), ones), (torch.tensor([0.5, 0.5]), ones)]
    assert computed(given, *batches, rows=2) == {"high": 0.5, "low": 1.0}


# Rows, and beginning anew.


def test_only_rows_that_count_are_seen_and_none_without_any():
    assert computed(Seen(), (LOGITS, LABELS), rows=2) == {"Seen": 2}
    assert computed(Seen(), ((LOGITS, LOGITS.sum()), (LABELS, LABELS)), rows=1) == {"Seen": 1}
    assert computed(Seen(), (LOGITS, LABELS), rows=0) == {"Seen": 0}
    metrics = RunningMetrics(Seen())
    metrics.begin(ranks=1)
    assert metrics.compute(is_trial=False) == {}


def test_each_evaluation_begins_anew():
    metrics = RunningMetrics(Seen())
    update(metrics)  # and fails before its end
    for _ in range(2):
        metrics.begin(ranks=1)
        update(metrics)
        assert metrics.compute(is_trial=False) == {"Seen": 3}


def test_what_was_given_stays_as_it_was():
    metric, collection = MeanSquaredError(), MetricCollection([MulticlassAccuracy(2)])
    computed({"mse": metric}, (LOGITS, LOGITS))
    computed(collection)
    assert metric.update_count == collection["MulticlassAccuracy"].update_count == 0
    assert metric.dist_sync_fn is None


def test_they_are_no_part_of_the_model_or_its_checkpoints():
    module = hfbridge.HFModule(make_model("distilbert"), metrics=MulticlassAccuracy(2))
    plain = hfbridge.HFModule(make_model("distilbert"))
    assert [name for name, _ in module.named_modules()] == [name for name, _ in plain.named_modules()]
    copied = copy.deepcopy(module).running_metrics
    copied.begin(ranks=1)
    update(copied)
    assert copied.compute(is_trial=True) == {"MulticlassAccuracy": pytest.approx(0.75)}
    assert module.running_metrics._has_labels is False


# What is compared with what.

SCORES, TOKENS = torch.rand(2, 3, 4), torch.tensor([[0, 1, -100], [3, 2, 1]])


def pair(outputs, labels, **changed):
    return flattened(*pair_of(outputs, labels, **{"shifts": False, "are_flags": False, **changed}))


def test_token_scores_become_rows():
    outputs, labels = pair(SCORES, TOKENS)
    assert torch.equal(outputs, SCORES.reshape(6, 4))
    assert labels.tolist() == [0, 1, -100, 3, 2, 1]


def test_the_next_token_is_what_is_predicted():
    outputs, labels = pair(SCORES, TOKENS, shifts=True)
    assert torch.equal(outputs, SCORES[:, :-1].reshape(4, 4))
    assert labels.tolist() == [1, -100, 2, 1]
    outputs, labels = pair(SCORES.argmax(-1), TOKENS, shifts=True)
    assert outputs.shape == labels.shape == (2, 2)


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        (LOGITS, LABELS),
        (torch.rand(2, 5, 8, 8), torch.zeros(2, 32, 32, dtype=torch.long)),
        (torch.zeros(2, 7, dtype=torch.long), TOKENS),
        ((LOGITS[:, 0], LOGITS[:, 1]), (LABELS, LABELS)),
        (["a", "b", "c"][0], LABELS),
    ],
    ids=["classes", "segmentation", "generated", "answers", "no-tensor"],
)
def test_others_stay_as_they_are(outputs, labels):
    found = pair(outputs, labels)
    assert found[0] is outputs
    assert found[1] is labels


def test_other_forms():
    assert pair(LABELS[:, None], LABELS)[0].shape == (3,)
    assert pair((LOGITS, SCORES), LABELS)[0] is LOGITS
    flags = torch.tensor([[1.0, 0.0]])
    assert pair(LOGITS[:1], flags, are_flags=True)[1].dtype == torch.long
    soft = torch.tensor([[0.5, 0.0]])
    assert pair(LOGITS[:1], soft, are_flags=True)[1] is soft


def test_perplexity_is_given_whole_rows_beside_metrics_that_are_not():
    both = {
        "p": Perplexity(ignore_index=-100),
        "acc": MulticlassAccuracy(4, average="micro", ignore_index=-100),
    }
    found = computed(MetricCollection(both, prefix="my_"), (SCORES, TOKENS), rows=2)
    chosen = torch.log_softmax(SCORES, -1).gather(-1, TOKENS.clamp(0)[..., None])[..., 0][TOKENS >= 0]
    assert found["my_p"] == pytest.approx(float((-chosen.mean()).exp()), rel=1e-6)
    hits = (SCORES.argmax(-1) == TOKENS)[TOKENS >= 0]
    assert found["my_acc"] == pytest.approx(float(hits.float().mean()))


# What does not fit.


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (MulticlassAccuracy, "objects, not classes"),
        ([MulticlassAccuracy(2)], "MetricCollection"),
        ({"f1": len}, r"'f1': <built-in"),
        ({1: MulticlassAccuracy(2)}, "1: MulticlassAccuracy"),
        ({}, "holds no metric"),
        (MetricCollection([]), "holds no metric"),
        (lambda prediction: {}, "compute_metrics="),
    ],
    ids=["class", "list", "value", "key", "empty", "empty-collection", "function"],
)
def test_what_is_no_metric_is_told_at_once(given, text):
    with pytest.raises(MetricsError, match=text):
        hfbridge.HFModule(make_model("distilbert"), metrics=given)


def test_a_metric_that_does_not_take_a_batch_is_named():
    given = {"good": MulticlassAccuracy(2), "bad": MulticlassAccuracy(3)}
    with pytest.raises(MetricsError, match=r"metrics=: bad does not take .* float32 \[3, 2\].* int64 \[3\]"):
        computed(given)
    with pytest.raises(MetricsError, match="ignore_index=-100"):
        computed(MulticlassAccuracy(4), (SCORES, TOKENS), rows=2)


@pytest.mark.parametrize(
    "value", [[torch.tensor(1.0)], "text", None, torch.zeros(1001)], ids=lambda v: type(v).__name__
)
def test_a_result_that_is_no_number_is_told(value):
    with pytest.raises(MetricsError, match="metrics=: m returned"):
        numbers_of("m", value)


def test_a_curve_is_no_number():
    with pytest.raises(MetricsError, match="MulticlassROC returned a tuple"):
        computed(MulticlassROC(2, thresholds=3))


def test_numbers_of_every_kind():
    assert numbers_of("m", 3) == {"m": 3}
    assert numbers_of("m", np.float32(0.5)) == {"m": 0.5}
    assert numbers_of("m", np.array([1.0, 2.0])) == {"m_0": 1.0, "m_1": 2.0}
    assert numbers_of("m", torch.tensor([4])) == {"m": 4}


def test_one_name_for_two_numbers_is_refused():
    assert join_metrics({"f1": 1}, {"acc": 2}, prefix="eval") == {"f1": 1, "acc": 2}
    for running_name in ("f1", "eval_f1", "loss", "runtime"):
        with pytest.raises(MetricsError, match=f"metrics= has {running_name}, a name"):
            join_metrics({"eval_f1": 1}, {running_name: 2}, prefix="eval")


# In an evaluation.


def test_only_losses_are_collected():
    metrics = RunningMetrics(MeanMetric())
    found = evaluation(running=RunningMetrics(Seen()), keeps_logits=True)
    assert run(found)[0] == {"eval_Seen": 5, "eval_loss": 1.75}
    assert found.collected.predictions is found.collected.label_ids is found.collected.losses is None
    assert metrics.compute(is_trial=True) == {}


def test_a_prediction_keeps_its_logits():
    found = evaluation(running=RunningMetrics(Seen()), keeps_logits=True, is_prediction=True)
    assert run(found)[0]["eval_Seen"] == 5
    assert found.collected.predictions.shape == (5, 1)


def test_labels_are_needed_but_in_predictions():
    batches = [{"x": batch["x"]} for batch in BATCHES]
    with pytest.raises(MetricsError, match="the set 'eval' has not all of labels"):
        evaluation(running=RunningMetrics(Seen()), keeps_logits=True).add(batches[0])
    found = evaluation(running=RunningMetrics(Seen()), keeps_logits=True, is_prediction=True)
    assert run(found, batches)[0] == {}


def test_a_rehearsal_tells_names_and_leaves_nothing_behind():
    metrics = RunningMetrics({"r2": Seen()})
    names = evaluation(running=metrics, keeps_logits=True).sanity_check(BATCHES)
    assert "eval_r2" in names
    assert run(evaluation(running=metrics, keeps_logits=True))[0]["eval_r2"] == 5


def test_a_rehearsal_tells_of_a_metric_that_does_not_fit():
    with pytest.raises(MetricsError, match="does not take"):
        evaluation(running=RunningMetrics(Perplexity()), keeps_logits=True).sanity_check(BATCHES)


# What is private.


def test_private_names_of_torchmetrics():
    metric = RetrievalMAP()
    assert set(metric._reductions.values()) == {None}, (
        "Metric._reductions no longer tells how states are joined"
    )
    assert MulticlassROC(2)._reductions["preds"] is dim_zero_cat
    assert type(metric)._sync_dist is Metric._sync_dist

"""From predictions to the metrics of a row."""

import math

import numpy as np
import pytest
import torch

from hfbridge.errors import MetricsError
from hfbridge.evaluation.gather import Collected
from hfbridge.evaluation.metrics import checked_metrics, mean_loss, metrics_of, rehearse, speed_of

ROWS = np.ones((3, 2), np.float32)
LABELS = np.array([0, 1, 1])


def collected(losses=(1.0, 2.0), weights=(2, 1), predictions=ROWS, labels=LABELS):
    return Collected(
        predictions,
        labels,
        None if losses is None else np.array(losses, np.float32),
        None if losses is None else np.array(weights, np.int64),
    )


def compute(compute_metrics, given=None, *, by_rows=False, drop_non_finite=True, prefix="eval"):
    return metrics_of(
        given or collected(),
        prefix=prefix,
        compute_metrics=compute_metrics,
        by_rows=by_rows,
        drop_non_finite=drop_non_finite,
    )


def test_names_get_the_prefix_unless_they_have_it():
    metrics = compute(lambda p: {"f1": 0.5, "eval_seen": 1, "evaluated": 2})
    assert {k: v for k, v in metrics.items() if k != "eval_loss"} == {
        "eval_f1": 0.5,
        "eval_seen": 1,
        "eval_evaluated": 2,
    }


def test_another_prefix():
    assert set(compute(lambda p: {"f1": 1}, prefix="test")) == {"test_f1", "test_loss"}


def test_the_function_gets_predictions_and_labels():
    seen = []
    compute(lambda p: seen.append(p) or {})
    assert seen[0].predictions is ROWS
    assert seen[0].label_ids is LABELS


@pytest.mark.parametrize("missing", [{"predictions": None}, {"labels": None}])
def test_without_predictions_or_labels_it_is_not_called(missing):
    assert set(compute(lambda p: 1 / 0, collected(**missing))) == {"eval_loss"}


def test_numbers_of_numpy_and_torch_become_python_numbers():
    metrics = compute(lambda p: {"a": np.float64(0.5), "b": torch.tensor(2.0), "c": np.array([1.0, 2.0])})
    assert type(metrics["eval_a"]) is float
    assert type(metrics["eval_b"]) is float
    assert isinstance(metrics["eval_c"], np.ndarray)


def test_a_metric_called_loss_gives_way_as_in_native():
    # native computes metrics first and then sets eval_loss, so an "eval_loss" of the function is overwritten
    metrics = compute(lambda p: {"eval_loss": 99.0})
    assert metrics["eval_loss"] == pytest.approx(4 / 3)


def test_the_users_dict_is_left_alone():
    mine = {"f1": 0.5}
    compute(lambda p: mine)
    assert mine == {"f1": 0.5}


def test_without_labels_there_is_no_loss():
    assert compute(None, collected(losses=None)) == {}


@pytest.mark.parametrize("returned", [0.9, None, [("a", 1)], {1: 0.5}, {("a",): 1}, np.float64(1)])
def test_anything_but_a_dict_of_names_is_refused(returned):
    def accuracy(prediction):
        return returned

    with pytest.raises(MetricsError) as caught:
        compute(accuracy)
    for part in ("accuracy", repr(returned), "must return a dict", '{"accuracy": 0.91}'):
        assert part in str(caught.value)


def test_a_callable_object_is_named_too():
    class Metric:
        def __call__(self, prediction):
            return None

    with pytest.raises(MetricsError, match="Metric"):
        checked_metrics(None, Metric())


def test_the_rehearsal_reports_what_is_returned_and_not_what_is_raised():
    def raising(prediction):
        raise ValueError("needs two classes")

    rehearse(raising, ROWS, LABELS)
    rehearse(lambda p: {"a": 1}, ROWS, LABELS)
    with pytest.raises(MetricsError):
        rehearse(lambda p: 0.5, ROWS, LABELS)


# The mean loss.


def test_by_rows_is_natives_repeat_and_mean():
    losses = np.array([0.1, 0.2, 0.7], np.float32)
    given = collected(losses, (4, 4, 3))
    theirs = (
        np.concatenate([np.repeat(loss, n) for loss, n in zip(losses, (4, 4, 3), strict=True)]).mean().item()
    )
    assert mean_loss(given, by_rows=True, drop_non_finite=True) == theirs


def test_by_items_is_the_weighted_mean_in_float64():
    losses, weights = np.array([0.1, 0.2, 0.7], np.float32), (40, 1, 7)
    exact = sum(float(loss) * n for loss, n in zip(losses, weights, strict=True)) / 48
    assert mean_loss(collected(losses, weights), by_rows=False, drop_non_finite=True) == pytest.approx(
        exact, abs=1e-15
    )


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_left_out(by_rows, bad):
    given = collected((1.0, bad, 3.0), (1, 5, 1))
    assert mean_loss(given, by_rows=by_rows, drop_non_finite=True) == 2.0
    kept = mean_loss(given, by_rows=by_rows, drop_non_finite=False)
    assert not math.isfinite(kept)


@pytest.mark.parametrize("by_rows", [True, False])
def test_if_none_is_finite_the_mean_is_not_either(by_rows):
    given = collected((math.nan, math.nan), (1, 2))
    assert math.isnan(mean_loss(given, by_rows=by_rows, drop_non_finite=True))


def test_a_set_without_items_has_loss_zero():
    assert mean_loss(collected((0.0, 0.0), (0, 0)), by_rows=False, drop_non_finite=True) == 0.0


def test_speed_has_the_native_names():
    assert set(speed_of("eval", start_s=0.0, samples=3, batches=2)) == {
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
    }

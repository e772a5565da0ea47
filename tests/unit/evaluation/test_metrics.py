"""From predictions to the metrics of a row."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hfbridge.errors import MetricsError
from hfbridge.evaluation.collector import Collected
from hfbridge.evaluation.metrics import (
    check_called_by_batch,
    check_is_computed,
    checked_logits,
    checked_metrics,
    mean_loss,
    name_metrics,
    prediction_of,
    speed_of,
)

ROWS = np.ones((3, 2), np.float32)
LABELS = np.array([0, 1, 1])


def collected(losses=(1.0, 2.0), weights=(2, 1), *, weight_by_sample=False):
    """Make what was collected; its items are its rows."""
    counts = np.array(weights, np.int64)
    means = None if losses is None else np.array(losses, np.float32)
    repeated = None if means is None else np.repeat(means, counts)
    return Collected(ROWS, LABELS, ROWS[:, :1], repeated, None if weight_by_sample else means, counts)


def name(computed, *, prefix="eval", loss=1.5, preparation_s=None):
    return name_metrics(computed, prefix=prefix, loss=loss, preparation_s=preparation_s)


def test_names_get_the_prefix_unless_they_have_it():
    assert name({"f1": 0.5, "eval_seen": 1, "evaluated": 2}, loss=None) == {
        "eval_f1": 0.5,
        "eval_seen": 1,
        "eval_evaluated": 2,
    }


def test_another_prefix():
    assert set(name({"f1": 1}, prefix="test")) == {"test_f1", "test_loss"}


def test_the_native_order_is_kept():
    found = name({"f1": 1, "eval_seen": 2}, preparation_s=0.12345)
    assert list(found) == ["eval_seen", "eval_loss", "eval_model_preparation_time", "eval_f1"]
    assert found["eval_model_preparation_time"] == 0.1235


@pytest.mark.parametrize("includes", [(), ("inputs",), ("loss",), ("inputs", "loss")])
def test_the_function_gets_what_is_asked_for(includes):
    given = prediction_of(collected(), includes=includes)
    assert given.predictions is ROWS
    assert given.label_ids is LABELS
    assert (given.inputs is None) == ("inputs" not in includes)
    assert given.losses is None if "loss" not in includes else given.losses.tolist() == [1, 1, 2]
    assert len(list(given)) == 2 + len(includes)


def test_numbers_of_numpy_and_torch_become_python_numbers():
    metrics = name({"a": np.float64(0.5), "b": torch.tensor(2.0), "c": np.array([1.0, 2.0])})
    assert type(metrics["eval_a"]) is float
    assert type(metrics["eval_b"]) is float
    assert isinstance(metrics["eval_c"], np.ndarray)


def test_a_metric_called_loss_gives_way_as_in_native():
    # native computes metrics first and then sets eval_loss, so an "eval_loss" of the function is overwritten
    assert name({"eval_loss": 99.0})["eval_loss"] == 1.5


def test_the_users_dict_is_left_alone():
    mine = {"f1": 0.5}
    name(mine)
    assert mine == {"f1": 0.5}


@pytest.mark.parametrize("returned", [0.9, None, [("a", 1)], {1: 0.5}, {("a",): 1}, np.float64(1)])
def test_anything_but_a_dict_of_names_is_refused(returned):
    def accuracy(prediction):
        return returned

    with pytest.raises(MetricsError) as caught:
        checked_metrics(returned, accuracy)
    for part in ("accuracy", repr(returned), "must return a dict", '{"accuracy": 0.91}'):
        assert part in str(caught.value)


def test_a_callable_object_is_named_too():
    class Metric:
        def __call__(self, prediction):
            return None

    with pytest.raises(MetricsError, match="Metric"):
        checked_metrics(None, Metric())


def test_logits_may_become_anything_but_nothing():
    assert checked_logits((), len) == ()
    with pytest.raises(MetricsError, match=r"preprocess_logits_for_metrics \(len\) returned None"):
        checked_logits(None, len)


@pytest.mark.parametrize(
    "function", [lambda p, compute_result: {}, lambda p, *, compute_result=False: {}], ids=["plain", "named"]
)
def test_a_function_that_can_be_called_by_batch(function):
    check_called_by_batch(function)


def test_one_that_cannot():
    def accuracy(prediction, **options):
        return {}

    with pytest.raises(MetricsError, match=r"accuracy\) takes prediction, options\. It must take"):
        check_called_by_batch(accuracy)


@pytest.mark.parametrize("wanted", ["f1", "eval_f1"])
def test_a_metric_may_be_named_without_its_prefix(wanted):
    check_is_computed(wanted, ["eval_loss", "eval_f1"])


def test_a_metric_that_is_not_there():
    with pytest.raises(MetricsError, match=r"metric_for_best_model='f2'.* which has eval_f1, eval_loss"):
        check_is_computed("f2", ["eval_loss", "eval_f1"])


# The mean loss.


@pytest.mark.parametrize("joined", [True, False])
def test_by_rows_is_natives_repeat_and_mean(joined):
    losses, parts = np.array([0.1, 0.2, 0.7], np.float32), (4, 4, 3)
    repeated = [np.repeat(loss, n) for loss, n in zip(losses, parts, strict=True)]
    theirs = np.concatenate(repeated).mean().item()
    given = collected(losses, parts, weight_by_sample=True)
    if not joined:
        given = replace(given, losses=repeated)
    assert mean_loss(given, drop_non_finite=True) == theirs


def test_by_items_is_the_weighted_mean_in_float64():
    losses, weights = np.array([0.1, 0.2, 0.7], np.float32), (40, 1, 7)
    exact = sum(float(loss) * n for loss, n in zip(losses, weights, strict=True)) / 48
    assert mean_loss(collected(losses, weights), drop_non_finite=True) == pytest.approx(exact, abs=1e-15)


@pytest.mark.parametrize("weight_by_sample", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_left_out(weight_by_sample, bad):
    given = collected((1.0, bad, 3.0), (1, 5, 1), weight_by_sample=weight_by_sample)
    assert mean_loss(given, drop_non_finite=True) == 2.0
    assert not math.isfinite(mean_loss(given, drop_non_finite=False))


@pytest.mark.parametrize("weight_by_sample", [True, False])
def test_if_none_is_finite_the_mean_is_not_either(weight_by_sample):
    given = collected((math.nan, math.nan), (1, 2), weight_by_sample=weight_by_sample)
    assert math.isnan(mean_loss(given, drop_non_finite=True))


def test_a_set_without_items_has_loss_zero():
    assert mean_loss(collected((0.0, 0.0), (0, 0)), drop_non_finite=True) == 0.0


def test_without_losses_there_is_no_mean():
    assert mean_loss(collected(losses=None), drop_non_finite=True) is None


def test_losses_of_one_round_of_objects_cannot_be_joined():
    scalars = [np.float32(1.0).reshape(()), np.float32(2.0).reshape(())]
    given = replace(collected(weight_by_sample=True), losses=scalars)
    with pytest.raises(MetricsError, match=r"eval_use_gather_object=True does not support .* single round"):
        mean_loss(given, drop_non_finite=True)


def test_speed_has_the_native_names():
    assert set(speed_of("eval", start_s=0.0, samples=3, batches=2)) == {
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
    }

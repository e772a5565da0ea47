"""An evaluation from its first batch to its metrics."""

import pytest
import torch
from torch import nn

from hfbridge.errors import MetricsError
from hfbridge.evaluation.run import Evaluation


class Echo(nn.Module):
    """Returns the batch's own numbers as its loss and logits."""

    def forward(self, x, labels=None):
        return {"loss": x.mean(), "logits": x}


def loss_of(model, batch):
    outputs = model(**batch)
    return outputs["loss"], outputs, int((batch["labels"] != -100).sum())


def evaluation(**changed):
    values = {
        "model": Echo(),
        "loss_of": loss_of,
        "label_names": ["labels"],
        "has_own_loss": False,
        "compute_metrics": None,
        "keeps_logits": False,
        "rows_per_batch": None,
        "move_every": None,
        "drop_non_finite": True,
    }
    return Evaluation(**{**values, **changed})


BATCHES = [
    {"x": torch.full((3, 1), 1.0), "labels": torch.tensor([0, 1, 1])},
    {"x": torch.full((2, 1), 4.0), "labels": torch.tensor([-100, 1])},
]


def run(found, batches=BATCHES, samples=5):
    for index, batch in enumerate(batches):
        found.add(batch, index=index, samples=samples)
    return found.finish("eval", samples=samples, batches=len(batches))


def test_exact_weighs_by_items():
    assert run(evaluation())[0] == {"eval_loss": (3 * 1 + 1 * 4) / 4}


def test_native_weighs_by_rows_and_knows_the_short_last_batch():
    assert run(evaluation(rows_per_batch=3))[0] == {"eval_loss": pytest.approx((3 * 1 + 2 * 4) / 5)}


def test_metrics_get_what_was_collected_and_speed_is_apart():
    seen = []
    metrics, speed = run(evaluation(compute_metrics=lambda p: seen.append(p) or {"n": 5}, keeps_logits=True))
    assert metrics["eval_n"] == 5
    assert seen[0].predictions.shape == (5, 1)
    assert seen[0].label_ids.tolist() == [0, 1, 1, -100, 1]
    assert set(speed) == {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def test_only_the_loss_is_kept_for_nobody():
    assert set(run(evaluation(compute_metrics=lambda p: 1 / 0, keeps_logits=False))[0]) == {"eval_loss"}


def test_a_rehearsal_reports_what_is_no_dict():
    with pytest.raises(MetricsError):
        evaluation(compute_metrics=lambda p: 0.5, keeps_logits=True).rehearse(BATCHES[0])


def test_a_rehearsal_without_labels_calls_nothing():
    unlabelled = {"x": torch.ones(2, 1)}
    evaluation(compute_metrics=lambda p: 1 / 0, keeps_logits=True).rehearse(unlabelled)


def test_a_rehearsal_of_losses_alone_calls_nothing():
    evaluation(compute_metrics=lambda p: 0.5, keeps_logits=False).rehearse(BATCHES[0])

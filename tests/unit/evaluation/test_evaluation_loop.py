"""An evaluation from its first batch to its metrics."""

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from hfbridge.errors import MetricsError
from hfbridge.evaluation.collector import EvalSet
from hfbridge.evaluation.evaluation_loop import EvalOptions, Evaluation


class Echo(nn.Module):
    """Returns the batch's own numbers as its loss and logits."""

    main_input_name = "x"

    def forward(self, x, labels=None):
        return {"loss": x.mean(), "logits": x}


def loss_of(model, batch):
    outputs = model(**batch)
    return outputs["loss"], outputs, int((batch["labels"] != -100).sum())


def evaluation(*, of=None, **changed):
    options = {name: changed.pop(name) for name in list(changed) if name in EvalOptions.__annotations__}
    values = {
        "model": Echo(),
        "of": of or EvalSet("eval", samples=5, batches=2, batch_size=3),
        "options": EvalOptions(**{"weight_by_sample": False, **options}),
        "loss_of": loss_of,
        "label_names": ["labels"],
        "has_own_loss": False,
        "compute_metrics": None,
        "preprocess_logits": None,
        "keeps_logits": "compute_metrics" in changed,
    }
    return Evaluation(**{**values, **changed})


BATCHES = [
    {"x": torch.full((3, 1), 1.0), "labels": torch.tensor([0, 1, 1])},
    {"x": torch.full((2, 1), 4.0), "labels": torch.tensor([-100, 1])},
]


def run(found, batches=BATCHES):
    for batch in batches:
        found.add(batch)
        found.close_batch()
    assert found.is_done
    return found.finish()


def test_exact_weighs_by_items():
    assert run(evaluation())[0] == {"eval_loss": (3 * 1 + 1 * 4) / 4}


def test_native_weighs_by_rows_and_knows_the_short_last_batch():
    assert run(evaluation(weight_by_sample=True))[0] == {"eval_loss": pytest.approx((3 * 1 + 2 * 4) / 5)}


def test_metrics_get_what_was_collected_and_speed_is_apart():
    seen = []
    metrics, speed = run(evaluation(compute_metrics=lambda p: seen.append(p) or {"n": 5}))
    assert metrics["eval_n"] == 5
    assert seen[0].predictions.shape == (5, 1)
    assert seen[0].label_ids.tolist() == [0, 1, 1, -100, 1]
    assert set(speed) == {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def test_only_the_loss_is_kept_for_nobody():
    assert set(run(evaluation(compute_metrics=lambda p: 1 / 0, keeps_logits=False))[0]) == {"eval_loss"}


@pytest.mark.parametrize("joins", [True, False])
def test_inputs_and_losses_are_given_on_request(joins):
    seen = []
    run(evaluation(compute_metrics=lambda p: seen.append(p) or {}, includes={"inputs", "loss"}, joins=joins))
    (given,) = seen
    losses = [part.tolist() for part in given.losses] if not joins else given.losses.tolist()
    assert losses == ([1, 1, 1, 4, 4] if joins else [[1, 1, 1], [4, 4]])
    assert len(given.inputs) == (5 if joins else 2)


def test_by_batch_the_function_gets_tensors_and_is_told_the_last():
    seen = []

    def note(prediction, compute_result):
        seen.append((prediction, compute_result))
        return {"n": 1} if compute_result else None

    found = evaluation(compute_metrics=note, by_batch=True, includes={"inputs", "loss"})
    assert run(found)[0] == {"eval_n": 1, "eval_loss": 1.75}
    assert [flag for _, flag in seen] == [False, True]
    first = seen[0][0]
    assert isinstance(first.predictions, torch.Tensor)
    assert first.inputs is BATCHES[0]
    assert first.losses.tolist() == [1, 1, 1]
    assert found.collected.predictions is None


def test_by_batch_a_prediction_keeps_its_logits():
    found = evaluation(compute_metrics=lambda p, compute_result: {}, by_batch=True, is_prediction=True)
    metrics, speed = run(found)
    assert found.output({**metrics, **speed}).predictions.shape == (5, 1)


def test_by_batch_only_the_last_result_counts():
    run(evaluation(compute_metrics=lambda p, compute_result: {} if compute_result else 0.5, by_batch=True))
    with pytest.raises(MetricsError):
        run(evaluation(compute_metrics=lambda p, compute_result: 0.5, by_batch=True))


def test_logits_are_preprocessed_and_the_models_are_returned():
    seen = []
    found = evaluation(
        compute_metrics=lambda p: seen.append(p) or {},
        preprocess_logits=lambda logits, labels: logits[:, 0] + 1,
    )
    assert found.add(BATCHES[0]).shape == (3, 1)
    found.add(BATCHES[1])
    found.finish()
    assert seen[0].predictions.tolist() == [2, 2, 2, 5, 5]


def test_without_logits_there_is_nothing_to_return():
    assert evaluation().add(BATCHES[0]) == ()


def test_a_rehearsal_reports_what_is_no_dict():
    with pytest.raises(MetricsError):
        evaluation(compute_metrics=lambda p: 0.5).sanity_check(BATCHES)


def test_a_rehearsal_reports_what_forgets_the_logits():
    with pytest.raises(MetricsError, match="returned None"):
        evaluation(compute_metrics=lambda p: {}, preprocess_logits=lambda *given: None).sanity_check(BATCHES)


def test_a_rehearsal_tells_the_names():
    named = {"eval_loss", "eval_f1", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    assert evaluation(compute_metrics=lambda p: {"f1": 1}).sanity_check(BATCHES) == named


def test_a_rehearsal_of_what_needs_more_rows_tells_nothing():
    assert evaluation(compute_metrics=lambda p: 1 / 0).sanity_check(BATCHES) is None


def test_a_rehearsal_does_not_call_what_keeps_its_batches():
    asked = evaluation(compute_metrics=lambda p, compute_result: 1 / 0, by_batch=True)
    assert asked.sanity_check(BATCHES) is None


def test_a_rehearsal_without_labels_calls_nothing():
    unlabelled = [{"x": torch.ones(2, 1)}]
    assert "eval_loss" not in evaluation(compute_metrics=lambda p: 1 / 0).sanity_check(unlabelled)


def test_a_rehearsal_of_losses_alone_calls_nothing():
    evaluation(compute_metrics=lambda p: 0.5, keeps_logits=False).sanity_check(BATCHES)


@pytest.mark.parametrize("is_first", [True, False])
def test_options_are_those_of_the_settings(is_first):
    args = TrainingArguments(
        output_dir="out",
        use_cpu=True,
        eval_use_gather_object=True,
        eval_accumulation_steps=3,
        eval_do_concat_batches=False,
        batch_eval_metrics=True,
        include_for_metrics=["loss"],
        logging_nan_inf_filter=False,
    )
    found = EvalOptions.of(args, weight_by_sample=True, is_first=is_first)
    assert found == EvalOptions(True, False, 3, False, True, frozenset({"loss"}), is_first)

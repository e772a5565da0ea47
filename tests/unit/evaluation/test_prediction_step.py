"""One evaluation batch, against the native prediction_step."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from hfbridge.evaluation.prediction_step import cast_for_evaluation, logits_in, predict_batch
from hfbridge.losses.item_counts import read_traits
from hfbridge.losses.step_loss import NativeLoss
from hfbridge.models.signature import label_names_of
from tests.tiny import PadRows, make_model, make_rows


def batch_of(kind, count=3):
    return PadRows()(make_rows(kind, count))


def predict(model, batch, *, keeps_logits=True, label_names=None, has_own_loss=False):
    return predict_batch(
        model,
        batch,
        loss_of=NativeLoss(read_traits(model)).evaluate,
        label_names=label_names_of(model) if label_names is None else label_names,
        has_own_loss=has_own_loss,
        keeps_logits=keeps_logits,
    )


def flat(value):
    return list(value) if isinstance(value, tuple | list) else [value]


def same(ours, theirs):
    return all(torch.equal(one, other) for one, other in zip(flat(ours), flat(theirs), strict=True))


@pytest.mark.parametrize("kind", ["distilbert", "llama", "gpt2", "bert-qa", "bert-token", "bert-regression"])
@pytest.mark.parametrize("keeps_logits", [True, False])
def test_it_is_the_native_prediction_step(kind, keeps_logits, tmp_path):
    model, batch = make_model(kind).eval(), batch_of(kind)
    native = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    loss, logits, labels = native.prediction_step(model, dict(batch), prediction_loss_only=not keeps_logits)
    seen = predict(model, batch, keeps_logits=keeps_logits)
    assert torch.equal(seen.loss, loss)
    assert type(seen.logits) is type(logits)
    assert type(seen.labels) is type(labels)
    if keeps_logits:
        assert same(seen.logits, logits)
        assert same(seen.labels, labels)


def test_nothing_keeps_a_graph():
    seen = predict(make_model("distilbert"), batch_of("distilbert"))
    assert not seen.loss.requires_grad
    assert not seen.logits.requires_grad


def test_without_labels_there_is_no_loss_but_logits():
    batch = batch_of("distilbert")
    del batch["labels"]
    seen = predict(make_model("distilbert"), batch)
    assert (seen.loss, seen.weight, seen.labels) == (None, 0, None)
    assert seen.logits.shape == (3, 2)


def test_all_label_names_must_be_there():
    batch = batch_of("bert-qa")
    del batch["end_positions"]
    assert predict(make_model("bert-qa").eval(), batch).loss is None


class OwnLoss(nn.Module):
    def forward(self, x, return_loss=True, **kwargs):
        return {"loss": x.sum(), "similarity": x * 2}


@pytest.mark.parametrize("has_own_loss", [True, False])
def test_a_model_may_have_a_loss_without_labels(has_own_loss):
    model = OwnLoss()
    model.p = nn.Parameter(torch.zeros(1))
    seen = predict(model, {"x": torch.ones(2)}, label_names=[], has_own_loss=has_own_loss)
    assert (seen.loss is not None) == has_own_loss


# What counts as logits.


class Configured(nn.Module):
    class config:
        keys_to_ignore_at_inference = ("cache",)


ONE, TWO = torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize(
    ("outputs", "model", "has_loss", "expected"),
    [
        ({"loss": ONE, "logits": TWO}, nn.Identity(), True, TWO),
        ({"logits": TWO, "hidden": ONE}, nn.Identity(), False, (TWO, ONE)),
        ({"loss": ONE, "logits": TWO}, nn.Identity(), False, (ONE, TWO)),
        ({"loss": ONE, "cache": ONE, "logits": TWO}, Configured(), True, TWO),
        ((ONE, TWO), nn.Identity(), True, TWO),
        ((ONE, TWO), nn.Identity(), False, (ONE, TWO)),
        ((TWO,), nn.Identity(), False, TWO),
    ],
)
def test_logits_are_what_is_neither_loss_nor_cache(outputs, model, has_loss, expected):
    found = logits_in(outputs, model, has_loss=has_loss)
    assert type(found) is type(expected)
    assert same(found, expected)


def test_a_models_cache_is_left_out():
    model = make_model("llama").eval()
    with torch.no_grad():
        outputs = model(**batch_of("llama"), use_cache=True)
    assert outputs.past_key_values is not None
    assert isinstance(logits_in(outputs, model, has_loss=True), torch.Tensor)


def test_a_loss_that_is_none_is_no_logit():
    outputs = SequenceClassifierOutput(loss=None, logits=TWO)
    assert torch.equal(logits_in(outputs, nn.Identity(), has_loss=False), TWO)


@pytest.mark.parametrize("asked", [True, False])
def test_a_batch_may_say_whether_there_is_a_loss(asked):
    model = OwnLoss()
    seen = predict(model, {"x": torch.ones(2), "return_loss": asked}, label_names=[], has_own_loss=not asked)
    assert (seen.loss is not None) == asked


@pytest.mark.parametrize(
    ("flag", "dtype"),
    [("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16), (None, torch.float32)],
)
def test_weights_are_cast(flag, dtype):
    model = nn.Linear(1, 1)
    cast_for_evaluation(
        model, TrainingArguments(output_dir="out", use_cpu=True, **({} if flag is None else {flag: True}))
    )
    assert model.weight.dtype == dtype

"""The two normalisations, formula by formula, on a model small enough to compute by hand."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hfbridge.errors import ModelError
from hfbridge.losses.criterion import loss_in
from hfbridge.losses.item_counts import read_traits
from hfbridge.losses.step_loss import ExactLoss, NativeLoss, scale_for_accumulation
from hfbridge.models.probing import device_of

CPU = torch.device("cpu")


class Stub(nn.Module):
    """Two classes from two features; `divides` says what it does with the number of items."""

    divides = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(2, 2)

    def forward(self, x, labels=None, num_items_in_batch=None, **kwargs):
        logits = self.linear(x)
        if labels is None:
            return {"logits": logits}
        if self.divides and num_items_in_batch is not None:
            loss = cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        else:
            loss = cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Dividing(Stub):
    divides = True


class Deaf(Stub):
    """Does not take the number at all."""

    def forward(self, x, labels=None):
        return super().forward(x, labels)


def batch(*labels, seed=0):
    x = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(seed + len(labels)))
    return {"x": x, "labels": torch.tensor(labels)}


WINDOW = [batch(0, 1, 1), batch(0, -100, -100, seed=5), batch(1, 0, seed=9)]


def shares(loss, model, window=WINDOW):
    items = loss.count(window, CPU)
    return [loss.train(model, inputs, items, i, len(window)) for i, inputs in enumerate(window)]


def means(model, window=WINDOW):
    return [model(**inputs)["loss"] for inputs in window]


def sums(model, window=WINDOW):
    return [cross_entropy(model.linear(b["x"]), b["labels"], reduction="sum") for b in window]


def native_of(model):
    return NativeLoss(read_traits(model))


def exact_of(model):
    return ExactLoss(read_traits(model), divides=model.divides)


def test_native_a_dividing_model_is_given_the_windows_items():
    model = Dividing()
    expected = [total / torch.tensor(6.0) for total in sums(model)]
    assert all(map(torch.equal, shares(native_of(model), model), expected))


def test_native_a_model_that_ignores_the_number_sums_its_means():
    model = Stub()
    assert all(map(torch.equal, shares(native_of(model), model), means(model)))


def test_native_a_model_that_does_not_take_the_number_averages_its_means():
    model = Deaf()
    assert all(map(torch.equal, shares(native_of(model), model), [loss / 3 for loss in means(model)]))


@pytest.mark.parametrize("kind", [Stub, Dividing, Deaf])
def test_exact_is_the_mean_over_all_items_for_every_kind(kind):
    model = kind()
    mean = sum(sums(model)) / 6
    torch.testing.assert_close(sum(shares(exact_of(model), model)), mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [Stub, Deaf])
def test_exact_leaves_a_window_of_one_micro_batch_to_the_model(kind):
    model = kind()
    window = [batch(0, 1, 1)]
    assert torch.equal(shares(exact_of(model), model, window)[0], means(model, window)[0])


@pytest.mark.parametrize("kind", [Stub, Dividing, Deaf])
def test_exact_a_micro_batch_without_items_gives_zero_and_zero_gradients(kind):
    model = kind()
    window = [batch(0, 1), batch(-100, -100)]
    loss = shares(exact_of(model), model, window)[1]
    assert loss.item() == 0.0
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(grad is not None and torch.equal(grad, torch.zeros_like(grad)) for grad in gradients)


@pytest.mark.parametrize("kind", [Stub, Dividing, Deaf])
def test_exact_a_window_without_any_items_gives_zero(kind):
    model = kind()
    window = [batch(-100, -100), batch(-100)]
    total = sum(shares(exact_of(model), model, window))
    total.backward()
    assert total.item() == 0.0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_exact_evaluation_is_the_mean_over_items():
    for model in (Stub(), Dividing(), Deaf()):
        loss, outputs, items = exact_of(model).evaluate(model, WINDOW[1])
        assert items == 1
        torch.testing.assert_close(loss, sums(model)[1])
        assert "logits" in outputs


def test_exact_evaluation_of_a_batch_without_items_is_zero():
    model = Stub()
    loss, _, items = exact_of(model).evaluate(model, batch(-100, -100))
    assert (loss.item(), items) == (0.0, 0)


def test_native_evaluation_gives_the_batchs_own_items():
    model = Dividing()
    loss, _, items = native_of(model).evaluate(model, WINDOW[0])
    assert items == 3
    assert torch.equal(loss, sums(model)[0] / 3)


def test_native_evaluation_without_labels_counts_nothing():
    model = Dividing()
    traits = dataclasses.replace(read_traits(model), takes_items=True)

    class Always(Dividing):
        def forward(self, x, **kwargs):
            return {"loss": x.sum(), "logits": x}

    _, _, items = NativeLoss(traits).evaluate(Always(), {"x": torch.ones(2, 2)})
    assert items == 0


def test_a_loss_is_taken_by_name_or_as_the_first_output():
    loss = torch.tensor(1.0)
    assert loss_in({"logits": 0, "loss": loss}, {}, Stub()) is loss
    assert loss_in((loss, 0), {}, Stub()) is loss


@pytest.mark.parametrize(
    ("outputs", "got"),
    [({"logits": torch.ones(1)}, "only logits"), ({"loss": None}, "loss"), ((None,), "tuple")],
)
def test_no_loss_is_an_error_that_names_model_outputs_and_inputs(outputs, got):
    with pytest.raises(ModelError) as caught:
        loss_in(outputs, {"x": 1, "mask": 2}, Stub())
    for part in ("Stub returned no loss", got, "given x, mask", "'labels' column"):
        assert part in str(caught.value)


def test_a_loss_of_none_is_not_listed_as_an_output():
    with pytest.raises(ModelError) as caught:
        loss_in({"loss": None, "logits": torch.ones(1)}, {"x": 1}, Stub())
    assert "only logits" in str(caught.value)


def test_the_models_own_error_is_not_replaced():
    class Failing(Stub):
        def forward(self, **inputs):
            raise RuntimeError("mine")

    model = Failing()
    with pytest.raises(RuntimeError, match="mine"):
        native_of(Stub()).evaluate(model, WINDOW[0])


def test_a_models_device_is_that_of_its_parameters():
    assert device_of(Stub()) == CPU


# Lightning's division by accumulate_grad_batches.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 65536.0, 2.0**-7, 3.0])
def test_the_gradient_after_lightnings_division_is_that_of_the_loss(dtype, scale):
    wrong = []
    for accumulation in range(1, 4097):
        weight = torch.tensor(0.7, dtype=dtype, requires_grad=True)
        divided = scale_for_accumulation(weight * 1.0, accumulation) / accumulation
        divided.backward(torch.tensor(scale, dtype=divided.dtype))
        if weight.grad.item() != scale:
            wrong.append(accumulation)
        assert divided.item() == pytest.approx(weight.item(), rel=1e-6)
    assert not wrong


def test_a_plain_product_in_float32_would_lose_digits():
    assert torch.tensor(1.0) / 41 * 41 != 1


def test_a_gradient_that_is_no_scale_keeps_its_digits():
    weight = torch.tensor(0.7, requires_grad=True)
    (scale_for_accumulation(weight * 1.0, 41) / 41).backward(torch.tensor(0.1234567))
    assert weight.grad.item() == pytest.approx(0.1234567, rel=2e-7)
    assert scale_for_accumulation(weight, 3).dtype is torch.float32


def test_a_gradient_that_overflows_stays_infinite():
    weight = torch.tensor(0.7, requires_grad=True)
    (scale_for_accumulation(weight * 1.0, 3) / 3).backward(torch.tensor(float("inf")))
    assert torch.isinf(weight.grad)

"""Autocast stands around the forward and nowhere else."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hfbridge.models.autocast import unwrap_forward, wrap_forward
from tests.tiny import PadRows, make_model, make_rows


class Spy(nn.Module):
    """Notes whether autocast is on in forward and in backward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.seen = []

    def forward(self, x):
        self.seen.append((torch.is_autocast_enabled("cpu"), self.linear(x).dtype))
        out = self.linear(x)
        if out.requires_grad:
            out.register_hook(lambda grad: self.seen.append(torch.is_autocast_enabled("cpu")))
        return {"logits": out, "nested": (out, [out])}


@pytest.fixture
def wrapped():
    model = Spy()
    wrap_forward(model, device_type="cpu", dtype=torch.bfloat16)
    return model


def test_the_forward_computes_in_bf16_and_returns_fp32(wrapped):
    outputs = wrapped(torch.ones(2, 4))
    assert wrapped.seen == [(True, torch.bfloat16)]
    assert outputs["logits"].dtype == outputs["nested"][0].dtype == torch.float32
    assert outputs["nested"][1][0].dtype == torch.float32


def test_autocast_is_off_before_after_and_in_backward(wrapped):
    loss = wrapped(torch.ones(2, 4))["logits"].sum()
    assert not torch.is_autocast_enabled("cpu")
    loss.backward()
    assert wrapped.seen[1] is False


def test_weights_and_gradients_stay_fp32(wrapped):
    before = copy.deepcopy(wrapped.linear.state_dict())
    wrapped(torch.ones(2, 4))["logits"].sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in wrapped.linear.state_dict().items())
    assert (
        {p.dtype for p in wrapped.parameters()}
        == {p.grad.dtype for p in wrapped.parameters()}
        == {torch.float32}
    )


def test_unwrapping_gives_the_class_its_forward_back(wrapped):
    unwrap_forward(wrapped)
    assert "forward" not in vars(wrapped)
    assert wrapped.forward.__func__ is Spy.forward
    wrapped(torch.ones(2, 4))
    assert wrapped.seen == [(False, torch.float32)]
    unwrap_forward(wrapped)


def test_a_forward_the_user_put_on_the_instance_comes_back():
    model = Spy()
    own = lambda x: {"logits": model.linear(x)}  # noqa: E731
    model.forward = own
    wrap_forward(model, device_type="cpu", dtype=torch.bfloat16)
    assert model(torch.ones(1, 4))["logits"].dtype == torch.float32
    unwrap_forward(model)
    assert model.forward is own


def test_wrapping_twice_and_unwrapping_once_leaves_no_autocast(wrapped):
    wrap_forward(wrapped, device_type="cpu", dtype=torch.bfloat16)
    unwrap_forward(wrapped)
    wrapped(torch.ones(2, 4))
    assert wrapped.seen == [(False, torch.float32)]


def test_an_unwrapped_model_can_be_pickled():
    model = make_model("distilbert")
    wrap_forward(model, device_type="cpu", dtype=torch.bfloat16)
    unwrap_forward(model)
    assert pickle.loads(pickle.dumps(model)).config.num_labels == 2


def test_it_is_what_accelerate_does(tmp_path):
    from accelerate import Accelerator

    ours, theirs = make_model("distilbert"), make_model("distilbert")
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(theirs)
    wrap_forward(ours, device_type="cpu", dtype=torch.bfloat16)
    batch = PadRows()(make_rows("distilbert", 3))
    left, right = (model.eval()(**batch) for model in (ours, prepared))
    assert torch.equal(left.loss, right.loss)
    assert torch.equal(left.logits, right.logits)
    assert type(left) is type(right)

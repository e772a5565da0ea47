"""What HFModule asks a strategy, where every rank holds the whole model."""

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from hfbridge.strategies import DDPStrategy, Sharing, sharing_of


@pytest.fixture
def sharing():
    return sharing_of(SingleDeviceStrategy())


def with_gradients():
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    return model


def test_clipping_returns_the_norm_from_before(sharing):
    model = with_gradients()
    assert sharing.clip(model, 1.0).item() == 5.0
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(total, torch.tensor(1.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_norm", [0.0, 50.0])
def test_gradients_stay_without_a_limit_or_below_it(sharing, max_norm):
    model = with_gradients()
    assert sharing.clip(model, max_norm).item() == 5.0
    assert model.bias.grad.item() == 4.0


def test_parameters_without_gradient_do_not_count(sharing):
    model = with_gradients()
    model.bias.grad = None
    assert sharing.clip(model, 0.0).item() == 3.0


def test_a_single_device_trains_the_model_as_it_is(sharing):
    model = nn.Linear(2, 1)
    before = dict(model.named_parameters())
    sharing.shard(model, dtype=torch.bfloat16)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert sharing.forward_through(model) is model
    with sharing.no_sync():
        assert torch.is_grad_enabled()


def test_weights_and_states_are_whole_already(sharing):
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    sharing.load_weights(other, sharing.weights(model))
    assert torch.equal(model.weight, other.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    again = torch.optim.AdamW(other.parameters(), lr=0.1)
    sharing.load_optimizer_state(other, again, sharing.optimizer_state(model, optimizer))
    assert again.param_groups[0]["lr"] == 0.5


def test_a_strategy_of_hfbridge_has_its_own():
    strategy = DDPStrategy()
    assert sharing_of(strategy) is strategy.sharing
    assert isinstance(strategy.sharing, Sharing)

"""An HFModule under the objects of Lightning's own sharding strategies, on two ranks."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from hfbridge import SettingsError
from tests.distributed.own_strategies import train, train_plain
from tests.tiny import make_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STRATEGIES = ["fsdp", "mesh", "mesh by hand", "deepspeed 2", "deepspeed 3"]
for_both = pytest.mark.parametrize("side", ["hfbridge", "lightning"])
for_each = pytest.mark.parametrize("name", STRATEGIES)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Check weights that were summed in another order, over steps at a rate of 0.5."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-6, msg=name)


@pytest.fixture(scope="session")
def by_ddp(ranks, tmp_path_factory):
    """Train by hfbridge's DDP, once for each accumulation."""
    found = {}

    def expect(accumulation=1):
        if accumulation not in found:
            folder = str(tmp_path_factory.mktemp("ddp"))
            found[accumulation] = ranks(2).run(
                run, "ddp", "hfbridge", {"folder": folder, "accumulation": accumulation}
            )[0]
        return found[accumulation]

    return expect


def run(name, side, given):
    """Call `train` on a rank."""
    return train(name, side, **given)


def why_not(side, folder, name="tensor parallel"):
    """Try to train HFModule tensor-parallel, or another module; returns the message of the error."""
    trains = partial(train_plain, accumulation=1) if name == "fsdp" else train
    with pytest.raises(SettingsError) as caught:
        trains(name, side, folder=folder)
    return str(caught.value)


@for_both
@for_each
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.long), 2])
def test_it_trains_as_under_ddp(ranks, tmp_path, by_ddp, name, side, accumulation):
    given = {"folder": str(tmp_path), "accumulation": accumulation}
    (weights, loss), (_, of_second) = ranks(2).run(run, name, side, given)
    expected, expected_loss = by_ddp(accumulation)
    assert_close(weights, expected)
    assert loss == of_second == pytest.approx(expected_loss, abs=2e-6)


@for_both
@for_each
@pytest.mark.parametrize("step", [2, pytest.param(4, marks=pytest.mark.long)])
def test_it_is_resumed_from_lightnings_own_checkpoint(ranks, tmp_path, name, side, step):
    settings = {"optim": "adamw_torch", "learning_rate": 1e-3}  # Lightning cannot read an empty state
    given = {"folder": str(tmp_path), "keeps": True, "settings": settings}
    (expected, expected_loss), _ = ranks(2).run(run, name, side, given)
    given |= {"folder": str(tmp_path / "resumed"), "ckpt_path": str(tmp_path / f"step={step}.ckpt")}
    (weights, loss), _ = ranks(2).run(run, name, side, given)
    assert_close(weights, expected)
    assert loss == pytest.approx(expected_loss, abs=2e-6)


@for_both
@pytest.mark.parametrize("name", ["fsdp", "mesh", "deepspeed 2", "deepspeed 3"])
def test_our_checkpoints_hold_whole_states(ranks, tmp_path, name, side):
    settings = {"save_strategy": "steps", "save_steps": 2}
    given = {"folder": str(tmp_path / "one"), "settings": settings}
    (expected, _), _ = ranks(2).run(run, name, side, given)
    checkpoint = tmp_path / "one" / "checkpoint-4"
    assert_close(load_file(checkpoint.parent / "checkpoint-6" / "model.safetensors"), expected)
    if name.startswith("deepspeed"):
        assert not (checkpoint / "optimizer.pt").exists()
        return
    given = {"folder": str(tmp_path / "two"), "ckpt_path": str(checkpoint)}
    (weights, _), _ = ranks(2).run(run, "ddp", side, given)
    assert_close(weights, expected)


@for_both
@pytest.mark.parametrize("name", ["fsdp", "mesh", "deepspeed 2", "deepspeed 3"])
def test_it_builds_a_named_model_and_clips(ranks, tmp_path, name, side):
    make_model("distilbert", dropout=0.0).save_pretrained(tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "settings": {"max_grad_norm": 0.05, "weight_decay": 0.1}}
    pool = ranks(2)
    (expected, expected_loss), _ = pool.run(run, "ddp", side, {**given, "folder": str(tmp_path / "one")})
    (weights, loss), _ = pool.run(run, name, side, {**given, "folder": str(tmp_path / "two")})
    assert_close(weights, expected)
    assert loss == pytest.approx(expected_loss, abs=2e-6)


@for_both
@pytest.mark.parametrize("name", ["fsdp2", "deepspeed 1", "deepspeed 2", "deepspeed 3"])
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.long), 2])
def test_ours_train_any_module_as_ddp_does(ranks, tmp_path, name, side, accumulation):
    pool = ranks(2)
    expected, _ = pool.run(train_plain, "ddp", side, str(tmp_path / "one"), accumulation)
    weights, other = pool.run(train_plain, name, side, str(tmp_path / "two"), accumulation)
    assert_close(weights, expected)
    assert_close(other, expected)


@for_both
def test_tensor_parallel_ranks_are_refused_with_what_to_pass(ranks, tmp_path, side):
    for message in ranks(2).run(why_not, side, str(tmp_path)):
        assert "ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)" in message


@pytest.mark.gpu
@for_both
@for_each
def test_it_trains_on_a_gpu(ranks, tmp_path, name, side):
    ((expected, expected_loss),) = ranks(1).run(run, "ddp", side, {"folder": str(tmp_path / "one")})
    ((weights, loss),) = ranks(1).run(run, name, side, {"folder": str(tmp_path / "two")})
    for key in expected:
        torch.testing.assert_close(weights[key], expected[key], rtol=0, atol=1e-4, msg=key)
    assert loss == pytest.approx(expected_loss, abs=1e-4)


@for_both
def test_fsdp_on_cpus_says_that_it_trains_an_hfmodule(ranks, tmp_path, side):
    for message in ranks(2).run(why_not, side, str(tmp_path), "fsdp"):
        assert message.startswith('strategy="fsdp" on CPUs trains an HFModule, and `WithMomentum` is none')

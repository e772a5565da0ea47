"""FSDP and FSDP2 on several ranks: one process's trajectory, whatever is sharded."""

import math

import pytest
import torch

from tests.distributed import sharded
from tests.tiny import make_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STRATEGIES = ["fsdp", "fsdp2"]
# Sums are taken in another order; one unit in the last place of float32 is 1.2e-7.
TOLERANCE = 2e-6


def assert_close(found, wanted):
    """Compare losses, gradient norms, and each weight by its norm."""
    assert len(found["rows"]) == len(wanted["rows"])
    for ours, theirs in zip(found["rows"], wanted["rows"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert math.isclose(ours[name], theirs[name], rel_tol=TOLERANCE), (name, ours, theirs)
    assert list(found["weights"]) == list(wanted["weights"])
    for name, tensor in wanted["weights"].items():
        distance = (found["weights"][name].double() - tensor.double()).norm()
        # No loss depends on the bias of keys: what its gradient has is rounding, and Adam makes it large.
        is_noise = name.endswith(("k_lin.bias", "key.bias", "c_attn.bias"))
        assert distance <= (1e-6 if is_noise else TOLERANCE * tensor.double().norm()), name


@pytest.mark.parametrize(
    "kind", ["distilbert", "llama", "gpt2", "t5", "bert-mlm", "bert-token", "lora-llama"]
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sharded_training_is_that_of_one_process(ranks, strategy, kind):
    wanted = ranks(1).run(sharded.train, kind, "one", 1, {})[0]
    found = ranks(2).run(sharded.train, kind, strategy, 2, {})
    assert found[0]["strategy"] == {"fsdp": "FSDPStrategy", "fsdp2": "FSDP2Strategy"}[strategy]
    assert_close(found[0], wanted)
    assert found[0]["rows"] == found[1]["rows"]


@pytest.mark.parametrize("tied", [False, True])
def test_fsdp2_reads_a_named_model_in_parts(ranks, tmp_path, tied):
    model = make_model("llama", dropout=0.0)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    model.to(torch.bfloat16).save_pretrained(
        tmp_path
    )  # to be read as float32, and not as it lies in the file
    arguments = (str(tmp_path), "AutoModelForCausalLM")
    wanted = ranks(1).run(sharded.load_named, *arguments, "one", {})[0]
    found = ranks(2).run(sharded.load_named, *arguments, "fsdp2", {})
    for name, tensor in wanted["first"].items():
        assert torch.equal(found[0]["first"][name], tensor), name
    assert_close(found[0], wanted)
    largest = model.model.embed_tokens.weight.numel()
    assert wanted["largest"] >= largest
    for of_rank in found:
        assert of_rank["largest"] <= largest / 2, of_rank["made by"]
        assert of_rank["held"] <= wanted["held"] / 2 + 16  # odd shapes
    assert all(
        of_rank["config"] == wanted["config"] and of_rank["tied"] == wanted["tied"] for of_rank in found
    )


def test_a_new_head_is_the_one_that_a_single_process_draws(ranks, tmp_path):
    make_model("distilbert").distilbert.save_pretrained(tmp_path)
    arguments = (str(tmp_path), "AutoModelForSequenceClassification")
    settings = {"eval_strategy": "no"}
    wanted = ranks(1).run(sharded.load_named, *arguments, "one", settings)[0]
    found = ranks(2).run(sharded.load_named, *arguments, "fsdp2", settings)
    for name, tensor in wanted["first"].items():
        assert torch.equal(found[0]["first"][name], tensor), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["gpt2", "lora-llama"])
def test_states_are_whole_and_any_strategy_goes_on_from_them(ranks, tmp_path, strategy, kind):
    found = ranks(2).run(sharded.save_in_the_middle, kind, strategy, tmp_path)
    one = ranks(1).run(sharded.save_in_the_middle, kind, "one", tmp_path / "one")[0]
    ours, theirs = found[0]["optimizer"], one["optimizer"]
    assert found[1]["optimizer"] == {}
    assert found[1]["state_dict"] == {}
    assert ours["param_groups"] == theirs["param_groups"]
    assert list(ours["state"]) == list(theirs["state"])
    for number, state in theirs["state"].items():
        assert [t.shape for t in ours["state"][number].values()] == [t.shape for t in state.values()]
        assert all(type(t) is torch.Tensor for t in ours["state"][number].values())
    assert found[0]["names"] == one["names"]
    assert_close(found[0], one)
    resumed = ranks(2).run(sharded.go_on, kind, strategy, tmp_path / "half.ckpt")
    assert resumed[0]["rows"] == found[0]["rows"]
    assert all(torch.equal(resumed[0]["weights"][name], t) for name, t in found[0]["weights"].items())
    crossed = ranks(1).run(sharded.go_on, kind, "one", tmp_path / "half.ckpt")[0]
    assert_close(crossed, one)
    back = ranks(2).run(sharded.go_on, kind, strategy, tmp_path / "one" / "half.ckpt")[0]
    assert_close(back, one)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapters_are_loaded_from_directories_and_files(ranks, tmp_path, strategy):
    found = ranks(2).run(sharded.load_best_and_resume, strategy, str(tmp_path))[0]
    for name, tensor in found["best"].items():  # that of the last step
        assert torch.equal(found["directory"][name], tensor), name
        assert torch.equal(found["file"][name], tensor), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "lora-llama"])
def test_sharded_models_generate_and_are_saved_whole(ranks, tmp_path, strategy, kind):
    found = ranks(2).run(sharded.generate_and_save, kind, strategy, tmp_path)
    model = sharded.read_back(kind, tmp_path)
    for rank, of_rank in enumerate(found):
        prompt = sharded.prompt_of(rank)
        for name, length in (("evaluating", 3), ("after", 4)):
            assert of_rank[name].shape[1] >= length + rank
        wanted = model.generate(**prompt, max_new_tokens=4 + 2 * rank, do_sample=False)
        assert torch.equal(of_rank["after"], wanted)
        assert torch.equal(of_rank["logits"], sharded.logits_of(model, prompt))
    assert all(torch.equal(t, found[0]["weights"][name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_runs_follow_one_another(ranks, strategy):
    found = ranks(2).run(sharded.run_after_run, strategy)
    wanted = ranks(1).run(sharded.run_after_run, "one")[0]
    for name in ("before", "after"):
        rows = torch.stack([of_rank[name] for of_rank in found], 1).flatten(0, 1)  # batches in turn
        torch.testing.assert_close(rows.flatten(0, 1), wanted[name].flatten(0, 1), rtol=1e-5, atol=1e-6)
    assert_close(found[0], wanted)
    assert found[0]["flos"] == wanted["flos"]


OPTIONS = {
    "fsdp": [
        {"reshard_after_forward": "shard_grad_op", "backward_prefetch": "backward_pre"},
        {"reshard_after_forward": "no_shard", "limit_all_gathers": "false", "sync_module_states": "false"},
        {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 500, "forward_prefetch": "true"},
        {"fsdp_transformer_layer_cls_to_wrap": "TransformerBlock", "activation_checkpointing": True},
        {"auto_wrap_policy": "NO_WRAP", "cpu_offload": True, "use_orig_params": True},
    ],
    "fsdp2": [
        {"reshard_after_forward": False, "cpu_offload": True},
        {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 500},
        {"fsdp_transformer_layer_cls_to_wrap": ["TransformerBlock"], "activation_checkpointing": "true"},
        {"auto_wrap_policy": "NO_WRAP", "cpu_ram_efficient_loading": True},
    ],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_option_leaves_the_trajectory_alone(ranks, strategy):
    settings = {"num_train_epochs": 1, "max_grad_norm": 0}
    wanted = ranks(1).run(sharded.train, "distilbert", "one", 1, settings)[0]
    found = ranks(2).run(sharded.train_with_options, "distilbert", strategy, settings, OPTIONS[strategy])
    for one in found[0]:
        assert_close(one, wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_gathers_in_bfloat16_and_trains_float32(ranks, strategy):
    wanted = ranks(1).run(sharded.train, "llama", "one", 1, {})[0]
    found = ranks(2).run(sharded.train_bf16, "llama", strategy)
    for of_rank in found:
        assert of_rank["trained"] == {torch.float32}
        assert of_rank["outputs"] == (torch.float32 if strategy == "fsdp" else torch.bfloat16)
        assert any(ours != theirs for ours, theirs in zip(of_rank["rows"], wanted["rows"], strict=True))
        for ours, theirs in zip(of_rank["rows"][:-1], wanted["rows"][:-1], strict=True):
            assert math.isclose(ours["loss"], theirs["loss"], rel_tol=2e-2)  # bfloat16 has 8 bits


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_four_ranks_share_a_model(ranks, strategy):
    wanted = ranks(1).run(sharded.train, "gpt2", "one", 1, {}, 48)[0]
    assert_close(ranks(4).run(sharded.train, "gpt2", strategy, 4, {}, 48)[0], wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_cannot_be_sharded_is_refused_on_every_rank(ranks, strategy):
    assert ranks(2).run(sharded.refusals, strategy) == [["optimizers holds", "names NoLayer"]] * 2

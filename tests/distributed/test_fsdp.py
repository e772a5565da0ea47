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


@pytest.mark.parametrize("kind", ["distilbert", "llama", "gpt2", "t5", "bert-mlm", "lora-llama"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sharded_training_is_that_of_one_process(ranks, strategy, kind):
    wanted = ranks(1).run(sharded.train, kind, "one", 1, {})[0]
    found = ranks(2).run(sharded.train, kind, strategy, 2, {})
    assert found[0]["strategy"] == {"fsdp": "FSDPStrategy", "fsdp2": "FSDP2Strategy"}[strategy]
    assert_close(found[0], wanted)
    assert found[0]["rows"] == found[1]["rows"]


@pytest.mark.parametrize("tied", [False, True])
def test_fsdp2_reads_a_named_model_in_parts(ranks, tmp_path, tied):
    model = make_model("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    arguments = (str(tmp_path), "AutoModelForCausalLM")
    wanted = ranks(1).run(sharded.load_named, *arguments, "one", {})[0]
    found = ranks(2).run(sharded.load_named, *arguments, "fsdp2", {})
    for name, tensor in wanted["first"].items():
        assert torch.equal(found[0]["first"][name], tensor), name
    assert_close(found[0], wanted)
    largest = model.model.embed_tokens.weight.numel()
    assert wanted["largest"] >= largest
    assert all(of_rank["largest"] <= largest / 2 for of_rank in found)
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

"""What a model does with num_items_in_batch is asked of the model."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from hfbridge.losses.criterion import Criterion
from hfbridge.losses.item_counts import read_traits
from hfbridge.losses.normalization import Normalization, native_factor, probe
from hfbridge.losses.step_loss import ExactLoss, NativeLoss
from tests.tiny import PadRows, make_model, make_rows

KINDS = {
    "llama": (True, True),
    "gpt2": (True, True),
    "distilbert": (False, False),
    "bert-token": (False, False),
    "bert-regression": (False, False),
    "bert-qa": (False, False),
}


def window_of(kind, sizes=(3, 2)):
    return [PadRows()(make_rows(kind, size, seed=size)) for size in sizes]


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_tells_which_models_divide(kind):
    model = make_model(kind)
    found = probe(model, window_of(kind)[0], read_traits(model))
    assert (found.divides, found.shift) == KINDS[kind]


@pytest.mark.parametrize("kind", ["llama", "distilbert"])
def test_the_probe_leaves_no_trace(kind):
    model = make_model(kind, dropout=0.5).train()
    inner = next(m for m in model.modules() if isinstance(m, nn.Dropout | nn.Embedding))
    inner.eval()
    state = torch.get_rng_state()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    probe(model, window_of(kind)[0], read_traits(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not inner.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())


def test_the_probe_leaves_the_generators_that_a_forward_draws_from():
    def draw(module, args):
        random.random()
        np.random.rand()

    model = make_model("llama")
    model.register_forward_pre_hook(draw)
    before = random.getstate(), np.random.get_state()[1].tolist()
    probe(model, window_of("llama")[0], read_traits(model))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def rows_seen(model):
    """Note how many rows each forward gets."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize(("kind", "forwards"), [("llama", 2), ("distilbert", 2), ("bert-token", 3)])
def test_a_process_alone_asks_by_few_rows_and_no_more_than_it_needs(kind, forwards):
    model = make_model(kind)
    seen = rows_seen(model)
    found = probe(model, window_of(kind, (16,))[0], read_traits(model), alone=True)
    assert (found.divides, found.shift) == KINDS[kind]
    assert seen == [2] * forwards


def test_ranks_run_the_same_forwards_whatever_each_finds():
    model = make_model("distilbert")
    seen = rows_seen(model)
    probe(model, window_of("distilbert", (16,))[0], read_traits(model))
    assert seen == [16] * 3


def test_the_rows_that_are_asked_have_items():
    model = make_model("llama")
    batch = window_of("llama", (8,))[0]
    batch["labels"][:5] = -100
    batch["labels"][6:] = -100
    found = probe(model, batch, read_traits(model), alone=True)
    assert (found.divides, found.shift) == (True, True)


@pytest.mark.parametrize("failure", [ValueError, RuntimeError])
def test_all_rows_are_asked_where_few_are_refused(failure):
    model = make_model("llama")
    seen = rows_seen(model)

    def refuse(module, args, kwargs):
        if len(kwargs["input_ids"]) < 8:
            raise failure("batches of 8 only")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert probe(model, window_of("llama", (8,))[0], read_traits(model), alone=True).divides
    assert seen == [2, 8, 8]


def test_all_rows_are_asked_where_the_loss_of_few_is_nothing():
    model = make_model("llama")
    plain = model.forward

    def forward(**inputs):
        outputs = plain(**inputs)
        if len(inputs["input_ids"]) < 8:
            outputs.loss = outputs.loss * 0
        return outputs

    model.forward = forward
    assert probe(model, window_of("llama", (8,))[0], read_traits(model), alone=True).divides


@pytest.mark.parametrize(
    ("kind", "name", "asks"),
    [
        ("distilbert", "exact", False),
        ("bert-regression", "exact", False),
        ("bert-token", "exact", True),
        ("llama", "exact", True),
        ("llama", "native", False),
    ],
)
def test_an_evaluation_asks_only_where_the_answer_matters(kind, name, asks):
    model, batch = make_model(kind), window_of(kind)[0]
    seen = rows_seen(model)
    normalization = Normalization(name, read_traits(model))
    loss = normalization.loss_for_evaluation(model, batch)
    assert bool(seen) == asks
    normalization.loss_for(model, [batch])
    settled = normalization.loss_for_evaluation(model, batch)
    assert settled is normalization.loss_for(model, [batch])
    first, second = (one.evaluate(model.eval(), batch) for one in (loss, settled))
    assert torch.equal(first[0], second[0])
    assert first[2] == second[2]


def test_an_evaluation_by_a_function_of_the_users_asks():
    model, batch = make_model("distilbert"), window_of("distilbert")[0]

    def summed(outputs, labels, num_items_in_batch):
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    criterion = Criterion(function=lambda *a, num_items_in_batch=None: summed(*a, num_items_in_batch or 3))
    normalization = Normalization("exact", read_traits(model, has_function=True), criterion)
    assert normalization.loss_for_evaluation(model, batch).divides


def test_the_loss_is_settled_once_by_the_first_micro_batch_with_items():
    model = make_model("llama")
    empty = {**window_of("llama")[0]}
    empty["labels"] = torch.full_like(empty["labels"], -100)
    normalization = Normalization("exact", read_traits(model))
    undecided = normalization.loss_for(model, [empty])
    assert isinstance(undecided, ExactLoss)
    assert normalization.compare([empty]) == ""
    settled = normalization.loss_for(model, [empty, window_of("llama")[0]])
    assert settled.divides
    assert normalization.loss_for(model, [empty]) is settled


def test_native_is_native_without_asking_for_anything_else():
    model = make_model("llama")
    assert isinstance(
        Normalization("native", read_traits(model)).loss_for(model, window_of("llama")), NativeLoss
    )


def factor(kind, sizes, world_size=1):
    model = make_model(kind)
    traits, window = read_traits(model), window_of(kind, sizes)
    return native_factor(probe(model, window[0], traits), window, traits, world_size=world_size)


def test_the_factor_of_equal_micro_batches_that_sum_their_means_is_their_number():
    assert factor("distilbert", (4, 4, 4)) == (3.0, 3.0)


def test_the_factor_of_unequal_micro_batches_is_a_range():
    assert factor("distilbert", (4, 2)) == (1.5, 3.0)


def test_the_factor_of_models_without_labels_column_is_by_their_share():
    least, most = factor("bert-qa", (4, 2))
    assert (least, most) == (0.75, 1.5)


def test_one_micro_batch_has_no_factor():
    assert factor("distilbert", (4,)) == (1.0, 1.0)
    assert factor("llama", (4, 2)) == (1.0, 1.0)


def test_the_note_names_the_factor_and_the_other_choice():
    model = make_model("distilbert")
    window = window_of("distilbert", (4, 4))
    notes = {}
    for name in ("exact", "native"):
        normalization = Normalization(name, read_traits(model))
        normalization.loss_for(model, window)
        notes[name] = normalization.compare(window)
    assert 'loss_normalization="exact" is used' in notes["exact"]
    assert "2 times" in notes["exact"]
    assert 'times those of "exact"' in notes["exact"]
    assert 'times those of "exact"' in notes["native"]


def test_no_note_where_both_agree():
    model = make_model("llama")
    window = window_of("llama")
    normalization = Normalization("exact", read_traits(model))
    normalization.loss_for(model, window)
    assert normalization.compare(window) == ""

"""What a model does with num_items_in_batch is asked of the model."""

import pytest
import torch
from torch import nn

from hfbridge.model.items import read_traits
from hfbridge.model.loss import ExactLoss, NativeLoss
from hfbridge.model.normalization import Normalization, native_factor, probe
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
    assert 'pass loss_normalization="native"' in notes["exact"]
    assert 'pass loss_normalization="exact"' in notes["native"]


def test_no_note_where_both_agree():
    model = make_model("llama")
    window = window_of("llama")
    normalization = Normalization("exact", read_traits(model))
    normalization.loss_for(model, window)
    assert normalization.compare(window) == ""

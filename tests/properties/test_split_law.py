"""The split law: in "exact" the gradient of an optimizer step does not depend on how its samples are cut."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hfbridge
from hfbridge.model.items import count_items, read_traits
from hfbridge.model.normalization import Normalization, probe
from tests.tiny import IGNORED, PadRows, make_dataset, make_model, make_rows

KINDS = ("distilbert", "bert-regression", "bert-token", "bert-qa", "llama", "gpt2")
ROWS = 12
# Sums are taken in another order. In fp64 that is a few 1e-16; Llama's and GPT-2's loss is computed in fp32
# (ForCausalLMLoss upcasts its logits to float), which leaves some 1e-7 where sums meet in another order.
TOLERANCE = 1e-6


def collator_for(kind: str) -> PadRows:
    """Pad ragged rows; for extractive QA to one length, as its preprocessing does.

    BertForQuestionAnswering takes its softmax over padding, too, so the loss of a row depends on how far the
    row is padded: a property of the model that no weighting of micro-batches can undo.
    """
    return PadRows(length=12 if kind == "bert-qa" else 0)


def gradient_of(model: nn.Module, rows: list[dict[str, Any]], cuts: Sequence[int], name: Any) -> torch.Tensor:
    """Whole gradient of one window whose micro-batches end before the rows in `cuts`."""
    bounds = [0, *sorted(cuts), len(rows)]
    pad = collator_for("bert-qa" if "start_positions" in rows[0] else "")
    window = [pad(rows[a:b]) for a, b in pairwise(bounds)]
    model.zero_grad()
    loss_of = Normalization(name, read_traits(model)).loss_for(model, window)
    items = loss_of.count(window, torch.device("cpu"))
    model.train()
    for index, inputs in enumerate(window):
        loss_of.train(model, inputs, items, index, len(window)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    made = make_model(request.param, dropout=0.0, dtype=torch.float64)
    made.kind = request.param
    return made


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, ROWS - 1), max_size=ROWS - 1), seed=st.integers(0, 1000))
def test_the_gradient_does_not_depend_on_the_cuts(model: Any, cuts: set[int], seed: int) -> None:
    rows = make_rows(model.kind, ROWS, seed=seed)
    whole = gradient_of(model, rows, (), "exact")
    cut = gradient_of(model, rows, cuts, "exact")
    assert float((cut - whole).norm() / whole.norm()) < TOLERANCE


@pytest.mark.parametrize("kind", ["bert-token", "llama", "gpt2"])
def test_a_micro_batch_without_items_contributes_nothing(kind: str) -> None:
    model = make_model(kind, dropout=0.0, dtype=torch.float64)
    rows = make_rows(kind, 6, seed=1)
    for row in rows[2:4]:
        row["labels"] = [IGNORED] * len(row["labels"])
    whole = gradient_of(model, rows, (), "exact")
    cut = gradient_of(model, rows, (2, 4), "exact")
    assert torch.isfinite(cut).all()
    assert float((cut - whole).norm() / whole.norm()) < TOLERANCE


@pytest.mark.parametrize("kind", ["bert-token", "llama"])
def test_a_window_without_items_has_no_gradient(kind: str) -> None:
    model = make_model(kind, dropout=0.0, dtype=torch.float64)
    rows = make_rows(kind, 4, seed=1)
    for row in rows:
        row["labels"] = [IGNORED] * len(row["labels"])
    found = gradient_of(model, rows, (2,), "exact")
    assert not found.numel() or float(found.abs().max()) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_native_differs_by_the_factor_that_the_note_names(kind: str) -> None:
    model = make_model(kind, dropout=0.0, dtype=torch.float64)
    rows = make_rows(kind, 8, seed=2)
    if kind == "gpt2":  # the first label counts natively, though the loss never sees it
        rows = [{**row, "labels": row["input_ids"]} for row in rows]
    pad = collator_for(kind)
    window = [pad(rows[:3]), pad(rows[3:6]), pad(rows[6:])]
    normalization = Normalization("exact", read_traits(model))
    normalization.loss_for(model, window)
    note = normalization.compare(window, world_size=1)
    ratio = float(
        gradient_of(model, rows, (3, 6), "native").norm() / gradient_of(model, rows, (3, 6), "exact").norm()
    )
    if kind == "llama":
        assert note == ""
        assert ratio == pytest.approx(1.0, rel=1e-6)  # fp32 loss in an fp64 model
        return
    assert 'loss_normalization="exact" is used' in note
    assert 'loss_normalization="native"' in note
    factor = note.split("window are ")[1].split(" times")[0]
    if kind == "gpt2":
        assert ratio == pytest.approx(float(factor), rel=1e-3)  # four digits are shown
    else:
        assert "by micro-batch" in factor  # 3, 3 and 2 rows
        low, high = (float(part) for part in factor.split(" (")[0].split(" to "))
        assert low <= high


def test_the_factor_of_equal_micro_batches_is_their_number() -> None:
    model = make_model("distilbert", dropout=0.0, dtype=torch.float64)
    rows = make_rows("distilbert", 8, seed=2)
    native, exact = (gradient_of(model, rows, (2, 4, 6), name) for name in ("native", "exact"))
    assert float(native.norm() / exact.norm()) == pytest.approx(4.0, rel=1e-12)  # rounding of fp64


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_finds_what_the_model_does_and_leaves_no_trace(kind: str) -> None:
    model = make_model(kind)
    model.eval()
    next(iter(model.children())).training = True
    modes, weights = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    inputs = PadRows()(make_rows(kind, 4, seed=4))
    found = probe(model, inputs, read_traits(model))
    assert found.divides == (kind in ("llama", "gpt2"))
    assert found.shift == (kind in ("llama", "gpt2"))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["distilbert", "bert-token", "gpt2", "llama", "bert-qa", "bert-regression"])
def test_the_trainer_takes_the_same_steps_however_the_batch_is_cut(kind: str) -> None:
    """22 rows: the last window is short, and so is its last micro-batch."""

    def run(batch: int, accumulation: int, eval_batch: int) -> tuple[Any, Any]:
        trainer = hfbridge.Trainer(
            hfbridge.Settings(
                output_dir="out",
                use_cpu=True,
                save_strategy="no",
                logging_steps=1,
                num_train_epochs=1,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                learning_rate=1e-3,
                per_device_eval_batch_size=eval_batch,
                eval_strategy="epoch",
                disable_tqdm=True,
            ),
            logger=False,
            enable_model_summary=False,
        )
        module = hfbridge.HFModule(make_model(kind, dropout=0.0, dtype=torch.float64))
        data = hfbridge.HFDataModule(
            train_dataset=make_dataset(kind, 22),
            eval_dataset=make_dataset(kind, 11, seed=5),
            data_collator=collator_for(kind),
        )
        trainer.fit(module, data)
        return trainer.log_history, module.model

    (whole, one), (cut, other) = run(8, 1, 11), run(2, 4, 3)
    steps = [(a, b) for a, b in zip(whole, cut, strict=True) if "loss" in a]
    assert len(steps) == 3
    for a, b in steps:  # fp32 losses of the causal models, and the logged sum, which is kept in fp32
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)
    evaluations = [[row["eval_loss"] for row in rows if "eval_loss" in row] for rows in (whole, cut)]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-6)
    # AdamW's first steps are as large as the learning rate whatever the gradient, so where a gradient is all
    # rounding (key biases of attention, 1e-20) its sign is, too; other weights agree as their gradients do.
    far = {
        name
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True)
        if not torch.allclose(a, b, rtol=1e-6, atol=1e-8)
    }
    assert all("k_lin.bias" in name or "key.bias" in name or "c_attn.bias" in name for name in far), far


def test_items_are_counted_once_however_they_are_cut() -> None:
    for kind in KINDS:
        traits, rows, pad = read_traits(make_model(kind)), make_rows(kind, 9, seed=6), PadRows()
        whole = count_items(pad(rows), traits)
        assert whole == sum(count_items(pad(rows[i : i + 2]), traits) for i in range(0, 9, 2))

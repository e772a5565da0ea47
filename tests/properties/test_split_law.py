"""The split law: in "exact" the gradient of an optimizer step does not depend on how its samples are cut.

Dropout is off and weights are float64, so that little but the order of sums differs between a batch and its
cuts.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from hfbridge.losses.criterion import OWN_LOSS, Criterion
from hfbridge.losses.item_counts import count_items, read_traits
from hfbridge.losses.normalization import Normalization, native_factor, probe
from hfbridge.losses.step_loss import ExactLoss
from tests.parity.engines import Job, Record, run_ours
from tests.tiny import IGNORED, PadRows, make_model, make_rows

CPU = torch.device("cpu")

# kind of model: divides by num_items_in_batch, does not count the first label of a row
KINDS = {
    "distilbert": (False, False),
    "albert": (False, False),
    "bert-regression": (False, False),
    "bert-token": (False, False),
    "bert-mlm": (False, False),
    "t5": (False, False),
    "bert-qa": (False, False),
    "llama": (True, True),
    "gpt2": (True, True),
}
LAW_KINDS = [kind for kind in KINDS if kind != "albert"]  # which is distilbert once more

# Sums are taken in another order, which in float64 is 1e-15 or so. Two things are float32 in a float64 model,
# too, and leave up to 1e-7: the share of a micro-batch (its items over the window's, a float32 scalar like
# native's), and the loss of Llama and GPT-2 (ForCausalLMLoss upcasts logits to float).
LAW = 1e-6
# One item counted wrongly in a window of some 50 to 100 would show as 1e-2.


def rows_of(kind: str, count: int, *, seed: int = 3) -> list[dict[str, Any]]:
    """Make rows; with a label now and then for masked language models, and on the first token for GPT-2.

    The native Trainer counts that first label, though GPT-2's loss never sees it.
    """
    rows = make_rows("bert-token" if kind == "bert-mlm" else kind, count, seed=seed)
    return [{**row, "labels": row["input_ids"]} for row in rows] if kind == "gpt2" else rows


def without_items(kind: str, row: dict[str, Any]) -> dict[str, Any]:
    """Make a row that holds nothing to learn."""
    if "label" in row:
        return {**row, "label": IGNORED}
    return {**row, "labels": [IGNORED] * len(row["labels"])}


def batch_of(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate, in float64 where labels are targets, and for extractive QA to one length.

    BertForQuestionAnswering takes its softmax over padding, too, so the loss of a row depends on how far the
    row is padded: a property of the model that no weighting of micro-batches can undo. Its preprocessing
    pads to one length.
    """
    batch = PadRows(length=12 if "start_positions" in rows[0] else 0)(list(rows))
    return {name: v.double() if v.is_floating_point() else v for name, v in batch.items()}


def make_exact_model(kind: str) -> nn.Module:
    """Make a float64 model without dropout."""
    return make_model(kind, dropout=0.0, dtype=torch.float64)


@functools.cache
def exact_model(kind: str) -> nn.Module:
    """Return a model that the drawn examples share; only its gradients change."""
    return make_exact_model(kind)


def gradient_of(
    model: nn.Module,
    windows: Sequence[dict[str, torch.Tensor]],
    *,
    name: str = "exact",
    criterion: Criterion = OWN_LOSS,
) -> tuple[torch.Tensor, float]:
    """Accumulate a window's gradient as HFModule does; return it flat, [parameters], and the summed loss."""
    normalization = Normalization(name, read_traits(model), criterion)  # type: ignore[arg-type]
    loss_of = normalization.loss_for(model, windows)
    items = loss_of.count(windows, CPU)
    model.zero_grad()
    model.train()
    summed = 0.0
    for index, inputs in enumerate(windows):
        loss = loss_of.train(model, inputs, items, index, len(windows))
        loss.backward()
        summed += loss.item()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients]), summed


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """Norm of the difference of two whole gradients, relative to the norm of the second."""
    return float((one - other).norm() / other.norm())


def cut(rows: list[dict[str, Any]], cuts: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
    """Cut rows at some places."""
    places = [0, *sorted(set(cuts)), len(rows)]
    for start, end in pairwise(places):
        yield rows[start:end]


@pytest.mark.parametrize("kind", LAW_KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_gradient_does_not_depend_on_the_cuts(kind: str, data: st.DataObject) -> None:
    """Equal cuts, unequal ones, ragged padding, a short last micro-batch."""
    count = data.draw(st.integers(2, 14), label="rows")
    rows = rows_of(kind, count, seed=data.draw(st.integers(0, 50), label="seed"))
    equal = data.draw(st.booleans(), label="equal sizes")
    size = data.draw(st.integers(1, count), label="size")
    cuts = (
        list(range(size, count, size))
        if equal
        else data.draw(st.lists(st.integers(1, count - 1), max_size=count), label="cuts")
    )
    model = exact_model(kind)
    assume(count_items(batch_of(rows), read_traits(model)))
    whole, loss = gradient_of(model, [batch_of(rows)])
    in_parts, losses = gradient_of(model, [batch_of(part) for part in cut(rows, cuts)])
    assert relative(in_parts, whole) < LAW
    assert losses == pytest.approx(loss, rel=LAW)


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_micro_batch_has_the_gradient_of_the_models_own_mean(kind: str) -> None:
    """The law alone would hold for any constant factor; this settles it."""
    model, batch = make_exact_model(kind), batch_of(rows_of(kind, 6))
    found, summed = gradient_of(model, [batch])
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert relative(found, torch.cat([gradient.flatten() for gradient in own])) < LAW
    assert summed == pytest.approx(loss.item(), rel=LAW)


@pytest.mark.parametrize("kind", ["distilbert", "bert-token", "bert-mlm", "t5", "llama", "gpt2"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_micro_batches_without_any_item_count_nothing(kind: str, data: st.DataObject) -> None:
    """A micro-batch all of whose labels are -100 has no mean, and changes neither loss nor gradient."""
    count = data.draw(st.integers(2, 9), label="rows")
    rows = rows_of(kind, count)
    empty = [without_items(kind, row) for row in rows_of(kind, 3, seed=4)]
    parts = list(cut(rows, data.draw(st.lists(st.integers(1, count - 1), max_size=3), label="cuts")))
    place = data.draw(st.integers(0, len(parts)), label="place of the empty micro-batch")
    model = exact_model(kind)
    assume(count_items(batch_of(rows), read_traits(model)))
    whole, loss = gradient_of(model, [batch_of(rows)])
    with_empty = [*parts[:place], empty, *parts[place:]]
    in_parts, losses = gradient_of(model, [batch_of(part) for part in with_empty])
    assert relative(in_parts, whole) < LAW
    assert losses == pytest.approx(loss, rel=LAW)


@pytest.mark.parametrize("kind", ["distilbert", "bert-token", "bert-mlm", "t5", "llama", "gpt2"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_window_without_any_item_has_no_gradient(kind: str, parts: int) -> None:
    """Zero, and not NaN: also as the first window, on which nothing can be found out about the model."""
    empty = batch_of([without_items(kind, row) for row in rows_of(kind, 3)])
    gradient, loss = gradient_of(make_exact_model(kind), [empty] * parts)
    assert loss == 0.0
    assert gradient.norm() == 0.0


@pytest.mark.parametrize("kind", ["llama", "distilbert", "bert-token"])
def test_the_model_is_still_found_out_after_a_window_without_items(kind: str) -> None:
    model = make_exact_model(kind)
    normalization = Normalization("exact", read_traits(model))
    empty = batch_of([without_items(kind, row) for row in rows_of(kind, 3)])
    normalization.loss_for(model, [empty])
    settled = normalization.loss_for(model, [empty, batch_of(rows_of(kind, 4))])
    assert isinstance(settled, ExactLoss)
    assert settled.divides is KINDS[kind][0]


@pytest.mark.parametrize("kind", list(KINDS))
def test_items_are_counted_once_however_they_are_cut(kind: str) -> None:
    traits, rows = read_traits(make_model(kind)), rows_of(kind, 9, seed=6)
    assert count_items(batch_of(rows), traits) == sum(
        count_items(batch_of(rows[i : i + 2]), traits) for i in range(0, 9, 2)
    )


# What the probe finds.


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("seed", [3, 8])
@pytest.mark.parametrize("alone", [False, True])
def test_probe_finds_what_a_model_does_with_the_number(kind: str, seed: int, alone: bool) -> None:
    model = make_model(kind)
    batch = PadRows()(rows_of(kind, 6, seed=seed))
    found = probe(model, batch, read_traits(model), alone=alone)
    assert (found.divides, found.shift) == KINDS[kind]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-token"])
@pytest.mark.parametrize("claimed_shift", [True, False])
@pytest.mark.parametrize("alone", [False, True])
def test_probe_corrects_a_wrong_guess_of_the_shift(kind: str, claimed_shift: bool, alone: bool) -> None:
    """Rows whose first label counts tell a model that shifts, whatever is claimed of its class."""
    model = make_model(kind)
    rows = [
        {**row, "labels": row["input_ids"] if KINDS[kind][0] else row["labels"]} for row in rows_of(kind, 6)
    ]
    claimed = dataclasses.replace(read_traits(model), shift=claimed_shift)
    found = probe(model, PadRows()(rows), claimed, alone=alone)
    assert found.divides is KINDS[kind][0]
    assert found.shift is KINDS[kind][1]


@pytest.mark.parametrize("kind", list(KINDS))
def test_probe_leaves_no_trace(kind: str) -> None:
    model = make_model(kind)
    batch = PadRows()(rows_of(kind, 4))
    model.train()
    next(model.children()).eval()
    model(**batch).loss.backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    state, kept = torch.get_rng_state(), {name: v.clone() for name, v in batch.items()}

    probe(model, batch, read_traits(model))

    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert True in modes
    assert False in modes
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    for parameter, before in zip(model.parameters(), gradients, strict=True):
        assert parameter.requires_grad
        assert (parameter.grad is None) if before is None else torch.equal(parameter.grad, before)
    assert list(batch) == list(kept)
    assert all(torch.equal(batch[name], kept[name]) for name in kept)
    assert torch.is_grad_enabled()


def test_probe_leaves_no_trace_when_the_model_fails() -> None:
    """Modes and random state are restored where a forward fails, too; training raises the error again."""
    model = make_model("distilbert")
    model.train()
    batch = PadRows()(make_rows("distilbert", 4))
    batch["labels"] = batch["labels"] + 99  # no such class
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    found = probe(model, batch, read_traits(model))
    assert (found.divides, found.shift) == (False, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes


# By which factor the two normalisations differ.


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", [4, 4, 4]),
        ("distilbert", [4, 4, 4, 4]),
        ("bert-regression", [4, 4]),
        ("gpt2", [4, 4, 4]),
        ("bert-qa", [4, 4]),
        ("distilbert", [4]),
        ("bert-qa", [4]),
    ],
)
def test_the_factor_is_that_of_the_gradients(kind: str, sizes: list[int]) -> None:
    """Where the factor is one number, native's gradient is as many times the exact one."""
    model = make_exact_model(kind)
    rows = rows_of(kind, sum(sizes))
    places = [sum(sizes[:i]) for i in range(1, len(sizes))]
    window = [batch_of(part) for part in cut(rows, places)]
    traits = read_traits(model)
    probed = probe(model, window[0], traits)
    least, most = native_factor(probed, window, dataclasses.replace(traits, shift=probed.shift), world_size=1)
    assert least == most
    exact, _ = gradient_of(model, window)
    native, _ = gradient_of(model, window, name="native")
    assert relative(native, least * exact) < LAW
    expected = {
        "llama": 1.0,
        "distilbert": float(len(sizes)),
        "bert-regression": float(len(sizes)),
        "bert-qa": 1.0,
    }
    if kind == "gpt2":
        counted = sum(int(b["labels"][..., 1:].ne(IGNORED).sum()) for b in window)
        native_count = sum(int(b["labels"].ne(IGNORED).sum()) for b in window)
        expected["gpt2"] = counted / native_count
    assert least == pytest.approx(expected[kind], rel=1e-12)  # quotients of whole numbers, one rounding


@pytest.mark.parametrize("kind", ["distilbert", "bert-qa", "bert-token"])
def test_a_range_of_factors_holds_the_gradients_between_them(kind: str) -> None:
    """Unequal micro-batches have unequal factors; each micro-batch alone shows its own."""
    model = make_exact_model(kind)
    window = [batch_of(part) for part in cut(rows_of(kind, 9), [4, 8])]
    traits = read_traits(model)
    probed = probe(model, window[0], traits)
    least, most = native_factor(probed, window, traits, world_size=1)
    assert least < most
    counts = [count_items(inputs, traits) for inputs in window]
    exact, native = ExactLoss(traits, divides=False), Normalization("native", traits).loss_for(model, window)
    shares = []
    for loss_of in (native, exact):
        items = loss_of.count(window, CPU)
        model.eval()
        shares.append(
            [
                loss_of.train(model, inputs, items, index, len(window)).item()
                for index, inputs in enumerate(window)
            ]
        )
    factors = [n / e for n, e in zip(*shares, strict=True) if e]
    assert min(factors) == pytest.approx(least, rel=LAW)
    assert max(factors) == pytest.approx(most, rel=LAW)
    weight = 1.0 if kind != "bert-qa" else 1 / len(window)
    assert (least, most) == pytest.approx(
        (weight * sum(counts) / max(counts), weight * sum(counts) / min(counts))
    )


# Through hfbridge.Trainer.


def run_exact(
    kind: str, *, size: int, accumulation: int, rows: int = 22, name: str = "exact", **more: Any
) -> Record:
    """Train a float64 model without dropout in dataset order, three windows of up to 8 rows."""
    job = Job(
        kind,
        {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "train_sampling_strategy": "sequential",
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "max_grad_norm": 0.5,
            "adam_epsilon": 1e-4,
            **more,
        },
        rows=rows,
        eval_rows=11,
        model=lambda: make_exact_model(kind),
        compute_metrics=None,
        collator=lambda: batch_of,
        train_rows=rows_of(kind, rows),
        validation_rows=rows_of(kind, 11, seed=5),
    )
    return run_ours(job, loss_normalization=name)


@pytest.mark.parametrize("kind", LAW_KINDS)
def test_accumulation_is_a_larger_batch(kind: str) -> None:
    """22 rows in windows of 4 times 2, or of 2 times 4, are batches of 8; the last one has 6."""
    whole = run_exact(kind, size=8, accumulation=1)
    for size, accumulation in ((2, 4), (4, 2)):
        in_parts = run_exact(kind, size=size, accumulation=accumulation)
        assert len(whole.log_history) == len(in_parts.log_history) == 4
        for ours, theirs in zip(in_parts.log_history[:3], whole.log_history[:3], strict=True):
            assert ours["learning_rate"] == theirs["learning_rate"]
            # The logged loss sums in float32, as the native one does: 6e-8 a micro-batch, four of them.
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=LAW)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=LAW)
        for name, tensor in whole.weights.items():
            # Adam divides by the gradient's own size, at least by adam_epsilon (1e-4 here, so that weights
            # whose gradient is only rounding stay): an error of 1e-8 grows by at most lr / eps = 10 a step.
            torch.testing.assert_close(in_parts.weights[name], tensor, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", LAW_KINDS)
def test_eval_loss_does_not_depend_on_the_batch_size(kind: str) -> None:
    losses = []
    for size in (1, 4, 11):
        record = run_exact(
            kind, size=8, accumulation=1, max_steps=1, eval_strategy="steps", per_device_eval_batch_size=size
        )
        losses += [row["eval_loss"] for row in record.log_history if "eval_loss" in row]
    assert len(losses) == 3
    assert losses == pytest.approx([losses[0]] * 3, rel=LAW)


def test_native_does_depend_on_how_it_is_cut() -> None:
    """The other choice breaks the law; were it not so, the tests above would show nothing."""
    whole = run_exact("bert-token", size=8, accumulation=1, name="native")
    in_parts = run_exact("bert-token", size=2, accumulation=4, name="native")
    ratio = in_parts.log_history[0]["grad_norm"] / whole.log_history[0]["grad_norm"]
    assert 3.0 < ratio < 5.0  # four micro-means summed, each of other items


# What the user is told.


def notes_about_normalization(record: Record) -> list[str]:
    return [note for note in record.module.notes if "loss_normalization" in note]


@pytest.mark.parametrize("name", ["exact", "native"])
@pytest.mark.parametrize(
    ("kind", "size", "accumulation", "rows", "factor"),
    [
        ("distilbert", 2, 4, 22, "4 times"),
        ("bert-regression", 2, 3, 22, "3 times"),
        ("t5", 4, 2, 22, None),
        ("gpt2", 4, 1, 22, None),
        ("gpt2", 2, 4, 22, None),
        ("bert-qa", 4, 3, 9, "0.75 to 3 (by micro-batch) times"),
        ("distilbert", 4, 3, 9, "2.25 to 9 (by micro-batch) times"),
        ("llama", 2, 4, 22, ""),
        ("llama", 4, 1, 22, ""),
        ("distilbert", 4, 1, 22, ""),
        ("bert-token", 4, 1, 22, ""),
        ("bert-qa", 4, 1, 22, ""),
        ("bert-qa", 4, 3, 22, ""),
    ],
)
def test_a_note_says_how_the_normalisations_differ(
    kind: str, size: int, accumulation: int, rows: int, factor: str | None, name: str
) -> None:
    settings_: dict[str, Any] = {"size": size, "accumulation": accumulation, "rows": rows, "max_steps": 1}
    record = run_exact(kind, name=name, **settings_)
    notes = notes_about_normalization(record)
    if factor == "":
        assert notes == []
        return
    (note,) = notes
    assert f'loss_normalization="{name}" is used' in note
    assert 'In "native" the loss and gradient of the first optimizer step are' in note
    assert 'those of "exact"' in note
    told = numbers_in(note)
    if factor is not None:
        assert f"are {factor} those" in note
    # Rows come in their order and no step came before: both gradients are of the same window and weights.
    other = {"exact": "native", "native": "exact"}[name]
    counterpart = run_exact(kind, name=other, **settings_)
    norms = {name: record.log_history[0]["grad_norm"], other: counterpart.log_history[0]["grad_norm"]}
    ratio = norms["native"] / norms["exact"]
    # The note shows four digits.
    if len(told) == 1:
        assert ratio == pytest.approx(told[0], rel=1e-3)
    else:
        # Norms of sums with weights between the two: not outside of them while the summed gradients agree in
        # direction, as they do at the start of training; 10 % for what does not.
        assert 0.9 * told[0] < ratio < 1.1 * told[1]
    if kind == "gpt2":
        labels = [row["labels"] for row in rows_of(kind, rows)[: size * accumulation]]
        counted = sum(label != IGNORED for row in labels for label in row[1:])
        native_count = sum(label != IGNORED for row in labels for label in row)
        assert told == pytest.approx([counted / native_count], rel=1e-3)


def numbers_in(note: str) -> list[float]:
    """Return the factor or the range that a note tells."""
    words = (
        note.partition("first optimizer step are ")[2]
        .partition(" times those")[0]
        .replace("(by micro-batch)", "")
    )
    return [float(word) for word in words.split(" to ")]

"""Training on packed rows: natively, the run on the same rows; exactly, the loss of the examples alone.

Grade: exact, one process, fp32, CPU, unless a test says otherwise.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import datasets
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening

from hfbridge import DataError, HFDataModule, ModelError
from hfbridge.data.packing import PackCollator, Packed, pack_rows
from hfbridge.losses.item_counts import count_items, read_traits
from tests.parity.engines import (
    Job,
    Record,
    assert_identical,
    make_ours,
    make_theirs,
    record_ours,
    record_theirs,
    run_ours,
)
from tests.parity.test_resume import assert_goes_on, bridge
from tests.properties.test_split_law import LAW, exact_model, gradient_of, relative
from tests.tiny import PadRows, make_model, make_rows

TOKENS = 24
_LIST = datasets.Dataset.from_list


def job_of(kind: str = "llama", *, as_dataset: Callable[..., Any] = _LIST, **more: Any) -> Job:
    """Two passes over 40 examples, in micro-batches of 2 packs."""
    return Job(
        kind,
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "remove_unused_columns": True,
            **more,
        },
        rows=40,
        eval_rows=0,
        as_dataset=as_dataset,
        has_ids=False,
        collator=None,
        compute_metrics=None,
        data_arguments={"packing": TOKENS},
    )


def run_native(job: Job, pack: Callable[[Any], Any]) -> Record:
    """Run the native Trainer on packed rows, with their collator."""
    trainer, recorder, _ = make_theirs(replace(job, as_dataset=lambda rows: pack(job.as_dataset(rows))))
    trainer.data_collator = PackCollator()
    trainer.train()
    return record_theirs(trainer, recorder, None)


def pack(rows: Any) -> Packed:
    return Packed(rows, TOKENS)


@pytest.mark.parametrize("as_dataset", [_LIST, list], ids=["dataset", "list"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_native_run_on_the_same_rows(kind: str, as_dataset: Callable[..., Any]) -> None:
    job = job_of(kind, as_dataset=as_dataset, label_smoothing_factor=0.1 if kind == "gpt2" else 0.0)
    theirs, ours = run_native(job, pack), run_ours(job)
    assert_identical(theirs, ours)
    packs = len(pack(make_rows(kind, 40)))
    assert packs < 20
    assert ours.state["max_steps"] == 2 * -(-packs // 4)


def test_the_native_run_on_a_packed_stream() -> None:
    def stream(rows: list[dict[str, Any]]) -> datasets.IterableDataset:
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    def packed(rows: datasets.IterableDataset) -> datasets.IterableDataset:
        columns = list(rows.column_names or ())
        return rows.map(pack_rows, batched=True, remove_columns=columns, fn_kwargs={"max_tokens": TOKENS})

    job = job_of(as_dataset=stream, max_steps=3)
    assert_identical(run_native(job, packed), run_ours(job))


def test_evaluation_sets_stay_examples() -> None:
    """And their batches are made by the user's collator."""
    job = replace(job_of(eval_strategy="epoch"), eval_rows=11, collator=PadRows)
    trainer, module, data, recorder, collator = make_ours(job)
    trainer.fit(module, data)
    record = record_ours(trainer, module, recorder, collator)
    rows = [row for row in record.log_history if "eval_loss" in row]
    assert len(rows) == 2
    assert collator is not None
    assert sum(len(ids) for ids in collator.ids) == 0  # rows have none
    loader: Any = data.val_dataloader()
    assert sum(len(batch["input_ids"]) for batch in loader) == 11


def test_a_stopped_run_goes_on() -> None:
    """In the middle of the second pass."""
    saving = job_of(save_strategy="steps", save_steps=1, logging_steps=1)
    whole = bridge(saving.with_settings(output_dir="whole"))
    step = whole.state["max_steps"] - 1
    again = bridge(saving.with_settings(output_dir="again"), f"whole/checkpoint-{step}")
    assert step > whole.state["max_steps"] // 2
    assert_goes_on(whole, again, step)


def test_a_run_may_be_repeated_with_the_same_data_module() -> None:
    trainer, module, data, *_ = make_ours(job_of(max_steps=1))
    trainer.fit(module, data)
    steps = data.schedule.steps_per_epoch
    again, module, *_ = make_ours(job_of(max_steps=1))
    again.fit(module, data)
    assert data.schedule.steps_per_epoch == steps


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_exact_loss_is_that_of_the_examples(kind: str, data: st.DataObject) -> None:
    """Packs cut into any micro-batches, in float64: what is left is what tests/properties tells of LAW."""
    count = data.draw(st.integers(1, 14), label="examples")
    rows = make_rows(kind, count, seed=data.draw(st.integers(0, 50), label="seed"))
    packed = Packed(rows, data.draw(st.integers(12, 40), label="tokens"))
    size = data.draw(st.integers(1, len(packed)), label="size")
    model = exact_model(kind)
    model.config.use_cache = False  # as the setting makes it
    batches = list(DataLoader(packed, size, collate_fn=PackCollator(5)))
    assume(count_items(PadRows()(rows), read_traits(model)))
    alone, loss = gradient_of(model, [PadRows()([row]) for row in rows])
    found, losses = gradient_of(model, batches)
    assert relative(found, alone) < LAW
    assert losses == pytest.approx(loss, rel=LAW)


@torch.no_grad()
def test_the_collator_of_transformers_gives_the_same_loss() -> None:
    """It makes one row of a micro-batch of examples: positions and labels are as of a pack."""
    model = make_model("llama", dropout=0.0)
    model.config.use_cache = False
    rows = make_rows("llama", 5)
    flat = DataCollatorWithFlattening()([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
    packed = PackCollator()([Packed(rows, sum(len(row["input_ids"]) for row in rows))[0]])
    assert list(flat) == list(packed)
    assert all(torch.equal(flat[name], packed[name]) for name in flat)


def fit(kind: str = "llama", rows: Any = None, **more: Any) -> None:
    job = replace(job_of(kind, max_steps=1, **more), train_rows=rows)
    trainer, module, data, *_ = make_ours(job)
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    try:
        trainer.fit(module, data)
    finally:
        assert all(value.equal(before[name]) for name, value in module.model.state_dict().items())


def test_a_model_that_cannot_is_refused_before_it_is_trained() -> None:
    with pytest.raises(ModelError, match="BertForTokenClassification is no causal language model"):
        fit("bert-token")


def test_a_leak_is_seen_before_the_first_step() -> None:
    job = job_of(max_steps=1)
    trainer, module, data, *_ = make_ours(job)
    mixes = module.model.model.layers[0].register_forward_hook(
        lambda layer, given_, out: out + out.cumsum(1) * 1e-3
    )
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: a sample's logits change by .* sample before"):
        trainer.fit(module, data)
    mixes.remove()
    assert all(value.equal(before[name]) for name, value in module.model.state_dict().items())


def test_a_cache_is_refused() -> None:
    with pytest.raises(ModelError, match="use_cache"):
        fit(use_cache=True)


def test_an_example_beyond_the_positions_is_named() -> None:
    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 70)]
    job = replace(job_of("gpt2", max_steps=1), train_rows=rows, data_arguments={"packing": 128})
    trainer, module, data, *_ = make_ours(job)
    with pytest.raises(
        DataError, match="longest example of the train set has 70 tokens, and the model has 64"
    ):
        trainer.fit(module, data)


def test_a_pack_may_have_more_tokens_than_the_model_has_positions() -> None:
    job = replace(job_of("gpt2", max_steps=1), data_arguments={"packing": 100})
    trainer, module, data, *_ = make_ours(job)
    trainer.fit(module, data)
    assert isinstance(data, HFDataModule)
    step = next(iter(data.train_dataloader())).step
    assert max(batch["input_ids"].shape[1] for batch in step) > 64


def test_a_column_that_the_model_takes_is_not_lost() -> None:
    rows = [{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in make_rows("gpt2", 8)]
    with pytest.raises(DataError, match="columns token_type_ids, which the model takes"):
        fit("gpt2", rows)

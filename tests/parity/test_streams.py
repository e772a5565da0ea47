"""Streams as training, evaluation and prediction sets: the native Trainer's run, to the bit.

Grade: exact. What is compared stands in tests/parity/engines.py.
"""

from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset

from hfbridge import BridgeError, HFDataModule, HFModule, Trainer
from tests.parity.engines import BASE, Job, run_both, run_ours
from tests.parity.test_resume import assert_goes_on, bridge, native
from tests.tiny import PadRows, make_model, make_rows


class Plain(IterableDataset[dict[str, Any]]):
    """A stream of torch's, which knows nothing but its rows."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


class Sized(Plain):
    """One that knows its length."""

    def __len__(self) -> int:
        return len(self.rows)


def generated(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from rows


def streamed(rows: list[dict[str, Any]]) -> Any:
    """Make a stream of `datasets`, whose order depends on the pass."""
    stream = datasets.IterableDataset.from_generator(generated, gen_kwargs={"rows": rows})
    return stream.shuffle(seed=3, buffer_size=9)


def interleaved(rows: list[dict[str, Any]]) -> Any:
    """Make a stream of two, drawn by probability."""
    return datasets.interleave_datasets(
        [streamed(rows[::2]), streamed(rows[1::2])], probabilities=[0.3, 0.7], seed=4
    )


KINDS = {"datasets": streamed, "interleaved": interleaved, "torch": Plain}
EVALUATED: dict[str, Any] = {"max_steps": 14, "eval_strategy": "steps", "eval_steps": 4, "logging_steps": 2}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_several_passes_over_a_finite_stream(make: Any, workers: int) -> None:
    asked = Job(settings={**EVALUATED, "dataloader_num_workers": workers}, rows=22, as_dataset=make)
    theirs, ours = run_both(asked)
    assert theirs.event_names.count("on_epoch_begin") > 1
    assert ours.engine.current_epoch > 0


@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_accumulation(kind: str) -> None:
    run_both(Job(kind, {**EVALUATED, "gradient_accumulation_steps": 3}, rows=48, as_dataset=streamed))


@pytest.mark.parametrize("more", [{"num_train_epochs": 2}, {"max_steps": 5}], ids=str)
def test_a_stream_with_a_length(more: dict[str, Any]) -> None:
    settings = {**EVALUATED, "max_steps": -1, "gradient_accumulation_steps": 5, **more}
    run_both(Job(settings=settings, as_dataset=Sized))


def test_several_sets_of_which_some_stream() -> None:
    made = iter((streamed, list, Plain, list, streamed, list, Plain, list))
    run_both(
        Job(settings=EVALUATED, as_dataset=lambda rows: next(made)(rows), eval_keys=("listed", "streamed"))
    )


RESUMED: dict[str, Any] = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}


class Noisy(PadRows):
    """A collator that draws."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        torch.rand(3)
        return batch


@pytest.mark.parametrize("collator", [PadRows, Noisy])
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_the_middle_of_a_pass(workers: int, collator: Any) -> None:
    def job(**more: Any) -> Job:
        settings = {**RESUMED, "gradient_accumulation_steps": 2, "dataloader_num_workers": workers, **more}
        return Job(settings=settings, rows=48, as_dataset=streamed, collator=collator)

    ours = bridge(job(output_dir="bridge"))
    again = {"save_strategy": "no", "output_dir": "again"}
    for step in (3, 6, 8):  # of 6 steps a pass
        assert_goes_on(ours, bridge(job(**again), f"bridge/checkpoint-{step}"), step)
    if collator is Noisy:
        return
    theirs = native(job(output_dir="native"))
    assert_goes_on(theirs, bridge(job(**again), "native/checkpoint-3"), 3, final_row=False)
    assert_goes_on(theirs, bridge(job(**again), "native/checkpoint-8"), 8, final_row=False)
    if workers == 0:
        assert_goes_on(ours, native(job(**again, max_steps=12), "bridge/checkpoint-3"), 3, final_row=False)


def test_rows_of_an_interrupted_pass_are_those_of_a_whole_one() -> None:
    def job(**more: Any) -> Job:
        return Job(settings={**RESUMED, **more}, rows=48, as_dataset=streamed)

    whole = bridge(job(output_dir="bridge"))
    again = bridge(job(save_strategy="no", output_dir="again"), "bridge/checkpoint-5")
    seen = [number for batch in again.collated for number in batch]
    assert sorted(seen) == sorted(number for batch in whole.collated for number in batch)


def test_ignoring_what_is_behind() -> None:
    def job(**more: Any) -> Job:
        return Job(settings={**RESUMED, **more}, rows=64, as_dataset=Plain)

    native(job(output_dir="native"))
    again = {"save_strategy": "no", "output_dir": "again", "ignore_data_skip": True, "max_steps": 9}
    resumed = native(job(**again), "native/checkpoint-5")
    assert_goes_on(resumed, bridge(job(**again), "native/checkpoint-5"), 5)


def test_a_short_window_is_a_step_of_its_own_in_exact() -> None:
    asked = Job(
        settings={"max_steps": 6, "gradient_accumulation_steps": 5}, rows=32, eval_rows=0, as_dataset=Plain
    )
    ours = run_ours(asked, loss_normalization="exact")
    assert [len(step["micro-batches"]) for step in ours.steps[:6]] == [5, 3] * 3


@pytest.mark.parametrize("rows", [32, 45])
@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_what_a_step_lacks_at_the_end_of_a_stream_is_added_to_the_next_in_native(
    kind: str, rows: int
) -> None:
    settings = {**EVALUATED, "gradient_accumulation_steps": 5}
    theirs, ours = run_both(Job(kind, settings, rows=rows, as_dataset=streamed))
    assert ours.event_names == theirs.event_names
    assert theirs.event_names.count("on_epoch_begin") > 2


def test_a_run_goes_on_where_a_step_lacks_micro_batches() -> None:
    def job(**more: Any) -> Job:
        settings = {**RESUMED, "gradient_accumulation_steps": 5, **more}
        return Job(settings=settings, rows=32, as_dataset=streamed)

    ours = bridge(job(output_dir="bridge"))
    again = job(output_dir="again", save_strategy="no")
    for step in (1, 2):
        assert_goes_on(ours, bridge(again, f"bridge/checkpoint-{step}"), step)


def module_and_trainer(**settings: Any) -> tuple[HFModule, Trainer]:
    trainer = Trainer({**BASE, **settings}, logger=False, enable_model_summary=False)
    return HFModule(make_model("distilbert")), trainer


@pytest.mark.parametrize(
    ("settings", "make", "told"),
    [
        ({}, Plain, "max_steps=-1"),
        ({"max_steps": 3, "dataloader_drop_last": True}, Plain, "dataloader_drop_last"),
        ({"max_steps": 3, "train_sampling_strategy": "group_by_length"}, Plain, "group_by_length"),
        ({"max_steps": 3}, lambda rows: Plain([]), "has no rows in epoch 1"),
        ({"max_steps": 30}, lambda rows: Once(rows), "has no rows in epoch 2"),
        ({"max_steps": 3, "gradient_accumulation_steps": 5}, Plain, "no optimizer step is taken"),
    ],
)
def test_what_cannot_be_done_is_said(settings: dict[str, Any], make: Any, told: str) -> None:
    module, trainer = module_and_trainer(**settings)
    module.loss_normalization = "native"
    rows = make_rows("distilbert", 16)
    with pytest.raises(BridgeError, match=told):
        trainer.fit(module, HFDataModule(make(rows), data_collator=PadRows()))


class Once(Plain):
    """A stream that can be read a single time."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.rows:
            yield self.rows.pop()


def test_mapping_while_reading() -> None:
    rows = make_rows("distilbert", 16)
    read: list[int] = []

    def count(row: dict[str, Any]) -> dict[str, Any]:
        read.append(1)
        return {"label": row["label"]}

    module, trainer = module_and_trainer(max_steps=2)
    stream = datasets.IterableDataset.from_generator(generated, gen_kwargs={"rows": rows})
    data = HFDataModule(stream, map_function=count, map_kwargs={"batched": False}, data_collator=PadRows())
    trainer.fit(module, data)
    assert 8 <= len(read) < 16
    wrong = HFDataModule(stream, map_function=count, map_kwargs={"num_proc": 2}, data_collator=PadRows())
    module, trainer = module_and_trainer(max_steps=2)
    with pytest.raises(BridgeError, match="map_kwargs has num_proc"):
        trainer.fit(module, wrong)


def test_predicting_a_stream() -> None:
    rows = make_rows("distilbert", 11)
    outputs = []
    for make in (list, Plain, streamed_in_order):
        module, trainer = module_and_trainer()
        data = HFDataModule(predict_dataset=make(rows), data_collator=PadRows())
        outputs.append(trainer.predict_dataset(module, data))
    for other in outputs[1:]:
        assert (outputs[0].predictions == other.predictions).all()
        assert outputs[0].metrics["test_loss"] == other.metrics["test_loss"]


def streamed_in_order(rows: list[dict[str, Any]]) -> Any:
    return datasets.IterableDataset.from_generator(generated, gen_kwargs={"rows": rows})

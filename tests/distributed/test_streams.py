"""Streams on several ranks: the native Trainer's rows on every rank, and clear ends where it would hang.

Grade: exact. What is compared stands in tests/parity/engines.py.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
import datasets.distributed
import pytest

from hfbridge import DataError, HFDataModule, HFModule, SettingsError, Trainer
from tests.distributed.evaluations import evaluate_exactly, names_its_rows
from tests.distributed.jobs import run_job_on_both
from tests.parity.engines import BASE, Job
from tests.parity.test_resume import assert_goes_on, bridge
from tests.parity.test_streams import Plain, generated
from tests.tiny import PadRows, make_model, make_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


Square = partial(PadRows, 64)  # accelerate sends batches of one shape


def sharded(rows: list[dict[str, Any]]) -> Any:
    """Make a stream of two shards of the same length."""
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)


@pytest.mark.parametrize(
    ("config", "make", "evaluates"),
    [
        ({}, Plain, True),
        ({"split_batches": True}, Plain, True),
        ({}, sharded, True),
        ({"dispatch_batches": True}, Plain, True),
        ({"dispatch_batches": False}, Plain, True),
        ({"dispatch_batches": False, "split_batches": True}, Plain, True),
        ({"dispatch_batches": False}, sharded, False),
    ],
)
def test_rows_are_dealt_natively(ranks, config, make, evaluates):
    settings = {"max_steps": 8, "accelerator_config": config, "logging_steps": 2}
    if evaluates:
        settings |= {"eval_strategy": "steps", "eval_steps": 4}
    rows = 44 if make is sharded else 43
    asked = Job(settings=settings, rows=rows, as_dataset=make, collator=Square, has_ids=False)
    run = ranks(2).run(run_job_on_both, asked if evaluates else with_no_evaluation(asked))
    assert len(run) == 2


def test_an_exact_evaluation_counts_each_row_once(ranks):
    """Nine rows on two ranks: of the last round's one, the second rank has a copy, which does not count.

    Close: accelerate cuts the last round in equal parts, so that its batches are others than in one process.
    """
    given = {"as_dataset": Plain, "collator": Square, "has_ids": False, "compute_metrics": names_its_rows}
    jobs = [Job(eval_rows=n, **given) for n in (9, 11, 13)]
    alone = evaluate_exactly(jobs)
    for rank in ranks(2).run(evaluate_exactly, jobs):
        for found, expected in zip(rank, alone, strict=True):
            for numbers, others in zip(found[:2], expected[:2], strict=True):
                assert numbers == pytest.approx(others, rel=1e-6)
            assert found[2] == expected[2]


def go_on(folder: str, make: Callable[..., Any], config: dict[str, Any]) -> list[int]:
    """Stop in the middle of the first and of the second pass of a stream, and go on; returns where."""
    saving = {"max_steps": 9, "save_strategy": "steps", "save_steps": 1, "logging_steps": 2}
    saving["accelerator_config"] = config
    whole = Job(settings={**saving, "output_dir": f"{folder}/whole"}, rows=44, as_dataset=make)
    whole = replace(whole, collator=Square, has_ids=False, eval_rows=0)
    expected = bridge(whole)
    steps = [2, 7]
    for step in steps:
        again = whole.with_settings(output_dir=f"{folder}/again", save_strategy="no")
        assert_goes_on(expected, bridge(again, f"{folder}/whole/checkpoint-{step}"), step)
    return steps


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (Plain, {}),
        pytest.param(sharded, {}, marks=pytest.mark.long),
        (sharded, {"dispatch_batches": False}),
    ],
)
def test_a_stopped_run_goes_on(ranks, tmp_path, make, config):
    assert ranks(2).run(go_on, str(tmp_path), make, config) == [[2, 7], [2, 7]]


def test_batches_that_cannot_be_dispatched(ranks):
    """Ranks read their own batches of a set; samples that accelerate repeats are counted once in "exact"."""
    assert all("is no stream" in error for error in ranks(2).run(error_of_dispatching, True, "native"))
    assert all("repeats samples" in error for error in ranks(2).run(error_of_dispatching, False, "exact"))


def error_of_dispatching(dispatches: bool, loss_normalization: str) -> str:
    rows = make_rows("distilbert", 8)
    stream: Any = datasets.Dataset.from_list(rows) if dispatches else Plain(rows)
    settings = {**BASE, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    settings["accelerator_config"] = {"dispatch_batches": dispatches}
    trainer = Trainer(settings, logger=False, enable_model_summary=False)
    data = HFDataModule(stream, eval_dataset=stream, data_collator=Square())
    with pytest.raises(SettingsError) as caught:
        trainer.fit(HFModule(make_model("distilbert"), loss_normalization=loss_normalization), data)
    return str(caught.value)


def with_no_evaluation(job):
    return replace(job, eval_rows=0)


def error_of_fit(sizes: tuple[int, int], config: dict[str, Any]) -> str:
    """Fit on a stream with a shard for each rank, and return the error."""
    rows = [make_rows("distilbert", size) for size in sizes]
    stream = datasets.IterableDataset.from_generator(of_shards, gen_kwargs={"shards": rows})
    trainer = Trainer(
        {**BASE, "max_steps": 6, "accelerator_config": config},
        logger=False,
        enable_model_summary=False,
    )
    data = HFDataModule(stream, data_collator=Square())
    try:
        trainer.fit(HFModule(make_model("distilbert")), data)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def of_shards(shards: list[list[dict[str, Any]]]) -> Any:
    for rows in shards:
        yield from generated(rows)


@pytest.mark.parametrize("sizes", [(16, 0), (16, 8)])
def test_shards_of_any_length_are_read_by_the_first_rank(ranks, sizes):
    assert ranks(2).run(error_of_fit, sizes, {}) == ["none", "none"]


def test_a_stream_without_rows(ranks):
    errors = ranks(2).run(error_of_fit, (0, 0), {})
    assert all("has no rows in epoch 1" in error for error in errors), errors


def train_on_a_part(normalization: str) -> tuple[str, list[str]]:
    """Train on the part of a stream that a rank has split off; returns the error, and the warnings."""
    number, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    whole = sharded(make_rows("distilbert", 32))
    stream = datasets.distributed.split_dataset_by_node(whole, rank=number, world_size=ranks)
    module = HFModule(make_model("distilbert"), loss_normalization=normalization)
    data = HFDataModule(train_dataset=stream, data_collator=Square())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            Trainer({**BASE, "max_steps": 2}, logger=False).fit(module, data)
            error = ""
        except DataError as raised:
            error = str(raised)
    return error, [str(one.message) for one in caught if "split between the ranks" in str(one.message)]


def test_a_stream_that_is_split_already(ranks):
    """transformers.Trainer splits it again, and never reads a half."""
    for error, warned in ranks(2).run(train_on_a_part, "exact"):
        assert "split between the ranks already" in error
        assert not warned
    for error, warned in ranks(2).run(train_on_a_part, "native"):
        assert not error
        assert warned

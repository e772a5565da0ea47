"""Sets that are mapped by several processes, formatted or transformed: the native Trainer's run on the same.

Grade: exact, one process, fp32, CPU. What is compared stands in tests/parity/engines.py.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import datasets
import pytest
import torch
from transformers import DataCollatorWithPadding

from tests.parity.engines import Job, assert_identical, run_both, run_ours, run_theirs
from tests.tiny import make_rows, make_tokenizer

SETTINGS = {"max_steps": 5, "gradient_accumulation_steps": 2, "remove_unused_columns": True}
_TEXT = {"text": "words", "number": 3}


def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
    """Make columns of texts."""
    made = make_tokenizer()([" ".join(words) for words in rows["words"]])
    return {**made, "label": rows["answer"]}


def as_words(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"words": [f"w{i}" for i in row["input_ids"]], "answer": row["label"]} for row in rows]
    )


def padded() -> DataCollatorWithPadding:
    return DataCollatorWithPadding(make_tokenizer())


def job_of(as_dataset: Callable[[list[dict[str, Any]]], Any], **more: Any) -> Job:
    return Job(
        settings={**SETTINGS, **more},
        as_dataset=as_dataset,
        collator=padded,
        has_ids=False,
        is_recorded=False,
        eval_rows=0,
    )


@pytest.mark.parametrize("processes", [None, 2])
@pytest.mark.parametrize("batched", [True, False])
def test_map_function_has_the_values_of_map(processes: int | None, *, batched: bool) -> None:
    """Batches of five rows, so that each process has several and a short one."""
    arguments = {"num_proc": processes, "batched": batched, "batch_size": 5}
    function = tokenize if batched else one_by_one
    theirs = run_theirs(job_of(lambda rows: as_words(rows).map(function, **arguments)))
    ours = replace(job_of(as_words), data_arguments={"map_function": function, "map_kwargs": dict(arguments)})
    assert_identical(theirs, run_ours(ours))


def one_by_one(row: dict[str, Any]) -> dict[str, Any]:
    return {name: values[0] for name, values in tokenize({n: [v] for n, v in row.items()}).items()}


FORMATS: dict[str, Callable[[datasets.Dataset], Any]] = {
    "torch": lambda rows: rows.with_format("torch"),
    "numpy": lambda rows: rows.with_format("numpy"),
    "torch, some columns": lambda rows: rows.with_format(
        "torch", columns=["input_ids", "attention_mask"], output_all_columns=True
    ),
    "transform": lambda rows: rows.with_transform(lambda batch: {**batch, "text": batch["label"]}),
    "selected": lambda rows: rows.shuffle(seed=4).select(range(5, 40)),
    "concatenated": lambda rows: datasets.concatenate_datasets([rows.select(range(9)), rows]),
}


@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 0) for name in FORMATS), ("torch", 1), ("transform", 1)]
)
def test_formats_and_views(name: str, workers: int) -> None:
    def formatted(rows: list[dict[str, Any]]) -> Any:
        return FORMATS[name](datasets.Dataset.from_list([{**row, **_TEXT} for row in rows]))

    # Columns that a transform makes must not be dropped before it has made them.
    keeps = name == "transform"
    job = job_of(formatted, dataloader_num_workers=workers, remove_unused_columns=not keeps)
    if keeps:
        job = replace(job, collator=lambda: without_text)
    run_both(job)


def without_text(rows: list[dict[str, Any]]) -> Any:
    return padded()([{n: v for n, v in row.items() if n not in _TEXT} for row in rows])


def test_a_set_in_files(tmp_path: Any) -> None:
    """Memory-mapped, as load_from_disk makes it."""
    stored = tmp_path / "set"
    datasets.Dataset.from_list(make_rows("distilbert", 46)).save_to_disk(stored)
    run_both(job_of(lambda rows: datasets.load_from_disk(stored)))


def test_a_transform_draws_as_natively() -> None:
    """Rows are read when natively they are: the rehearsal and the checks draw nothing from the generators."""

    def draw(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids = [[(i + int(torch.randint(0, 3, ()))) % 50 for i in row] for row in batch["input_ids"]]
        return {**batch, "input_ids": ids}

    job = job_of(lambda rows: datasets.Dataset.from_list(rows).with_transform(draw))
    run_both(replace(job, eval_rows=11).with_settings(eval_strategy="steps", eval_steps=2))

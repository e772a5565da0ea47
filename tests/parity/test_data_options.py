"""What settings do to the order of samples and to their loaders: the native Trainer's, to the bit.

Grade: exact. What is compared stands in tests/parity/engines.py.
"""

import multiprocessing
from typing import Any

import datasets
import pytest

import hfbridge
from tests.parity.engines import Job, make_ours, run_both, run_ours
from tests.tiny import PadRows, make_rows, make_tokenizer

EVALUATED = {
    "gradient_accumulation_steps": 3,
    "num_train_epochs": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
}
LENGTHS = [
    {"train_sampling_strategy": "group_by_length"},
    {"train_sampling_strategy": "batch_rebalance"},
]
BY_STRATEGY = pytest.mark.parametrize("settings", LENGTHS, ids=["group_by_length", "batch_rebalance"])


@BY_STRATEGY
@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_order_by_length(kind: str, settings: dict[str, Any]) -> None:
    theirs, _ = run_both(Job(kind, {**EVALUATED, **settings}))
    shuffled = run_ours(Job(kind, EVALUATED))
    assert theirs.collated != shuffled.collated


@BY_STRATEGY
@pytest.mark.parametrize(
    "more",
    [
        {"dataloader_drop_last": True},
        {"data_seed": 5},
        {"gradient_accumulation_steps": 1},
        {"max_steps": 5, "gradient_accumulation_steps": 4},
        {"num_train_epochs": 1.5},
        {"per_device_train_batch_size": 7},
    ],
    ids=["drop last", "data seed", "no accumulation", "max steps", "part of an epoch", "larger batches"],
)
def test_order_by_length_otherwise(settings: dict[str, Any], more: dict[str, Any]) -> None:
    run_both(Job("distilbert", {**EVALUATED, **settings, **more}))


def with_lengths(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Give each row a length that is not that of its ids."""
    return datasets.Dataset.from_list([{**row, "size": 100 - 3 * len(row["input_ids"])} for row in rows])


class WithoutLengths(PadRows):
    """Drops the column of lengths, which the model does not take."""

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        return super().__call__([{name: v for name, v in row.items() if name != "size"} for row in rows])


@BY_STRATEGY
@pytest.mark.parametrize("removes", [True, False])
def test_a_column_of_lengths(settings: dict[str, Any], removes: bool) -> None:
    """With unused columns removed it is gone before it could be read, natively, too."""
    named = {**settings, "length_column_name": "size", "remove_unused_columns": removes}
    job = Job(
        "distilbert",
        {**EVALUATED, **named},
        as_dataset=with_lengths,
        collator=WithoutLengths,
        has_ids=not removes,
    )
    run_both(job)


@BY_STRATEGY
def test_a_tokenizer_names_the_column(settings: dict[str, Any]) -> None:
    run_both(Job("distilbert", {**EVALUATED, **settings}, processing_class=make_tokenizer()))


@BY_STRATEGY
def test_rows_without_lengths_are_told(settings: dict[str, Any]) -> None:
    rows = [{"text": row["input_ids"], "label": row["label"]} for row in make_rows("distilbert", 8)]
    job = Job("distilbert", {**settings, "remove_unused_columns": False}, train_rows=rows, eval_rows=0)
    with pytest.raises(hfbridge.DataError, match=r"train_sampling_strategy=.*input_ids.*length_column_name"):
        run_ours(job)


@pytest.mark.parametrize(
    "config",
    [
        {"use_seedable_sampler": False},
        {"split_batches": True},
        {"even_batches": False},
        {"non_blocking": True},
        {"dispatch_batches": True},
        {"dispatch_batches": False},
        {"use_seedable_sampler": False, "even_batches": False},
    ],
    ids=str,
)
def test_accelerator_config(config: dict[str, Any]) -> None:
    run_both(Job("distilbert", {**EVALUATED, "accelerator_config": config}))


@pytest.mark.parametrize(
    "config",
    [{"gradient_accumulation_kwargs": {"num_steps": 2}}, {"surprise": 1}],
    ids=str,
)
def test_an_accelerator_config_that_is_not_carried(config: dict[str, Any]) -> None:
    with pytest.raises(hfbridge.SettingsError, match="accelerator_config"):
        hfbridge.Settings(accelerator_config=config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers",
    [
        {"dataloader_num_workers": 2},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3},
        {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"},
        {"dataloader_num_workers": 1, "train_sampling_strategy": "group_by_length"},
        {
            "dataloader_num_workers": 1,
            "train_sampling_strategy": "group_by_length",
            "dataloader_persistent_workers": True,
        },
    ],
    ids=["two", "persistent", "fork", "by length", "by length, persistent"],
)
def test_workers(workers: dict[str, Any]) -> None:
    run_both(Job("distilbert", {**EVALUATED, **workers}, rows=30))


@pytest.mark.slow
def test_workers_that_live_on_end_with_the_run() -> None:
    before = set(multiprocessing.active_children())
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer, module, data, _, _ = make_ours(Job("distilbert", {**EVALUATED, **workers}, rows=30))
    trainer.fit(module, data)
    assert set(multiprocessing.active_children()) == before  # though trainer and data are still there


@pytest.mark.parametrize("label_names", [["labels"], []], ids=str)
def test_names_of_labels(label_names: list[str]) -> None:
    run_both(Job("distilbert", {**EVALUATED, "label_names": label_names}, rows=30))


@pytest.mark.parametrize("as_dataset", [list, datasets.Dataset.from_list], ids=["list", "dataset"])
def test_unused_columns_are_removed(as_dataset: Any) -> None:
    job = Job(
        "distilbert",
        {**EVALUATED, "remove_unused_columns": True},
        rows=30,
        as_dataset=lambda rows: as_dataset([{**row, "unused": "x"} for row in rows]),
        has_ids=False,
    )
    run_both(job)


def test_drop_last_of_training_and_evaluation() -> None:
    run_both(Job("distilbert", {**EVALUATED, "dataloader_drop_last": True}, rows=31, eval_rows=11))

"""Before the first step the rows of a set are looked at once, and no more of them the more there are."""

from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch

from hfbridge import HFDataModule, HFModule, Trainer
from hfbridge.data import limits
from hfbridge.data.packing import Packed
from tests.parity.engines import BASE
from tests.tiny import PadRows, make_model, make_rows


class Counted(torch.utils.data.Dataset[Any]):
    """Rows that are made when they are read, and counted."""

    def __init__(self, count: int) -> None:
        self.count, self.reads = count, 0
        self.rows = make_rows("distilbert", 16)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        return self.rows[index % 16]


def fit(train: Any, evaluation: Any = None, **settings: Any) -> HFDataModule:
    """Train one step of two rows."""
    given = {
        **BASE,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        **settings,
    }
    trainer = Trainer(given, logger=False, enable_model_summary=False)
    data = HFDataModule(train_dataset=train, eval_dataset=evaluation, data_collator=PadRows())
    trainer.fit(HFModule(make_model("distilbert")), data)
    return data


def test_rows_read_before_the_first_step_do_not_grow_with_the_set() -> None:
    reads = []
    for count in (100, 1_000_000):
        rows = Counted(count)
        fit(rows)
        reads.append(rows.reads)
    assert reads[0] == reads[1] <= 4  # the micro-batch and the one in hand


def scans(monkeypatch: pytest.MonkeyPatch, seen: Callable[[Any], None]) -> None:
    """Tell which rows `check_rows` is given."""
    real = limits.check_rows

    def counted(dataset: Any, *args: Any, **named: Any) -> str:
        seen(named["split"])
        return real(dataset, *args, **named)

    monkeypatch.setattr("hfbridge.data.factory.check_rows", counted)
    monkeypatch.setattr("hfbridge.data.factory.is_known", lambda collator: True)


def test_each_set_is_looked_at_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though loaders of the evaluation set are made for the rehearsal and for the evaluations."""
    seen: list[str] = []
    scans(monkeypatch, seen.append)
    rows = datasets.Dataset.from_list(make_rows("distilbert", 8))
    data = fit(rows, rows, max_steps=3, eval_strategy="steps", eval_steps=1)
    assert sorted(seen) == ["eval", "train"]
    trainer = Trainer({**BASE, "max_steps": 1}, logger=False, enable_model_summary=False)
    trainer.fit(HFModule(make_model("distilbert")), data)  # another model may know other ids
    assert sorted(seen) == ["eval", "train", "train"]


def test_no_more_than_the_first_rows_of_a_stored_set_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """An id that does not fit is found among them; behind them no row is read."""
    monkeypatch.setattr(limits, "ROWS_SEEN", 4)
    rows = datasets.Dataset.from_dict({"input_ids": [[5]] * 4 + [[999]] * 4})
    found = limits.Limits("Model", vocabulary=50)
    assert limits.check_rows(rows, found, split="train") == ""
    with pytest.raises(ValueError, match="holds the id 999"):
        limits.check_rows(rows.select(range(1, 8)), found, split="train")


def test_packing_reads_lengths_and_one_row() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]] * 1_000})
    reads: list[Any] = []
    packed = Packed(rows, 6)
    packed._dataset = Reading(packed._dataset, reads)
    assert packed[3]["input_ids"] == [5, 6, 7, 5, 6, 7]
    assert len(reads) == 2


class Reading:
    """Note which rows are read."""

    def __init__(self, rows: Any, reads: list[Any]) -> None:
        self.rows, self.reads = rows, reads

    def __getitem__(self, index: Any) -> Any:
        self.reads.append(index)
        return self.rows[index]

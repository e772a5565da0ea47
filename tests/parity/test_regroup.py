"""`HFDataModule(regroup=...)`: the run of the same settings without it, with less padding."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import hfbridge
from hfbridge import DataError, SettingsError
from tests.parity.engines import Job, Record, make_ours, run_ours
from tests.tiny import PadRows, make_model, make_rows

# Sums are taken in another order in float64; AdamW's first steps divide by small numbers.
CLOSE = 1e-9
SETTINGS = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 3, "num_train_epochs": 2}


def job(regroup: Any, **settings: Any) -> Job:
    return Job(
        "bert-token",
        {**SETTINGS, "optim": "sgd", **settings},
        rows=50,
        model=lambda: make_model("bert-token", dropout=0.0, dtype=torch.float64),
        data_arguments={"regroup": regroup},
    )


def tokens(record: Record) -> int:
    """Tokens that the model was given, padding included."""
    return int(record.engine.state_of_run.num_input_tokens_seen)


@pytest.mark.parametrize("regroup", [True, 24])
def test_the_same_rows_steps_and_weights(regroup: Any) -> None:
    counting = {"include_num_input_tokens_seen": "all"}
    plain = run_ours(job(False, **counting), loss_normalization="exact")
    ours = run_ours(job(regroup, **counting), loss_normalization="exact")
    assert len(ours.log_history) == len(plain.log_history)
    for mine, theirs in zip(ours.log_history, plain.log_history, strict=True):
        for name in {"loss", "grad_norm", "learning_rate", "epoch", "step"} & theirs.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), (
                name
            )  # the share of a batch is float32
    for name, weight in plain.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=CLOSE, atol=CLOSE)
    assert tokens(ours) < tokens(plain)
    assert sorted(i for ids in ours.collated for i in ids) == sorted(i for ids in plain.collated for i in ids)


@pytest.mark.parametrize("regroup", [True, 24])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path, regroup: Any, workers: int) -> None:
    def parts(folder: str) -> Any:
        made = Job(
            "bert-token",
            {
                **SETTINGS,
                "output_dir": str(tmp_path / folder),
                "save_strategy": "steps",
                "save_steps": 3,
                "dataloader_num_workers": workers,
            },
            rows=50,
            collator=MaskAtRandom,
            data_arguments={"regroup": regroup},
        )
        return make_ours(made, loss_normalization="exact")

    whole, module, data, *_ = parts("whole")
    whole.fit(module, data)
    again, resumed, rows, *_ = parts("again")
    again.fit(resumed, rows, ckpt_path=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.log_history[-2] == whole.log_history[-2]
    for name, weight in module.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


class MaskAtRandom(PadRows):
    """A collator that draws."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        batch["input_ids"][torch.rand(batch["input_ids"].shape) < 0.2] = 1
        return batch


def test_lengths_of_a_dataset_with_a_column_and_without(tmp_path: Path) -> None:
    rows = make_rows("bert-token", 40)
    table = datasets.Dataset.from_list(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    found = []
    for given in (rows, table, table.select(range(40)), table.add_column("length", lengths)):
        trainer, module, _, _, _ = make_ours(job(True), loss_normalization="exact")
        data = hfbridge.HFDataModule(train_dataset=given, data_collator=PadRows(), regroup=True)
        settings = trainer.settings.replace(remove_unused_columns=True, num_train_epochs=1.0)
        trainer = hfbridge.Trainer(settings, logger=False, enable_model_summary=False)
        trainer.fit(module, data)
        found.append(module.model.state_dict()["classifier.weight"])
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("wrong", [0, -3, "yes", None, 2.5])
def test_a_wrong_value_is_named(wrong: Any) -> None:
    with pytest.raises(DataError, match=r"regroup=.*must be True"):
        hfbridge.HFDataModule(train_dataset=make_rows("distilbert", 4), regroup=wrong)


def test_what_cannot_be_regrouped_is_refused_in_one_error() -> None:
    trainer, module, data, _, _ = make_ours(
        job(True, train_sampling_strategy="batch_rebalance"), loss_normalization="native"
    )
    with pytest.raises(SettingsError, match=r"(?s)loss_normalization=\"native\".*batch_rebalance"):
        trainer.fit(module, data)


def test_rows_without_lengths_are_refused() -> None:
    rows = [{"ids": [1, 2], "label": 0}] * 4
    trainer, module, _, _, _ = make_ours(job(True), loss_normalization="exact")
    data = hfbridge.HFDataModule(train_dataset=rows, data_collator=PadRows(), regroup=True)
    with pytest.raises(DataError, match=r"needs numbers in a column 'length'.*or lists in 'input_ids'"):
        trainer.fit(module, data)

"""A run tells once how far the two normalisations are apart."""

from typing import Any

import pytest

import hfbridge
from tests.tiny import PadRows, make_dataset, make_model


def notes_of(kind: str, name: Any, accumulation: int, *, rows: int = 16) -> list[str]:
    trainer = hfbridge.Trainer(
        {
            "output_dir": "out",
            "use_cpu": True,
            "save_strategy": "no",
            "max_steps": 2,
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": accumulation,
        },
        logger=False,
        enable_model_summary=False,
    )
    module = hfbridge.HFModule(make_model(kind), loss_normalization=name)
    trainer.fit(
        module, hfbridge.HFDataModule(train_dataset=make_dataset(kind, rows), data_collator=PadRows())
    )
    return [note for note in module.notes if "loss_normalization" in note]


@pytest.mark.parametrize("name", ["exact", "native"])
def test_a_model_that_ignores_the_number_of_items_gets_a_note_with_the_factor(name: str) -> None:
    (note,) = notes_of("distilbert", name, 4)
    other = "native" if name == "exact" else "exact"
    assert f'loss_normalization="{name}" is used' in note
    assert "are 4 times those" in note
    assert f'Pass loss_normalization="{other}" to HFModule' in note


def test_a_model_whose_micro_means_hold_different_numbers_of_items_gets_a_range() -> None:
    (note,) = notes_of("bert-token", "exact", 4)
    assert "by micro-batch" in note


@pytest.mark.parametrize(("kind", "accumulation"), [("llama", 4), ("distilbert", 1), ("bert-qa", 4)])
def test_no_note_where_both_are_the_same(kind: str, accumulation: int) -> None:
    assert notes_of(kind, "exact", accumulation) == []

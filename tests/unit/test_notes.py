"""A run tells once how far the two normalisations are apart, in the words of the tool that its user has."""

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import transformers

import hfbridge
import hfbridge.dropin
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
    assert f'loss_normalization="{name}" is used' in note
    assert "are 4 times those" in note
    assert note.endswith('of "exact", which is the mean over all its items.')


def test_a_model_whose_micro_means_hold_different_numbers_of_items_gets_a_range() -> None:
    (note,) = notes_of("bert-token", "exact", 4)
    assert "by micro-batch" in note


@pytest.mark.parametrize(("kind", "accumulation"), [("llama", 4), ("distilbert", 1), ("bert-qa", 4)])
def test_no_note_where_both_are_the_same(kind: str, accumulation: int) -> None:
    assert notes_of(kind, "exact", accumulation) == []


@dataclass
class ScriptArguments(transformers.TrainingArguments):
    """As scripts have them."""

    length: int = 3


def make_native(kind: type[transformers.Trainer]) -> transformers.Trainer:
    args = ScriptArguments(
        output_dir="out",
        use_cpu=True,
        save_strategy="no",
        max_steps=2,
        report_to="none",
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        resume_from_checkpoint="out/checkpoint-2",
        length=4,
    )
    rows = make_dataset("distilbert", 16)
    return kind(make_model("distilbert"), args, train_dataset=rows, data_collator=PadRows())


def test_who_moves_a_trainer_over_is_told_what_from_trainer_takes() -> None:
    asked: dict[str, Any] = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer, module, data = hfbridge.from_trainer(make_native(transformers.Trainer), **asked)
    trainer.fit(module, data)
    assert any(
        note.endswith('are 2 times those of "exact", which is the mean over all its items.')
        for note in module.notes
    )
    assert any("pass it to trainer.fit as ckpt_path=." in note for note in module.notes)
    assert any(note.startswith("length is a field of ScriptArguments") for note in module.notes)
    assert "disable_tqdm=True was taken over from Trainer(...)" in trainer.plan.notes


def test_who_has_a_drop_in_is_told_what_that_takes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make_native(hfbridge.dropin.Trainer).train()
    assert 'are 2 times those of "exact", which is the mean over all its items.' in caplog.text
    for other in ("HFModule", "Trainer(...)", "ckpt_path", "was taken over", "length"):
        assert other not in caplog.text

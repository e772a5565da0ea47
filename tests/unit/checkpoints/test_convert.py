"""What save_pretrained writes is the model: the same logits, tied weights, tokenizer, generation config."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import hfbridge
from hfbridge import CheckpointError, HFModule, ModelError
from hfbridge.checkpoints import convert
from tests.parity.engines import Job, make_ours
from tests.tiny import make_rows, make_tokenizer

CLASSES = {
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "distilbert": AutoModelForSequenceClassification,
    "albert": AutoModelForSequenceClassification,
}


@pytest.mark.parametrize("kind", CLASSES)
def test_the_same_logits(kind: str) -> None:
    trainer, module, data, *_ = make_ours(Job(kind=kind, processing_class=make_tokenizer()))
    trainer.fit(module, data)
    module.save_pretrained("final")
    loaded = CLASSES[kind].from_pretrained("final")
    names = set(module.model.state_dict())
    assert names == set(loaded.state_dict())
    batch = {
        name: torch.tensor([value])
        for name, value in make_rows(kind, 1)[0].items()
        if name in ("input_ids", "attention_mask", "labels")
    }
    with torch.no_grad():
        ours, theirs = module.model.eval()(**batch), loaded.eval()(**batch)
    assert torch.equal(ours.logits, theirs.logits)
    tied = [n for n, p in loaded.named_parameters(remove_duplicate=False)]
    own = dict(module.model.named_parameters(remove_duplicate=False))
    assert sorted(tied) == sorted(own)
    if module.model.can_generate():
        assert Path("final/generation_config.json").exists()
    assert AutoTokenizer.from_pretrained("final").get_vocab() == make_tokenizer().get_vocab()


def test_other_files_of_the_folder_stay() -> None:
    Path("final").mkdir()
    Path("final/notes.txt").write_text("mine", encoding="utf-8")
    module = HFModule(Job().make_model())
    module.save_pretrained("final")
    module.save_pretrained("final")
    assert Path("final/notes.txt").read_text(encoding="utf-8") == "mine"
    assert sorted(p.name for p in Path("final").iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]
    assert [p.name for p in Path().iterdir()] == ["final"]


def test_what_was_written_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    module = HFModule(Job().make_model())
    save = convert.save_model

    def spoil(model: Any, *arguments: Any, **named: Any) -> None:
        save(model, *arguments, **named)
        with torch.no_grad():
            next(model.parameters()).add_(1)

    monkeypatch.setattr(convert, "save_model", spoil)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not hold what the model has"):
        module.save_pretrained("final")
    assert list(Path("final").iterdir()) == []


def test_a_model_that_is_not_built() -> None:
    module = hfbridge.HFModule("some/model", AutoModelForCausalLM)
    with pytest.raises(ModelError, match="not built yet"):
        module.save_pretrained("final")


def test_a_folder_that_cannot_be_made() -> None:
    Path("final").write_text("mine", encoding="utf-8")
    with pytest.raises(CheckpointError, match="could not be written to 'final'"):
        HFModule(Job().make_model()).save_pretrained("final")

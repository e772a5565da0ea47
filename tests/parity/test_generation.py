"""Evaluations that generate: the numbers of the native Seq2SeqTrainer, to the bit.

Grade: exact. What is compared stands in tests/parity/engines.py.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    set_seed,
)

import hfbridge
from hfbridge import DataError, ModelError, SettingsError, decode
from tests.parity.engines import Job, make_ours, make_theirs, run_both, same
from tests.parity.test_evaluation_options import ByBatch, act, parts_digest
from tests.tiny import VOCABULARY, PadRows, make_model, make_rows, make_tokenizer

STEPS = {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2}

# transformers recommends max_new_tokens wherever the length is that of the default; native gets it, too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning"),
]


# A generation config takes the whole place of the model's.
T5 = {"decoder_start_token_id": 0, "pad_token_id": 0}


def job(kind: str = "t5", settings: dict[str, Any] | None = None, **given: Any) -> Job:
    """Make a job whose evaluations generate."""
    settings = {**STEPS, "predict_with_generate": True, "generation_max_length": 9, **(settings or {})}
    if kind in ("llama", "gpt2"):
        settings.setdefault("generation_max_length", 20)
        given = {"validation_rows": prompts(11), **given}
    return Job(kind, settings, **{"rows": 30, "compute_metrics": parts_digest, **given})


def prompts(count: int) -> list[dict[str, Any]]:
    """Make rows for a decoder: prompts padded on the left, and what should follow as labels."""
    longest = 6
    found = []
    for row in make_rows("llama", count, seed=5, longest=longest):
        ids = row["input_ids"]
        blank = longest - len(ids)
        found.append(
            {
                "input_ids": [0] * blank + ids,
                "attention_mask": [0] * blank + [1] * len(ids),
                "labels": [-100] * blank + ids,
            }
        )
    return found


def bart() -> PreTrainedModel:
    """Build a tiny BART."""
    set_seed(7)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
        )
    )


def vision() -> nn.Module:
    """Build a tiny ViT that a tiny BERT decodes."""
    set_seed(7)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    seeing = ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes)
    reading = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(seeing, reading)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    model = VisionEncoderDecoderModel(config=config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=1, pad_token_id=0, eos_token_id=2, max_length=8
    )
    return model


def pictures(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Make pictures and what they are to be read as."""
    generator = torch.Generator().manual_seed(seed)
    rows = make_rows("t5", count, seed=seed)
    return [
        {"pixel_values": torch.randn(1, 8, 8, generator=generator).tolist(), "labels": row["labels"]}
        for row in rows
    ]


class PadPictures(PadRows):
    """Stack pictures, and pad their labels."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = super().__call__([{"labels": row["labels"]} for row in rows])
        return {"pixel_values": torch.tensor([row["pixel_values"] for row in rows]), **labels}


def with_decoder_inputs() -> DataCollatorForSeq2Seq:
    """Make the collator that gives a decoder its inputs, made of the labels."""
    return DataCollatorForSeq2Seq(make_tokenizer(), model=make_model("t5"))


def mean_of_logits(outputs: Any, labels: Any, num_items_in_batch: Any) -> torch.Tensor:
    """Be a loss of the user's; natively, it is not asked where evaluations generate."""
    return outputs.logits.mean()


# While training.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"generation_max_length": None},
        {"generation_max_length": 30, "generation_num_beams": 2},
        {"generation_config": GenerationConfig(**T5, max_new_tokens=6, num_beams=2, length_penalty=0.5)},
        {"bf16": True},
        {"eval_on_start": True, "eval_accumulation_steps": 1, "include_for_metrics": ["inputs", "loss"]},
        {"prediction_loss_only": True},
    ],
    ids=str,
)
def test_evaluations_generate_as_natively(settings: dict[str, Any]) -> None:
    theirs, _ = run_both(job(settings=settings))
    assert sum("eval_loss" in row for row in theirs.log_history) >= 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}], ids=str)
def test_decoders_generate_as_natively(kind: str, settings: dict[str, Any]) -> None:
    """What is generated follows the prompt, which is part of the prediction."""
    run_both(job(kind, {"generation_max_length": 12, **settings}))


def test_other_encoder_decoders_generate_as_natively() -> None:
    collator = lambda: DataCollatorForSeq2Seq(make_tokenizer(), model=bart())  # noqa: E731
    run_both(job("t5", {"generation_num_beams": 2}, model=bart, collator=collator))


def test_a_model_that_sees_generates_as_natively() -> None:
    rows = {"train_rows": pictures(30, seed=3), "validation_rows": pictures(9, seed=5)}
    run_both(job("t5", model=vision, collator=PadPictures, **rows))


def test_sampling_draws_as_natively_and_training_goes_on_as_natively() -> None:
    config = GenerationConfig(**T5, do_sample=True, top_k=5, max_new_tokens=5)
    settings = {"generation_config": config, "generation_max_length": None, "eval_on_start": True}
    theirs, _ = run_both(job(settings=settings))
    seen = [row["eval_predictions"] for row in theirs.log_history if "eval_predictions" in row]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({}, {"eval_keys": ["a", "b"]}),
        ({"batch_eval_metrics": True}, {"compute_metrics": ByBatch()}),
        ({"eval_do_concat_batches": False}, {}),
        ({}, {"compute_metrics": None}),
        ({}, {"processing_class": make_tokenizer()}),
        ({}, {"preprocess_logits_for_metrics": lambda tokens, labels: tokens[:, 1:]}),
        ({"label_smoothing_factor": 0.1}, {"collator": with_decoder_inputs}),
        ({}, {"collator": with_decoder_inputs, "compute_loss_func": mean_of_logits}),
    ],
    ids=["several", "by-batch", "apart", "losses", "tokenizer", "preprocessed", "smoothed", "loss"],
)
def test_other_options(settings: dict[str, Any], given: dict[str, Any]) -> None:
    run_both(job(settings=settings, **given))


# By themselves.


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_evaluating_and_predicting_by_themselves(kind: str) -> None:
    settings = {"generation_max_length": 12}
    rows = prompts(9) if kind == "llama" else make_rows(kind, 9)
    act(job(kind, settings), "evaluate", "train", "predict", "evaluate", rows=rows)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_rows_without_labels_are_predicted(kind: str) -> None:
    rows = prompts(9) if kind == "llama" else make_rows(kind, 9)
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    (output,), module = act(job(kind, {"generation_max_length": 12}), "predict", rows=rows)
    assert output.label_ids is None
    assert output.predictions.shape[1] >= 12
    data = hfbridge.HFDataModule(predict_dataset=rows, data_collator=PadRows())
    batches = module.trainer.predict(module, data)
    assert torch.equal(torch.cat(batches), torch.from_numpy(output.predictions))


def test_arguments_of_one_call_win_over_the_settings() -> None:
    asked, given = job(), {"max_new_tokens": 4, "num_beams": 3}
    native, _, _ = make_theirs(asked)
    rows = native.eval_dataset
    expected, metrics = native.predict(rows, **given), native.evaluate(**given)
    trainer, module, data, _, _ = make_ours(asked)
    asking = hfbridge.HFDataModule(predict_dataset=rows, data_collator=data.data_collator)
    output = trainer.predict_dataset(module, asking, **given)
    assert (output.predictions == expected.predictions).all()
    found = trainer.validate(module, data, verbose=False, **given)[0]
    assert found["eval_predictions"] == metrics["eval_predictions"]
    plain = trainer.validate(module, data, verbose=False)[0]
    assert plain["eval_predictions"] != metrics["eval_predictions"]


def test_arguments_of_generate_where_nothing_generates() -> None:
    trainer, module, data, _, _ = make_ours(job(settings={"predict_with_generate": False}))
    with pytest.raises(SettingsError, match="num_beams: arguments of generate"):
        trainer.predict_dataset(module, data, num_beams=2)
    with pytest.raises(SettingsError, match="set predict_with_generate=True"):
        trainer.predict_texts(module, data)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_exact_generates_the_same_and_keeps_its_loss(kind: str) -> None:
    rows = prompts(11) if kind == "llama" else make_rows(kind, 11)
    found = {}
    for generating in (True, False):
        settings = {"predict_with_generate": generating, "generation_max_length": 12}
        asked = job(kind, settings, validation_rows=rows)
        for name in ("exact", "native"):
            trainer, module, data, _, _ = make_ours(asked, loss_normalization=name)
            found[generating, name] = trainer.validate(module, data, verbose=False)[0]
    exact, native = found[True, "exact"], found[True, "native"]
    assert exact["eval_predictions"] == native["eval_predictions"]
    assert exact["eval_loss"] == found[False, "exact"]["eval_loss"]


# Texts.


def test_texts_of_a_whole_set() -> None:
    tokenizer = make_tokenizer()
    trainer, module, data, _, _ = make_ours(job(processing_class=tokenizer))
    rows = data._raw["eval"]
    asking = hfbridge.HFDataModule(predict_dataset=rows, data_collator=data.data_collator)
    texts = trainer.predict_texts(module, asking)
    module.model.eval()
    for row, text in zip(rows, texts, strict=True):
        ids = module.model.generate(torch.tensor([row["input_ids"]]), max_length=9)
        assert text == tokenizer.decode(ids[0], skip_special_tokens=True)
    output = trainer.predict_dataset(module, asking)
    assert decode(output, tokenizer) == texts
    assert decode(trainer.predict(module, asking), tokenizer) == texts


# Checkpoints.


def test_checkpoints_hold_the_native_generation_config() -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "eval_steps": 2}
    config = GenerationConfig(**T5, max_new_tokens=5, num_beams=2)
    found = {}
    for name, make in (("theirs", make_theirs), ("ours", make_ours)):
        settings = {**saving, "generation_config": config, "output_dir": name}
        made = make(job(settings=settings))
        made[0].train() if name == "theirs" else made[0].fit(*made[1:3])
        read = [Path(name, f"checkpoint-{n}", "generation_config.json").read_text() for n in (1, 2)]
        found[name] = read
    same("generation_config.json", found["theirs"], found["ours"])


@pytest.mark.parametrize("form", ["object", "dictionary", "folder", "file"])
def test_a_generation_config_may_be_given_in_several_forms(form: str) -> None:
    config = GenerationConfig(**T5, max_new_tokens=5, num_beams=2)
    config.save_pretrained("kept")
    given: Any = {
        "object": config,
        "dictionary": {**T5, "max_new_tokens": 5, "num_beams": 2},
        "folder": Path("kept"),
        "file": "kept/generation_config.json",
    }[form]
    trainer, module, data, _, _ = make_ours(job(settings={"generation_config": given}))
    trainer.validate(module, data, verbose=False)
    assert (module.model.generation_config.max_new_tokens, module.model.generation_config.num_beams) == (5, 2)


# Mistakes are told before the first step.


def refused(asked: Job, *, match: str, kind: type[Exception]) -> None:
    """Train, and see that nothing was trained."""
    trainer, module, data, recorder, _ = make_ours(asked, loss_normalization="exact")
    with pytest.raises(kind, match=match):
        trainer.fit(module, data)
    assert recorder.steps == []


def without_padding() -> PreTrainedModel:
    """Build a decoder that has no pad token."""
    model = make_model("gpt2")
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    return model


def contradicting() -> PreTrainedModel:
    """Build a model whose own generation config cannot be saved again."""
    model = make_model("t5")
    model.generation_config.temperature = 0.5
    return model


def test_a_model_that_cannot_generate() -> None:
    match = "predict_with_generate=True needs a model that generates, and DistilBert"
    refused(job("distilbert"), kind=ModelError, match=match)


def test_no_pad_token() -> None:
    refused(job("gpt2", model=without_padding), kind=ModelError, match="there is no pad token")


def test_prompts_longer_than_what_may_be_generated() -> None:
    settings = {"generation_max_length": 6}
    match = "(?s)Nothing can be generated: Input length .* 6.*raise generation_max_length"
    refused(job("llama", settings), kind=DataError, match=match)


def test_a_generation_config_that_is_not_there() -> None:
    settings = {"generation_config": "nowhere/at/all"}
    refused(job(settings=settings), kind=SettingsError, match="generation_config='nowhere/at/all' cannot be")


def test_a_generation_config_that_does_not_say_how_a_decoder_starts() -> None:
    settings = {"generation_config": {"max_new_tokens": 5}}
    refused(job(settings=settings), kind=ModelError, match="neither decoder_start_token_id nor bos_token_id")


def test_a_model_whose_own_config_could_not_be_saved() -> None:
    asked = job(settings={"save_strategy": "steps", "save_steps": 2}, model=contradicting)
    refused(asked, kind=ModelError, match=r"(?s)generation_config of T5.*temperature")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"generation_max_length": 0}, r"generation_max_length = 0 +must be 1 or more"),
        ({"generation_num_beams": 0}, r"generation_num_beams = 0 +must be 1 \(no beam search\) or more"),
        ({"generation_config": ""}, r'generation_config = "" +must be a GenerationConfig'),
        ({"generation_config": {"max_new_tokens": -1}}, "is no valid GenerationConfig"),
        ({"generation_config": {"temperature": 0.5}}, "is no valid GenerationConfig"),
        ({"generation_config": 3}, "must be a string or a dictionary or None, not int"),
    ],
    ids=str,
)
def test_wrong_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        hfbridge.Settings(predict_with_generate=True, **settings)
    assert re.search(text, " ".join(str(caught.value).split()))

"""The way back: what has a native counterpart is there, and what has none is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchmetrics.classification import MulticlassAccuracy
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Seq2SeqTrainer,
    TrainerCallback,
    set_seed,
)
from transformers import Trainer as NativeTrainer

import hfbridge
from hfbridge import HFDataModule, HFModule, Settings, SettingsError, Trainer
from hfbridge.errors import DataError
from tests.tiny import PadRows, make_dataset, make_model, make_tokenizer

SETTINGS = {"output_dir": "out", "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 1}


class Mine(TrainerCallback):
    """A user's."""


def make_data(**given: Any) -> HFDataModule:
    rows = make_dataset("distilbert", 8)
    return HFDataModule(**{"train_dataset": rows, "data_collator": PadRows(), **given})


def test_everything_arrives() -> None:
    tokenizer, model, rows = make_tokenizer(), make_model("distilbert"), make_dataset("distilbert", 4)
    metrics, loss, logits = (lambda *a: {}), (lambda *a: a), (lambda a, b: a)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    module = HFModule(
        model,
        processing_class=tokenizer,
        compute_metrics=metrics,
        compute_loss_func=loss,
        preprocess_logits_for_metrics=logits,
        optimizers=(optimizer, None),
        loss_normalization="native",
    )
    data = make_data(eval_dataset={"a": rows, "b": rows})
    early = EarlyStoppingCallback()
    trainer = Trainer({**SETTINGS, "learning_rate": 1e-3}, callbacks=[Mine], max_steps=1)
    native = module.to_native(data, trainer, callbacks=[early])
    assert type(native) is NativeTrainer
    assert native.model is model
    assert native.args.learning_rate == 1e-3
    assert native.processing_class is tokenizer
    assert native.compute_metrics is metrics
    assert native.compute_loss_func is loss
    assert native.preprocess_logits_for_metrics is logits
    assert native.optimizer is optimizer
    assert native.data_collator is data.data_collator
    assert len(native.train_dataset) == 8
    assert {name: len(given) for name, given in native.eval_dataset.items()} == {"a": 4, "b": 4}
    kinds = [type(callback) for callback in native.callback_handler.callbacks]
    assert kinds[1:] == [Mine, EarlyStoppingCallback, PrinterCallback]
    assert early in native.callback_handler.callbacks
    assert module.notes == []


def test_settings_of_seq2seq_make_a_seq2seq_trainer() -> None:
    module = HFModule(make_model("t5"), optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
    data = HFDataModule(train_dataset=make_dataset("t5", 4), data_collator=PadRows())
    native = module.to_native(data, {**SETTINGS, "predict_with_generate": True})
    assert type(native) is Seq2SeqTrainer
    assert isinstance(native.create_optimizer(), torch.optim.SGD)
    (note,) = module.notes
    assert 'loss_normalization="exact" is not supported by transformers.Trainer' in note


def test_sets_are_mapped_and_a_collator_follows_the_datas_tokenizer() -> None:
    def cut(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: [v[:2] for v in rows[name]] for name in ("input_ids", "attention_mask")}

    tokenizer, other = make_tokenizer(), make_tokenizer()
    module = HFModule(make_model("distilbert"), processing_class=tokenizer)
    rows = make_dataset("distilbert", 8)
    data = HFDataModule(rows, eval_dataset=rows, map_function=cut, processing_class=other)
    native: Any = module.to_native(data, SETTINGS)
    assert {len(ids) for ids in native.train_dataset["input_ids"]} == {2}
    assert {len(ids) for ids in native.eval_dataset["input_ids"]} == {2}
    assert native.data_collator.tokenizer is other
    assert native.processing_class is tokenizer


def test_settings_are_those_of_the_last_run_of_the_module_or_of_the_data() -> None:
    module = HFModule(make_model("distilbert"), settings={**SETTINGS, "seed": 1})
    assert module.to_native(make_data()).args.seed == 1
    module, data = HFModule(make_model("distilbert")), make_data(settings={**SETTINGS, "seed": 2})
    assert module.to_native(data).args.seed == 2
    trainer = Trainer({**SETTINGS, "seed": 3, "save_strategy": "no"}, callbacks=[Mine], logger=False)
    data = make_data()
    trainer.fit(module, data)
    native = module.to_native(data)
    assert native.args.seed == 3
    assert any(isinstance(callback, Mine) for callback in native.callback_handler.callbacks)
    assert native.model is module.model
    with pytest.raises(SettingsError, match="needs settings"):
        HFModule(make_model("distilbert")).to_native(make_data())


def test_a_named_model_is_built_as_in_a_run(tmp_path: Path) -> None:
    set_seed(5)
    make_model("distilbert").save_pretrained(tmp_path)
    module = HFModule(tmp_path, "AutoModelForSequenceClassification", model_kwargs={"num_labels": 3})
    drawn = []
    for _ in range(2):
        native: Any = HFModule(
            tmp_path,
            "AutoModelForSequenceClassification",
            model_kwargs={"num_labels": 3, "ignore_mismatched_sizes": True},
        ).to_native(make_data(), SETTINGS)
        drawn.append(native.model.classifier.weight)
    assert torch.equal(*drawn)
    assert not module.is_built


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("deepspeed_stage_2", {"deepspeed": 2}),
        ("fsdp2", {"fsdp_config": 2}),
        ("fsdp", {"fsdp_config": 1}),
    ],
)
def test_the_name_of_a_strategy_becomes_settings(
    strategy: str, said: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Settings] = []

    def stop(self: Settings, **_: Any) -> Any:
        seen.append(self)
        raise InterruptedError

    monkeypatch.setattr(Settings, "as_training_arguments", stop)
    trainer = Trainer(SETTINGS, strategy=strategy, devices=1)
    with pytest.raises(InterruptedError):
        HFModule(make_model("distilbert")).to_native(make_data(), trainer)
    (settings,) = seen
    if "deepspeed" in said:
        assert settings.deepspeed["zero_optimization"]["stage"] == said["deepspeed"]
    else:
        assert settings.fsdp is True
        assert settings.fsdp_config["version"] == said["fsdp_config"]


class Own(HFModule):
    """Replaces a method."""

    def configure_optimizers(self) -> Any: ...


def test_what_has_no_native_counterpart_is_named_in_one_error() -> None:
    module = Own(make_model("llama"), metrics=MulticlassAccuracy(num_classes=2))
    data = HFDataModule(make_dataset("llama", 8), packing=16)
    trainer = Trainer(SETTINGS, callbacks=[ModelCheckpoint()], max_time="00:01:00:00", min_steps=1)
    with pytest.raises(SettingsError) as caught:
        module.to_native(data, trainer)
    subjects = [problem.subject for problem in caught.value.problems]
    assert subjects == [
        "HFModule(metrics=...)",
        "HFDataModule(packing=16)",
        "Own.configure_optimizers",
        "Timer",  # of max_time
        "ModelCheckpoint",
        "Trainer(max_time=00:01:00:00)",
        "Trainer(min_steps=1)",
    ]
    assert "compute_metrics" in caught.value.problems[0].text


def test_data_of_another_kind_is_refused() -> None:
    with pytest.raises(DataError, match="takes an HFDataModule, and was given a list"):
        HFModule(make_model("distilbert")).to_native([], SETTINGS)  # type: ignore[arg-type]


def test_rows_that_were_not_printed_are_not_printed_natively() -> None:
    native = HFModule(make_model("distilbert")).to_native(make_data(), SETTINGS)
    native.remove_callback(PrinterCallback)
    trainer, module, data = hfbridge.from_trainer(native)
    back = module.to_native(data, trainer)
    assert not any(isinstance(callback, PrinterCallback) for callback in back.callback_handler.callbacks)

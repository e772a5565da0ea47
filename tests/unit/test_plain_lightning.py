"""HFModule and HFDataModule under Lightning's own Trainer, and Lightning's own callbacks under ours."""

import csv
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import hfbridge
from tests.tiny import PadRows, make_dataset, make_model

SETTINGS: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "save_strategy": "no",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "disable_tqdm": True,
}
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def make_pair(**named: Any) -> tuple[hfbridge.HFModule, hfbridge.HFDataModule]:
    module = hfbridge.HFModule(
        make_model("distilbert"), compute_metrics=lambda r: {"m": float(r.predictions.mean())}, **named
    )
    data = hfbridge.HFDataModule(
        train_dataset=make_dataset("distilbert", 46),
        eval_dataset=make_dataset("distilbert", 11, seed=5),
        data_collator=PadRows(),
        **named,
    )
    return module, data


def fit_ours(settings: Any = None, **arguments: Any) -> tuple[hfbridge.HFModule, hfbridge.Trainer]:
    module, data = make_pair()
    trainer = hfbridge.Trainer(
        {**SETTINGS, **(settings or {})}, **{"enable_model_summary": False, "logger": False, **arguments}
    )
    trainer.fit(module, data)
    return module, trainer


def rows_of(module: hfbridge.HFModule) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k}
        for row in module.log_history
    ]


def assert_same(one: hfbridge.HFModule, other: hfbridge.HFModule) -> None:
    assert rows_of(one) == rows_of(other)
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# Lightning warns of its own defaults: no many workers, an epoch shorter than log_every_n_steps.
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize(
    "arguments",
    [
        {"enable_checkpointing": False},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 1.0},
        {"num_sanity_val_steps": 2, "check_val_every_n_epoch": 1},
    ],
    ids=str,
)
def test_a_plain_trainer_trains_like_ours(arguments: dict[str, Any], tmp_path: Path) -> None:
    ours, _ = fit_ours()
    module, data = make_pair(settings=SETTINGS)
    if arguments.get("enable_checkpointing", True):
        arguments = {**arguments, "callbacks": [ModelCheckpoint(dirpath=tmp_path / "kept")]}
    plain = pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, **QUIET, **arguments)
    plain.fit(module, datamodule=data)
    assert_same(ours, module)
    assert plain.global_step == 4


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_plain_trainer_saves_and_goes_on(kind: str) -> None:
    settings = {**SETTINGS, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    whole, _ = fit_ours({**settings, "output_dir": "whole"})
    quiet = {"accelerator": "cpu", "devices": 1, **QUIET}
    module, data = make_pair(settings=settings)
    kept = ModelCheckpoint(dirpath="kept", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    pl.Trainer(max_epochs=2, callbacks=[kept], **quiet).fit(module, datamodule=data)
    assert_same(whole, module)
    assert {path.name for path in Path("out").iterdir()} == {"checkpoint-3", "checkpoint-6", "checkpoint-8"}
    again, data = make_pair(settings={**settings, "output_dir": "again"})
    trainer = pl.Trainer(max_epochs=2, callbacks=[] if kind == "directory" else [kept], **quiet)
    source = "out/checkpoint-3" if kind == "directory" else "kept/step=3.ckpt"
    trainer.fit(again, datamodule=data, ckpt_path=source)
    assert trainer.global_step == 8
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_plain_trainer_does_not_read_where_to_go_on() -> None:
    module, data = make_pair(settings={**SETTINGS, "resume_from_checkpoint": "out/checkpoint-3"})
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, enable_checkpointing=False, **QUIET)
    with pytest.raises(hfbridge.SettingsError, match=r"write trainer\.fit\(\.\.\., ckpt_path="):
        trainer.fit(module, datamodule=data)


@pytest.mark.parametrize("owner", ["module", "data"])
def test_settings_are_given_once(owner: str) -> None:
    ours, _ = fit_ours()
    with_settings, without = make_pair(settings=SETTINGS), make_pair()
    module, data = (with_settings[0], without[1]) if owner == "module" else (without[0], with_settings[1])
    pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, enable_checkpointing=False, **QUIET).fit(
        module, datamodule=data
    )
    assert_same(ours, module)
    assert module.args.max_steps == -1  # the steps are counted, and not written into the settings


def test_settings_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    hfbridge.Settings(**SETTINGS).save(path)
    module, data = make_pair(settings=path)
    assert module.given_settings == data.given_settings == hfbridge.Settings(**SETTINGS)


def test_a_plain_trainer_says_how_long_if_the_settings_do_not() -> None:
    settings = {name: value for name, value in SETTINGS.items() if name != "num_train_epochs"}
    module, data = make_pair(settings=settings)
    plain = pl.Trainer(max_epochs=2, accelerator="cpu", devices=1, enable_checkpointing=False, **QUIET)
    plain.fit(module, datamodule=data)
    assert module.host.state.max_steps == 8


def test_early_stopping_and_checkpoints_follow_our_metrics(tmp_path: Path) -> None:
    kept = ModelCheckpoint(
        dirpath=tmp_path / "kept", monitor="eval_m", filename="{step}-{eval_m:.3f}", save_top_k=-1
    )
    stopping = EarlyStopping(monitor="eval_loss", mode="max", patience=1)
    module, trainer = fit_ours({"num_train_epochs": 3}, callbacks=[stopping, kept])
    losses = [row["eval_loss"] for row in module.log_history if "eval_loss" in row]
    stops = next(i for i in range(1, len(losses) + 1) if i == len(losses) or losses[i] <= max(losses[:i]))
    assert len(losses) == stops + 1 < 6  # stopped at the first evaluation that is no better
    assert trainer.global_step == 2 * len(losses)
    names = {path.name.split("-")[0] for path in (tmp_path / "kept").iterdir()}
    assert names == {f"step={2 * (i + 1)}" for i in range(len(losses))}
    assert {"eval_loss", "eval_m", "loss", "grad_norm", "learning_rate"} <= set(trainer.callback_metrics)


def test_a_logger_gets_the_names_of_callback_metrics_and_steps(tmp_path: Path) -> None:
    module, _ = fit_ours(logger=CSVLogger(tmp_path), callbacks=[LearningRateMonitor("step")])
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    logged = {int(row["step"]): float(row["loss"]) for row in rows if row["loss"]}
    assert logged == {row["step"]: row["loss"] for row in module.log_history if "loss" in row}
    assert {int(row["step"]) for row in rows if row["eval_loss"]} == {2, 4}


def test_hooks_see_each_micro_batch_and_each_optimizer_step() -> None:
    class Counter(pl.Callback):
        batches = backwards = steps = 0

        def on_train_batch_end(self, *hook: Any) -> None:
            self.batches += 1

        def on_before_optimizer_step(self, *hook: Any) -> None:
            self.steps += 1

        def on_after_backward(self, *hook: Any) -> None:
            self.backwards += 1

    counter, (silent, _) = Counter(), fit_ours()
    module, _ = fit_ours(callbacks=[counter])
    assert (counter.batches, counter.backwards, counter.steps) == (12, 12, 4)
    assert_same(silent, module)


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_lightnings_bars_show_loss_and_metrics(bar: type[Any]) -> None:
    shown = bar()
    module, trainer = fit_ours({"disable_tqdm": None}, callbacks=[shown])
    assert {"loss", "grad_norm", "learning_rate", "eval_loss", "eval_m"} <= set(
        shown.get_metrics(trainer, module)
    )


def test_our_bar_shows_the_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    module, trainer = fit_ours({"disable_tqdm": None, "num_train_epochs": 2})
    (bar,) = (cb for cb in trainer.callbacks if isinstance(cb, hfbridge.callbacks.progress.RunProgressBar))
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (8, 8)
    shown = bar.get_metrics(trainer, module)
    assert {"loss", "norm", "lr", "eval_loss", "eval_m"} == set(shown)
    assert "Epoch 2/2" in capsys.readouterr().out


def test_dropout_is_on_at_the_first_step_and_after_each_evaluation() -> None:
    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[bool] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            module.model.eval()  # even so

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            self.seen.append(all(part.training for part in module.model.modules()))

    watch = Watch()
    module, data = make_pair()
    module.model.eval()  # as from_pretrained hands it over
    hfbridge.Trainer(SETTINGS, callbacks=[watch], logger=False, enable_model_summary=False).fit(module, data)
    assert watch.seen == [True] * 4


def test_validate_and_predict() -> None:
    module, data = make_pair()
    trainer = hfbridge.Trainer(SETTINGS, logger=False, enable_model_summary=False)
    trainer.fit(module, data)
    (metrics,) = trainer.validate(module, data, verbose=False)
    last = [row for row in module.log_history if "eval_loss" in row][-1]
    assert metrics["eval_m"] == pytest.approx(last["eval_m"], rel=1e-6)  # Lightning returns float32
    asked = hfbridge.HFDataModule(predict_dataset=make_dataset("distilbert", 11), data_collator=PadRows())
    logits = torch.cat(trainer.predict(module, asked))
    assert logits.shape == (11, 2)


def test_validate_without_training_needs_no_training_set() -> None:
    module = hfbridge.HFModule(make_model("distilbert"))
    data = hfbridge.HFDataModule(eval_dataset=make_dataset("distilbert", 11), data_collator=PadRows())
    (metrics,) = hfbridge.Trainer(SETTINGS, logger=False).validate(module, data, verbose=False)
    assert metrics["eval_loss"] > 0


def test_a_module_is_trained_on_by_a_second_trainer_and_not_mapped_again() -> None:
    calls: list[int] = []

    def count(rows: dict[str, Any]) -> dict[str, Any]:
        calls.append(len(rows["input_ids"]))
        return {}

    module, _ = make_pair()
    data = hfbridge.HFDataModule(
        train_dataset=make_dataset("distilbert", 12), map_function=count, data_collator=PadRows()
    )
    before = [p.clone() for p in module.model.parameters()]
    for _ in range(2):
        hfbridge.Trainer({**SETTINGS, "eval_strategy": "no"}, logger=False, enable_model_summary=False).fit(
            module, data
        )
        mapped = len(calls)
    assert any(not torch.equal(a, b) for a, b in zip(before, module.model.parameters(), strict=True))
    assert sum(calls[:mapped]) == sum(calls)
    assert sum(n for n in calls if n > 2) == 12


def test_weights_in_bf16_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model: nn.Module = make_model("distilbert", dtype=torch.bfloat16)
    module = hfbridge.HFModule(model)
    data = hfbridge.HFDataModule(train_dataset=make_dataset("distilbert", 12), data_collator=PadRows())
    with caplog.at_level(logging.INFO):
        hfbridge.Trainer({**SETTINGS, "eval_strategy": "no"}, logger=False, enable_model_summary=False).fit(
            module, data
        )
    assert any("The weights are torch.bfloat16" in note for note in module.notes)
    assert next(model.parameters()).dtype is torch.bfloat16


@pytest.mark.parametrize("inference_mode", [True, False])
def test_inference_mode_makes_inference_tensors(inference_mode: bool) -> None:
    seen = []

    def note(prediction: Any) -> dict[str, float]:
        seen.append(torch.is_inference_mode_enabled())
        return {}

    rows = make_dataset("distilbert", 6)
    module = hfbridge.HFModule(
        make_model("distilbert"), compute_metrics=note, settings={"use_cpu": True, "report_to": "none"}
    )
    data = hfbridge.HFDataModule(eval_dataset=rows, predict_dataset=rows, data_collator=PadRows())
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", inference_mode=inference_mode, **quiet)
    trainer.validate(module, data, verbose=False)
    assert seen == [inference_mode]
    made = {logits.is_inference() for logits in trainer.predict(module, data)}
    assert made == {inference_mode}

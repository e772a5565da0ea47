"""Any LightningModule: on an HFDataModule, and under hfbridge.Trainer with what settings mean.

Grade: exact, against the same module under lightning.Trainer.
"""

from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.tuner import Tuner
from transformers import TrainerCallback

import hfbridge
from tests.lightning.plain_data import (
    QUIET,
    SETTINGS,
    PlainData,
    PlainModule,
    Watch,
    assert_same_weights,
    fit,
    for_both,
    is_same,
    make_loader,
    make_module,
    make_trainer,
    names_of,
    our_data,
    our_trainer,
    rows_in,
    weights,
)
from tests.tiny import PadRows, make_dataset, make_model, make_rows

pytestmark = [
    # Lightning's advice: a validation_step without a loader, a checkpoint in mid-epoch.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    # Lightning: the run that resumes does not write checkpoints as the first one did.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    # torchdata 0.11: calls a function that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
]
EVALUATED = {"eval_strategy": "epoch"}


# HFDataModule under another LightningModule.


def columns_of(count: int, *, seed: int = 3) -> datasets.Dataset:
    """Make rows with a column that the model does not take, and one that no tensor holds."""
    rows = make_rows("distilbert", count, seed=seed)
    extra = [{"weight": 1.0 + index, "text": f"row {index}"} for index in range(count)]
    return datasets.Dataset.from_list([{**row, **more} for row, more in zip(rows, extra, strict=True)])


class Weighted(PlainModule):
    """Use a column that no Hugging Face model takes."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs = {name: value for name, value in batch.items() if name != "weight"}
        return self.model(**inputs).loss * batch["weight"].mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        inputs = {name: value for name, value in batch.items() if name != "weight"}
        self.log("eval_loss", self.model(**inputs).loss, batch_size=len(batch["weight"]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch["weight"]


@for_both
def test_our_data_module_gives_plain_batches_to_any_module(side: str) -> None:
    watch, train = Watch(), columns_of(10)
    settings = {"eval_strategy": "epoch"}
    data = our_data(side, settings=settings, train_dataset=train, eval_dataset=columns_of(6, seed=5))
    trainer = our_trainer(side, settings=settings, callbacks=[watch])
    trainer.fit(Weighted(), data)
    assert all(isinstance(batch, dict) for batch in watch.batches)
    expected = {"input_ids", "attention_mask", "labels", "weight"}
    for batch in watch.batches + watch.validated:
        assert set(batch) == expected
        assert all(isinstance(value, torch.Tensor) for value in batch.values())
    assert [len(batch["labels"]) for batch in watch.batches] == [4, 4, 2] * 2
    first, second = watch.rows[:10], watch.rows[10:]
    assert sorted(first) == sorted(second) == sorted(names_of(train))
    assert first != second  # shuffled anew
    assert [row for batch in watch.validated[:2] for row in rows_in(batch)] == names_of(columns_of(6, seed=5))
    assert "eval_loss" in trainer.callback_metrics


@for_both
def test_the_order_is_that_under_hfmodule(side: str) -> None:
    orders, settings = [], {"data_seed": 11}
    for module in (PlainModule(), make_module("hfbridge")):
        watch = Watch()
        data = our_data(side, settings=settings, train_dataset=make_dataset("distilbert", 10))
        our_trainer(side, settings=settings, callbacks=[watch]).fit(module, data)
        orders.append(watch.rows)
    assert orders[0] == orders[1]
    assert len(set(orders[0])) == 10


@for_both
def test_our_data_module_accumulates_under_any_module(side: str) -> None:
    settings = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    data = our_data(side, settings=settings, train_dataset=make_dataset("distilbert", 16))
    ours, trainer = PlainModule(), our_trainer(side, settings=settings)
    trainer.fit(ours, data)
    theirs, plain = fit("reference", make_loader(16), settings={"gradient_accumulation_steps": 2})
    assert trainer.global_step == plain.global_step == 4
    assert_same_weights(ours, theirs)


@for_both
def test_a_stream_gives_plain_batches_to_any_module(side: str) -> None:
    watch, rows = Watch(), columns_of(10)
    settings = {"max_steps": 5}
    data = our_data(side, settings=settings, train_dataset=rows.to_iterable_dataset())
    our_trainer(side, settings=settings, callbacks=[watch]).fit(Weighted(), data)
    assert watch.rows == (names_of(rows) * 2)[:18]
    assert set(watch.batches[0]) == {"input_ids", "attention_mask", "labels", "weight"}


def test_a_stream_of_epochs_under_a_plain_trainer() -> None:
    watch, rows = Watch(), make_dataset("distilbert", 10)
    data = hfbridge.HFDataModule(
        train_dataset=rows.to_iterable_dataset(), data_collator=PadRows(), batch_size=4
    )
    make_trainer("lightning", callbacks=[watch]).fit(PlainModule(), data)
    assert watch.rows == names_of(rows) * 2


@for_both
@pytest.mark.parametrize("streamed", [False, True], ids=["sized", "streamed"])
def test_any_module_is_evaluated_on_our_data(side: str, streamed: bool) -> None:
    def rows(count: int, seed: int) -> Any:
        found = make_dataset("distilbert", count, seed=seed)
        return found.to_iterable_dataset() if streamed else found

    def data() -> hfbridge.HFDataModule:
        return our_data(side, eval_dataset=rows(10, 5), test_dataset=rows(9, 6), predict_dataset=rows(7, 7))

    plain, module = make_trainer("reference"), PlainModule()
    (validated,) = our_trainer(side).validate(module, data())
    (tested,) = our_trainer(side).test(module, data())
    predicted = our_trainer(side).predict(module, data())
    assert validated["eval_loss"] == plain.validate(module, make_loader(10, seed=5))[0]["eval_loss"]
    assert tested["test_loss"] == plain.test(module, make_loader(9, seed=6))[0]["test_loss"]
    expected = plain.predict(module, make_loader(7, seed=7))
    assert all(torch.equal(one, other) for one, other in zip(predicted, expected, strict=True))


@for_both
def test_any_module_is_evaluated_on_several_sets(side: str) -> None:
    sets = {"a": make_dataset("distilbert", 10, seed=5), "b": make_dataset("distilbert", 6, seed=6)}
    found = our_trainer(side).validate(PlainModule(), our_data(side, eval_dataset=sets))
    loaders = [make_loader(10, seed=5), make_loader(6, seed=6)]
    expected = make_trainer("reference").validate(PlainModule(), loaders)
    merged = {name: value for of_one in found for name, value in of_one.items()}
    for of_one in expected:
        assert {name: merged[name] for name in of_one} == of_one


@for_both
@pytest.mark.parametrize("streamed", [False, True], ids=["sized", "streamed"])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_any_module_resumes_on_our_data_in_mid_epoch(side: str, streamed: bool, step: int) -> None:
    settings = {"gradient_accumulation_steps": 2, "data_seed": 11}
    rows = make_dataset("distilbert", 14)

    def fit_ours(watch: Watch, *more: Any, seed: int = 0, **arguments: Any) -> Any:
        train = rows.to_iterable_dataset() if streamed else rows
        data = our_data(side, settings={**settings, **steps}, train_dataset=train)
        module = PlainModule(make_model("distilbert", dropout=0.0, seed=seed))
        trainer = our_trainer(side, settings={**settings, **steps}, callbacks=[watch, *more])
        trainer.fit(module, data, **arguments)
        assert trainer.global_step == 4
        return module

    steps = {"max_steps": 4} if streamed else {}
    watch, seen = Watch(), Watch()
    kept = ModelCheckpoint(dirpath="kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit_ours(watch, kept)
    again = fit_ours(seen, seed=8, ckpt_path=f"kept/step={step}.ckpt", weights_only=False)
    assert [len(batch["labels"]) for batch in watch.batches] == [4, 4, 4, 2] * 2
    assert seen.rows == watch.rows[[8, 14, 22, 28][step - 1] :]
    assert_same_weights(again, whole)


@for_both
def test_to_overfit_any_module_gets_the_first_rows_in_order(side: str) -> None:
    watch, rows = Watch(), make_dataset("distilbert", 14)
    data = our_data(side, train_dataset=rows)
    our_trainer(side, callbacks=[watch], overfit_batches=2).fit(PlainModule(), data)
    assert watch.rows == names_of(rows)[:8] * 2


@pytest.mark.parametrize(
    ("side", "module"), [("lightning", "HFModule"), ("lightning", "PlainModule"), ("hfbridge", "PlainModule")]
)
def test_a_token_budget_needs_our_loop_and_our_module(side: str, module: str) -> None:
    data = our_data(side, train_dataset=make_dataset("distilbert", 14), regroup=64)
    trained = PlainModule() if module == "PlainModule" else make_module("hfbridge")
    reason = "accumulate_grad_batches of them" if side == "lightning" else "loss of PlainModule by"
    with pytest.raises(hfbridge.SettingsError, match=f"regroup=64 .*different numbers.*{reason}"):
        our_trainer(side).fit(trained, data)


@for_both
def test_rows_are_grouped_by_length_for_any_module(side: str) -> None:
    watch, rows = Watch(), make_dataset("distilbert", 16)
    settings = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    data = our_data(side, settings=settings, epochs=1, train_dataset=rows, regroup=True)
    our_trainer(side, settings=settings, epochs=1, callbacks=[watch]).fit(PlainModule(), data)
    names = names_of(rows)
    for start in (0, 8):
        ours = watch.rows[start : start + 8]
        assert sorted(ours) == sorted(names[start : start + 8])
        assert [len(row) for row in ours] == sorted(map(len, ours), reverse=True)


@for_both
def test_packing_needs_our_module(side: str) -> None:
    data = our_data(side, train_dataset=make_dataset("llama", 14), data_collator=None, packing=32)
    with pytest.raises(hfbridge.DataError, match=r"packing=32 needs .*HFModule"):
        our_trainer(side).fit(PlainModule(), data)


@for_both
@pytest.mark.parametrize("module", ["PlainModule", "HFModule"])
def test_predictions_keep_their_order_where_evaluations_go_by_length(side: str, module: str) -> None:
    class Writer(BasePredictionWriter):
        def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, batch_indices: Any) -> None:
            found.append(batch_indices)

    found: list[Any] = []
    rows = make_dataset("distilbert", 7, seed=7)
    data = our_data(side, predict_dataset=rows, eval_by_length=True)
    trained = PlainModule() if module == "PlainModule" else make_module("hfbridge")
    predicted = our_trainer(side, callbacks=[Writer("epoch")]).predict(trained, data)
    assert found == [[[[0, 1, 2, 3], [4, 5, 6]]]]
    expected = make_trainer("reference").predict(PlainModule(), make_loader(7, seed=7))
    assert all(torch.equal(one, other) for one, other in zip(predicted, expected, strict=True))


@for_both
def test_predictions_leave_out_no_row(side: str) -> None:
    settings = {"dataloader_drop_last": True}
    data = our_data(side, settings=settings, predict_dataset=make_dataset("distilbert", 7, seed=7))
    predicted = our_trainer(side, settings=settings).predict(PlainModule(), data)
    assert [len(logits) for logits in predicted] == [4, 3]


# Batch size.


@for_both
def test_batch_size_is_that_of_all_loaders(side: str) -> None:
    watch = Watch()
    data = hfbridge.HFDataModule(
        train_dataset=make_dataset("distilbert", 10),
        eval_dataset=make_dataset("distilbert", 7),
        data_collator=PadRows(),
        batch_size=5,
    )
    assert data.batch_size == 5
    trainer = make_trainer(side, settings=EVALUATED, epochs=1, callbacks=[watch])
    trainer.fit(PlainModule(), data)
    assert [len(batch["labels"]) for batch in watch.batches] == [5, 5]
    assert [len(batch["labels"]) for batch in watch.validated] == [5, 2]
    data.batch_size = 2
    trainer = make_trainer(side, settings=EVALUATED, epochs=1, callbacks=[watch])
    trainer.fit(PlainModule(), data)
    assert [len(batch["labels"]) for batch in watch.batches[2:]] == [2] * 5


@for_both
def test_two_batch_sizes_are_a_contradiction(side: str) -> None:
    settings = {"per_device_train_batch_size": 2}
    data = our_data(side, settings=settings, train_dataset=make_dataset("distilbert", 10), batch_size=5)
    with pytest.raises(
        hfbridge.SettingsError, match=r"batch_size=5.* conflicts with .*per_device_train_batch_size=2"
    ):
        our_trainer(side, settings=settings).fit(make_module("hfbridge"), data)


@for_both
@pytest.mark.parametrize("module", ["PlainModule", "HFModule"])
def test_the_tuner_finds_a_batch_size(side: str, module: str) -> None:
    def scale(of_side: str, trained: Any, data: Any) -> int:
        trainer = make_trainer(of_side, epochs=1)
        found = Tuner(trainer).scale_batch_size(
            trained, datamodule=data, mode="power", init_val=2, max_trials=2, steps_per_trial=1
        )
        assert found is not None
        return found

    data = hfbridge.HFDataModule(
        train_dataset=make_dataset("distilbert", 16),
        eval_dataset=make_dataset("distilbert", 10),
        data_collator=PadRows(),
        batch_size=2,
    )
    trained = PlainModule() if module == "PlainModule" else make_module("hfbridge")
    before = weights(trained)
    plain_data = PlainData()
    assert scale(side, trained, data) == scale("reference", PlainModule(), plain_data)
    assert data.batch_size == plain_data.batch_size
    assert is_same(weights(trained), before)


# hfbridge.Trainer with any LightningModule: what settings mean.


def steep(base: type[Any]) -> type[Any]:
    """Return a loss whose gradients are clipped; log it at each step."""

    class Steep(base):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("mine", loss, on_step=True, on_epoch=False)
            return loss * 10

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Steep


def fit_any(settings: Any, *data: Any, drop: tuple[str, ...] = (), **arguments: Any) -> tuple[Any, Any]:
    """Train a plain module under our Trainer."""
    module = steep(PlainModule)()
    said = {name: value for name, value in {**SETTINGS, **settings}.items() if name not in drop}
    trainer = hfbridge.Trainer(said, **{**QUIET, **arguments})
    trainer.fit(module, *(data or (make_loader(24),)))
    return module, trainer


def fit_plain(*data: Any, **arguments: Any) -> tuple[Any, Any]:
    module = steep(PlainModule)()
    trainer = make_trainer("reference", **arguments)
    trainer.fit(module, *(data or (make_loader(24),)))
    return module, trainer


@pytest.mark.parametrize(
    ("settings", "arguments", "steps"),
    [
        ({"num_train_epochs": 2}, {"max_epochs": 2}, 12),
        ({"num_train_epochs": 1.5}, {"max_steps": 9, "max_epochs": -1}, 9),
        ({"max_steps": 5}, {"max_steps": 5, "max_epochs": -1}, 5),
        (
            {"gradient_accumulation_steps": 3, "num_train_epochs": 2},
            {"accumulate_grad_batches": 3, "max_epochs": 2},
            4,
        ),
        ({"max_grad_norm": 0.1, "max_steps": 3}, {"gradient_clip_val": 0.1, "max_steps": 3}, 3),
        ({"bf16": True, "max_steps": 3}, {"precision": "bf16-mixed", "max_steps": 3}, 3),
    ],
    ids=str,
)
def test_settings_train_any_module(settings: Any, arguments: Any, steps: int) -> None:
    ours, trainer = fit_any(settings)
    theirs, _ = fit_plain(**arguments)
    assert trainer.global_step == steps
    assert_same_weights(ours, theirs)


def test_without_a_word_any_module_gets_the_defaults_of_transformers() -> None:
    ours, trainer = fit_any({}, drop=("max_grad_norm", "learning_rate", "lr_scheduler_type", "optim"))
    theirs, _ = fit_plain(max_epochs=3, gradient_clip_val=1.0)
    assert trainer.global_step == 18
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05  # the module's own optimizer
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "epoch"}, [6, 12]),
        ({"eval_strategy": "steps", "eval_steps": 5}, [5, 10]),
        ({"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 3}, [1, 2, 3, 4]),
        ({"eval_strategy": "epoch", "eval_on_start": True}, [0, 6, 12]),
    ],
    ids=str,
)
def test_settings_say_when_any_module_is_evaluated(settings: Any, expected: list[int]) -> None:
    watch = Watch()
    loaders = make_loader(24), make_loader(10, seed=5)
    module, trainer = fit_any({"num_train_epochs": 2, **settings}, *loaders, callbacks=[watch])
    assert watch.validated_at == expected
    assert len(watch.validated) == 3 * len(expected)
    assert ("eval_loss" in trainer.callback_metrics) is bool(expected)
    theirs, _ = fit_plain(
        max_epochs=2, accumulate_grad_batches=settings.get("gradient_accumulation_steps", 1)
    )
    assert_same_weights(module, theirs)


def logged(folder: Path) -> list[tuple[str, str]]:
    """Read steps and values of what the module logs."""
    (file,) = folder.rglob("metrics.csv")
    header, *lines = [line.split(",") for line in file.read_text().splitlines()]
    found = [dict(zip(header, line, strict=True)) for line in lines]
    return [(row["step"], row["mine"]) for row in found if row.get("mine")]


def test_settings_say_when_any_module_logs() -> None:
    fit_any({"num_train_epochs": 2, "logging_steps": 5}, logger=CSVLogger("ours"))
    fit_plain(max_epochs=2, log_every_n_steps=5, logger=CSVLogger("theirs"))
    assert logged(Path("ours")) == logged(Path("theirs"))
    assert [step for step, _ in logged(Path("ours"))] == ["4", "9"]


def checkpoints(folder: str) -> dict[str, Path]:
    return {path.stem: path for path in Path(folder).glob("checkpoint-*")}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"save_strategy": "no"}, set()),
        ({"save_strategy": "steps", "save_steps": 5}, {"checkpoint-5", "checkpoint-10", "checkpoint-12"}),
        ({"save_strategy": "epoch"}, {"checkpoint-6", "checkpoint-12"}),
        ({"save_strategy": "epoch", "save_total_limit": 1}, {"checkpoint-12"}),
        (
            {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 3},
            {"checkpoint-2", "checkpoint-4"},
        ),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_settings_say_when_any_module_is_saved(settings: Any, expected: set[str]) -> None:
    fit_any({"num_train_epochs": 2, "output_dir": "here", **settings})
    assert set(checkpoints("here")) == expected


def test_any_module_resumes_from_what_was_saved() -> None:
    settings = {"num_train_epochs": 2, "save_strategy": "epoch"}
    whole, _ = fit_any(settings)
    again, watch = steep(PlainModule)(make_model("distilbert", dropout=0.0, seed=8)), Watch()
    trainer = hfbridge.Trainer({**SETTINGS, **settings, "output_dir": "again"}, callbacks=[watch], **QUIET)
    trainer.fit(again, make_loader(24), ckpt_path=str(checkpoints("out")["checkpoint-6"]))
    assert len(watch.batches) == 6
    assert_same_weights(again, whole)


def test_steps_below_1_are_shares_of_the_run_of_any_module() -> None:
    watch = Watch()
    shares = {"save_strategy": "steps", "save_steps": 0.5, "eval_strategy": "steps", "eval_steps": 0.25}
    settings = {"num_train_epochs": 1.5, "logging_steps": 0.3, **shares}
    loaders = make_loader(24), make_loader(10, seed=5)
    _, trainer = fit_any(settings, *loaders, callbacks=[watch], logger=CSVLogger("ours"))
    assert trainer.global_step == 9
    assert set(checkpoints("out")) == {"checkpoint-5", "checkpoint-9"}
    assert watch.validated_at == [3, 6, 9]
    assert [step for step, _ in logged(Path("ours"))] == ["2", "5", "8"]
    assert trainer.max_steps == -1


def test_any_module_sees_as_many_steps_as_the_settings_give() -> None:
    class Counts(PlainModule):
        def configure_optimizers(self) -> Any:
            self.steps = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    module = Counts()
    settings = {**SETTINGS, "num_train_epochs": 1.5, "gradient_accumulation_steps": 2}
    hfbridge.Trainer(settings, **QUIET).fit(module, make_loader(24))
    assert module.steps == module.trainer.global_step == 5


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_logging_strategy_of_any_module(strategy: str) -> None:
    logger = CSVLogger("ours")
    fit_any({"num_train_epochs": 2, "logging_strategy": strategy}, drop=("logging_steps",), logger=logger)
    assert not list(Path("ours").rglob("metrics.csv"))  # it logs by steps only


# Lightning: checkpoints of the run that is resumed.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("source", ["last", True, "setting"], ids=str)
def test_any_module_resumes_from_the_newest_in_output_dir(source: Any) -> None:
    settings: dict[str, Any] = {"num_train_epochs": 2, "save_strategy": "epoch"}
    whole, _ = fit_any(settings)
    checkpoints("out")["checkpoint-12"].unlink()
    again, watch = steep(PlainModule)(make_model("distilbert", dropout=0.0, seed=8)), Watch()
    settings |= {"resume_from_checkpoint": "out/checkpoint-6.ckpt"} if source == "setting" else {}
    trainer = hfbridge.Trainer({**SETTINGS, **settings}, callbacks=[watch], **QUIET)
    trainer.fit(again, make_loader(24), ckpt_path=None if source == "setting" else source)
    assert len(watch.batches) == 6
    assert_same_weights(again, whole)


def test_the_best_checkpoint_of_any_module() -> None:
    class Scored(PlainModule):
        scores = (3.0, 5.0, 4.0)

        def on_validation_epoch_end(self) -> None:
            self.log("eval_score", self.scores[self.current_epoch])

    settings = {"num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "best"}
    settings |= {"metric_for_best_model": "score", "greater_is_better": True}
    module, trainer = Scored(), hfbridge.Trainer({**SETTINGS, **settings}, **QUIET)
    trainer.fit(module, make_loader(24), make_loader(10, seed=5))
    assert set(checkpoints("out")) == {"checkpoint-12"}
    before = weights(module)
    trainer.test(module, make_loader(9, seed=6), ckpt_path="best")
    saved = torch.load(checkpoints("out")["checkpoint-12"], weights_only=False)["state_dict"]
    found = weights(module)
    assert is_same(found, {name.removeprefix("model."): value for name, value in saved.items()})
    assert not is_same(found, before)


def test_a_trainer_is_as_it_was_once_any_module_is_trained() -> None:
    watch = Watch()
    loaders = make_loader(24), make_loader(10, seed=5)
    module, trainer = fit_any({"num_train_epochs": 1}, *loaders, callbacks=[watch])
    assert watch.validated == []
    assert trainer.validate(module, loaders[1]) == make_trainer("reference").validate(module, loaders[1])
    assert len(watch.validated) == 3
    ours = make_module("hfbridge")
    trainer = hfbridge.Trainer({**SETTINGS, "bf16": True, "num_train_epochs": 1}, **QUIET)
    trainer.fit(PlainModule(), loaders[0])
    assert type(trainer.precision_plugin) is Precision
    trainer.validate(ours, loaders[1])
    assert "eval_loss" in trainer.callback_metrics


def test_any_module_has_lightnings_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**SETTINGS, "disable_tqdm": False, "num_train_epochs": 1}
    quiet = {name: value for name, value in QUIET.items() if name != "enable_progress_bar"}
    trainer = hfbridge.Trainer(settings, **quiet)
    bar = trainer.progress_bar_callback
    trainer.fit(PlainModule(), make_loader(24))
    assert "Epoch 0: 100%" in capsys.readouterr().out
    assert trainer.progress_bar_callback is bar
    assert trainer.log_history == []


def test_what_has_no_effect_with_any_module_is_named(caplog: pytest.LogCaptureFixture) -> None:
    given = {"label_smoothing_factor": 0.1, "warmup_steps": 3, "num_train_epochs": 1}
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="Mine: a TrainerCallback is called with"):
        fit_any(given, callbacks=[Mine])
    (note,) = [record.getMessage() for record in caplog.records if "without an effect" in record.getMessage()]
    assert "label_smoothing_factor, warmup_steps" in note
    assert "Steep" in note
    for name in ("num_train_epochs", "output_dir", "report_to", "use_cpu"):
        assert name not in note


class Mine(TrainerCallback):
    """A callback of transformers."""


def test_the_seed_of_the_settings_is_that_of_any_module() -> None:
    def run(seed: int, before: int) -> dict[str, torch.Tensor]:
        module = PlainModule(make_model("distilbert", dropout=0.5))
        torch.manual_seed(before)
        trainer = hfbridge.Trainer({**SETTINGS, "max_steps": 3, "seed": seed}, **QUIET)
        trainer.fit(module, make_loader(16, shuffle=True))
        return weights(module)

    first = run(5, 1)
    assert is_same(first, run(5, 2))
    assert not is_same(first, run(6, 1))


def test_any_module_is_validated_tested_and_predicted_under_our_trainer() -> None:
    module, data = PlainModule(), PlainData()
    ours, theirs = hfbridge.Trainer(SETTINGS, **QUIET), make_trainer("reference")
    assert ours.validate(module, data) == theirs.validate(module, data)
    assert ours.test(module, data) == theirs.test(module, data)
    pairs = zip(ours.predict(module, data), theirs.predict(module, data), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_what_is_no_module_is_refused_as_lightning_does() -> None:
    with pytest.raises(TypeError, match="LightningModule"):
        hfbridge.Trainer(SETTINGS, **QUIET).fit(torch.nn.Linear(2, 2), make_loader())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LightningModule"):
        pl.Trainer(accelerator="cpu", **QUIET).fit(torch.nn.Linear(2, 2), make_loader())  # type: ignore[arg-type]

"""Every form of data that Lightning takes, with HFModule and with HFDataModule, under both Trainers.

Grade: exact, against a hand-written LightningModule under lightning.Trainer (tests/lightning/plain_data.py).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from hfbridge import HFDataModule
from tests.lightning.plain_data import (
    RATE,
    PlainData,
    PlainModule,
    RowsOneByOne,
    Watch,
    assert_close_weights,
    assert_same_weights,
    fit,
    for_both,
    is_same,
    make_loader,
    make_module,
    make_trainer,
    our_data,
    our_trainer,
    weights,
)
from tests.tiny import IGNORED, PadRows, make_dataset, make_model, make_rows

pytestmark = [
    # Lightning's advice: a validation_step without a loader, a checkpoint in mid-epoch.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    # Lightning: the run that resumes does not write checkpoints as the first one did.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    # torchdata 0.11: calls a function that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
]
EVALUATED = {"eval_strategy": "epoch"}
for_verbs = pytest.mark.parametrize("verb", ["validate", "test", "predict"])
PREFIX = {"validate": "eval", "test": "test"}


# One loader.


def shuffled_loader() -> DataLoader[Any]:
    """Draw the order from a generator of its own: a second look at the loader would change it."""
    return make_loader(16, shuffle=True, generator=torch.Generator().manual_seed(5))


@for_both
@pytest.mark.parametrize("form", ["positional", "by name", "train only"])
def test_fit_takes_loaders(side: str, form: str) -> None:
    def run(of_side: str) -> tuple[Any, Any, Watch]:
        watch, train, val = Watch(), shuffled_loader(), make_loader(10, seed=5)
        loaders = {"positional": (train, val), "by name": (), "train only": (train,)}[form]
        named = {"train_dataloaders": train, "val_dataloaders": val} if form == "by name" else {}
        settings = {"gradient_accumulation_steps": 2, **({} if form == "train only" else EVALUATED)}
        return *fit(of_side, *loaders, named=named, settings=settings, callbacks=[watch]), watch

    ours, trainer, seen = run(side)
    theirs, plain, expected = run("reference")
    assert_same_weights(ours, theirs)
    assert seen.rows == expected.rows
    assert seen.indices == [0, 1, 2, 3] * 2
    assert trainer.global_step == plain.global_step == 4
    assert seen.validated_at == expected.validated_at == ([] if form == "train only" else [2, 4])
    if form != "train only":
        # HFModule averages over rows, Lightning over batches by their size: the sums differ.
        loss = plain.callback_metrics["eval_loss"]
        assert float(trainer.callback_metrics["eval_loss"]) == pytest.approx(float(loss), rel=1e-6)


@for_both
@for_verbs
@pytest.mark.parametrize("named", [False, True], ids=["positional", "by name"])
def test_an_evaluation_takes_a_loader(side: str, verb: str, named: bool) -> None:
    def run(of_side: str) -> list[Any]:
        call, loader = getattr(make_trainer(of_side), verb), make_loader(10, seed=5)
        module = make_module(of_side)
        return call(module, dataloaders=loader) if named else call(module, loader)  # type: ignore[no-any-return]

    ours, theirs = run(side), run("reference")
    if verb == "predict":
        assert [len(logits) for logits in ours] == [4, 4, 2]
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    else:
        name = f"{PREFIX[verb]}_loss"
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-6)


@for_both
def test_loaders_of_the_module(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class WithLoaders(base):  # type: ignore[misc]
            def train_dataloader(self) -> Any:
                return shuffled_loader()

            def val_dataloader(self) -> Any:
                return make_loader(10, seed=5)

            def predict_dataloader(self) -> Any:
                return make_loader(5, seed=7)

        return WithLoaders

    watch = Watch()
    ours, trainer = fit(side, make_class=make_class, settings=EVALUATED, callbacks=[watch])
    theirs, _ = fit("reference", make_class=make_class)
    assert_same_weights(ours, theirs)
    assert watch.validated_at == [4, 8]
    assert [len(logits) for logits in trainer.predict(ours)] == [4, 1]


# Several loaders.


def several(form: str) -> Any:
    """Make loaders of 4 and 2 batches in a form."""
    long, short = make_loader(16), make_loader(8, seed=4)
    if form == "list":
        return [long, short]
    loaders = {"long": long, "short": short}
    return loaders if form == "dict" else CombinedLoader(loaders, form)


def takes_several(base: type[Any]) -> type[Any]:
    """Train and evaluate on batches of several loaders."""

    class TakesSeveral(base):  # type: ignore[misc]
        def loss_of(self, batch: Any) -> Any:
            parts = batch if isinstance(batch, (list, tuple)) else batch.values()
            losses = [self.model(**part).loss for part in parts if part is not None]
            return sum(weight * loss for weight, loss in zip([1.0, 0.5], losses, strict=False))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss_of(batch)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("both_loss", self.loss_of(batch), batch_size=1)

    return TakesSeveral


@for_both
@pytest.mark.parametrize(
    ("form", "batches"), [("list", 4), ("dict", 4), ("min_size", 2), ("max_size_cycle", 4), ("max_size", 4)]
)
def test_fit_takes_several_loaders(side: str, form: str, batches: int) -> None:
    settings = {"gradient_accumulation_steps": 2}
    ours, trainer = fit(side, several(form), make_class=takes_several, settings=settings)
    theirs, plain = fit("reference", several(form), make_class=takes_several, settings=settings)
    assert_same_weights(ours, theirs)
    assert trainer.num_training_batches == plain.num_training_batches == batches
    assert trainer.global_step == plain.global_step == batches


@for_both
def test_validation_takes_batches_of_several_loaders(side: str) -> None:
    def run(of_side: str) -> tuple[list[Any], Watch]:
        watch = Watch()
        trainer = make_trainer(of_side, callbacks=[watch])
        found = trainer.validate(make_module(of_side, takes_several), several("max_size_cycle"))
        return found, watch

    (ours, seen), (theirs, _) = run(side), run("reference")
    assert ours[0]["both_loss"] == theirs[0]["both_loss"]
    assert [set(batch) for batch in seen.validated] == [{"long", "short"}] * 4


@for_both
@for_verbs
@pytest.mark.parametrize("form", ["list", "dict", "sequential"])
def test_an_evaluation_takes_loaders_one_after_the_other(side: str, verb: str, form: str) -> None:
    def run(of_side: str) -> tuple[list[Any], Any]:
        trainer = make_trainer(of_side)
        return getattr(trainer, verb)(make_module(of_side), several(form)), trainer

    (ours, trainer), (theirs, _) = run(side), run("reference")
    if verb == "predict":
        assert [[len(logits) for logits in part] for part in ours] == [[4] * 4, [4] * 2]
        assert all(torch.equal(torch.cat(a), torch.cat(b)) for a, b in zip(ours, theirs, strict=True))
        return
    found = {name: value for of_one in ours for name, value in of_one.items()}
    for index, of_one in enumerate(theirs):
        name = f"{PREFIX[verb]}_loss/dataloader_idx_{index}"
        assert found[name] == pytest.approx(of_one[name], rel=1e-6)
        assert float(trainer.callback_metrics[name]) == pytest.approx(of_one[name], rel=1e-6)
        if side == "hfbridge":
            numbers = {name.partition("/dataloader_idx_")[2] for name in ours[index]}
            assert ours[index][name] == found[name]
            assert numbers <= {"", str(index)}
    assert len(ours) == len(theirs)


@for_both
def test_fit_evaluates_several_loaders(side: str) -> None:
    _, trainer = fit(side, make_loader(16), several("list"), settings=EVALUATED)
    _, plain = fit("reference", make_loader(16), several("list"))
    for index in range(2):
        name = f"eval_loss/dataloader_idx_{index}"
        expected = float(plain.callback_metrics[name])
        assert float(trainer.callback_metrics[name]) == pytest.approx(expected, rel=1e-6)


# A LightningDataModule.


@for_both
@pytest.mark.parametrize("form", ["positional", "by name"])
def test_a_users_data_module(side: str, form: str) -> None:
    def run(of_side: str) -> tuple[Any, ...]:
        data = PlainData()
        place: tuple[Any, ...] = (data,) if form == "positional" else ()
        named = {"datamodule": data} if form == "by name" else {}
        watch = Watch()
        module, trainer = fit(of_side, *place, named=named, settings=EVALUATED, callbacks=[watch])
        found = [getattr(trainer, verb)(module, *place, **named) for verb in ("validate", "test", "predict")]
        return module, data, watch, found

    ours, data, seen, (validated, tested, predicted) = run(side)
    theirs, plain, expected, (validated_plainly, tested_plainly, predicted_plainly) = run("reference")
    assert_same_weights(ours, theirs)
    assert data.stages == plain.stages
    assert max(int(batch["input_ids"].max()) for batch in seen.batches) == 20  # its hook was called
    assert seen.validated_at == expected.validated_at
    assert validated[0]["eval_loss"] == pytest.approx(validated_plainly[0]["eval_loss"], rel=1e-6)
    assert tested[0]["test_loss"] == pytest.approx(tested_plainly[0]["test_loss"], rel=1e-6)
    assert [len(logits) for logits in predicted] == [4, 3]
    assert torch.equal(torch.cat(predicted), torch.cat(predicted_plainly))


# Iterable and stateful loaders.


@for_both
def test_the_loader_of_an_iterable_dataset(side: str) -> None:
    def run(of_side: str) -> tuple[Any, Any, Watch]:
        watch = Watch()
        loader = DataLoader(RowsOneByOne(10), batch_size=4, collate_fn=PadRows())
        val = DataLoader(RowsOneByOne(6, seed=5), batch_size=4, collate_fn=PadRows())
        settings = {"max_steps": 5, **EVALUATED}
        return *fit(of_side, loader, val, settings=settings, callbacks=[watch]), watch

    ours, trainer, seen = run(side)
    theirs, plain, expected = run("reference")
    assert_same_weights(ours, theirs)
    assert trainer.global_step == 5
    assert seen.rows == expected.rows
    assert len(seen.rows) == 10 + 8  # an epoch of three batches, and two of the next
    assert expected.validated_at[0] == seen.validated_at[0] == 3
    loss = float(plain.callback_metrics["eval_loss"])
    if expected.validated_at == seen.validated_at:
        assert float(trainer.callback_metrics["eval_loss"]) == pytest.approx(loss, rel=1e-6)


@for_both
@for_verbs
def test_an_evaluation_takes_the_loader_of_an_iterable_dataset(side: str, verb: str) -> None:
    def run(of_side: str) -> Any:
        loader = DataLoader(RowsOneByOne(6), batch_size=4, collate_fn=PadRows())
        return getattr(make_trainer(of_side), verb)(make_module(of_side), loader)

    ours, theirs = run(side), run("reference")
    if verb == "predict":
        assert torch.equal(torch.cat(ours), torch.cat(theirs))
    else:
        name = f"{PREFIX[verb]}_loss"
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-6)


def stateful_loader(count: int = 24) -> Any:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    return stateful.StatefulDataLoader(
        make_rows("distilbert", count), batch_size=4, collate_fn=PadRows(), shuffle=False
    )


def assert_resumes(side: str, source: Path, whole: Any, watch: Watch, settings: Any) -> None:
    """Resume a run of 6 batches an epoch, two a step, after its first step."""
    seen = Watch()
    again = make_module(side, settings=settings, model=make_model("distilbert", dropout=0.0, seed=8))
    trainer = make_trainer(side, settings=settings, callbacks=[seen])
    trainer.fit(again, stateful_loader(), ckpt_path=str(source), weights_only=False)
    assert trainer.global_step == 6
    assert seen.rows == watch.rows[8:]  # neither a row twice nor one left out
    assert_same_weights(again, whole)


@for_both
def test_a_stateful_loader_resumes_in_mid_epoch(side: str) -> None:
    settings = {"gradient_accumulation_steps": 2}
    for of_side in ("reference", side):
        watch = Watch()
        folder = Path(f"kept-{of_side}")
        kept = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        whole, _ = fit(of_side, stateful_loader(), settings=settings, callbacks=[watch, kept])
        assert_resumes(of_side, folder / "step=1.ckpt", whole, watch, settings)


def test_a_stateful_loader_resumes_from_a_checkpoint_of_the_settings() -> None:
    settings = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1}
    watch = Watch()
    whole, _ = fit("hfbridge", stateful_loader(), settings=settings, callbacks=[watch])
    assert_resumes("hfbridge", Path("out/checkpoint-1"), whole, watch, {**settings, "output_dir": "again"})


def endless_loader(count: int = 14) -> Any:
    """Make a stateful loader without a length, of 4 micro-batches, the last of them short."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    return stateful.StatefulDataLoader(RowsOneByOne(count), batch_size=4, collate_fn=PadRows())


@pytest.mark.parametrize("module", ["PlainModule", "HFModule"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_stateful_loader_without_a_length_resumes_after_the_step_that_was_taken(
    module: str, step: int
) -> None:
    settings = {"gradient_accumulation_steps": 2, "max_steps": 4}

    def fit_endless(watch: Watch, **arguments: Any) -> Any:
        model = make_model("distilbert", dropout=0.0)
        trained = PlainModule(model) if module == "PlainModule" else make_module("hfbridge", model=model)
        trainer = make_trainer("hfbridge", settings=settings, callbacks=[watch, *arguments.pop("more", ())])
        trainer.fit(trained, endless_loader(), **arguments)
        assert trainer.global_step == 4
        return trained

    watch, seen = Watch(), Watch()
    kept = ModelCheckpoint(dirpath="kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit_endless(watch, more=[kept])
    again = fit_endless(seen, ckpt_path=f"kept/step={step}.ckpt", weights_only=False)
    assert [len(batch["labels"]) for batch in watch.batches] == [4, 4, 4, 2] * 2
    assert seen.rows == watch.rows[[8, 14, 22][step - 1] :]
    assert_same_weights(again, whole)


# How the loss is normalised.


def causal_loader(*, length: int = 10) -> DataLoader[Any]:
    """Make 5 micro-batches, of which each has another number of labels; the last one is short."""
    rows = make_rows("llama", 18, seed=9)
    for index, row in enumerate(rows):
        keep = 2 + index % (len(row["labels"]) - 1)
        row["labels"] = [token if at <= keep else IGNORED for at, token in enumerate(row["labels"])]
    return DataLoader(rows, batch_size=4, collate_fn=PadRows(length))  # type: ignore[arg-type]


def train_by_hand(model: Any, batches: list[Any], *, accumulation: int, exact: bool) -> Any:
    """Write the loop: with the mean over all labels of a step, or with the mean of the batches' means."""
    for start in range(0, len(batches), accumulation):
        step = batches[start : start + accumulation]
        items = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in step)
        model.zero_grad()
        for batch in step:
            loss = model(**batch, **({"num_items_in_batch": items} if exact else {})).loss
            (loss if exact else loss / accumulation).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
    return model


def weights_by_hand(*, exact: bool) -> dict[str, torch.Tensor]:
    model = train_by_hand(
        make_model("llama", dropout=0.0), list(causal_loader()), accumulation=2, exact=exact
    )
    return dict(model.state_dict())


def fit_causal(side: str, *, accumulation: int = 2) -> Any:
    module, _ = fit(
        side,
        causal_loader(),
        epochs=1,
        settings={"gradient_accumulation_steps": accumulation},
        given={"model": make_model("llama", dropout=0.0)},
    )
    return module


def test_a_foreign_loader_is_exact_under_our_trainer() -> None:
    found = weights(fit_causal("hfbridge"))
    assert is_same(found, weights_by_hand(exact=True))
    assert not is_same(found, weights_by_hand(exact=False))


def test_a_plain_trainer_takes_the_mean_of_means_and_a_note_says_so() -> None:
    module, reference = fit_causal("lightning"), fit_causal("reference")
    assert is_same(weights(module), weights(reference))
    assert is_same(weights(module), weights_by_hand(exact=False))
    assert any("accumulate_grad_batches" in note and "mean" in note for note in module.notes)


@pytest.mark.parametrize(("side", "accumulation"), [("lightning", 1), ("hfbridge", 2)])
def test_without_a_difference_there_is_no_note(side: str, accumulation: int) -> None:
    module = fit_causal(side, accumulation=accumulation)
    assert not any("accumulate_grad_batches" in note for note in module.notes)


def test_a_model_that_returns_means_is_exact_too() -> None:
    rows = make_rows("distilbert", 10)  # micro-batches of 4, 4 and 2 rows make one step
    ours, _ = fit(
        "hfbridge",
        DataLoader(rows, batch_size=4, collate_fn=PadRows(12)),  # type: ignore[arg-type]
        settings={"gradient_accumulation_steps": 3},
    )
    whole = DataLoader(rows, batch_size=10, collate_fn=PadRows(12))  # type: ignore[arg-type]
    theirs, _ = fit("reference", whole)
    assert_close_weights(ours, theirs)  # one sum over 10 rows there, three here


# Testing, predicting, validating.


@for_both
def test_test_gives_metrics_of_the_test_set(side: str) -> None:
    module = make_module(side, compute_metrics=lambda found: {"rows": float(len(found.predictions))})
    data = our_data(
        "hfbridge",
        eval_dataset=make_dataset("distilbert", 10, seed=5),
        test_dataset=make_dataset("distilbert", 9, seed=6),
    )
    trainer = our_trainer(side)
    (found,) = trainer.test(module, data)
    (expected,) = make_trainer("reference").test(PlainModule(), make_loader(9, seed=6))
    assert found["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-6)
    assert found["test_rows"] == 9.0
    assert not any(name.startswith("eval_") for name in found)
    assert float(trainer.callback_metrics["test_loss"]) == pytest.approx(expected["test_loss"], rel=1e-6)


class Writer(BasePredictionWriter):
    """Keep what is predicted with its indices."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.of_batches: list[Any] = []
        self.of_epoch: list[Any] = []

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, *batch: Any
    ) -> None:
        self.of_batches.append(batch_indices)

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.of_epoch.append((predictions, batch_indices))


@for_both
@pytest.mark.parametrize("source", ["loader", "HFDataModule"])
@pytest.mark.parametrize("module", ["PlainModule", "HFModule"])
def test_predictions_come_with_the_indices_of_their_rows(side: str, source: str, module: str) -> None:
    writer = Writer()
    data: Any = make_loader(7, seed=7)
    if source == "HFDataModule":
        data = our_data(side, predict_dataset=make_dataset("distilbert", 7, seed=7))
    trained = PlainModule() if module == "PlainModule" else make_module("hfbridge")
    predicted = our_trainer(side, callbacks=[writer]).predict(trained, data)
    assert writer.of_batches == [[0, 1, 2, 3], [4, 5, 6]]
    ((found, indices),) = writer.of_epoch
    assert indices == [[[0, 1, 2, 3], [4, 5, 6]]]
    assert all(torch.equal(one, other) for one, other in zip(found, predicted, strict=True))


@for_both
def test_validate_with_the_best_weights(side: str) -> None:
    def run(of_side: str) -> tuple[float, float, float]:
        # The largest loss is the first one: the best weights are not the last.
        kept = ModelCheckpoint(dirpath=f"kept-{of_side}", monitor="eval_loss", mode="max")
        loaders = make_loader(16), make_loader(16)
        module, trainer = fit(of_side, *loaders, epochs=3, settings=EVALUATED, callbacks=[kept])
        (last,) = trainer.validate(module, loaders[1])
        (best,) = trainer.validate(module, loaders[1], ckpt_path="best", weights_only=False)
        assert kept.best_model_score is not None
        return float(last["eval_loss"]), float(best["eval_loss"]), float(kept.best_model_score)

    last, best, score = run(side)
    assert best == pytest.approx(score, rel=1e-6)
    assert last < best - 1e-3
    assert (last, best, score) == pytest.approx(run("reference"), rel=1e-6)


@for_both
def test_a_second_fit_of_a_trainer(side: str) -> None:
    def run(of_side: str) -> tuple[Any, list[Any], Watch]:
        watch = Watch()
        module, trainer = fit(of_side, make_loader(16), epochs=1, callbacks=[watch])
        counts = [(trainer.global_step, trainer.current_epoch, len(watch.batches))]
        first = weights(module)
        trainer.fit(module, make_loader(16))  # the epochs are over
        counts.append((trainer.global_step, trainer.current_epoch, len(watch.batches)))
        assert is_same(weights(module), first)
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, make_loader(16))
        counts.append((trainer.global_step, trainer.current_epoch, len(watch.batches)))
        return module, counts, watch

    ours, counts, seen = run(side)
    theirs, expected, watch = run("reference")
    assert counts == expected
    assert counts[-1] == (12, 3, 12)
    assert seen.rows == watch.rows
    assert_same_weights(ours, theirs)


@for_both
@pytest.mark.parametrize("first", [{"num_train_epochs": 1}, {"max_steps": 3}])
def test_limits_set_between_fits(side: str, first: dict[str, Any]) -> None:
    def run(of_side: str) -> list[int]:
        module, trainer = fit(of_side, make_loader(16), settings=first, epochs=1)
        taken = [trainer.global_step]
        for epochs, steps in ((3, -1), (-1, 17), (8, 19), (5, 100)):
            trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = epochs, steps
            trainer.fit(module, make_loader(16))
            taken.append(trainer.global_step)
        return taken

    assert run(side) == run("reference")


@for_both
def test_loaders_after_a_data_module(side: str) -> None:
    def run(of_side: str, later: bool) -> tuple[Any, list[Any]]:
        module, trainer = make_module(of_side, epochs=1), make_trainer(of_side, epochs=1)
        if later:  # Lightning keeps the data module, and does not read it again
            data = HFDataModule(make_rows("distilbert", 4, seed=3), data_collator=PadRows(), batch_size=4)
            trainer.fit(module, datamodule=data)
        else:
            trainer.fit(module, make_loader(4))
        found: list[Any] = [trainer.validate(module, make_loader(8, seed=9))[0]["eval_loss"]]
        found += [trainer.test(module, make_loader(8, seed=9))[0]["test_loss"]]
        found += [torch.cat(trainer.predict(module, make_loader(8, seed=9)))]
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, make_loader(12, seed=4))
        return module, [*found, trainer.global_step]

    (ours, found), (theirs, expected) = run(side, later=True), run("reference", later=False)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-6)
    assert torch.allclose(found[2], expected[2])
    assert found[3] == expected[3] == 4
    assert_close_weights(ours, theirs)  # the data module shuffles the rows of a batch


@for_both
def test_another_module_in_the_second_fit(side: str) -> None:
    _, trainer = fit(side, make_loader(16), epochs=1)
    trainer.fit_loop.max_epochs = 2
    other = make_module(side, settings={}, epochs=1)
    trainer.fit(other, make_loader(16))
    theirs, _ = fit("reference", make_loader(16), epochs=1)
    assert_same_weights(other, theirs)

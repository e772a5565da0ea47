"""Every hook of a LightningModule, overridden in a subclass of HFModule, under both Trainers.

Grade: exact, against the same override of a hand-written LightningModule under lightning.Trainer
(tests/lightning/plain_data.py).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hfbridge
from tests.lightning.plain_data import (
    RATE,
    SETTINGS,
    MakeClass,
    PlainModule,
    Watch,
    assert_close_weights,
    assert_same_weights,
    fit,
    fit_both,
    for_both,
    is_same,
    make_loader,
    make_module,
    make_trainer,
    weights,
)
from tests.tiny import PadRows, make_dataset, make_model

# Lightning's advice: a validation_step without a loader.
pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
EVALUATED = {"eval_strategy": "epoch"}
for_super = pytest.mark.parametrize("calls_super", [True, False], ids=["super", "alone"])


# Steps.


@for_both
@for_super
@pytest.mark.parametrize("source", ["loader", "HFDataModule"])
def test_training_step(side: str, calls_super: bool, source: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Doubled(base):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                assert isinstance(batch, dict)
                self.__dict__.setdefault("seen", []).append((batch_idx, len(batch["labels"])))
                if calls_super:
                    return 2 * super().training_step(batch, batch_idx)
                return 2 * self.model(**batch).loss

        return Doubled

    settings = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
    }
    data: Any = make_loader(16)
    if source == "HFDataModule":
        data = hfbridge.HFDataModule(train_dataset=make_dataset("distilbert", 16), data_collator=PadRows())
    ours, trainer = fit(side, data, make_class=make_class, settings=settings)
    theirs, plain = fit("reference", make_loader(16), make_class=make_class, settings=settings)
    assert ours.seen == theirs.seen == [(index, 4) for index in range(4)] * 2
    assert trainer.global_step == plain.global_step == 4
    assert_same_weights(ours, theirs)


@for_both
def test_training_step_with_the_batch_only(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Short(base):  # type: ignore[misc]
            def training_step(self, batch: Any) -> Any:
                return self.model(**batch).loss

        return Short

    ours, _, theirs, _ = fit_both(side, make_class)
    assert_same_weights(ours, theirs)


@for_both
def test_training_step_returns_a_dict(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Returns(base):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                outputs = self.model(**batch)
                return {"loss": outputs.loss, "logits": outputs.logits.detach()}

        return Returns

    watches = {"reference": Watch(), side: Watch()}
    modules = [
        fit(of_side, make_loader(16), make_class=make_class, callbacks=[watch])[0]
        for of_side, watch in watches.items()
    ]
    assert_same_weights(modules[1], modules[0])
    pairs = zip(watches["reference"].outputs, watches[side].outputs, strict=True)
    for theirs, ours in pairs:
        assert set(ours) == set(theirs) == {"loss", "logits"}
        assert torch.equal(ours["loss"], theirs["loss"])
        assert torch.equal(ours["logits"], theirs["logits"])


@for_both
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_training_step_skips_a_batch(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Skips(base):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return None if batch_idx == 1 else self.model(**batch).loss

        return Skips

    ours, trainer, theirs, plain = fit_both(side, make_class)
    assert_same_weights(ours, theirs)
    assert trainer.global_step == plain.global_step
    everything, _ = fit("reference", make_loader(16))
    assert not is_same(weights(ours), weights(everything))


def evaluates(name: str, *, calls_super: bool) -> MakeClass:
    """Override an evaluation step: log a metric of one's own."""

    def make_class(base: type[Any]) -> type[Any]:
        def step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            assert not self.model.training
            assert not torch.is_grad_enabled()
            if calls_super:
                getattr(super(Evaluates, self), name)(batch, batch_idx, dataloader_idx)
            share = (self.model(**batch).logits.argmax(-1) == batch["labels"]).float().mean()
            self.log("share", share, batch_size=len(batch["labels"]))
            return share

        class Evaluates(base):  # type: ignore[misc]
            pass

        setattr(Evaluates, name, step)
        return Evaluates

    return make_class


@for_both
@for_super
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_evaluation_steps(side: str, calls_super: bool, verb: str) -> None:
    make_class = evaluates("validation_step" if verb == "validate" else "test_step", calls_super=calls_super)

    def run(of_side: str) -> tuple[Any, Any]:
        trainer = make_trainer(of_side)
        (found,) = getattr(trainer, verb)(make_module(of_side, make_class), make_loader(10, seed=5))
        return found, trainer

    (ours, trainer), (theirs, _) = run(side), run("reference")
    assert ours["share"] == theirs["share"]
    assert 0 < ours["share"] < 1
    assert float(trainer.callback_metrics["share"]) == theirs["share"]
    name = "eval_loss" if verb == "validate" else "test_loss"
    assert (name in ours) is calls_super
    if calls_super:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6)


@for_both
@for_super
def test_validation_step_within_fit(side: str, calls_super: bool) -> None:
    make_class = evaluates("validation_step", calls_super=calls_super)
    ours, trainer, theirs, plain = fit_both(side, make_class, loaders=2, settings=EVALUATED)
    assert_same_weights(ours, theirs)
    assert trainer.callback_metrics["share"] == plain.callback_metrics["share"]
    assert ("eval_loss" in trainer.callback_metrics) is calls_super


@for_both
@for_super
def test_predict_step(side: str, calls_super: bool) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Classes(base):  # type: ignore[misc]
            def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
                if calls_super:
                    return super().predict_step(batch, batch_idx, dataloader_idx).argmax(-1)
                return self.model(**batch).logits.argmax(-1)

        return Classes

    def run(of_side: str) -> Any:
        return make_trainer(of_side).predict(make_module(of_side, make_class), make_loader(10, seed=5))

    ours, theirs = run(side), run("reference")
    assert [len(classes) for classes in ours] == [4, 4, 2]
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


# Optimizers and schedules.


def decaying(self: Any, **scheduler: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return optimizer, ({"scheduler": decay, **scheduler} if scheduler else decay)


def as_dict(self: Any, **scheduler: Any) -> Any:
    optimizer, config = decaying(self, **scheduler)
    return {"optimizer": optimizer, "lr_scheduler": config}


def on_plateau(self: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=0, threshold=10.0, threshold_mode="abs"
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "eval_loss"}}


@for_both
@pytest.mark.parametrize(
    ("configure", "rates"),
    [
        (lambda self: torch.optim.SGD(self.parameters(), lr=0.2), [0.2] * 8),
        (lambda self: torch.optim.AdamW(self.parameters(), lr=0.01), [0.01] * 8),
        (lambda self: [torch.optim.SGD(self.parameters(), lr=0.2)], [0.2] * 8),
        (lambda self: {"optimizer": torch.optim.SGD(self.parameters(), lr=0.2)}, [0.2] * 8),
        # The rate is read when the batch has ended, and the schedule has moved on.
        (lambda self: tuple([part] for part in decaying(self)), [0.2] * 3 + [0.1] * 4 + [0.05]),
        (as_dict, [0.2] * 3 + [0.1] * 4 + [0.05]),
        (
            lambda self: as_dict(self, interval="step", frequency=2),
            [0.2, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.0125],
        ),
        (on_plateau, [0.2] * 8),
    ],
    ids=["optimizer", "AdamW", "list", "dict", "two lists", "per epoch", "per two steps", "plateau"],
)
def test_configure_optimizers(side: str, configure: Callable[[Any], Any], rates: list[float]) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Configured(base):  # type: ignore[misc]
            def configure_optimizers(self) -> Any:
                return configure(self)

        return Configured

    watches = {"reference": Watch(), side: Watch()}
    found = [
        fit(
            of_side,
            make_loader(16),
            make_loader(10, seed=5),
            make_class=make_class,
            settings=EVALUATED,
            epochs=2 if configure is not on_plateau else 3,
            callbacks=[watch],
        )
        for of_side, watch in watches.items()
    ]
    (theirs, _), (ours, trainer) = found
    assert watches[side].rates == watches["reference"].rates
    assert watches[side].rates[:8] == pytest.approx(rates)
    if configure is on_plateau:
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)  # halved twice
    assert_same_weights(ours, theirs)


@for_both
def test_a_schedule_of_steps_counts_optimizer_steps(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Configured(base):  # type: ignore[misc]
            def configure_optimizers(self) -> Any:
                return as_dict(self, interval="step", frequency=1)

        return Configured

    ours, trainer, theirs, plain = fit_both(side, make_class, settings={"gradient_accumulation_steps": 2})
    assert_same_weights(ours, theirs)
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == plain.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.2 / 2**4)


@for_both
def test_configure_optimizers_changes_what_the_settings_make(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Changed(base):  # type: ignore[misc]
            def configure_optimizers(self) -> Any:
                found = super().configure_optimizers()
                optimizer = found["optimizer"] if isinstance(found, dict) else found
                optimizer = optimizer[0][0] if isinstance(optimizer, (list, tuple)) else optimizer
                for group in optimizer.param_groups:
                    group["momentum"] = 0.9
                return found

        return Changed

    ours, _, theirs, _ = fit_both(side, make_class)
    assert_same_weights(ours, theirs)
    without, _ = fit("reference", make_loader(16))
    assert not is_same(weights(ours), weights(without))


@for_both
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_configure_optimizers_returns_none(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Nothing(base):  # type: ignore[misc]
            def configure_optimizers(self) -> Any:
                return None

        return Nothing

    ours, trainer, theirs, plain = fit_both(side, make_class)
    assert trainer.global_step == plain.global_step
    assert is_same(weights(ours), weights(theirs))
    assert is_same(weights(ours), make_model("distilbert", dropout=0.0).state_dict())


@for_both
def test_the_rate_in_the_log_is_that_of_the_users_optimizer(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Configured(base):  # type: ignore[misc]
            def configure_optimizers(self) -> Any:
                return as_dict(self, interval="step", frequency=1)

        return Configured

    module, _ = fit(side, make_loader(16), make_class=make_class, epochs=1)
    rates = [entry["learning_rate"] for entry in module.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.2, 0.1, 0.05, 0.025])


@for_both
@for_super
def test_lr_scheduler_step(side: str, calls_super: bool) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Twice(base):  # type: ignore[misc]
            def configure_optimizers(self) -> Any:
                return as_dict(self, interval="step", frequency=1)

            def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
                assert metric is None
                for _ in range(2):
                    if calls_super:
                        super().lr_scheduler_step(scheduler, metric)
                    else:
                        scheduler.step()

        return Twice

    ours, trainer, theirs, _ = fit_both(side, make_class)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.2 / 4**8)
    assert_same_weights(ours, theirs)


@for_both
def test_lr_scheduler_step_of_the_settings_schedule(side: str) -> None:
    calls: list[Any] = []

    def make_class(base: type[Any]) -> type[Any]:
        class Still(base):  # type: ignore[misc]
            def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
                calls.append(metric)  # the rate stays where it is

        return Still

    settings = {"lr_scheduler_type": "linear", "gradient_accumulation_steps": 2}
    ours, trainer = fit(side, make_loader(16), make_class=make_class, settings=settings)
    theirs, _ = fit("reference", make_loader(16), settings={"gradient_accumulation_steps": 2})
    assert calls == [None] * 4
    assert trainer.optimizers[0].param_groups[0]["lr"] == RATE
    assert_same_weights(ours, theirs)


@for_both
@for_super
def test_optimizer_step(side: str, calls_super: bool) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class WarmsUp(base):  # type: ignore[misc]
            steps = 0

            def optimizer_step(
                self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
            ) -> None:
                type(self).steps += 1
                for group in optimizer.param_groups:
                    group["lr"] = RATE * self.steps / 4
                if calls_super:
                    super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
                else:
                    optimizer.step(closure=optimizer_closure)

        return WarmsUp

    ours, _, theirs, _ = fit_both(side, make_class, settings={"gradient_accumulation_steps": 2})
    assert type(ours).steps == type(theirs).steps == 4
    assert_same_weights(ours, theirs)


@for_both
def test_optimizer_step_leaves_steps_out(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class EverySecond(base):  # type: ignore[misc]
            def optimizer_step(
                self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
            ) -> None:
                if batch_idx % 2 == 0:
                    optimizer.step(closure=optimizer_closure)
                else:
                    optimizer_closure()  # gradients only

        return EverySecond

    ours, trainer, theirs, plain = fit_both(side, make_class)
    assert trainer.global_step == plain.global_step
    assert_same_weights(ours, theirs)


@for_both
@for_super
def test_optimizer_zero_grad(side: str, calls_super: bool) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Keeps(base):  # type: ignore[misc]
            def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
                if batch_idx % 2 == 0:  # the gradients of two steps add up
                    if calls_super:
                        super().optimizer_zero_grad(epoch, batch_idx, optimizer)
                    else:
                        optimizer.zero_grad(set_to_none=False)

        return Keeps

    ours, _, theirs, _ = fit_both(side, make_class)
    assert_same_weights(ours, theirs)
    cleared, _ = fit("reference", make_loader(16))
    assert not is_same(weights(ours), weights(cleared))


@for_both
@pytest.mark.parametrize(
    ("how", "value", "algorithm"),
    [("super", 0.1, "norm"), ("super", 0.01, "value"), ("alone", 0.1, "norm"), ("alone", 0.01, "value")],
)
def test_configure_gradient_clipping(side: str, how: str, value: float, algorithm: str) -> None:
    given: list[Any] = []

    def make_class(base: type[Any]) -> type[Any]:
        class Clips(base):  # type: ignore[misc]
            def configure_gradient_clipping(
                self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
            ) -> None:
                given.append(gradient_clip_val)
                if how == "super":
                    super().configure_gradient_clipping(optimizer, value, algorithm)
                else:
                    self.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm=algorithm)

        return Clips

    ours, _, theirs, _ = fit_both(side, make_class, settings={"gradient_accumulation_steps": 2})
    assert len(given) == 8
    assert not any(given)  # max_grad_norm=0, and no gradient_clip_val
    free, _ = fit("reference", make_loader(16), settings={"gradient_accumulation_steps": 2})
    assert not is_same(weights(ours), weights(free))
    if algorithm == "value":
        assert_same_weights(ours, theirs)
    else:
        assert_close_weights(ours, theirs)  # the norm is summed in the order of the parameter groups


@for_both
def test_configure_gradient_clipping_gets_max_grad_norm(side: str) -> None:
    given: list[Any] = []

    def make_class(base: type[Any]) -> type[Any]:
        class Looks(base):  # type: ignore[misc]
            def configure_gradient_clipping(
                self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
            ) -> None:
                given.append(gradient_clip_val)
                super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

        return Looks

    settings = {"max_grad_norm": 0.1}
    ours, _ = fit(side, make_loader(16), make_class=make_class, settings=settings)
    theirs, _ = fit("reference", make_loader(16), gradient_clip_val=0.1)
    assert given == [0.1] * 8
    assert_close_weights(ours, theirs)  # the norm is summed in the order of the parameter groups


# Manual optimization.


def by_hand(base: type[Any]) -> type[Any]:
    """Optimize by hand, with two optimizers and a schedule."""

    class ByHand(base):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            body, head = self.optimizers()
            loss = self.model(**batch).loss
            body.zero_grad()
            head.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(body, gradient_clip_val=0.01, gradient_clip_algorithm="value")
            body.step()
            if batch_idx % 2:
                head.step()
            self.lr_schedulers().step()
            self.log("mine", loss.detach(), prog_bar=True)

        def configure_optimizers(self) -> Any:
            parts: dict[bool, list[Any]] = {True: [], False: []}
            for name, parameter in self.model.named_parameters():
                parts[name.startswith("classifier")].append(parameter)
            body = torch.optim.SGD(parts[False], lr=RATE)
            head = torch.optim.SGD(parts[True], lr=RATE)
            return [body, head], [torch.optim.lr_scheduler.ExponentialLR(body, 0.9)]

    return ByHand


@for_both
def test_manual_optimization(side: str) -> None:
    ours, trainer, theirs, plain = fit_both(side, by_hand, loaders=2, settings=EVALUATED)
    assert trainer.global_step == plain.global_step == 12  # each step of each optimizer counts
    assert trainer.callback_metrics["mine"] == plain.callback_metrics["mine"]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(RATE * 0.9**8)
    loss = float(plain.callback_metrics["eval_loss"])
    assert float(trainer.callback_metrics["eval_loss"]) == pytest.approx(loss, rel=1e-6)
    assert_same_weights(ours, theirs)


def test_manual_optimization_with_the_defaults_of_transformers() -> None:
    # max_grad_norm is 1.0 then, and Lightning refuses to clip where one optimizes by hand.
    said = {name: value for name, value in SETTINGS.items() if name != "max_grad_norm"}
    ours = make_module("hfbridge", by_hand)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    hfbridge.Trainer({**said, "num_train_epochs": 2}, **quiet).fit(ours, make_loader(16))
    theirs, _ = fit("reference", make_loader(16), make_class=by_hand)
    assert_same_weights(ours, theirs)


@for_both
def test_manual_optimization_of_the_optimizer_in_the_settings(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class ByHand(base):  # type: ignore[misc]
            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **named)
                self.automatic_optimization = False

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                optimizer = self.optimizers()
                loss = self.model(**batch).loss
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                return loss

        return ByHand

    ours, trainer = fit(side, make_loader(16), make_class=make_class)
    theirs, _ = fit("reference", make_loader(16))
    assert trainer.global_step == 8
    assert_same_weights(ours, theirs)


# compute_loss.


def smoothed(base: type[Any]) -> type[Any]:
    """Take another loss: by `compute_loss`, or by hand in each step."""

    def loss_of(outputs: Any, batch: Any) -> Any:
        return nn.functional.cross_entropy(outputs.logits, batch["labels"], label_smoothing=0.3)

    class ByHook(base):  # type: ignore[misc]
        def compute_loss(self, outputs: Any, batch: Any) -> Any:
            return loss_of(outputs, batch)

    class ByHand(base):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss_of(self.model(**batch), batch)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            loss = loss_of(self.model(**batch), batch)
            self.log("eval_loss", loss, batch_size=len(batch["labels"]))

    return ByHand if issubclass(base, PlainModule) else ByHook


@for_both
@pytest.mark.parametrize("source", ["loader", "HFDataModule"])
def test_compute_loss(side: str, source: str) -> None:
    settings = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "train_sampling_strategy": "sequential",
        **EVALUATED,
    }
    data: tuple[Any, ...] = make_loader(16), make_loader(10, seed=5)
    if source == "HFDataModule":
        sets = {
            "train_dataset": make_dataset("distilbert", 16),
            "eval_dataset": make_dataset("distilbert", 10, seed=5),
        }
        data = (hfbridge.HFDataModule(**sets, data_collator=PadRows()),)
    watch = Watch()
    ours, trainer = fit(side, *data, make_class=smoothed, settings=settings, callbacks=[watch])
    loaders = make_loader(16), make_loader(10, seed=5)
    theirs, plain = fit("reference", *loaders, make_class=smoothed, settings=settings)
    assert_same_weights(ours, theirs)
    loss = float(plain.callback_metrics["eval_loss"])
    assert float(trainer.callback_metrics["eval_loss"]) == pytest.approx(loss, rel=1e-6)
    unchanged, _ = fit("reference", make_loader(16), settings=settings)
    assert not is_same(weights(ours), weights(unchanged))


@for_both
def test_compute_loss_may_build_on_the_models(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Penalized(base):  # type: ignore[misc]
            def compute_loss(self, outputs: Any, batch: Any) -> Any:
                return super().compute_loss(outputs, batch) + outputs.logits.pow(2).mean()

        class ByHand(base):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                outputs = self.model(**batch)
                return outputs.loss + outputs.logits.pow(2).mean()

        return ByHand if issubclass(base, PlainModule) else Penalized

    ours, _, theirs, _ = fit_both(side, make_class)
    assert_same_weights(ours, theirs)

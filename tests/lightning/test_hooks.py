"""Every hook of lightning.pytorch.core.hooks in a subclass of HFModule: its order, its number, its effect.

Grade: exact, against the same overrides of a hand-written LightningModule under lightning.Trainer.
"""

import inspect
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core import hooks

from tests.lightning.plain_data import (
    MakeClass,
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
from tests.tiny import make_model

# Lightning's advice: a validation_step without a loader.
pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
EVALUATED = {"eval_strategy": "epoch"}
for_super = pytest.mark.parametrize("calls_super", [True, False], ids=["super", "alone"])


# Hooks.

CLASSES = (hooks.ModelHooks, hooks.DataHooks, hooks.CheckpointHooks)
STEPS = ("training_step", "validation_step", "test_step", "predict_step")
OPTIMIZATION = (
    "configure_optimizers",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
    "backward",
)
# Deprecated, with a warning; and what makes loaders, which are given here.
LEFT_OUT = {"configure_sharded_model"} | {
    f"{name}_dataloader" for name in ("train", "val", "test", "predict")
}
HOOKS = sorted(
    {
        name
        for of_class in CLASSES
        for name, member in vars(of_class).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }
    - LEFT_OUT
)
EMPTY = [
    name
    for name in HOOKS
    if name.startswith("on_")
    and not name.endswith(("_transfer", "_model_zero_grad", "_model_eval", "_model_train"))
]


def listening(*names: str, calls_super: bool = True) -> MakeClass:
    """Override hooks: note that they are called, and do what they did, or nothing."""

    def make_class(base: type[Any]) -> type[Any]:
        class Listens(base):  # type: ignore[misc]
            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **named)
                self.heard: list[str] = []

        def override(name: str) -> Any:
            def hook(self: Any, *arguments: Any, **named: Any) -> Any:
                self.heard.append(name)
                if calls_super:
                    return getattr(super(Listens, self), name)(*arguments, **named)
                return None

            # Lightning reads the names of parameters.
            hook.__signature__ = inspect.signature(getattr(base, name))  # type: ignore[attr-defined]
            return hook

        for name in names:
            setattr(Listens, name, override(name))
        return Listens

    return make_class


def run_all(side: str, make_class: MakeClass, *, saves: bool = False) -> tuple[Any, Any]:
    """Fit with evaluations and accumulation, validate, test and predict."""
    settings = {"gradient_accumulation_steps": 2, **EVALUATED}
    kept = [ModelCheckpoint(dirpath=f"kept-{side}", every_n_epochs=1, save_top_k=-1)] if saves else []
    loaders = make_loader(16), make_loader(10, seed=5)
    module, trainer = fit(side, *loaders, make_class=make_class, settings=settings, callbacks=kept)
    trainer.validate(module, loaders[1])
    trainer.test(module, loaders[1])
    trainer.predict(module, loaders[1])
    return module, trainer


def test_the_hooks_are_all_of_lightnings() -> None:
    assert {"on_train_batch_start", "on_before_zero_grad", "on_validation_model_zero_grad"} <= set(HOOKS)
    assert {"on_save_checkpoint", "setup", "transfer_batch_to_device", "configure_model"} <= set(HOOKS)
    assert len(HOOKS) >= 45


@for_both
def test_the_order_and_the_number_of_hooks(side: str) -> None:
    make_class = listening(*HOOKS, *STEPS, *OPTIMIZATION)
    ours, _ = run_all(side, make_class, saves=True)
    theirs, _ = run_all("reference", make_class, saves=True)
    assert {"on_validation_model_train", "on_test_epoch_end", "on_predict_end"} <= set(theirs.heard)
    assert theirs.heard.count("training_step") == 8
    assert theirs.heard.count("on_before_optimizer_step") == 4
    assert ours.heard == theirs.heard
    assert_same_weights(ours, theirs)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of the reference, which has noted all hooks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("plain"))
        return run_all("reference", listening(*HOOKS), saves=True)[0]


@for_both
@pytest.mark.parametrize("name", HOOKS)
def test_one_hook_by_itself(side: str, name: str, plain_run: Any) -> None:
    ours, _ = run_all(side, listening(name), saves=name == "on_save_checkpoint")
    assert len(ours.heard) == plain_run.heard.count(name)
    assert bool(ours.heard) is (name != "on_load_checkpoint")
    assert_same_weights(ours, plain_run)


@for_both
def test_hooks_without_super(side: str) -> None:
    make_class = listening(*EMPTY, calls_super=False)
    ours, trainer = run_all(side, make_class)
    theirs, plain = run_all("reference", make_class)
    assert ours.heard == theirs.heard
    assert trainer.global_step == plain.global_step == 4
    assert_same_weights(ours, theirs)


@for_both
def test_configure_model_without_super(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Builds(base):  # type: ignore[misc]
            is_built = False

            def configure_model(self) -> None:
                if not self.is_built:
                    self.is_built, self.model = True, make_model("distilbert", dropout=0.0, seed=8)

        return Builds

    ours, trainer, theirs, _ = fit_both(side, make_class)
    assert trainer.global_step == 8
    assert_same_weights(ours, theirs)


@for_both
def test_setup_and_teardown_without_super(side: str) -> None:
    make_class = listening("setup", "teardown", "prepare_data", calls_super=False)
    ours, _ = run_all(side, make_class)
    theirs, _ = run_all("reference", make_class)
    assert ours.heard == theirs.heard
    assert_same_weights(ours, theirs)


def halves_gradients(base: type[Any], name: str) -> type[Any]:
    class Halves(base):  # type: ignore[misc]
        pass

    def hook(self: Any, *arguments: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad *= 0.5

    hook.__signature__ = inspect.signature(getattr(base, name))  # type: ignore[attr-defined]
    setattr(Halves, name, hook)
    return Halves


@for_both
@pytest.mark.parametrize("name", ["on_after_backward", "on_before_optimizer_step"])
def test_a_hook_changes_gradients(side: str, name: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        return halves_gradients(base, name)

    ours, _, theirs, _ = fit_both(side, make_class, settings={"gradient_accumulation_steps": 2})
    assert_same_weights(ours, theirs)
    free, _ = fit("reference", make_loader(16), settings={"gradient_accumulation_steps": 2})
    assert not is_same(weights(ours), weights(free))


@for_both
def test_gradients_are_clipped_after_on_before_optimizer_step(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Enlarges(base):  # type: ignore[misc]
            def on_before_optimizer_step(self, optimizer: Any) -> None:
                for parameter in self.parameters():
                    if parameter.grad is not None:
                        parameter.grad *= 1000

        return Enlarges

    ours, _ = fit(side, make_loader(16), make_class=make_class, settings={"max_grad_norm": 0.1})
    theirs, _ = fit("reference", make_loader(16), make_class=make_class, gradient_clip_val=0.1)
    assert_close_weights(ours, theirs)  # the norm is summed in the order of the parameter groups


@for_both
def test_on_train_batch_start_ends_an_epoch(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Ends(base):  # type: ignore[misc]
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
                return -1 if batch_idx == 3 else None

        return Ends

    ours, trainer, theirs, plain = fit_both(side, make_class)
    assert trainer.global_step == plain.global_step == 6
    assert trainer.current_epoch == plain.current_epoch == 2
    assert_same_weights(ours, theirs)


@for_both
def test_a_hook_stops_training(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Stops(base):  # type: ignore[misc]
            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                self.trainer.should_stop = self.global_step == 3

        return Stops

    ours, trainer, theirs, plain = fit_both(side, make_class)
    assert trainer.global_step == plain.global_step == 3
    assert_same_weights(ours, theirs)


@for_both
@pytest.mark.parametrize(
    "name", ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"]
)
def test_hooks_of_the_transfer_change_the_batch(side: str, name: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Changes(base):  # type: ignore[misc]
            pass

        def hook(self: Any, batch: Any, *arguments: Any) -> Any:
            return {**batch, "input_ids": batch["input_ids"].clamp(max=20)}

        setattr(Changes, name, hook)
        return Changes

    watch = Watch()
    ours, _ = fit(side, make_loader(16), make_class=make_class, callbacks=[watch])
    theirs, _ = fit("reference", make_loader(16), make_class=make_class)
    assert max(int(batch["input_ids"].max()) for batch in watch.batches) == 20
    assert_same_weights(ours, theirs)


@for_both
def test_hooks_of_checkpoints(side: str) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Remembers(base):  # type: ignore[misc]
            word = "nothing"

            def on_save_checkpoint(self, checkpoint: Any) -> None:
                checkpoint["word"] = "saved"

            def on_load_checkpoint(self, checkpoint: Any) -> None:
                self.word = checkpoint["word"]

        return Remembers

    for of_side in ("reference", side):
        module, trainer = fit(of_side, make_loader(16), make_class=make_class, epochs=1)
        trainer.save_checkpoint(f"{of_side}.ckpt")
        again = make_module(of_side, make_class, model=make_model("distilbert", seed=8, dropout=0.0))
        trainer = make_trainer(of_side, epochs=2)
        trainer.fit(again, make_loader(16), ckpt_path=f"{of_side}.ckpt", weights_only=False)
        assert again.word == "saved"
        assert trainer.global_step == 8
        if of_side == "reference":
            theirs = again
    assert_same_weights(again, theirs)
    assert not is_same(weights(again), weights(module))


@for_both
def test_modes_of_an_evaluation(side: str) -> None:
    seen: dict[str, list[bool]] = {"reference": [], side: []}

    def make_class(of_side: str) -> MakeClass:
        def make(base: type[Any]) -> type[Any]:
            class Stays(base):  # type: ignore[misc]
                def on_validation_model_eval(self) -> None:
                    self.model.train()

                def on_validation_batch_end(self, *hook: Any) -> None:
                    seen[of_side].append(self.model.training)

            return Stays

        return make

    for of_side in ("reference", side):
        loaders = make_loader(16), make_loader(10, seed=5)
        fit(of_side, *loaders, make_class=make_class(of_side), settings=EVALUATED)
    assert seen[side] == seen["reference"] == [True] * 6


@for_both
def test_configure_callbacks(side: str) -> None:
    watches = {"reference": Watch(), side: Watch()}

    def make_class(of_side: str) -> MakeClass:
        def make(base: type[Any]) -> type[Any]:
            class WithCallback(base):  # type: ignore[misc]
                def configure_callbacks(self) -> Any:
                    return [*super().configure_callbacks(), watches[of_side]]

            return WithCallback

        return make

    modules = [fit(s, make_loader(16), make_class=make_class(s))[0] for s in watches]
    assert watches[side].rows == watches["reference"].rows
    assert len(watches[side].batches) == 8
    assert_same_weights(modules[1], modules[0])


@for_both
def test_configure_callbacks_without_super(side: str) -> None:
    watch = Watch()

    def make_class(base: type[Any]) -> type[Any]:
        class WithCallback(base):  # type: ignore[misc]
            def configure_callbacks(self) -> Any:
                return watch

        return WithCallback

    ours, trainer = fit(side, make_loader(16), make_class=make_class)
    theirs, _ = fit("reference", make_loader(16))
    assert len(watch.batches) == trainer.global_step == 8
    assert_same_weights(ours, theirs)


@for_both
@for_super
def test_backward(side: str, calls_super: bool) -> None:
    def make_class(base: type[Any]) -> type[Any]:
        class Scales(base):  # type: ignore[misc]
            def backward(self, loss: Any, *arguments: Any, **named: Any) -> None:
                if calls_super:
                    super().backward(loss * 2, *arguments, **named)
                else:
                    (loss * 2).backward()

        return Scales

    ours, _, theirs, _ = fit_both(side, make_class, settings={"gradient_accumulation_steps": 2})
    assert_same_weights(ours, theirs)
    free, _ = fit("reference", make_loader(16), settings={"gradient_accumulation_steps": 2})
    assert not is_same(weights(ours), weights(free))

"""from_trainer: a `transformers.Trainer` object becomes Trainer, HFModule and HFDataModule.

the object overrides          becomes
nothing                       HFModule and HFDataModule; migration/convert_trainer.py
methods or attributes         the same with OwnSteps, OwnData and NativeHost, which call the object
`train`, or the loop itself   an error that names it
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import transformers
from lightning.pytorch.trainer.states import TrainerFn
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from hfbridge.checkpoints.checkpoint_io import NewestOf, newest_in
from hfbridge.datamodule import HFDataModule
from hfbridge.dropin.host import NativeHost, join_host
from hfbridge.dropin.replaced_methods import EVALUATES, STEPS, Overrides
from hfbridge.dropin.run_setup import build_run, ranks_of, reinit_model
from hfbridge.dropin.steps import OwnSteps
from hfbridge.errors import Problem, SettingsError
from hfbridge.migration.convert_trainer import convert_trainer
from hfbridge.migration.trainer_attributes import find_unfit
from hfbridge.module import HFModule
from hfbridge.trainer import Trainer


def from_trainer(
    native_trainer: transformers.Trainer,
    *,
    strategy: Any = "auto",
    loss_normalization: Literal["exact", "native"] = "native",
    **trainer_arguments: Any,
) -> tuple[Trainer, HFModule, HFDataModule]:
    """Convert a `transformers.Trainer` object to Trainer, HFModule and HFDataModule.

    After `trainer, module, data = from_trainer(native_trainer)`, `trainer.fit(module, data)` does what
    `native_trainer.train()` would have done next, bit for bit. Use one of the two: model, callbacks and
    datasets are the same objects. If it has trained, `fit` begins with its weights, optimizer and random
    state at step 0; to resume the run, `trainer.fit(module, data, ckpt_path="out/checkpoint-500")`.

    `trainer.fit` calls methods that its class or the object overrides when the HF Trainer would. Where
    evaluation is overridden, call `native_trainer.evaluate()` in place of `trainer.validate`.

    Args:
        native_trainer: a `transformers.Trainer` or `Seq2SeqTrainer`, or of a subclass.
        strategy: as of `hfbridge.Trainer`: "ddp", "fsdp2", "deepspeed_stage_2", ...; "auto" is that of the
            settings, or one device.
        loss_normalization: "native": the HF Trainer's numbers. "exact", HFModule's default: numbers that do
            not depend on how a step's samples are split into micro-batches.
        **trainer_arguments: of `hfbridge.Trainer`, such as `devices=2`; `callbacks` are added.

    Returns:
        Trainer, module and data module.

    Raises:
        SettingsError: `train` or the loop itself is overridden, or a setting is unsupported; all are named.
            Or methods are overridden, and the number of ranks differs from that of the Trainer.
        DataError: the Trainer has no dataset.
        ModelError: the model cannot be trained by hfbridge.

    Mirrors: transformers.Trainer.train
    Proved by: tests/parity/test_migrate.py, tests/dropin/test_from_trainer.py
    """
    trainer, module, data = move(
        native_trainer, loss_normalization=loss_normalization, strategy=strategy, **trainer_arguments
    )
    if native_trainer.args.resume_from_checkpoint:
        module.info_once(
            "resume_from_checkpoint is read by scripts, not by transformers.Trainer: pass it to trainer.fit "
            "as ckpt_path=."
        )
    return trainer, module, data


def move(
    native_trainer: transformers.Trainer,
    *,
    loss_normalization: Literal["exact", "native"],
    hides_progress: bool = False,
    **trainer_arguments: Any,
) -> tuple[Trainer, HFModule, HFDataModule]:
    """Do the work of `from_trainer`.

    Args:
        native_trainer: the object.
        loss_normalization: of the module.
        hides_progress: show no progress bar, whatever the settings are.
        **trainer_arguments: of `hfbridge.Trainer`.

    Raises:
        SettingsError: something is not supported on Lightning; all of it is named.
    """
    if not isinstance(native_trainer, transformers.Trainer):
        is_class = isinstance(native_trainer, type)
        kind = f"the class {native_trainer.__name__}" if is_class else f"a {type(native_trainer).__name__}"
        raise SettingsError(f"from_trainer takes a transformers.Trainer object, and was given {kind}.")
    overrides = Overrides.of(native_trainer)
    if overrides.where:
        if hides_progress:
            native_trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        return _move_overriding(native_trainer, overrides, loss_normalization, trainer_arguments)
    return convert_trainer(
        native_trainer,
        refused=find_unfit(native_trainer),
        loss_normalization=loss_normalization,
        changed={"disable_tqdm": True} if hides_progress else {},
        **trainer_arguments,
    )


def _move_overriding(
    native: Any, overrides: Overrides, loss_normalization: Any, arguments: dict[str, Any]
) -> tuple[Trainer, HFModule, HFDataModule]:
    """Convert a Trainer whose overridden methods are called."""
    given = arguments.pop("callbacks", None) or []
    callbacks = list(given) if isinstance(given, list | tuple) else [given]
    bridged = [cb for cb in callbacks if isinstance(cb, TrainerCallback) or _is_class_of_callbacks(cb)]
    refused = [*_refused(overrides, loss_normalization), *find_unfit(native)]
    if not refused:
        reinit_model(native)
        native.accelerator.free_memory()
        for callback in bridged:
            native.add_callback(callback)
    trainer, module, data = build_run(
        native,
        overrides=overrides,
        loss_normalization=loss_normalization,
        output_dir=native.args.output_dir,
        refused=refused,
        module_class=MovedSteps,
        callbacks=[cb for cb in callbacks if cb not in bridged],
        **{**ranks_of(native.args), **arguments},
    )
    if trainer.world_size != native.args.world_size:
        raise SettingsError(
            f"{', '.join(overrides.where.values())}: called on a Trainer that was made for "
            f"{native.args.world_size} processes, and {trainer.world_size} are to train. Start them before "
            "the Trainer is made, by torchrun --nproc-per-node or `hfbridge run --devices`."
        )
    join_host(native, trainer, module, overrides=overrides, kind=MovedHost)
    return trainer, module, data


def _refused(overrides: Overrides, loss_normalization: str) -> Iterator[Problem]:
    """Name what is overridden and cannot be called."""
    yield from overrides.problems(loss_normalization)
    if "train" in overrides.where:
        text = "trainer.fit trains in its place; do before and after trainer.fit what it does"
        yield Problem(overrides.where["train"], text)


def _is_class_of_callbacks(callback: Any) -> bool:
    return isinstance(callback, type) and issubclass(callback, TrainerCallback)


class MovedSteps(OwnSteps):
    """OwnSteps of a run that `trainer.fit` begins.

    Proved by: tests/dropin/test_from_trainer.py
    """

    def configure_callbacks(self) -> list[pl.Callback]:
        """Begin a run of the `transformers.Trainer`, before its data are set up."""
        added = super().configure_callbacks()
        if self.trainer.state.fn == TrainerFn.FITTING:
            assert isinstance(self.host, MovedHost)
            self.host.begin()
            self.resumed_from = None
        return added

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the run is resumed from, before it is loaded."""
        if self._trainer is not None:
            path: Any = self.trainer.ckpt_path
            self.resumed_from = str(newest_in(Path(path)) if isinstance(path, NewestOf) else path)
        super().on_load_checkpoint(checkpoint)

    def to_native(self, *arguments: Any, **named: Any) -> Any:
        """Return the `transformers.Trainer` that was converted."""
        return self.native


class MovedHost(NativeHost):
    """NativeHost of a run that `trainer.fit` begins.

    Proved by: tests/dropin/test_from_trainer.py
    """

    _run = ExitStack()

    def begin(self) -> None:
        """Set up the `transformers.Trainer` as its `train` does before the loop.

        Mirrors: transformers.Trainer.train
        """
        self._run = ExitStack()
        self._run.enter_context(self.replaced_sigterm_callback())
        self._run.callback(self._end)
        train(self._native)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise for an evaluation that would not call what is overridden."""
        super().setup(trainer, pl_module, stage)
        named, function = self._overrides.named(EVALUATES | STEPS), trainer.state.fn
        if function not in (None, TrainerFn.FITTING) and named:
            raise SettingsError(
                f"trainer.{function.value} would not call {', '.join(named)}. Call evaluate or predict of "
                "the transformers.Trainer, which has the model of the run."
            )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """End the run of the `transformers.Trainer`, too."""
        self._run.close()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the run of the `transformers.Trainer`, too."""
        self._run.close()
        super().teardown(trainer, pl_module, stage)

    def _end(self) -> None:
        """Have evaluations of the `transformers.Trainer` prepare the model again."""
        self._native.is_in_train = False
        self._native.accelerator._models.clear()


def train(native: Any) -> None:
    """Begin to measure; the tracker takes its stage from the name of the function that calls it."""
    native.is_in_train = True
    native._memory_tracker.start()

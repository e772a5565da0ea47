"""hfbridge.Trainer: a lightning.Trainer with Hugging Face settings."""

import dataclasses
import inspect
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Unpack

import lightning.pytorch as pl
import torch
from accelerate.utils import find_executable_batch_size
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.compile import from_compiled
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch._dynamo import OptimizedModule
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PredictionOutput

from hfbridge.callbacks.any_module import (
    configured_for_any_module,
    configured_to_fit_any_module,
    has_partial_epoch,
    newest_checkpoint,
)
from hfbridge.callbacks.connector import reset_fit_loop
from hfbridge.callbacks.evaluation import OF_LOADER, Evaluator
from hfbridge.callbacks.progress import RunProgressBar, has_progress_callback, is_silenced
from hfbridge.checkpoints.checkpoint_io import NewestOf, newest_in
from hfbridge.checkpoints.layout import checkpoints_in
from hfbridge.checkpoints.reader import read_checkpoint
from hfbridge.datamodule import HFDataModule, predicting
from hfbridge.errors import CheckpointError, DataError, ModelError, ModuleTypeError, SettingsError
from hfbridge.evaluation.generation import decode
from hfbridge.loops.epoch_loop import LeanEpochLoop, NoProfiler
from hfbridge.loops.fit_loop import FitLoop
from hfbridge.module import HFModule
from hfbridge.settings import (
    AccelerateConfig,
    Launched,
    Plan,
    Settings,
    SettingsSource,
    StrategyChoice,
    read_accelerate_config,
    require_environment,
    require_machine,
    translate,
)
from hfbridge.settings.accelerate_config import OF_MACHINES
from hfbridge.strategies import launched_ranks, make_strategy
from hfbridge.types import AnyCallback, TrainerArguments

DEFAULT_OUTPUT_DIR = "trainer_output"
"""Where transformers writes when the settings do not say it."""

_KNOWN_ARGUMENTS = tuple(inspect.signature(pl.Trainer.__init__).parameters)[1:]


class Trainer(pl.Trainer):
    """Run HFModule on HFDataModule with the settings of `transformers.Trainer`.

    Args:
        settings: `Settings`, a `transformers.TrainingArguments`, a dict of the same names, or the path of a
            YAML or JSON file that holds one. Without any, the loop has Lightning's defaults (logger,
            ModelCheckpoint, validation each epoch, sanity check), optimizer and schedule transformers'.
        asynchronous_saving: write checkpoints during training, from copies in memory.
        callbacks: Lightning callbacks and transformers' `TrainerCallback` objects or classes, in one list.
        accelerate_config: path of a file that `accelerate config` has written: processes, machines,
            precision, FSDP or DeepSpeed. It must agree with settings and arguments.
        **trainer_arguments: arguments of `lightning.Trainer`, with Lightning's meaning. They must agree with
            the settings. `strategy` is a name ("ddp", "fsdp", "fsdp2", "deepspeed_stage_2", ...) or an object
            of `hfbridge.strategies`.

    Attributes:
        plan: what the settings became.
        train_batch_size: samples of a micro-batch; `auto_find_batch_size` makes it smaller.
        initialized_callbacks: TrainerCallbacks whose `on_init_end` another Trainer has called.
        print_logs: whether log entries are printed where no bar is shown, as by the HF Trainer.

    Raises:
        SettingsError: a setting or argument is unknown, wrong, unsupported or in conflict; all are named.
        MissingDependencyError: a setting needs a package that is not installed.
    """

    def __init__(
        self,
        settings: SettingsSource | None = None,
        *,
        asynchronous_saving: bool = False,
        callbacks: Sequence[AnyCallback] | AnyCallback | None = None,
        accelerate_config: str | os.PathLike[str] | None = None,
        **trainer_arguments: Unpack[TrainerArguments],
    ) -> None:
        own, bridged = _split_callbacks(callbacks)
        passed: Mapping[str, Any] = {**trainer_arguments, **({"callbacks": own} if own or bridged else {})}
        settings, config = None if settings is None else Settings.of(settings), None
        if accelerate_config is not None:
            config = _read_config(accelerate_config)
            settings, passed = config.applied_to(settings or Settings(), passed, environment=os.environ)
        self.plan: Plan = translate(settings, passed, known_arguments=_KNOWN_ARGUMENTS, launched=_launched())
        if config is not None:
            self.plan = dataclasses.replace(self.plan, notes=(*config.notes, *self.plan.notes))
        self.settings: Settings = self.plan.settings
        self.train_batch_size: int = self.settings.per_device_train_batch_size
        self.asynchronous_saving = asynchronous_saving
        require_machine(self.settings)
        kind = self.plan.strategy.kind
        name = type(passed.get("strategy")).__name__ if kind == "given" else kind
        require_environment(self.settings, name)
        self.trainer_callbacks: tuple[TrainerCallback | type[TrainerCallback], ...] = tuple(bridged)
        self.initialized_callbacks: tuple[TrainerCallback, ...] = ()
        self.print_logs = self.plan.has_settings
        shows_own_bar = not has_progress_callback(self.trainer_callbacks) and not is_silenced(self.settings)
        arguments = _with_defaults(self.plan.trainer_arguments, shows_bar=shows_own_bar)
        os.environ.update({} if config is None else config.environment)
        super().__init__(**_with_strategy(arguments, self.plan.strategy))
        fit, loop = self.fit_loop, self.fit_loop.epoch_loop
        self.fit_loop = FitLoop(self, min_epochs=fit.min_epochs, max_epochs=fit.max_epochs)
        self.fit_loop.epoch_loop = LeanEpochLoop(self, min_steps=loop.min_steps, max_steps=loop.max_steps)
        for note in self.plan.notes:
            rank_zero_info(f"hfbridge: {note}")

    @property
    def state_of_run(self) -> TrainerState:
        """The HF Trainer's state of the run: global step, epoch, log history; of a run of HFModule."""
        module: Any = self.lightning_module
        state: TrainerState = module.host.state
        return state

    @property
    def log_history(self) -> list[dict[str, float]]:
        """Log entries of a run of HFModule, as the HF Trainer makes them, each with its step."""
        return self.state_of_run.log_history if isinstance(self.lightning_module, HFModule) else []

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps of the run; an epoch that the settings end early is counted as far as it goes."""
        steps: int | float = super().estimated_stepping_batches
        if self.max_steps != -1 or not has_partial_epoch(self.settings) or not 0 < steps < math.inf:
            return steps
        per_epoch = math.ceil(self.num_training_batches / self.accumulate_grad_batches)
        epochs: float = self.settings.num_train_epochs
        return math.ceil(epochs * per_epoch)

    def fit(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train an HFModule, or any LightningModule, with what the settings mean.

        Args:
            model: the module.
            train_dataloaders: an HFDataModule, any LightningDataModule, or loaders, as in Lightning.
            val_dataloaders: loaders to validate on, as in Lightning.
            datamodule: an HFDataModule or any LightningDataModule.
            ckpt_path: what to resume from: a `checkpoint-N` directory of either engine, a Lightning `.ckpt`,
                or "last" (or True), the newest complete checkpoint in `output_dir`. Without it,
                `resume_from_checkpoint` of the settings.
            weights_only: as in Lightning; checkpoints of HFModule are always read so.

        Raises:
            ModuleTypeError: the model is not a LightningModule.
            CheckpointError: what to resume from is not there, damaged, or of another model.
            SettingsError: the settings cannot be used for this module; or, with `auto_find_batch_size`, no
                batch fits into memory.

        Mirrors: transformers.Trainer.train
        Proved by: tests/parity/test_resume.py
        """
        model = _module_of("fit", model)
        data: dict[str, Any] = {
            "train_dataloaders": train_dataloaders,
            "val_dataloaders": val_dataloaders,
            "datamodule": datamodule,
        }
        ckpt_path = self.settings.resume_from_checkpoint if ckpt_path is None else ckpt_path
        if ckpt_path == "hpc" and self._checkpoint_connector._hpc_resume_path is None:
            raise CheckpointError(
                'ckpt_path="hpc": there is no hpc_ckpt_*.ckpt in default_root_dir='
                f"{self.default_root_dir!r}. Leave it out: under SLURM a first job begins a new run, and a "
                "requeued one resumes from its own checkpoint."
            )
        if not isinstance(model, HFModule):
            data["ckpt_path"] = self._resolve_for_any_module(ckpt_path)
            with configured_to_fit_any_module(self, model, datamodule or train_dataloaders):
                super().fit(model, **data, weights_only=weights_only)
            return
        self._prepare_optimization(model)
        ckpt_path = self._resolve(ckpt_path)
        data |= {"ckpt_path": ckpt_path, "weights_only": weights_only}
        if self.settings.auto_find_batch_size:
            self._fit_with_batch_size_finder(model, data)
        else:
            super().fit(model, **data)

    def _prepare_optimization(self, model: HFModule) -> None:
        """Leave accumulation and clipping to a module that optimizes manually, unless they were passed."""
        if model.automatic_optimization:
            return
        if not self.plan.passed.get("accumulate_grad_batches"):
            self.accumulate_grad_batches = 1
        if self.plan.passed.get("gradient_clip_val") is None:
            self.gradient_clip_val = None

    @property
    def _output_dir(self) -> Path:
        return Path(self.settings.output_dir or DEFAULT_OUTPUT_DIR).expanduser()

    def _resolve_for_any_module(self, ckpt_path: Any) -> Any:
        """Find the newest of the checkpoints of `save_strategy`; leave other paths to Lightning."""
        if ckpt_path in (None, False, ""):
            return None
        if ckpt_path not in (True, "last"):
            return ckpt_path
        newest = newest_checkpoint(self._output_dir)
        return "last" if newest is None else str(newest)

    def _resolve(self, ckpt_path: Any) -> Any:
        """Find and read the checkpoint to resume from, before anything is built.

        Mirrors: transformers.Trainer.train
        """
        if ckpt_path in (None, False, ""):
            return None
        folder = self._output_dir
        is_alone = self.world_size == 1
        if ckpt_path in (True, "last"):
            # Several ranks are not connected yet: the first one chooses, when they are.
            if self.checkpoint_callbacks and not checkpoints_in(folder):
                return "last"  # of ModelCheckpoint's
            return str(newest_in(folder)) if is_alone else NewestOf(folder)
        if (
            ckpt_path == "best"
            and not self.checkpoint_callbacks
            and isinstance(self.lightning_module, HFModule)
        ):
            return self.state_of_run.best_model_checkpoint or ckpt_path
        if is_alone and isinstance(ckpt_path, str | os.PathLike) and Path(ckpt_path).is_dir():
            checkpoint = read_checkpoint(Path(ckpt_path))
            if self.settings.auto_find_batch_size and checkpoint.state.train_batch_size is not None:
                self.train_batch_size = checkpoint.state.train_batch_size
        return str(ckpt_path)

    def _fit_with_batch_size_finder(self, model: HFModule, data: dict[str, Any]) -> None:
        """Train; when memory runs out, begin again with smaller batches, weights and optimizer as they are.

        Mirrors: transformers.Trainer.train
        Proved by: tests/parity/test_batch_size.py
        """
        tried: list[int] = []

        def attempt(batch_size: int) -> None:
            if tried:
                rank_zero_warn(
                    f"hfbridge: out of memory with micro-batches of {tried[-1]}; training begins again with "
                    f"{batch_size} (auto_find_batch_size)."
                )
                model._reused_optimizer = next(iter(self.optimizers), None)
                reset_fit_loop(self)
            tried.append(batch_size)
            self.train_batch_size = batch_size
            super(Trainer, self).fit(model, **data)

        try:
            find_executable_batch_size(attempt, starting_batch_size=self.train_batch_size)()
        except RuntimeError as error:
            if tried[-1] > 1 or "No executable batch size" not in str(error):
                raise
            raise SettingsError(
                "auto_find_batch_size=True: out of memory with a micro-batch of one sample. Use shorter "
                "samples, activation_checkpointing=True, or a smaller model."
            ) from error

    def validate(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: Any = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
        **gen_kwargs: Any,
    ) -> list[Mapping[str, float]]:
        """Evaluate a module: `trainer.validate(module, data)`.

        Args:
            model: the module; by default that of the last run.
            dataloaders: an HFDataModule, any LightningDataModule, or loaders, as in Lightning.
            ckpt_path: load these weights first, as for `fit`, or "best".
            verbose: print the metrics.
            datamodule: an HFDataModule or any LightningDataModule.
            weights_only: as in Lightning; checkpoints of HFModule are always read so.
            **gen_kwargs: with `predict_with_generate`, arguments of `generate`, such as `num_beams=4`, which
                win over the settings.

        Returns:
            For HFModule one dict with the metrics of all evaluation sets, as from
            `transformers.Trainer.evaluate`, and what callbacks logged, on all ranks; one for each of several
            loaders of the user's. Otherwise what Lightning returns.

        Raises:
            TypeError: there are arguments of `generate`, and nothing is generated.

        Mirrors: transformers.Trainer.evaluate
        """
        if gen_kwargs and not self.settings.predict_with_generate:
            raise TypeError(
                f"Trainer.validate got {', '.join(gen_kwargs)}, which are arguments of generate. Set "
                "predict_with_generate=True, or leave them out."
            )
        model = None if model is None else _module_of("validate", model)
        with self._evaluating(model, ckpt_path, gen_kwargs) as ckpt_path:
            found = super().validate(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)
        if not isinstance(self.lightning_module, HFModule):
            return found
        return _by_loader(found, self.lightning_module.eval_metrics)

    def test(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: Any = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> list[Mapping[str, float]]:
        """Test a module: `trainer.test(module, data)`; the arguments are those of `validate`."""
        model = None if model is None else _module_of("test", model)
        with self._evaluating(model, ckpt_path) as ckpt_path:
            found = super().test(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)
        return _by_loader(found) if isinstance(self.lightning_module, HFModule) else found

    def predict(
        self,
        model: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool | None = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Predict with a module: `trainer.predict(module, data)`; the arguments are those of Lightning's."""
        model = None if model is None else _module_of("predict", model)
        with self._evaluating(model, ckpt_path) as ckpt_path:
            return super().predict(
                model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only
            )

    @contextmanager
    def _evaluating(
        self, model: Any, ckpt_path: Any, gen_kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> Iterator[Any]:
        """Prepare an evaluation of a module, and yield the checkpoint that was found."""
        if isinstance(model or self.lightning_module, HFModule):
            with _generating(model or self.lightning_module, dict(gen_kwargs)):
                yield self._resolve(ckpt_path)
        else:
            found = None if ckpt_path is None else self._resolve_for_any_module(ckpt_path)
            with configured_for_any_module(self):
                yield found

    def predict_dataset(
        self,
        model: HFModule,
        datamodule: HFDataModule,
        dataset: Any = None,
        *,
        metric_key_prefix: str = "test",
        ckpt_path: Any = None,
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """Predict a full set as `transformers.Trainer.predict` does.

        Every rank gets the predictions of all. Lightning's `predict` returns logits batch by batch, on rank r
        of W those of batches r, r + W, ...; the first samples may fill up its last one.

        Args:
            model: the module.
            datamodule: its `predict_dataset`, or test split.
            dataset: another set, mapped and collated as those of the datamodule.
            metric_key_prefix: prefix of the metrics' names.
            ckpt_path: load these weights first, as for `fit`.
            **gen_kwargs: with `predict_with_generate`, arguments of `generate`, which win over the settings.

        Returns:
            predictions, label_ids (`None` without labels) and metrics; nothing is logged.

        Raises:
            ModelError: the model is not an HFModule.
            DataError: there is no such set, or the datamodule is no HFDataModule.
            SettingsError: arguments of `generate`, and nothing is generated.

        Mirrors: transformers.Trainer.predict
        Proved by: tests/parity/test_evaluation_options.py
        """
        if not isinstance(model, HFModule):
            raise ModelError(f"`predict_dataset` expects an `HFModule`, got `{type(model).__name__}`.")
        if not isinstance(datamodule, HFDataModule):
            raise DataError(
                f"predict_dataset takes an HFDataModule, got a {type(datamodule).__name__}. A set comes "
                "after it: trainer.predict_dataset(module, data, dataset)."
            )
        if gen_kwargs and not self.settings.predict_with_generate:
            raise SettingsError(
                f"{', '.join(gen_kwargs)}: arguments of generate, and predictions are logits. Set "
                "predict_with_generate=True, or leave them out."
            )
        if dataset is not None:
            datamodule = predicting(datamodule, dataset)
        evaluator = model.evaluator
        evaluator.predicts, evaluator.prediction = metric_key_prefix, None
        try:
            with _generating(model, gen_kwargs):
                self.predict(model, datamodule=datamodule, return_predictions=False, ckpt_path=ckpt_path)
        finally:
            evaluator.predicts = None
        output, evaluator.prediction = evaluator.prediction, None
        assert output is not None
        return output

    def predict_texts(
        self, model: HFModule, datamodule: HFDataModule, dataset: Any = None, **gen_kwargs: Any
    ) -> list[str]:
        """Generate for a full set, and decode the result.

        Args:
            model: the module; its `processing_class` decodes.
            datamodule: its `predict_dataset`, or test split.
            dataset: another set, mapped and collated as those of the datamodule.
            **gen_kwargs: arguments of `generate`, which win over the settings.

        Returns:
            One text per sample, in the order of the set, on all ranks.

        Raises:
            SettingsError: `predict_with_generate` is not set.
            ModelError: the module has no `processing_class` that decodes.

        Proved by: tests/parity/test_generation.py
        """
        if not self.settings.predict_with_generate:
            raise SettingsError("predict_texts decodes what is generated: set predict_with_generate=True.")
        output = self.predict_dataset(model, datamodule, dataset, **gen_kwargs)
        return decode(output, model.processing_class)


def _by_loader(
    found: Sequence[Mapping[str, float]], metrics: Mapping[str, float] = MappingProxyType({})
) -> list[Mapping[str, float]]:
    """Merge what an evaluation returned into one dict, or one for each loader in the names."""
    values = {**metrics, **{k: v for of_one in found for k, v in of_one.items() if k not in metrics}}
    numbers = sorted({int(name.partition(OF_LOADER)[2]) for name in values if OF_LOADER in name})
    return [
        {name: value for name, value in values.items() if name.partition(OF_LOADER)[2] in ("", str(number))}
        for number in numbers or [0]
    ]


@contextmanager
def _generating(model: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """Have evaluations of a module give arguments to `generate`."""
    if not arguments:
        yield
        return
    evaluator: Evaluator = model.evaluator
    evaluator.generate_arguments = arguments
    try:
        yield
    finally:
        evaluator.generate_arguments = {}


def _module_of(method: str, model: object) -> Any:
    """Return the LightningModule to run, which may be compiled; an HFModule compiles its model."""
    inside: Any = getattr(model, "_orig_mod", None)
    if isinstance(model, OptimizedModule) and isinstance(inside, pl.LightningModule):
        if not isinstance(inside, HFModule):
            return from_compiled(model)
        inside.compile_context = model.dynamo_ctx
        return inside
    if isinstance(model, pl.LightningModule):
        return model
    name = type(model).__name__
    hint = " Wrap the model: HFModule(model)." if isinstance(model, torch.nn.Module) else ""
    raise ModuleTypeError(f"`{method}` expects an HFModule or another LightningModule, got `{name}`.{hint}")


def _with_defaults(arguments: Mapping[str, Any], *, shows_bar: bool) -> dict[str, Any]:
    """Add hfbridge's profiler, and its progress bar where the user brings none."""
    found = {**arguments, "callbacks": list(arguments.get("callbacks") or [])}
    if arguments.get("barebones"):
        return dict(arguments)
    if arguments["enable_progress_bar"] and not any(isinstance(cb, ProgressBar) for cb in found["callbacks"]):
        found["enable_progress_bar"] = shows_bar
        found["callbacks"] += [RunProgressBar()] if shows_bar else []
    if arguments.get("profiler") is None:
        found["profiler"] = NoProfiler()
    return found


def _read_config(path: str | os.PathLike[str]) -> AccelerateConfig:
    """Read an accelerate config; under a launcher the ranks' rendezvous is in the environment already."""
    config = read_accelerate_config(path)
    if _launched() is not None:
        for name in OF_MACHINES:
            config.environment.pop(name, None)
    return config


def _launched() -> Launched | None:
    """Find the processes that a launcher has started."""
    found = launched_ranks()
    return None if found is None else Launched(*found)


def _with_strategy(arguments: dict[str, Any], choice: StrategyChoice) -> dict[str, Any]:
    """Put the object of the chosen strategy in the place of its name."""
    if choice.kind in ("single", "given"):
        return arguments
    return {**arguments, "strategy": make_strategy(choice.kind, **choice.options)}


def _split_callbacks(callbacks: Any) -> tuple[list[Any], list[Any]]:
    """Sort a list of callbacks into Lightning's and transformers'."""
    given = (
        [] if callbacks is None else list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
    )
    bridged = [
        cb
        for cb in given
        if isinstance(cb, TrainerCallback) or (isinstance(cb, type) and issubclass(cb, TrainerCallback))
    ]
    return [cb for cb in given if not any(cb is other for other in bridged)], bridged

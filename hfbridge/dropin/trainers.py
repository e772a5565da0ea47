"""transformers' Trainer and Seq2SeqTrainer, whose `train` runs on Lightning.

called on the object                   is
train                                  hfbridge.Trainer.fit; leaves the object as transformers' own does
evaluate, predict, save_model          transformers' own; of a sharded model, shared.py
a checkpoint within train              hfbridge's, in the HF Trainer's files
an overridden method                   called when the HF Trainer would call it; the loop itself is an error
all else                               transformers' own
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import transformers
from transformers.trainer_utils import PredictionOutput, TrainOutput

from hfbridge.dropin.host import NativeHost, join_host
from hfbridge.dropin.planning import DryRun
from hfbridge.dropin.replaced_methods import Overrides
from hfbridge.dropin.run_setup import (
    build_run,
    find_checkpoint,
    preserve_process_state,
    ranks_of,
    reinit_model,
    restore_trainer,
)
from hfbridge.dropin.shared import SharedRun
from hfbridge.errors import SettingsError


class Trainer(transformers.Trainer):
    """`transformers.Trainer`, trained by Lightning: the same arguments, methods, numbers, files and errors.

    `train` computes the same numbers, bit for bit, and keeps `state`, `model`, `optimizer`, `lr_scheduler`,
    `callback_handler` and `control` of the object up to date. Two things differ: checkpoints are written
    atomically, and errors about data, model or settings may be raised earlier (`hfbridge.errors`).

    The ranks are the processes that torchrun, `accelerate launch`, SLURM or `hfbridge run` has started.

    Attributes:
        strategy: as of `hfbridge.Trainer`. "auto" is that of the environment variable HFBRIDGE_STRATEGY, or
            of the settings (`fsdp`, `deepspeed`), or one device, or DDP. Set it on the class or on an object,
            before `train`.
        loss_normalization: "native" or "exact", as of HFModule.

    Raises:
        SettingsError: the loop itself is overridden.

    Mirrors: transformers.Trainer
    Proved by: tests/dropin/test_train.py
    """

    strategy: str = "auto"
    loss_normalization: Literal["native", "exact"] = "native"

    dry_run: DryRun | None = None
    """Plans the run in place of `train`; set by `hfbridge run --dry-run`."""

    _run: NativeHost | None = None
    _shared: SharedRun | None = None

    @functools.wraps(transformers.Trainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._find_overrides()

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train on Lightning.

        Args:
            resume_from_checkpoint: a `checkpoint-N` directory of either engine, or True for the newest.
            trial: of `hyperparameter_search`.
            ignore_keys_for_eval: outputs of the model that evaluations within `train` do not gather.

        Returns:
            Steps, training loss and metrics.

        Raises:
            SettingsError: something is not supported on Lightning; all of it is named.
            ValueError: there is no training set, or no checkpoint.

        Mirrors: transformers.Trainer.train
        """
        self._memory_tracker.start()
        self.is_in_train = True
        reinit_model(self, trial)
        self._hp_search_setup(trial)
        checkpoint = find_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        overrides = self._find_overrides()
        if self.train_dataset is None and not overrides.any({"get_train_dataloader"}):
            raise ValueError("Trainer: training requires a train_dataset.")
        if self.dry_run is not None:
            raise self.dry_run.plan(
                self, overrides, lambda: self._make_run(overrides, ignore_keys_for_eval, trial)
            )
        self.accelerator.free_memory()
        trainer, module, data, host = self._make_run(overrides, ignore_keys_for_eval, trial)
        module.resumed_from = checkpoint
        self._run = host
        try:
            with preserve_process_state(), host.replaced_sigterm_callback():
                trainer.fit(module, data, ckpt_path=checkpoint)
        finally:
            self._run = None
            restore_trainer(self)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, host.train_loss, host.row)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate as `transformers.Trainer` does; of a sharded model, all ranks call this.

        Args:
            eval_dataset: a set, several by name, or the name of one; `None` is the Trainer's.
            ignore_keys: of the model's outputs, not gathered.
            metric_key_prefix: of the metrics' names.
            **gen_kwargs: of `Seq2SeqTrainer` alone: arguments of `generate`.

        Mirrors: transformers.Trainer.evaluate
        """
        evaluate = functools.partial(super().evaluate, eval_dataset, ignore_keys, metric_key_prefix)
        return dict(self._call_on_model(functools.partial(evaluate, **gen_kwargs)))

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """Predict as `transformers.Trainer` does; of a sharded model, all ranks call this.

        Args:
            test_dataset: the set.
            ignore_keys: of the model's outputs, not gathered.
            metric_key_prefix: of the metrics' names.
            **gen_kwargs: of `Seq2SeqTrainer` alone: arguments of `generate`.

        Mirrors: transformers.Trainer.predict
        """
        predict = functools.partial(super().predict, test_dataset, ignore_keys, metric_key_prefix)
        found: PredictionOutput = self._call_on_model(functools.partial(predict, **gen_kwargs))
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model to `output_dir`, or that of the settings; of a sharded model, all ranks call this.

        Mirrors: transformers.Trainer.save_model
        """
        if self._is_shared:
            self._shared_run().save(self, Path(str(output_dir or self.args.output_dir)))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint of a run, for callbacks that call this."""
        if self._run is None or self._run.saves_by_trainer:
            super()._save_checkpoint(model, trial)
        else:
            self._run.save()

    def _find_overrides(self) -> Overrides:
        """Find what is overridden; the loop itself raises a SettingsError."""
        overrides = Overrides.of(self)
        if self.dry_run is None:  # which lists it
            overrides.check(type(self).__name__, self.loss_normalization)
        return overrides

    def _make_run(
        self, overrides: Overrides, ignore_keys: list[str] | None = None, trial: Any = None
    ) -> tuple[Any, Any, Any, NativeHost]:
        """Make Trainer, module, data and host of a run."""
        if self._shared is not None:
            raise SettingsError(
                "train: the last run has sharded the model, which cannot be sharded again. Save it, and load "
                "it into a new Trainer."
            )
        trainer, module, data = build_run(
            self,
            overrides=overrides,
            strategy=self.strategy,
            loss_normalization=self.loss_normalization,
            output_dir=self._get_output_dir(trial),
            **(ranks_of if self.dry_run is None else self.dry_run.ranks)(self.args),
        )
        host = join_host(self, trainer, module, overrides=overrides, ignore_keys=ignore_keys, trial=trial)
        if host.is_shared:
            self._shared = SharedRun(trainer, module, host)
        return trainer, module, data, host

    @property
    def _is_shared(self) -> bool:
        """Whether the model is reached through the strategy of a run only."""
        return self._shared is not None or bool(self.is_deepspeed_enabled)

    def _shared_run(self) -> SharedRun:
        if self._shared is None:
            self._make_run(self._find_overrides())
        assert self._shared is not None
        return self._shared

    def _call_on_model(self, method: Callable[[], Any]) -> Any:
        """Call a method that evaluates or predicts."""
        return method() if self._run is not None or not self._is_shared else self._shared_run().call(method)


class Seq2SeqTrainer(Trainer, transformers.Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer`, trained by Lightning as `Trainer` is.

    Raises:
        SettingsError: the loop itself is overridden.

    Mirrors: transformers.Seq2SeqTrainer
    Proved by: tests/dropin/test_seq2seq.py
    """

    @functools.wraps(transformers.Seq2SeqTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

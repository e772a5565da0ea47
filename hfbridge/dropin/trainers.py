"""transformers' Trainer and Seq2SeqTrainer, whose `train` runs on Lightning; knows both worlds.

called on the object                   is
Trainer(...), its arguments            transformers' own; then what is overridden is looked for
train                                  from_trainer, hfbridge.Trainer.fit, and the state left as natively
evaluate, predict, save_model          transformers' own; where ranks share the weights, shared.py
a checkpoint within train              hfbridge's, in the native files
all else                               transformers' own

a subclass overrides                   it is called when the HF Trainer would call it; overrides.py
the loop itself                        refused by name when an object is made
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
    as_natively,
    carry_trainer,
    find_checkpoint,
    make_model_anew,
    ranks_of,
    take_back,
)
from hfbridge.dropin.shared import SharedRun
from hfbridge.errors import SettingsError


class Trainer(transformers.Trainer):
    """`transformers.Trainer`, trained by Lightning: the same arguments, methods, numbers, files and errors.

    `train` does what it does natively, to the bit, and leaves the object as natively: `state`, `model`,
    `optimizer`, `lr_scheduler`, `callback_handler` and `control` are those of the run, while it goes on, too.
    Two things are as hfbridge does them: checkpoints are whole or not there, and errors about data, model or
    settings may come earlier and say more (they are ValueErrors, or what else `hfbridge.errors` says).

    The ranks of a run are the processes that torchrun, `accelerate launch`, SLURM or `hfbridge run` has
    started; without one of these it is one.

    Attributes:
        strategy: how ranks share the work, by a name of `hfbridge.Trainer(strategy=)`. "auto" is what the
            environment variable HFBRIDGE_STRATEGY names; without it, what the settings say (`fsdp`,
            `deepspeed`); else one device, or DDP. Set it on the class or on an object, before `train`.
        loss_normalization: "native", or "exact": HFModule says what that is.

    Raises:
        SettingsError: the loop itself is overridden.

    Mirrors: transformers.Trainer
    Proved by: tests/dropin/test_train.py
    """

    strategy: str = "auto"
    loss_normalization: Literal["native", "exact"] = "native"

    dry_run: DryRun | None = None
    """Plans the run in the place of `train`; set by `hfbridge run --dry-run`."""

    _run: NativeHost | None = None
    _shared: SharedRun | None = None

    @functools.wraps(transformers.Trainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._see_overrides()

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
            ignore_keys_for_eval: outputs of the model that evaluations while training do not gather.

        Returns:
            Steps, training loss and metrics.

        Raises:
            SettingsError: something cannot be carried to Lightning; all of it is named.
            ValueError: nothing to train on, or the checkpoint is not there.

        Mirrors: transformers.Trainer.train
        """
        self._memory_tracker.start()
        self.is_in_train = True
        make_model_anew(self, trial)
        self._hp_search_setup(trial)
        checkpoint = find_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        overrides = self._see_overrides()
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
            with as_natively(), host.listening():
                trainer.fit(module, data, ckpt_path=checkpoint)
        finally:
            self._run = None
            take_back(self)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, host.train_loss, host.row)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate, as natively; where the ranks share the model, all of them call this together.

        Args:
            eval_dataset: a set, several by name, or the name of one; the Trainer's without it.
            ignore_keys: of the model's outputs, not to be gathered.
            metric_key_prefix: what the metrics' names begin with.
            **gen_kwargs: of `Seq2SeqTrainer` alone: arguments of `generate`.

        Returns:
            The metrics.

        Mirrors: transformers.Trainer.evaluate
        """
        evaluate = functools.partial(super().evaluate, eval_dataset, ignore_keys, metric_key_prefix)
        return dict(self._where_the_model_is(functools.partial(evaluate, **gen_kwargs)))

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """Predict, as natively; where the ranks share the model, all of them call this together.

        Args:
            test_dataset: the set.
            ignore_keys: of the model's outputs, not to be gathered.
            metric_key_prefix: what the metrics' names begin with.
            **gen_kwargs: of `Seq2SeqTrainer` alone: arguments of `generate`.

        Returns:
            Predictions, label ids and metrics.

        Mirrors: transformers.Trainer.predict
        """
        predict = functools.partial(super().predict, test_dataset, ignore_keys, metric_key_prefix)
        found: PredictionOutput = self._where_the_model_is(functools.partial(predict, **gen_kwargs))
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, as natively; where the ranks share it, all of them call this together.

        Args:
            output_dir: the folder; that of the settings without it.

        Mirrors: transformers.Trainer.save_model
        """
        if self._is_shared:
            self._shared_run().save(self, Path(str(output_dir or self.args.output_dir)))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint of a run, for a callback that asks for it by this name."""
        if self._run is None or self._run.saves_natively:
            super()._save_checkpoint(model, trial)
        else:
            self._run.save()

    # Parts of the above.

    def _see_overrides(self) -> Overrides:
        """Find what is overridden.

        Raises:
            SettingsError: the loop itself, which Lightning runs.
        """
        overrides = Overrides.of(self)
        if self.dry_run is None:  # which lists what is refused
            overrides.check(type(self).__name__, self.loss_normalization)
        return overrides

    def _make_run(
        self, overrides: Overrides, ignore_keys: list[str] | None = None, trial: Any = None
    ) -> tuple[Any, Any, Any, NativeHost]:
        """Make Trainer, module, data and host of a run.

        Raises:
            SettingsError: something cannot be carried to Lightning, or the ranks share the model already.
        """
        if self._shared is not None:
            raise SettingsError(
                "train: the ranks share the model since the last run, and cannot share it anew. Save it, "
                "load it into a new Trainer, and train that."
            )
        trainer, module, data = carry_trainer(
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
        """Whether the model has to be reached through the strategy of a run."""
        return self._shared is not None or bool(self.is_deepspeed_enabled)

    def _shared_run(self) -> SharedRun:
        if self._shared is None:
            self._make_run(self._see_overrides())
        assert self._shared is not None
        return self._shared

    def _where_the_model_is(self, method: Callable[[], Any]) -> Any:
        """Call a method that evaluates or predicts."""
        return method() if self._run is not None or not self._is_shared else self._shared_run().call(method)


class Seq2SeqTrainer(Trainer, transformers.Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer`, trained by Lightning; all that is said of `Trainer` holds.

    Raises:
        SettingsError: the loop itself is overridden.

    Mirrors: transformers.Seq2SeqTrainer
    Proved by: tests/dropin/test_seq2seq.py
    """

    @functools.wraps(transformers.Seq2SeqTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

"""Begin and end of a `transformers.Trainer`'s run on Lightning.

the HF Trainer, around its loop                   here
calls model_init, seeded                          reinit_model
finds the checkpoint to resume from               find_checkpoint
keeps the optimizer of an earlier `train`,
  not its schedule                                build_run
leaves the model prepared for evaluations         restore_trainer
"""

import os
import signal
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from lightning.fabric.utilities.warnings import PossibleUserWarning
from transformers import enable_full_determinism, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hfbridge.datamodule import HFDataModule
from hfbridge.dropin.loader import OwnData
from hfbridge.dropin.replaced_methods import COUNTS, LOADS, STEPS, Overrides
from hfbridge.dropin.steps import OwnSteps
from hfbridge.errors import Problem, SettingsError
from hfbridge.migration.convert_trainer import convert_trainer
from hfbridge.migration.trainer_attributes import find_unfit
from hfbridge.trainer import Trainer

STRATEGY_VARIABLE = "HFBRIDGE_STRATEGY"
"""Environment variable that names a strategy where the class says "auto"."""


def innermost(optimizer: Any) -> Any:
    """Return the optimizer that accelerate has wrapped."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def reinit_model(native: Any, trial: Any = None) -> None:
    """Call `model_init`, if there is one, with the trial of a hyperparameter search.

    Mirrors: transformers.Trainer.train
    """
    args = native.args
    if native.model_init is None:
        return
    (enable_full_determinism if args.full_determinism else set_seed)(args.seed)
    native.model = native.call_model_init(trial)
    native.optimizer = native.lr_scheduler = None
    if native.place_model_on_device:
        native._move_model_to_device(native.model, args.device)
    native.model_wrapped = native.model


def find_checkpoint(resume_from: str | bool | None, output_dir: str) -> str | None:
    """Find the checkpoint to resume from, with the errors of the HF Trainer.

    Raises:
        ValueError: there is none.

    Mirrors: transformers.Trainer.train
    """
    if resume_from is None or resume_from is False:
        return None
    found = get_last_checkpoint(output_dir) if resume_from is True else resume_from
    if found is None:
        raise ValueError(f"No valid checkpoint found in output directory ({output_dir})")
    if not Path(found).is_dir():
        raise ValueError(f"Can't find a valid checkpoint at {found}")
    return str(found)


def build_run(
    native: Any,
    *,
    overrides: Overrides,
    loss_normalization: Any,
    output_dir: str,
    strategy: Any = "auto",
    refused: Iterable[Problem] | None = None,
    module_class: type[OwnSteps] = OwnSteps,
    **trainer_arguments: Any,
) -> tuple[Trainer, OwnSteps, HFDataModule]:
    """Make Trainer, module and data of the next run.

    Args:
        native: the `transformers.Trainer`.
        overrides: what it overrides.
        loss_normalization: of the module.
        output_dir: of the run; each trial of a search has its own.
        strategy: of the Trainer; "auto" is that of the environment, or of the settings.
        refused: what is unsupported; `None` reads it from the object.
        module_class: of the module.
        **trainer_arguments: of `hfbridge.Trainer`, among them the number of processes.

    Raises:
        SettingsError: something is not supported on Lightning; all of it is named.
    """
    if native._created_lr_scheduler:
        native.lr_scheduler = None
    makes_schedule = native.lr_scheduler is None
    native.optimizer = innermost(native.optimizer)
    # The model has been made, the loop has not begun, and a search may be running.
    hidden = {"model_init": None, "is_in_train": False, "hp_search_backend": None}
    kept = {name: getattr(native, name) for name in hidden}
    vars(native).update(hidden)
    try:
        trainer, module, data = convert_trainer(
            native,
            refused=find_unfit(native) if refused is None else refused,
            loss_normalization=loss_normalization,
            # The object's own callbacks show progress.
            changed={"disable_tqdm": True, "output_dir": output_dir},
            module_class=module_class,
            make_data=partial(OwnData, native, overrides)
            if overrides.any(STEPS | LOADS | COUNTS)
            else HFDataModule,
            drops_unread=True,
            strategy=chosen_strategy(strategy),
            **{"logger": False, "enable_model_summary": False, **trainer_arguments},
        )
    finally:
        vars(native).update(kept)
    assert isinstance(module, OwnSteps)
    module.attach_to(native, overrides)
    native._created_lr_scheduler = makes_schedule
    vars(native.model).pop("_is_accelerate_prepared", None)  # its forward has been unwrapped
    # Random states are left alone: the HF Trainer seeds in its __init__.
    module.evaluator.follow(
        trainer, skip_memory_metrics=True, preparation_s=getattr(native, "model_preparation_time", None)
    )
    return trainer, module, data


def chosen_strategy(strategy: Any) -> Any:
    """Resolve "auto" by the environment variable."""
    return os.environ.get(STRATEGY_VARIABLE, "auto") if strategy == "auto" else strategy


def ranks_of(args: Any) -> dict[str, Any]:
    """Return Lightning's `devices` and `num_nodes` for the processes that have been started.

    Raises:
        SettingsError: several GPUs would share one process (torch's DataParallel).
    """
    if args.n_gpu > 1:
        raise SettingsError(
            f"{args.n_gpu} GPUs are visible to one process, and torch's DataParallel is not supported. Start "
            "a process for each (torchrun --nproc-per-node, hfbridge run --devices), or set "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if args.world_size == 1:
        return {"devices": 1}
    local = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    return {"devices": local, "num_nodes": args.world_size // local}


def restore_trainer(native: Any) -> None:
    """Leave model and accelerator as `transformers.Trainer.train` does."""
    prepared, model = native.accelerator._models, native.model
    if not any(found is model for found in prepared):
        return  # the run has not begun
    if native.place_model_on_device:
        native._move_model_to_device(model, native.args.device)
    if native.accelerator.mixed_precision != "no":
        prepared.clear()
        native.accelerator.prepare_model(model, evaluation_mode=True)


@contextmanager
def preserve_process_state() -> Iterator[None]:
    """Preserve SIGINT, KeyboardInterrupt and WORLD_SIZE from Lightning, and hide its loader hints."""
    world_size = os.environ.get("WORLD_SIZE")
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, on_interrupt)
        raise error.__context__ from None
    finally:
        if world_size is not None:
            os.environ["WORLD_SIZE"] = world_size

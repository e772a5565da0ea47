"""Going on with a run: what Lightning, the host and the data are told by a checkpoint; knows both worlds.

Everything is told by the number S of optimizer steps in the native state, with U steps to a pass:

    weights                       restored by Lightning, tied ones completed here
    optimizer, schedule           restored by Lightning; a schedule that follows a metric, by the host
    pass, and place in it         S // U and S % U: Lightning's loop counters, and WindowLoader.start_at
    random states                 set by WindowLoader, at the moment the native Trainer sets them
    TrainerState, callbacks       CallbackHost.on_fit_start
    loss since the last row       LoggedLoss; the native Trainer forgets it
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer as NativeTrainer
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import compare_trainer_and_checkpoint_args

from hfbridge import generators
from hfbridge.checkpoints import layout
from hfbridge.checkpoints.convert import native_position, pack, plain_position, without_prefix
from hfbridge.checkpoints.read import state_from
from hfbridge.checkpoints.weights import complete_weights, saved_names
from hfbridge.checkpoints.write import other_files
from hfbridge.checkpoints.writer import as_json
from hfbridge.data.loader import PassRecord, Start, WindowLoader
from hfbridge.data.window import Schedule
from hfbridge.errors import BridgeWarning, CheckpointError


@dataclass(frozen=True)
class Resumption:
    """What a run goes on from.

    Attributes:
        state_text: the native state, as JSON.
        start: place in the data, and random states.
        schedule: `state_dict` of the schedule; `None` if the checkpoint has none.
        optimizer: `state_dict` of the optimizer; likewise.
        loss: what was summed since the last log row; `None` if the checkpoint does not know.
    """

    state_text: str
    start: Start
    schedule: dict[str, Any] | None
    optimizer: dict[str, Any] | None
    loss: dict[str, Any] | None

    @property
    def is_mid_epoch(self) -> bool:
        """Whether a pass goes on that was begun."""
        return self.start.windows > 0

    def new_state(self) -> TrainerState:
        """Make the native state of the run."""
        return state_from(self.state_text)

    def has_evaluated(self, prefix: str) -> bool:
        """Whether the run has evaluated a set before."""
        return any(f"{prefix}_loss" in row for row in self.new_state().log_history)


def fill_checkpoint(module: Any, checkpoint: dict[str, Any]) -> Resumption | None:
    """Complete a checkpoint that Lightning has read, before it restores anything from it.

    Args:
        module: the HFModule, whose model is built.
        checkpoint: its weights are completed and, if a run is to go on, its loop counters replaced.

    Returns:
        What else the run has to be told; `None` if only weights are wanted.

    Raises:
        CheckpointError: the weights are another model's, or the file does not tell of a run.
    """
    # Out of memory: the run begins again with the weights as they are.
    own = checkpoint["state_dict"] if module.kept_optimizer is None else module.state_dict()
    complete = complete_weights(module.model, without_prefix(own), source="the checkpoint")
    checkpoint["state_dict"] = {f"{layout.PREFIX}{name}": tensor for name, tensor in complete.items()}
    trainer = module._trainer
    if trainer is None:
        return None
    if trainer.state.fn != TrainerFn.FITTING:
        loops = {f"{name}_loop": getattr(trainer, f"{name}_loop") for name in ("validate", "test", "predict")}
        checkpoint["loops"] = {name: loop.state_dict() for name, loop in loops.items()}
        return None
    if layout.STATE_KEY not in checkpoint:
        raise CheckpointError(
            "This checkpoint was not written by a run of HFModule: it does not tell where its run was. Load "
            "its weights by HFModule.load_from_checkpoint, and begin a new run."
        )
    schedule: Schedule = trainer.datamodule.schedule
    resumption = _read(checkpoint, schedule, skips_data=not module.args.ignore_data_skip)
    step, in_pass = resumption.new_state().global_step, resumption.start.windows
    checkpoint["loops"] = {
        "fit_loop": loop_counters(trainer, step=step, epoch=step // schedule.steps_per_epoch, in_pass=in_pass)
    }
    checkpoint.setdefault("optimizer_states", [])
    checkpoint.setdefault("lr_schedulers", [])
    if not checkpoint["optimizer_states"]:
        warnings.warn(
            "The checkpoint holds weights and state alone (save_only_model): optimizer and schedule begin "
            "anew, and random numbers are others.",
            BridgeWarning,
            stacklevel=2,
        )
    if step >= schedule.max_steps:
        warnings.warn(
            f"The checkpoint is of step {step}, and the run ends at {schedule.max_steps}: there is nothing "
            "left to train. More epochs or max_steps would go on.",
            BridgeWarning,
            stacklevel=2,
        )
    return resumption


def _read(checkpoint: dict[str, Any], schedule: Schedule, *, skips_data: bool) -> Resumption:
    text: str = checkpoint[layout.STATE_KEY]
    state = state_from(text)
    states = checkpoint.get(layout.RNG_KEY)
    windows = state.global_step % schedule.steps_per_epoch if skips_data else 0
    position, record = checkpoint.get(layout.POSITION_KEY), None
    if position is not None:
        position = native_position(position)
        if position["pass_states"] is not None:
            record = PassRecord(position["pass_states"], position["pass_sampler"], position["in_hand"])
    start = Start(
        windows=windows,
        states=None if not states else generators.as_native(states[0]),
        record=record if states else None,
        sampler=None if position is None else position["sampler"],
    )
    optimizers, schedules = checkpoint.get("optimizer_states"), checkpoint.get("lr_schedulers")
    return Resumption(
        state_text=text,
        start=start,
        schedule=schedules[0] if schedules else None,
        optimizer=optimizers[0] if optimizers else None,
        loss=None if position is None else position["loss"],
    )


def loop_counters(trainer: pl.Trainer, *, step: int, epoch: int, in_pass: int) -> dict[str, Any]:
    """Count for Lightning's loops as they would have counted at a step, whenever its checkpoint was written.

    Args:
        trainer: the Trainer whose loops will read it.
        step: optimizer steps of the run.
        epoch: passes that are behind.
        in_pass: optimizer steps of the pass that is running; one batch is one of them.
    """
    counters: dict[str, Any] = trainer.fit_loop.state_dict()
    begun = epoch + 1 if in_pass else epoch
    per_pass = {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    counters["epoch_progress"] = {"total": dict(per_pass), "current": dict(per_pass)}
    total = {"ready": step, "started": step, "processed": step, "completed": step}
    current = dict.fromkeys(total, in_pass)
    batches = counters["epoch_loop.batch_progress"]
    counters["epoch_loop.batch_progress"] = {
        **batches,
        "total": dict(total),
        "current": dict(current),
        "is_last_batch": False,
    }
    stepped = {"ready": step, "completed": step}, {"ready": in_pass, "completed": in_pass}
    counters["epoch_loop.scheduler_progress"] = {"total": dict(stepped[0]), "current": dict(stepped[1])}
    zeroed = {"ready": step, "started": step, "completed": step}
    counters["epoch_loop.automatic_optimization.optim_progress"] = {
        "optimizer": {
            "step": {"total": dict(stepped[0]), "current": dict(stepped[1])},
            "zero_grad": {"total": zeroed, "current": dict.fromkeys(zeroed, in_pass)},
        }
    }
    counters["epoch_loop.state_dict"] = {
        **counters["epoch_loop.state_dict"],
        "_batches_that_stepped": step,
    }
    return counters


def position_of(loader: WindowLoader, loss: dict[str, Any]) -> dict[str, Any]:
    """Collect what the native Trainer forgets: draws of the pass that is running, and the unlogged loss."""
    record = loader.record
    return {
        "pass_states": None if record is None else record.states,
        "pass_sampler": None if record is None else record.sampler,
        "in_hand": None if record is None else record.in_hand,
        "sampler": loader.sampler_state,
        "loss": loss,
    }


def describe_run(
    module: Any, state: TrainerState, position: dict[str, Any], processing_class: Any
) -> dict[str, Any]:
    """Make the entries that a Lightning checkpoint of a run has beside Lightning's own.

    Args:
        module: the HFModule.
        state: with what callbacks export.
        position: from `position_of`.
        processing_class: tokenizer or processor, kept beside the weights.

    Returns:
        Entries by key; checkpoints/layout.py has the table.
    """
    weights = _stand_ins(module.model)
    return {
        layout.STATE_KEY: as_json(state),
        layout.RNG_KEY: [generators.as_plain(generators.capture())],
        layout.POSITION_KEY: plain_position(position),
        layout.WEIGHTS_KEY: {"names": saved_names(module.model, weights), "adapter": False},
        layout.FILES_KEY: pack(other_files(module.model, module.args, processing_class)),
        "lr_schedulers": [module.schedule.state_dict()],
    }


def _stand_ins(model: nn.Module) -> dict[str, Tensor]:
    """Make a small tensor for each one in a model's `state_dict`; tied ones have the same."""
    made: dict[int, Tensor] = {}
    own = model.state_dict(keep_vars=True)
    return {name: made.setdefault(id(tensor), torch.empty(1)) for name, tensor in own.items()}


def check_optimizer_state(optimizer: Optimizer, found: dict[str, Any], *, is_sharded: bool = False) -> None:
    """See that the state of an optimizer belongs to the parameters it is put to.

    Args:
        optimizer: of this run.
        found: its whole state.
        is_sharded: parameters are parts, of other shapes than the whole; those who cut see to them.

    Raises:
        CheckpointError: it has other groups, or tensors of other shapes.
    """
    own = [len(group["params"]) for group in optimizer.param_groups]
    saved = [len(group["params"]) for group in found["param_groups"]]
    advice = "Is it the checkpoint of another model, or of other settings?"
    if own != saved:
        raise CheckpointError(
            f"{layout.OPTIMIZER_NAME} is of groups of {saved} parameters, and this run has {own}. {advice}"
        )
    if is_sharded:
        return
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in found["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        moment = found["state"].get(number, {}).get("exp_avg")
        if moment is not None and moment.shape != parameter.shape and moment.numel() == parameter.numel():
            raise CheckpointError(
                f"{layout.OPTIMIZER_NAME} has a moment of shape {tuple(moment.shape)} for a parameter of "
                f"shape {tuple(parameter.shape)}. {advice}"
            )


def take_up_state(state: TrainerState, args: TrainingArguments, handler: Any, control: Any) -> Any:
    """Let the native Trainer's own methods read a state, and callbacks' states if asked for.

    Returns:
        The run's `TrainerControl`, which may be the one that was saved.

    Mirrors: transformers.Trainer._init_training_state
    """
    best = state.best_model_checkpoint
    if best is not None and not layout.is_checkpoint(Path(best)):
        warnings.warn(
            f"The best checkpoint so far, {best!r}, is not there any more; it is forgotten.",
            BridgeWarning,
            stacklevel=2,
        )
        state.best_model_checkpoint = None
    compare_trainer_and_checkpoint_args(args, state)
    trainer: Any = SimpleNamespace(args=args, state=state, callback_handler=handler, control=control)
    NativeTrainer._load_callback_state(trainer)
    return trainer.control

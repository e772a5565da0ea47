"""Resuming of a run: how a checkpoint reaches Lightning, the callback host and the data.

    weights                       restored by Lightning, tied ones completed here
    optimizer, schedule           restored by Lightning; a schedule that follows a metric, by the host
    epoch, and position in it     DataPosition: Lightning's loop counters, and TrainLoader.start_at
    random states                 set by TrainLoader, when the HF Trainer sets them
    TrainerState, callbacks       CallbackHost.on_fit_start
    loss since the last log       LoggedLoss; the HF Trainer does not save it

After S optimizer steps of U an epoch, the position is S // U and S % U, unless the batch layout changes
(ranks, micro-batch size, accumulation). Then

    the epoch                     is resumed after the trained samples; its order does not depend on that
    the step                      stays S, and the epoch ends with as many steps as its other samples need
    later epochs                  have the U of the new layout
    max_steps                     stays, if it is a setting; else it is S, the rest of the epoch, and U for
                                  each epoch left of num_train_epochs
    the schedule                  is that of the new max_steps, entered at step S
    random states                 are those of the rank's number, or newly seeded for additional ranks

A layout that changes within an epoch is an error where the order depends on it. A checkpoint of the HF
Trainer gives its ranks by its rng_state files, and its trained samples by the epoch in its state.
"""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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

from hfbridge.checkpoints import layout
from hfbridge.checkpoints.atomic_write import other_files
from hfbridge.checkpoints.lightning_format import native_ranks, pack, plain_ranks, without_prefix
from hfbridge.checkpoints.reader import RankState, state_from
from hfbridge.checkpoints.weights import (
    adapter_files,
    complete_weights,
    outline_of,
    saved_names,
    trained_names,
    writes_adapters,
)
from hfbridge.checkpoints.writer import as_json
from hfbridge.data.accumulation import BatchLayout, DataPosition, Schedule
from hfbridge.data.dataloaders import EpochRecord, Start
from hfbridge.data.iterable import hf_position
from hfbridge.data.samplers import is_order_layout_dependent, rows_of_micro_batch
from hfbridge.distributed import collectives
from hfbridge.errors import BridgeWarning, CheckpointError
from hfbridge.utilities import rng


@dataclass(frozen=True)
class Resumption:
    """The state that a run is resumed from; `None` stands for what the checkpoint does not have.

    Attributes:
        state_text: `TrainerState` as JSON.
        start: position in the data, and random states.
        steps_in_epoch: completed optimizer steps of the current epoch, as Lightning counts them, to which all
            epochs are equally long.
        schedule: `state_dict` of the schedule.
        optimizer: `state_dict` of the optimizer.
        loss: the sum since the last log entry.
        loaders: states of the user's training loaders.
        due: what follows the last optimizer step and was not done yet.
    """

    state_text: str
    start: Start
    steps_in_epoch: int
    schedule: dict[str, Any] | None
    optimizer: dict[str, Any] | None
    loss: dict[str, Any] | None
    loaders: list[Any] | None = None
    due: dict[str, Any] | None = None

    @property
    def is_mid_epoch(self) -> bool:
        """Whether the run is resumed within an epoch."""
        return self.steps_in_epoch > 0

    def new_state(self) -> TrainerState:
        """Make a new `TrainerState` of the run."""
        return state_from(self.state_text)

    def has_evaluated(self, prefix: str) -> bool:
        """Whether the run has evaluated a set before."""
        return any(f"{prefix}_loss" in entry for entry in self.new_state().log_history)


def fill_checkpoint(module: Any, checkpoint: dict[str, Any]) -> Resumption | None:
    """Complete a checkpoint that Lightning has read, before it restores anything from it.

    Args:
        module: the HFModule, whose model is built.
        checkpoint: its weights are completed and, when fitting, its loop counters replaced.

    Returns:
        What else the run needs; `None` if only weights are loaded.

    Raises:
        CheckpointError: the weights are another model's, or no run can be resumed from the file.
    """
    is_loaded = "state_dict" not in checkpoint  # by a strategy of Lightning's that shards
    own = {} if is_loaded else checkpoint["state_dict"]
    if module._reused_optimizer is not None:  # out of memory: restarted with the weights as they are
        own = module.state_dict()
    if own or not (is_loaded or layout.PARTS_KEY in checkpoint):
        complete = complete_weights(module.model, without_prefix(own), source="the checkpoint")
        beside = {n: tensor for n, tensor in own.items() if not n.startswith(layout.PREFIX)}
        beside = beside or _state_beside_model(module)  # a directory holds the model's weights alone
        checkpoint["state_dict"] = beside | {f"{layout.PREFIX}{n}": tensor for n, tensor in complete.items()}
    trainer = module._trainer
    if trainer is None:
        return None
    if trainer.state.fn != TrainerFn.FITTING:
        loops = {f"{name}_loop": getattr(trainer, f"{name}_loop") for name in ("validate", "test", "predict")}
        checkpoint["loops"] = {name: loop.state_dict() for name, loop in loops.items()}
        return None
    if (reason := checkpoint.get(layout.REASON_KEY)) and module.has_host:
        raise CheckpointError(cannot_be_resumed(reason))
    takes_parts = module.sharing.save_parts is not None
    _check_is_resumable(checkpoint, takes_parts=takes_parts)
    if layout.STATE_KEY not in checkpoint:
        return None  # written by Lightning outside of a run: its own counters, optimizer and schedule
    module.sharing.resume_from(checkpoint.get(layout.PARTS_KEY))
    is_ours = hasattr(module.data, "lengthen")
    resumption = _read(module, checkpoint, has_user_loaders=not is_ours)
    schedule = module.data.schedule
    step = resumption.new_state().global_step
    if is_ours or "fit_loop" not in checkpoint.get("loops", {}):
        checkpoint["loops"] = {"fit_loop": _counters_of(trainer, resumption, schedule, step=step)}
    checkpoint.setdefault("optimizer_states", [])
    checkpoint.setdefault("lr_schedulers", [])
    if not takes_parts:
        _warn_of_absent_states(trainer, checkpoint)
    is_within_epochs = resumption.start.position.epoch < schedule.epochs
    if step >= schedule.max_steps and is_within_epochs and not module.host.checks_limit_first:
        trainer.fit_loop.epoch_loop.max_steps = step + 1
    elif step >= schedule.max_steps:
        warnings.warn(
            f"The checkpoint is of step {step}, and the run ends at {schedule.max_steps}: there is nothing "
            "left to train. Increase num_train_epochs or max_steps.",
            BridgeWarning,
            stacklevel=2,
        )
    return resumption


def _state_beside_model(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of an HFModule without its model's, which ranks may share."""
    own = nn.Module()
    own._parameters, own._buffers = module._parameters, module._buffers
    own._non_persistent_buffers_set = module._non_persistent_buffers_set
    found: dict[str, Tensor] = own.state_dict()
    for name, child in module.named_children():
        if f"{name}." != layout.PREFIX:
            found |= child.state_dict(prefix=f"{name}.")
    return found


def _counters_of(
    trainer: pl.Trainer, resumption: Resumption, schedule: Schedule, *, step: int
) -> dict[str, Any]:
    """Make Lightning's loop counters, with the states of the user's loaders."""
    done = resumption.start.done if resumption.steps_in_epoch else 0
    counts_itself = not hasattr(trainer.fit_loop.epoch_loop, "current")  # a plain lightning.Trainer
    if counts_itself and done % trainer.accumulate_grad_batches:
        raise CheckpointError(
            f"The checkpoint was written with another number of ranks, batch size or accumulation, and "
            f"{done} micro-batches of the epoch are completed, which is no multiple of "
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}. Resume it under hfbridge.Trainer."
        )
    epoch = resumption.start.position.epoch
    limit = trainer.max_epochs  # beyond which Lightning restores no run
    counters = loop_counters(
        trainer,
        step=step,
        epoch=epoch if limit in (None, -1) else min(epoch, limit),
        steps_in_epoch=resumption.steps_in_epoch,
        batches=epoch * schedule.micro_batches_per_epoch + done,
        batches_in_epoch=done,
    )
    if resumption.loaders:
        counters["state_dict"] = {**counters["state_dict"], "combined_loader": resumption.loaders}
    return counters


def _check_is_resumable(checkpoint: dict[str, Any], *, takes_parts: bool) -> None:
    """Raise for `ModelCheckpoint(save_weights_only=True)`, and for files of another strategy."""
    is_of_run = layout.STATE_KEY in checkpoint
    if not (
        "lr_schedulers" in checkpoint
        if is_of_run
        else checkpoint.get("optimizer_states") and checkpoint.get("loops")
    ):
        raise CheckpointError(
            "This checkpoint cannot be resumed: it holds weights alone, without optimizer and schedule. Load "
            "them by HFModule.load_from_checkpoint into a new run; to resume a run, write its checkpoints "
            "without save_weights_only."
        )
    if is_of_run and takes_parts != (layout.PARTS_KEY in checkpoint):
        raise CheckpointError(
            "This checkpoint was written without DeepSpeed, or with save_only_model. Resume under the "
            "strategy it was written with, or load its weights into a new run: HFModule(folder, auto_class)."
            if takes_parts
            else "This checkpoint was written under DeepSpeed, which alone reads its optimizer and weights. "
            "Resume with the same deepspeed= in the settings, or load its weights into a new run."
        )


def _warn_of_absent_states(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Warn of what a checkpoint of `save_only_model` lacks, in place of "Restored all states"."""
    if checkpoint["optimizer_states"]:
        return
    held = {
        layout.OPTIMIZER_NAME: False,
        layout.SCHEDULER_NAME: bool(checkpoint["lr_schedulers"]),
        layout.random_name(0, 1): bool(checkpoint.get(layout.RNG_KEY)),
    }
    if collectives.rank() == 0:
        warnings.warn(
            "The checkpoint holds weights and state alone (save_only_model), without "
            f"{', '.join(name for name, is_held in held.items() if not is_held)}: optimizer, schedule and "
            "random states are new ones. To resume exactly, leave save_only_model out.",
            BridgeWarning,
            stacklevel=2,
        )
    connector: Any = trainer._checkpoint_connector
    resume_end = connector.resume_end

    def resume_silently() -> None:
        path, connector._ckpt_path = connector._ckpt_path, None
        resume_end()
        connector._ckpt_path = path
        del connector.resume_end

    connector.resume_end = resume_silently


def cannot_be_resumed(reason: str) -> str:
    """Return the message for a checkpoint that was not written between two optimizer steps."""
    return (
        f"This checkpoint cannot be resumed: {reason}. Resume from another one, or load its weights into a "
        "new run by HFModule.load_from_checkpoint."
    )


def _read(module: Any, checkpoint: dict[str, Any], *, has_user_loaders: bool) -> Resumption:
    """Read what a run is resumed from; the user's own loaders keep their state themselves."""
    text: str = checkpoint[layout.STATE_KEY]
    state, found, number = state_from(text), native_ranks(checkpoint), collectives.rank()
    own = found[number] if number < len(found) else None
    position = None if own is None else own.position
    optimizers, schedules = checkpoint.get("optimizer_states"), checkpoint.get("lr_schedulers")
    shared: dict[str, Any] = {
        "state_text": text,
        "schedule": schedules[0] if schedules else None,
        "optimizer": optimizers[0] if optimizers else None,
    }
    states = None if own is None else own.random_states
    data, args = module.data, module.args
    accumulation = data.layout.accumulation
    if has_user_loaders:
        epoch, steps = divmod(state.global_step, data.schedule.steps_per_epoch)
        start = Start(position=DataPosition(epoch, steps), done=steps * accumulation, states=states)
        kept: dict[str, Any] = position or {}
        shared |= {name: kept.get(name) for name in ("loss", "loaders", "due")}
        return Resumption(start=start, steps_in_epoch=steps, **shared)
    place, is_as_before = find_place(module, state, found)
    if place.extra:
        data.lengthen(place.extra)
    if args.ignore_data_skip:
        place = replace(place, windows=0, first_row=0)
    left, schedule = data.micro_batches(first_row=place.first_row), data.schedule
    record = None
    if is_as_before and position is not None and position["pass_states"] is not None:
        record = EpochRecord(position["pass_states"], position["pass_sampler"], position["in_hand"])
    if found and states is None:
        states = rng.seeded(args.seed + number + state.global_step)
    positions = [rank.position for rank in found if rank is not None and rank.position is not None]
    return Resumption(
        start=Start(
            position=place,
            done=schedule.micro_batches_per_epoch - left + place.windows * accumulation,
            states=states,
            record=record,
            sampler=positions[0]["sampler"] if positions else None,
        ),
        steps_in_epoch=schedule.steps_per_epoch - math.ceil(left / accumulation) + place.windows,
        loss=_mean_loss(positions) if not is_as_before or position is None else position["loss"],
        due=positions[0].get("due") if positions else None,
        **shared,
    )


def find_place(
    module: Any, state: TrainerState, found: Sequence[RankState | None]
) -> tuple[DataPosition, bool]:
    """Find the position in the data at which a run is resumed.

    Args:
        module: the HFModule of the run.
        state: of the checkpoint.
        found: the states of the ranks that wrote it; none with `save_only_model`.

    Returns:
        The position, and whether the batch layout is unchanged.

    Raises:
        CheckpointError: the layout has changed where the order depends on it, or the position is unknown.

    Proved by: tests/distributed/test_resume.py
    """
    data = module.data
    current, step = data.layout, state.global_step
    is_streamed = data.is_streamed("train")
    kept = next((rank.position.get("place") for rank in found if rank is not None and rank.position), None)
    if kept is not None:
        written = BatchLayout(kept["ranks"], kept["rows"], kept["accumulation"])
        place = DataPosition(kept["epoch"], kept["windows"], kept["first_row"], kept["extra"])
        trained = place.first_row + place.windows * written.rows_per_step
    elif is_streamed:
        place = hf_position(state, data.schedule, accumulation=current.accumulation)
        written = replace(current, ranks=len(found) or current.ranks)
        trained = place.windows * current.rows_per_step
    else:
        count = len(found) or current.ranks
        size = state.train_batch_size or data.train_batch_size
        rows = rows_of_micro_batch(size, data.settings, ranks=count)
        written = BatchLayout(count, rows, current.accumulation)
        place, trained = _place_by_state(data, state, written, skips_data=not module.args.ignore_data_skip)
    if written == current and trained == place.first_row + place.windows * current.rows_per_step:
        return place, True
    if trained and (is_streamed or is_order_layout_dependent(data.settings)):
        raise CheckpointError(
            f"The checkpoint is of the middle of an epoch, of a run of {written}; this one has "
            f"{current}. With train_sampling_strategy={str(data.settings.train_sampling_strategy)!r} and "
            f"accelerator_config={data.settings.accelerator_config!r} the order of samples depends on that. "
            "Resume with the layout it was written with, or from a checkpoint of the end of an epoch."
        )
    epoch, left = place.epoch, data.micro_batches(first_row=trained)
    if left == 0:  # dataloader_drop_last
        epoch, trained, left = epoch + 1, 0, data.micro_batches()
    extra = step + math.ceil(left / current.accumulation) - (epoch + 1) * data.schedule.steps_per_epoch
    module.info_once(
        f"The checkpoint is of a run of {written}; this one has {current}. Epoch {epoch + 1} is resumed "
        f"after its {trained} trained samples, with other numbers than that run would have had."
    )
    return DataPosition(epoch, first_row=trained, extra=extra), False


def _place_by_state(
    data: Any, state: TrainerState, written: BatchLayout, *, skips_data: bool
) -> tuple[DataPosition, int]:
    """Derive position and trained samples of the epoch from the `TrainerState` alone.

    Raises:
        CheckpointError: state and number of ranks contradict each other.

    Mirrors: transformers.Trainer._init_training_state
    """
    step, steps = state.global_step, data.schedule.steps_per_epoch
    place, is_as_before = DataPosition(step // steps, step % steps), written == data.layout
    per_epoch = data.micro_batches(layout=written)
    done = place.windows * written.accumulation
    expected = place.epoch + done / max(per_epoch, 1)
    is_consistent = state.epoch is None or math.isclose(state.epoch, expected, abs_tol=1e-6)
    if is_as_before and (is_consistent or not skips_data):
        return place, place.windows * written.rows_per_step
    # The state has no accumulation, but the completed micro-batches follow from its epoch.
    epoch = math.floor((state.epoch or 0) + 1e-6)
    fraction = ((state.epoch or 0) - epoch) * per_epoch
    done = round(fraction)
    is_integer = state.epoch is not None and math.isclose(fraction, done, abs_tol=1e-3)
    if not is_integer or not (is_as_before or _fits(step, epoch, done, per_epoch)):
        raise CheckpointError(
            f"{layout.TRAINER_STATE_NAME} has epoch={state.epoch!r} at step {step}, which no run has "
            f"come to with {written.ranks} rank(s), the number of its rng_state files, and micro-batches of "
            f"{written.rows}. If no file is missing, resume with the ranks, batches and training set it had, "
            "or load its weights into a new run."
        )
    steps_done = done // written.accumulation if is_as_before else 0
    return DataPosition(epoch, steps_done), done * written.ranks * written.rows


def _fits(step: int, epoch: int, done: int, per_epoch: int) -> bool:
    """Whether any accumulation leads to that step after some epochs and `done` micro-batches."""
    return any(
        done % size == 0 and step == epoch * math.ceil(per_epoch / size) + done // size
        for size in range(1, per_epoch + 1)
    )


def _mean_loss(positions: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Average the ranks' loss since the last log entry; `None` if it is unknown."""
    if not positions:
        return None
    losses = [position["loss"] for position in positions]
    return {**losses[0], "sum": torch.stack([loss["sum"] for loss in losses]).mean()}


def loop_counters(
    trainer: pl.Trainer,
    *,
    step: int,
    epoch: int,
    steps_in_epoch: int,
    batches: int,
    batches_in_epoch: int,
) -> dict[str, Any]:
    """Make the counters that Lightning's loops have at a step, from what is completed.

    Args:
        trainer: the Trainer whose loops will read it.
        step: optimizer steps of the run.
        epoch: epochs.
        steps_in_epoch: optimizer steps of the current epoch.
        batches: micro-batches of the run.
        batches_in_epoch: micro-batches of the current epoch.
    """
    counters: dict[str, Any] = trainer.fit_loop.state_dict()
    begun = epoch + 1 if steps_in_epoch else epoch
    epochs = {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    counters["epoch_progress"] = {"total": dict(epochs), "current": dict(epochs)}
    names = ("ready", "started", "processed", "completed")
    counters["epoch_loop.batch_progress"] = {
        **counters["epoch_loop.batch_progress"],
        "total": dict.fromkeys(names, batches),
        "current": dict.fromkeys(names, batches_in_epoch),
        "is_last_batch": False,
    }
    stepped = {
        "total": {"ready": step, "completed": step},
        "current": {"ready": steps_in_epoch, "completed": steps_in_epoch},
    }
    counters["epoch_loop.scheduler_progress"] = copy.deepcopy(stepped)
    cleared = names[:2] + names[3:]
    counters["epoch_loop.automatic_optimization.optim_progress"] = {
        "optimizer": {
            "step": stepped,
            "zero_grad": {
                "total": dict.fromkeys(cleared, step),
                "current": dict.fromkeys(cleared, steps_in_epoch),
            },
        }
    }
    counters["epoch_loop.state_dict"] = {
        **counters["epoch_loop.state_dict"],
        "_batches_that_stepped": step,
    }
    return counters


def position_of(start: Start, loss: dict[str, Any], batch_layout: BatchLayout) -> dict[str, Any]:
    """Collect what the HF Trainer does not save: draws and position of the epoch, and the unlogged loss."""
    record = start.record
    return {
        "pass_states": None if record is None else record.states,
        "pass_sampler": None if record is None else record.sampler,
        "in_hand": None if record is None else record.prefetch_states,
        "sampler": start.sampler,
        "loss": loss,
        "place": {**asdict(start.position), **asdict(batch_layout)},
    }


def describe_run(
    module: Any,
    state: TrainerState,
    rank_state: RankState,
    processing_class: Any,
    state_dict: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Make hfbridge's entries of a Lightning checkpoint; called by all ranks.

    Args:
        module: the HFModule.
        state: with what callbacks export.
        rank_state: random states and position of this rank, from `position_of`.
        processing_class: tokenizer or processor.
        state_dict: the module's, as Lightning has gathered it.

    Returns:
        Entries by key; checkpoints/layout.py has the table.
    """
    states = collectives.gather(rank_state)
    return {
        layout.STATE_KEY: as_json(state),
        **plain_ranks(states),
        **_describe_weights(module, state_dict),
        layout.FILES_KEY: pack(other_files(module.model, module.args, processing_class)),
    }


def _describe_weights(module: Any, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Make the entries of the weights; with adapters, without the frozen base model."""
    model: nn.Module = module.model
    if not writes_adapters(model):
        made: dict[int, Tensor] = {}
        stand_ins = {
            name: made.setdefault(id(tensor), torch.empty(1)) for name, tensor in outline_of(model).items()
        }
        names = saved_names(model, stand_ins)
        return {layout.WEIGHTS_KEY: {"names": names, "adapter": False}}
    files = adapter_files(model)
    entries = {layout.WEIGHTS_KEY: {"names": files.names, "adapter": True, "made": files.made}}
    if module.sharing.reads_weights:
        return entries
    names_of_model = trained_names(model, module.trainer.optimizers) | set(files.names.values())
    kept = {f"{layout.PREFIX}{name}" for name in names_of_model}
    return entries | {
        "state_dict": {
            name: tensor
            for name, tensor in state_dict.items()
            if name in kept or not name.startswith(layout.PREFIX)
        }
    }


def check_optimizer_state(optimizer: Optimizer, found: dict[str, Any], *, is_sharded: bool = False) -> None:
    """Check that an optimizer's state belongs to its parameters.

    Args:
        optimizer: of this run.
        found: its full state.
        is_sharded: parameters have the shapes of shards, which are not compared.

    Raises:
        CheckpointError: it has other groups, or tensors of other shapes.
    """
    own = [len(group["params"]) for group in optimizer.param_groups]
    saved = [len(group["params"]) for group in found["param_groups"]]
    hint = "Is it the checkpoint of another model, or of other settings?"
    if own != saved:
        raise CheckpointError(
            f"{layout.OPTIMIZER_NAME} is of groups of {saved} parameters, and this run has {own}. {hint}"
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
                f"shape {tuple(parameter.shape)}. {hint}"
            )


def restore_callback_state(state: TrainerState, args: TrainingArguments, handler: Any, control: Any) -> Any:
    """Restore the callbacks' states by the HF Trainer's own methods, if the settings say so.

    Returns:
        The run's `TrainerControl`, which may be the saved one.

    Mirrors: transformers.Trainer._init_training_state
    """
    best = state.best_model_checkpoint
    if best is not None and not Path(best).is_dir():
        warnings.warn(
            f"The best checkpoint so far, {best!r}, is missing; the best is counted from here on.",
            BridgeWarning,
            stacklevel=2,
        )
        state.best_model_checkpoint = None
    compare_trainer_and_checkpoint_args(args, state)
    trainer: Any = SimpleNamespace(args=args, state=state, callback_handler=handler, control=control)
    NativeTrainer._load_callback_state(trainer)
    return trainer.control

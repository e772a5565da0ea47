"""Going on with a run: what Lightning, the host and the data are told by a checkpoint; knows both worlds.

    weights                       restored by Lightning, tied ones completed here
    optimizer, schedule           restored by Lightning; a schedule that follows a metric, by the host
    pass, and place in it         Place: Lightning's loop counters, and TrainLoader.start_at
    random states                 set by TrainLoader, at the moment the native Trainer sets them
    TrainerState, callbacks       CallbackHost.on_fit_start
    loss since the last row       LoggedLoss; the native Trainer forgets it

With S optimizer steps behind and U to a pass, the place is S // U and S % U, unless the cut is another: the
number of ranks, the rows of a micro-batch, or the accumulation. Then

    the pass goes on              behind the rows that were trained; its order does not depend on the cut
    the step                      stays S, and the pass ends with as many steps as its other rows need
    later passes                  have the U of the new cut
    max_steps                     stays, if it is a setting; else it is S, what is left of the pass, and U for
                                  each pass that num_train_epochs leaves
    the schedule                  is that of the new max_steps, entered at step S
    random states                 are those of a rank's number, or seeded anew for ranks that were not there

Refused is a cut that changes in mid-pass where the order of the pass depends on it. A native checkpoint tells
its ranks by its rng_state files, and the rows that are behind by the epoch in its state.
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
    """What a run goes on from.

    Attributes:
        state_text: the native state, as JSON.
        start: place in the data, and random states.
        in_pass: optimizer steps of the running pass that count as behind for Lightning, to which all passes
            are equally long.
        schedule: `state_dict` of the schedule; `None` if the checkpoint has none.
        optimizer: `state_dict` of the optimizer; likewise.
        loss: what was summed since the last log row; `None` if the checkpoint does not know.
        loaders: states of the user's training loaders; `None` if the checkpoint has none.
        due: what follows the last optimizer step and was not done yet; `None` for nothing.
    """

    state_text: str
    start: Start
    in_pass: int
    schedule: dict[str, Any] | None
    optimizer: dict[str, Any] | None
    loss: dict[str, Any] | None
    loaders: list[Any] | None = None
    due: dict[str, Any] | None = None

    @property
    def is_mid_epoch(self) -> bool:
        """Whether a pass goes on that was begun."""
        return self.in_pass > 0

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
    is_loaded = "state_dict" not in checkpoint  # by a strategy of Lightning's that shards
    own = {} if is_loaded else checkpoint["state_dict"]
    if module._reused_optimizer is not None:
        own = module.state_dict()
    if own or not (is_loaded or layout.PARTS_KEY in checkpoint):
        complete = complete_weights(module.model, without_prefix(own), source="the checkpoint")
        beside = {n: tensor for n, tensor in own.items() if not n.startswith(layout.PREFIX)}
        beside = beside or _beside_model(module)  # a directory holds the model's weights alone
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
    _check_tells_of_run(checkpoint)
    if layout.STATE_KEY not in checkpoint:
        return None  # written by Lightning outside of a run: its own counters, optimizer and schedule
    takes_parts = module.sharing.save_parts is not None
    if takes_parts != (layout.PARTS_KEY in checkpoint):
        raise CheckpointError(_wrong_strategy(takes_parts))
    module.sharing.resume_from(checkpoint.get(layout.PARTS_KEY))
    is_ours = hasattr(module.data, "lengthen")
    resumption = _read(module, checkpoint) if is_ours else _read_beside_loaders(module, checkpoint)
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


def _beside_model(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of what an HFModule has beside its model, which is not asked: ranks may share it."""
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
    """Count for Lightning's loops where a run is resumed, with the states of the user's loaders."""
    done = resumption.start.done if resumption.in_pass else 0
    _check_alignment(trainer, done)
    epoch = resumption.start.position.epoch
    limit = trainer.max_epochs  # beyond which Lightning restores no run
    counters = loop_counters(
        trainer,
        step=step,
        epoch=epoch if limit in (None, -1) else min(epoch, limit),
        steps_in_epoch=resumption.in_pass,
        batches=epoch * schedule.micro_batches_per_epoch + done,
        batches_in_epoch=done,
    )
    if resumption.loaders:
        counters["state_dict"] = {**counters["state_dict"], "combined_loader": resumption.loaders}
    return counters


def _check_tells_of_run(checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint is one that a run can be resumed from.

    Raises:
        CheckpointError: it holds weights alone, as `ModelCheckpoint(save_weights_only=True)` writes them.
    """
    if layout.STATE_KEY in checkpoint:
        tells = "lr_schedulers" in checkpoint
    else:
        tells = bool(checkpoint.get("optimizer_states") and checkpoint.get("loops"))
    if tells:
        return
    raise CheckpointError(
        "This checkpoint does not tell where its run was: it holds weights alone, without optimizer and "
        "schedule. Load them by HFModule.load_from_checkpoint, and begin a new run; to resume one, write its "
        "checkpoints without save_weights_only."
    )


def _warn_of_absent_states(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Name what a checkpoint of `save_only_model` does not hold, in place of "Restored all states"."""
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
            f"{', '.join(name for name, is_held in held.items() if not is_held)}: optimizer and schedule "
            "begin anew, and random numbers are others. For runs that resume exactly, leave save_only_model "
            "out.",
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
    """Say what a checkpoint that was written at no moment between two optimizer steps is good for."""
    return (
        f"This checkpoint cannot be resumed: {reason}. Resume from another one, or load its weights by "
        "HFModule.load_from_checkpoint, and begin a new run."
    )


def _wrong_strategy(takes_parts: bool) -> str:
    if takes_parts:
        return (
            "This checkpoint holds no states of DeepSpeed's: it was written under another strategy, or by "
            "save_only_model. Resume under that strategy, or begin a new run with its weights: "
            "HFModule(folder, auto_class)."
        )
    return (
        "This checkpoint was written under DeepSpeed: optimizer and weights are in parts that only DeepSpeed "
        "reads. Resume with the same deepspeed= in the settings, or begin a new run with its weights."
    )


def _read(module: Any, checkpoint: dict[str, Any]) -> Resumption:
    text: str = checkpoint[layout.STATE_KEY]
    state, found = state_from(text), native_ranks(checkpoint)
    data, args = module.data, module.args
    place, is_as_before = find_place(module, state, found)
    if place.extra:
        data.lengthen(place.extra)
    if args.ignore_data_skip:
        place = replace(place, windows=0, first_row=0)
    left, schedule = data.micro_batches(first_row=place.first_row), data.schedule
    windows_left = math.ceil(left / data.layout.accumulation)
    number = collectives.rank()
    own = found[number] if number < len(found) else None
    position = None if own is None else own.position
    record = None
    if is_as_before and position is not None and position["pass_states"] is not None:
        record = EpochRecord(position["pass_states"], position["pass_sampler"], position["in_hand"])
    states = None if own is None else own.random_states
    if found and states is None:
        states = rng.seeded(args.seed + number + state.global_step)
    optimizers, schedules = checkpoint.get("optimizer_states"), checkpoint.get("lr_schedulers")
    positions = [rank.position for rank in found if rank is not None and rank.position is not None]
    return Resumption(
        state_text=text,
        start=Start(
            position=place,
            done=schedule.micro_batches_per_epoch - left + place.windows * data.layout.accumulation,
            states=states,
            record=record,
            sampler=positions[0]["sampler"] if positions else None,
        ),
        in_pass=schedule.steps_per_epoch - windows_left + place.windows,
        schedule=schedules[0] if schedules else None,
        optimizer=optimizers[0] if optimizers else None,
        loss=_loss_of(positions) if not is_as_before or position is None else position["loss"],
        due=positions[0].get("due") if positions else None,
    )


def find_place(
    module: Any, state: TrainerState, found: Sequence[RankState | None]
) -> tuple[DataPosition, bool]:
    """Find where in the data a run goes on.

    Args:
        module: the HFModule of the run.
        state: of the checkpoint.
        found: the states of the ranks that wrote it; none with `save_only_model`.

    Returns:
        The place, and whether the run is cut as before.

    Raises:
        CheckpointError: the cut is another, and no place is right, or none is told.

    Proved by: tests/distributed/test_resume.py
    """
    data = module.data
    cut, step = data.layout, state.global_step
    is_streamed = data.is_streamed("train")
    kept = next((rank.position.get("place") for rank in found if rank is not None and rank.position), None)
    if kept is not None:
        written = BatchLayout(kept["ranks"], kept["rows"], kept["accumulation"])
        place = DataPosition(kept["epoch"], kept["windows"], kept["first_row"], kept["extra"])
        rows = place.first_row + place.windows * written.rows_per_step
    elif is_streamed:
        place = hf_position(state, data.schedule, accumulation=cut.accumulation)
        written, rows = replace(cut, ranks=len(found) or cut.ranks), place.windows * cut.rows_per_step
    else:
        count = len(found) or cut.ranks
        size = state.train_batch_size or data.train_batch_size
        rows = rows_of_micro_batch(size, data.settings, ranks=count)
        written = BatchLayout(count, rows, cut.accumulation)
        place, rows = _native_place(data, state, written, skips_data=not module.args.ignore_data_skip)
    if written == cut and rows == place.first_row + place.windows * cut.rows_per_step:
        return place, True
    if rows and (is_streamed or is_order_layout_dependent(data.settings)):
        raise CheckpointError(
            f"The checkpoint is of the middle of a pass, of a run of {written}; this one has {cut}. With "
            f"train_sampling_strategy={str(data.settings.train_sampling_strategy)!r} and accelerator_config="
            f"{data.settings.accelerator_config!r} the order of a pass depends on that, and rows would be "
            "repeated or left out. Go on as before, or from a checkpoint of the end of a pass."
        )
    epoch, left = place.epoch, data.micro_batches(first_row=rows)
    if left == 0:  # dataloader_drop_last
        epoch, rows, left = epoch + 1, 0, data.micro_batches()
    extra = step + math.ceil(left / cut.accumulation) - (epoch + 1) * data.schedule.steps_per_epoch
    module.info_once(
        f"The checkpoint is of a run of {written}; this one has {cut}. Pass {epoch + 1} goes on behind the "
        f"{rows} rows that were trained, and from here on numbers are others than those of that run."
    )
    return DataPosition(epoch, first_row=rows, extra=extra), False


def _native_place(
    data: Any, state: TrainerState, written: BatchLayout, *, skips_data: bool
) -> tuple[DataPosition, int]:
    """Find the place, and how many rows of the pass are behind, of a checkpoint that does not name them.

    Raises:
        CheckpointError: state and number of ranks do not belong together.

    Mirrors: transformers.Trainer._init_training_state
    """
    step, steps = state.global_step, data.schedule.steps_per_epoch
    place, is_as_before = DataPosition(step // steps, step % steps), written == data.layout
    rows, of_pass = place.windows * written.rows_per_step, data.micro_batches(layout=written)
    done = place.windows * written.accumulation
    expected = place.epoch + done / max(of_pass, 1)
    is_told = state.epoch is None or math.isclose(state.epoch, expected, abs_tol=1e-6)
    if is_as_before and (is_told or not skips_data):
        return place, rows
    # The accumulation is not told; the micro-batches that are behind are.
    epoch = math.floor((state.epoch or 0) + 1e-6)
    behind = ((state.epoch or 0) - epoch) * of_pass
    is_whole = state.epoch is not None and math.isclose(behind, round(behind), abs_tol=1e-3)
    if not is_whole or not (is_as_before or _fits(step, epoch, round(behind), of_pass)):
        raise CheckpointError(
            f"{layout.TRAINER_STATE_NAME} tells epoch={state.epoch!r} at step {step}, which no run has "
            f"come to with {written.ranks} rank(s), as its rng_state files tell, and micro-batches of "
            f"{written.rows}. Are files of other ranks missing, or was the training set another? Go on with "
            "the ranks and batches it was written with, or begin a new run from its weights."
        )
    behind = round(behind)
    windows = behind // written.accumulation if is_as_before else 0
    return DataPosition(epoch, windows), behind * written.ranks * written.rows


def _fits(step: int, epoch: int, behind: int, of_pass: int) -> bool:
    """Whether any accumulation gives that many steps for some passes and full windows of micro-batches."""
    return any(
        behind % size == 0 and step == epoch * math.ceil(of_pass / size) + behind // size
        for size in range(1, of_pass + 1)
    )


def _loss_of(positions: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Make what was summed since the last row, on the average of all ranks; `None` if it is not known."""
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
    """Count for Lightning's loops as they would have counted at a step, whenever its checkpoint was written.

    Args:
        trainer: the Trainer whose loops will read it.
        step: optimizer steps of the run.
        epoch: completed epochs.
        steps_in_epoch: completed optimizer steps of the current epoch.
        batches: completed micro-batches of the run.
        batches_in_epoch: completed micro-batches of the current epoch.
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


def _check_alignment(trainer: pl.Trainer, done: int) -> None:
    """Check that Lightning's own loop would take its steps where the run takes them.

    Raises:
        CheckpointError: a plain `lightning.Trainer` counts steps from the beginning of the epoch.
    """
    counts_itself = not hasattr(trainer.fit_loop.epoch_loop, "current")
    if counts_itself and done % trainer.accumulate_grad_batches:
        raise CheckpointError(
            f"The checkpoint was written with another number of ranks, batch size or accumulation, and "
            f"{done} micro-batches of the epoch are completed, which is no multiple of "
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}. Resume it under hfbridge.Trainer."
        )


def _read_beside_loaders(module: Any, checkpoint: dict[str, Any]) -> Resumption:
    """Read what a run over loaders of the user's is resumed from; the loaders keep their own state."""
    text: str = checkpoint[layout.STATE_KEY]
    state, schedule = state_from(text), module.data.schedule
    found, accumulation = native_ranks(checkpoint), module.data.layout.accumulation
    epoch, steps = divmod(state.global_step, schedule.steps_per_epoch)
    number = collectives.rank()
    own = found[number] if number < len(found) else None
    optimizers, schedules = checkpoint.get("optimizer_states"), checkpoint.get("lr_schedulers")
    return Resumption(
        state_text=text,
        start=Start(
            position=DataPosition(epoch, steps),
            done=steps * accumulation,
            states=None if own is None else own.random_states,
        ),
        in_pass=steps,
        schedule=schedules[0] if schedules else None,
        optimizer=optimizers[0] if optimizers else None,
        loss=None if own is None or own.position is None else own.position["loss"],
        loaders=None if own is None or own.position is None else own.position.get("loaders"),
        due=None if own is None or own.position is None else own.position.get("due"),
    )


def position_of(start: Start, loss: dict[str, Any], batch_layout: BatchLayout) -> dict[str, Any]:
    """Collect what the HF Trainer forgets: draws and position of the current epoch, and the unlogged loss."""
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
    """Make the entries of a run's Lightning checkpoint that Lightning does not make; called by all ranks.

    Args:
        module: the HFModule.
        state: with what callbacks export.
        rank_state: random states and position of this rank, from `position_of`.
        processing_class: tokenizer or processor, kept beside the weights.
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
    """Make the entries of the weights: with adapters, without what is frozen below them."""
    model: nn.Module = module.model
    if not writes_adapters(model):
        names = saved_names(model, _stand_ins(model))
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


def _stand_ins(model: nn.Module) -> dict[str, Tensor]:
    """Make a small tensor for each one in a model's `state_dict`; tied ones have the same."""
    made: dict[int, Tensor] = {}
    own = outline_of(model).items()
    return {name: made.setdefault(id(tensor), torch.empty(1)) for name, tensor in own}


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


def restore_callback_state(state: TrainerState, args: TrainingArguments, handler: Any, control: Any) -> Any:
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

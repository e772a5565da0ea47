"""A run between two optimizer steps: what a Lightning checkpoint keeps of it, whenever it is written.

written                                    the file holds
in a step, before the optimizer's update   the moment before the step, which a resumed run repeats
after the update                           the moment after it; what follows a step is due
in an evaluation                           the moment before it; the evaluation is due
after the run, or an exception             its last moment
in `optimizer.step()`, with other weights  why it cannot be resumed
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import nn
from transformers import DefaultFlowCallback, TrainerState

from hfbridge.callbacks.connector import lightning_validates
from hfbridge.callbacks.run_data import UserData
from hfbridge.checkpoints.resume import position_of
from hfbridge.data.accumulation import DataPosition
from hfbridge.data.dataloaders import ResumableMixin, Start
from hfbridge.utilities import rng
from hfbridge.utilities.rng import RandomStates

UPDATING = "it was written while the optimizer was changing the weights"
BY_HAND = "it was written within a batch for which the module, which optimizes by hand, had taken a step"
NOT_BEGUN = "it was written before the run had begun"
RESTORING = "it was written before the run had been resumed from its own checkpoint"


class Begun(NamedTuple):
    """What an optimizer step changes of a run, as it was when the step began.

    Attributes:
        loss: sum of the losses since the last log entry.
        tokens: input tokens seen.
        flops: operations that the state does not count yet.
        log_entries: number of log entries.
        schedule_step: steps of the learning-rate schedule; `None` if it does not say.
        states: the random states, for loaders that do not keep them.
        loaders: states of the user's loaders before they were read.
        buffers: copies of what the model's forward may change.
    """

    loss: torch.Tensor
    tokens: int
    flops: float
    log_entries: int
    schedule_step: int | None
    states: RandomStates | None
    loaders: list[Any] | None
    buffers: dict[str, torch.Tensor] | None


@dataclass
class Moment:
    """A run between two optimizer steps.

    Attributes:
        state: of the HF Trainer.
        position: of this rank in the data, and what is due, as `position_of` returns it.
        random_states: of this rank.
        flops: operations of this rank that the state does not count yet.
        buffers: of the model, where its present ones may differ.
        schedules: state of a schedule that Lightning does not step.
        needs_schedule_step: the schedule has yet to take its step.
        is_within_step: it is not the present moment.
    """

    state: TrainerState
    position: dict[str, Any]
    random_states: RandomStates
    flops: float
    buffers: dict[str, torch.Tensor] | None = None
    schedules: list[Any] | None = None
    needs_schedule_step: bool = False
    is_within_step: bool = False


def moment_of(host: Any, module: Any) -> Moment | str:
    """Return the moment that a checkpoint written now can hold, or why there is none."""
    trainer: pl.Trainer = module.trainer
    if host.counter is None:
        return NOT_BEGUN
    if trainer._checkpoint_connector._loaded_checkpoint:
        return RESTORING
    begun = None if host.at_begin is None else Begun(*host.at_begin)
    is_updated = _is_updated(host, module)
    if module.last_step.is_updating and not is_updated:
        return UPDATING
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if is_updated and not module.automatic_optimization and batches.processed < batches.ready:
        return BY_HAND
    state = replace(
        host.state,
        log_history=list(host.state.log_history),
        stateful_callbacks=copy.deepcopy(host.state.stateful_callbacks),
    )
    place, flops = host.position, float(host.counter.flops)
    if is_updated:
        host.add_losses()
        place, state.epoch = host.next_place(trainer.fit_loop.batch_idx)
        state.global_step += 1
    elif begun is not None:
        state.num_input_tokens_seen, flops = begun.tokens, begun.flops
        del state.log_history[begun.log_entries :]
    before = None if is_updated else begun
    position, states = place_of(host, module, place, before)
    due = None if before is not None else due_at(host, module, place)
    schedule, is_stepped = module.lr_schedule, bool(trainer.lr_scheduler_configs)
    return Moment(
        state=state,
        position={**position, "due": due},
        random_states=rng.capture() if states is None else states,
        flops=flops,
        buffers=None if before is None else before.buffers,
        schedules=None if is_stepped or schedule is None else [copy.deepcopy(schedule.state_dict())],
        needs_schedule_step=is_updated and _needs_schedule_step(trainer, begun),
        is_within_step=begun is not None,
    )


def _is_updated(host: Any, module: Any) -> bool:
    """Whether the optimizer has changed the weights in a step that is not counted yet."""
    is_updated: bool = module.last_step.is_updated or module.trainer.global_step > host.trainer_step
    return is_updated and host.at_begin is not None


def place_of(
    host: Any, module: Any, place: DataPosition, before: Begun | None = None
) -> tuple[dict[str, Any], RandomStates | None]:
    """Find where in the data a run is, and its random states, `None` for those of now."""
    loader: Any = module.trainer.train_dataloader
    loss, states, loaders = (
        (None, None, None) if before is None else (before.loss, before.states, before.loaders)
    )
    start = loader.start_from(place) if isinstance(loader, ResumableMixin) else Start(place, 0, states)
    position = position_of(start, host.logged.record(loss), module.data.layout)
    if isinstance(module.data, UserData):
        position["loaders"] = module.data.loader_states() if loaders is None else loaders
    return position, start.states


def due_at(host: Any, module: Any, place: DataPosition) -> dict[str, Any] | None:
    """Describe what follows the last optimizer step and is not done yet; `None` for nothing."""
    control, trainer, step = host.control, module.trainer, module.last_step
    names = ("should_log", "should_evaluate", "should_save") if host.pending == "actions" else ()
    flags = {name: True for name in names if getattr(control, name)}
    if host.pending == "evaluation":
        flags["should_evaluate"] = True
    found = {
        "step": _is_updated(host, module) or host.pending == "step",
        "flags": flags,
        "validates": _validation_is_due(trainer, host.validated_batch),
        "epoch": place.windows == 0 and place.epoch > host.closed_epochs,
    }
    if not any(found.values()):
        return None
    last = {"grad_norm": step.grad_norm, "learning_rate": step.learning_rate}
    return {**found, **last, "ends_epoch": host.ends_epoch}


def end_last_step(host: Any, module: Any, resumption: Any) -> None:
    """Log, evaluate and save what was due when the checkpoint of a resumed run was written.

    TrainerCallbacks get no end of a step or an epoch whose beginning they did not get.
    """
    trainer, due, start, flow = module.trainer, resumption.due, resumption.start, DefaultFlowCallback()
    args, state, control, step = host.args, host.state, host.control, module.last_step
    if start.states is not None:
        rng.restore(start.states)
    step.grad_norm, step.learning_rate = due["grad_norm"], due["learning_rate"]
    host._has_losses = True
    trainer.fit_loop.epoch_loop.val_loop.restarting = False
    if due["step"]:
        flow.on_step_end(args, state, control)
    vars(control).update(due["flags"])
    _finish(host, module, ends_epoch=due["ends_epoch"])
    if due["validates"]:
        host._evaluate(trainer)
    if due["epoch"]:
        flow.on_epoch_end(args, state, control)
        _finish(host, module, ends_epoch=True)
    host._stop(trainer)
    loader: Any = trainer.train_dataloader
    if isinstance(loader, ResumableMixin):
        loader.start_at(replace(start, states=rng.capture()))


def _finish(host: Any, module: Any, *, ends_epoch: bool) -> None:
    host.pending, host.ends_epoch = "actions", ends_epoch
    host._log_evaluate_save(module.trainer, module, ends_epoch=ends_epoch)
    host.pending = "nothing"


def _validation_is_due(trainer: pl.Trainer, validated_batch: int) -> bool:
    """Whether Lightning's loop is about to validate, or validates."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    batch = loop.total_batch_idx
    if not lightning_validates(trainer) or batch in (-1, validated_batch) or fetcher is None:
        return False
    return not trainer.sanity_checking and loop._should_check_val_fx(fetcher)


def _needs_schedule_step(trainer: pl.Trainer, begun: Begun | None) -> bool:
    """Whether the schedule has yet to take the step of an optimizer step that is counted."""
    if begun is None or begun.schedule_step is None or not trainer.lr_scheduler_configs:
        return False
    config = trainer.lr_scheduler_configs[0]
    takes_steps = config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau
    return bool(takes_steps and config.scheduler.last_epoch == begun.schedule_step)


def step_schedule(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Put the schedule and the optimizer's rates into a checkpoint as they are after the next step."""
    if not checkpoint.get("lr_schedulers") or not checkpoint.get("optimizer_states"):
        return
    schedule: Any = trainer.lr_scheduler_configs[0].scheduler
    groups = trainer.optimizers[0].param_groups
    kept, rates = copy.deepcopy(schedule.state_dict()), [_without_parameters(group) for group in groups]
    schedule.step()
    checkpoint["lr_schedulers"][0] = copy.deepcopy(schedule.state_dict())
    for saved, group in zip(checkpoint["optimizer_states"][0]["param_groups"], groups, strict=True):
        saved.update(_without_parameters(group))
    schedule.load_state_dict(kept)
    for group, rate in zip(groups, rates, strict=True):
        group.update(rate)


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.copy(value) for name, value in group.items() if name != "params"}


class BufferCopies:
    """Copy the buffers of a model that its checkpoints hold, such as running statistics, before each step."""

    def __init__(self, model: nn.Module) -> None:
        found = {
            f"{prefix}.{name}" if prefix else name: buffer
            for prefix, part in model.named_modules()
            for name, buffer in part._buffers.items()
            if buffer is not None and name not in part._non_persistent_buffers_set
        }
        self.names, self._buffers = list(found), list(found.values())

    def take(self) -> dict[str, torch.Tensor]:
        """Copy them."""
        return dict(zip(self.names, [buffer.clone() for buffer in self._buffers], strict=True))

"""A training loop written with accelerate, as tutorials write it.

Model, data, loss, optimizer and schedule are the job's. The loop itself is what it would be in a script:

    accelerator.prepare                model and optimizer; the loader comes prepared from the Trainer
    for each optimizer step            its micro-batches are fetched together: their number of items is needed
      forward, accelerator.backward    gradients are reduced with the last one only
      accelerator.clip_grad_norm_
      optimizer.step, scheduler.step   the schedule is not prepared, or it would move on once for each rank
      zero_grad
      evaluate                         where the settings say so

It logs nothing and saves nothing. The job's TrainerCallbacks are called.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from typing import Any

from torch import Tensor
from transformers import Trainer as NativeTrainer
from transformers import TrainerState, set_seed

from hfbridge.compare.record import Recorder, described
from hfbridge.errors import Problem, SettingsError, raise_problems
from hfbridge.models.optimizers import follows_metric

# Settings that the HF Trainer applies around its loop.
_NOT_DONE = (
    "activation_checkpointing",
    "auto_find_batch_size",
    "deepspeed",
    "fsdp",
    "neftune_noise_alpha",
    "parallelism_config",
    "torch_empty_cache_steps",
    "use_liger_kernel",
)
NOTES = (
    "The loop logs nothing and saves nothing; load_best_model_at_end has no effect.",
    "The loss of a step is computed by the job's Trainer (compute_loss); everything around it is the loop's.",
)


def check_settings(trainer: NativeTrainer) -> None:
    """Check that the loop supports the settings.

    Raises:
        SettingsError: with all that are unsupported.
    """
    text = "not supported by the loop; leave the engine out"
    values = {name: getattr(trainer.args, name) for name in _NOT_DONE}
    problems = [Problem(f"{name} = {value!r}", text) for name, value in values.items() if value]
    if problems:
        raise_problems(SettingsError, "The accelerate loop cannot train this job.", problems)


class AccelerateLoop:
    """Train the job of a transformers.Trainer without its `train`.

    Args:
        trainer: holds the job; its state and control are those of the loop.
        recorder: records the micro-batches.

    Proved by: tests/compare/test_record.py
    """

    def __init__(self, trainer: NativeTrainer, recorder: Recorder) -> None:
        check_settings(trainer)
        self._trainer, self._recorder = trainer, recorder
        self._accelerator = trainer.accelerator
        self._args = trainer.args

    def train(self) -> None:
        """Train from the first step to the last.

        Raises:
            SettingsError: the schedule follows a metric.
        """
        trainer, args = self._trainer, self._args
        if trainer.model_init is not None:
            set_seed(args.seed)
            trainer.model = trainer.call_model_init()
            trainer.model.to(args.device)
        loader = trainer.get_train_dataloader()
        epochs, _, _, _, _, micro_batches, max_steps = trainer.set_initial_training_values(args, loader)
        assert micro_batches is not None  # transformers counts them, or raises
        model, optimizer = self._accelerator.prepare(trainer.model, trainer.create_optimizer())
        trainer.model_wrapped, trainer.optimizer = model, optimizer
        schedule = trainer.create_scheduler(num_training_steps=max_steps)
        if follows_metric(schedule):
            raise SettingsError(
                f"lr_scheduler_type={str(args.lr_scheduler_type)!r}: the loop of the engine accelerate has "
                "no schedule that follows a metric; leave the engine out."
            )
        self._begin(model, schedule, loader, max_steps=max_steps, epochs=epochs)
        for epoch in range(epochs):
            self._call_event("on_epoch_begin")
            _set_epoch(loader, epoch)
            for done, batches, items in self._accumulation_steps(loader, micro_batches):
                self._step(model, optimizer, schedule, batches, items)
                trainer.state.epoch = epoch + done / micro_batches
                self._call_event("on_step_end")
                self._evaluate_if_due()
                if trainer.control.should_training_stop or trainer.control.should_epoch_stop:
                    break
            self._call_event("on_epoch_end")
            self._evaluate_if_due()
            if trainer.control.should_training_stop:
                break
        self._call_event("on_train_end")

    def _begin(self, model: Any, schedule: Any, loader: Any, *, max_steps: int, epochs: int) -> None:
        trainer = self._trainer
        trainer.is_in_train = True
        trainer.state = TrainerState(
            is_local_process_zero=trainer.is_local_process_zero(),
            is_world_process_zero=trainer.is_world_process_zero(),
            max_steps=max_steps,
            num_train_epochs=epochs,
            epoch=0,
        )
        trainer.state.compute_steps(self._args, max_steps)
        handler = trainer.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = trainer.model, trainer.optimizer, schedule
        handler.train_dataloader = loader
        model.zero_grad()
        self._call_event("on_train_begin")
        if self._args.eval_on_start:
            trainer.evaluate()

    def _accumulation_steps(
        self, loader: Any, micro_batches: int
    ) -> Iterator[tuple[int, list[Any], Tensor | int | None]]:
        """Fetch the micro-batches of an epoch, those of an optimizer step together.

        Yields:
            Completed micro-batches of the epoch; those of the step; and what their losses are divided by.
        """
        size, iterator = self._args.gradient_accumulation_steps, iter(loader)
        for first in count(0, size):
            left = min(size, micro_batches - first)
            if left <= 0:
                return
            batches, items = self._trainer.get_batch_samples(iterator, left, self._args.device)
            if not batches:
                return
            yield first + len(batches), batches, items

    def _step(
        self, model: Any, optimizer: Any, schedule: Any, batches: list[Any], items: Tensor | int | None
    ) -> None:
        """Take one optimizer step."""
        accelerator, args = self._accelerator, self._args
        self._call_event("on_step_begin")
        for index, inputs in enumerate(batches):
            is_last = index == len(batches) - 1
            seen = described(inputs)
            model.train()
            if hasattr(optimizer, "train") and callable(optimizer.train):
                optimizer.train()
            with nullcontext() if is_last else accelerator.no_sync(model):
                loss = self._share(model, inputs, items, len(batches))
                accelerator.backward(loss)
            self._recorder.add_micro_batch(*seen, loss)
            if not is_last:
                self._call_event("on_substep_end")
        norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
        self._recorder.grad_norm = lambda: norm
        self._call_event("on_pre_optimizer_step")
        optimizer.step()
        self._call_event("on_optimizer_step")
        if not accelerator.optimizer_step_was_skipped:
            schedule.step()
        model.zero_grad()
        self._trainer.state.global_step += 1

    def _share(self, model: Any, inputs: Any, items: Tensor | int | None, size: int) -> Tensor:
        """Compute a micro-batch's share in the loss of its step, scaled as in the HF Trainer.

        Mirrors: transformers.Trainer.training_step
        """
        trainer = self._trainer
        loss: Any = trainer.compute_loss(model, inputs, num_items_in_batch=items)
        has_items = trainer.model_accepts_loss_kwargs and items is not None
        share: Tensor = loss if has_items or trainer.compute_loss_func is not None else loss / size
        return share

    def _evaluate_if_due(self) -> None:
        if self._trainer.control.should_evaluate:
            self._trainer.evaluate()

    def _call_event(self, event: str) -> None:
        trainer = self._trainer
        call = getattr(trainer.callback_handler, event)
        trainer.control = call(self._args, trainer.state, trainer.control)


def _set_epoch(loader: Any, epoch: int) -> None:
    """Set the epoch of loader and sampler, from which some of them draw their order."""
    sampler: Any = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    for part in (loader, sampler):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)

"""Which methods of a Trainer are overridden, and what that changes in a run.

A method is overridden in a subclass, on the object, or in transformers' class; attributes that libraries set
on the object count, too.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from hfbridge.errors import Problem, SettingsError, raise_problems
from hfbridge.migration.overrides import find_overridden, find_overridden_settings
from hfbridge.migration.trainer_attributes import find_changed

_SETTINGS = "args"
"""Stands for overridden methods and properties of the settings."""

STEPS = frozenset(
    {
        _SETTINGS,
        "_get_num_items_in_batch",
        "_prepare_context_parallel_inputs",
        "_prepare_input",
        "_prepare_inputs",
        "accelerator.backward",
        "autocast_smart_context_manager",
        "can_return_loss",
        "compute_loss",
        "compute_loss_context_manager",
        "compute_loss_func",
        "get_batch_samples",
        "label_smoother",
        "_loss_shifts_labels",
        "loss_is_scaled_for_ga",
        "model_accepts_loss_kwargs",
        "training_step",
    }
)
"""Methods of a micro-batch, and attributes that they read."""

LOADS = frozenset(
    {
        _SETTINGS,
        "_get_collator_with_removed_columns",
        "_get_dataloader",
        "_get_train_sampler",
        "_load_rng_state",
        "_remove_unused_columns",
        "_set_signature_columns_if_needed",
        "_signature_columns",
        "_train_batch_size",
        "get_total_train_batch_size",
        "get_train_dataloader",
        "set_initial_training_values",
    }
)
"""Methods that make the training loader, and attributes that they read."""

OPTIMIZES = frozenset(
    {
        _SETTINGS,
        "create_optimizer",
        "create_scheduler",
        "get_decay_parameter_names",
        "get_optimizer_cls_and_kwargs",
    }
)
CLIPS = frozenset(
    {
        "_clip_grad_norm",
        "_get_grad_norm",
        "_has_mixed_mesh_grads",
        "_mixed_mesh_grad_norm",
        "accelerator.clip_grad_norm_",
        "max_grad_norm",
    }
)
COUNTS = frozenset({"_track_num_input_tokens", "floating_point_ops", "store_flos"})
LOGS = frozenset({"_maybe_log_save_evaluate"})
SAVES = frozenset(
    {
        "_get_output_dir",
        "_save",
        "_save_checkpoint",
        "_save_optimizer_and_scheduler",
        "_save_rng_state",
        "_save_scaler",
        "save_model",
    }
)
RESUMES = frozenset(
    {"_load_callback_state", "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler"}
)
ENDS = frozenset({"_load_best_model"})
EVALUATES = frozenset(
    {
        _SETTINGS,
        "_evaluate",
        "_get_collator_with_removed_columns",
        "_get_dataloader",
        "_get_eval_sampler",
        "_pad_tensors_to_max_len",
        "_remove_unused_columns",
        "_set_signature_columns_if_needed",
        "_signature_columns",
        "evaluate",
        "evaluation_loop",
        "gather_function",
        "get_eval_dataloader",
        "num_examples",
        "prediction_step",
    }
)
FIXED = frozenset({"gradient_accumulation_steps", "optimizer"})
"""What the HF Trainer reads in each step, and Lightning's loop when a run begins."""

LOOP = frozenset(
    {
        "_finalize_training",
        "_init_training_state",
        "_inner_training_loop",
        "_prepare_for_training",
        "_run_epoch",
        "_wrap_model",
    }
)
"""The loop itself, which Lightning runs."""


@dataclass(frozen=True)
class Overrides:
    """What a Trainer overrides.

    Attributes:
        where: methods and attributes, each with how the user wrote it.
    """

    where: dict[str, str]

    @classmethod
    def of(cls, native: Any) -> "Overrides":
        """Find what an object overrides."""
        found = dict(find_overridden(native))
        found.update((name, f"{type(native).__name__} object: {name} = ...") for name in find_changed(native))
        if settings := ", ".join(find_overridden_settings(native.args)):
            found[_SETTINGS] = settings
        found.update(_of_accelerator(native.accelerator))
        return cls(found)

    def any(self, names: Collection[str]) -> bool:
        """Whether one of these is overridden."""
        return not self.where.keys().isdisjoint(names)

    def named(self, names: Collection[str]) -> list[str]:
        """Return the code location of what is overridden of these."""
        return [self.where[name] for name in self.where if name in names]

    def check(self, kind: str, loss_normalization: str) -> None:
        """Raise a SettingsError if the loop itself is overridden, or the loss while "exact" is set."""
        if problems := list(self.problems(loss_normalization)):
            raise_problems(SettingsError, f"{kind} cannot be trained on Lightning.", problems)

    def problems(self, loss_normalization: str) -> Iterator[Problem]:
        """Name overrides of the loop itself, or of the loss while "exact" is set."""
        if loss_normalization == "exact" and self.any(STEPS):
            text = f'{", ".join(self.named(STEPS))} computes the loss; leave it "native"'
            yield Problem('loss_normalization = "exact"', text)
        for name in self.where.keys() & LOOP:
            yield Problem(
                self.where[name],
                "Lightning runs the training loop; override what it calls (training_step, compute_loss, "
                "get_train_dataloader, ...), or use a TrainerCallback",
            )


def _of_accelerator(accelerator: Any) -> Iterator[tuple[str, str]]:
    """Name what is overridden in a subclass of Accelerator, or on the object, of what a step calls."""
    for name in ("backward", "clip_grad_norm_"):
        if name in vars(accelerator):
            yield f"accelerator.{name}", f"accelerator object: {name} = ..."
        elif getattr(type(accelerator), name) is not getattr(Accelerator, name):
            yield f"accelerator.{name}", f"{type(accelerator).__name__}.{name}"


class Watched:
    """What callbacks may change during a run, and the HF Trainer reads in each step or evaluation."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self._steps, self._evaluations = self._read(), self._read_evaluated()

    def find_changed(self) -> list[str]:
        """Name what a step reads and has changed since the last call."""
        before, self._steps = self._steps, self._read()
        if before == self._steps:
            return []
        return [name for name, value in self._steps.items() if value != before[name]]

    @property
    def has_evaluated_change(self) -> bool:
        """Whether what an evaluation reads has changed since the run began."""
        return self._evaluations != self._read_evaluated()

    def _read(self) -> dict[str, Any]:
        native, args = self._native, self._native.args
        return {
            "max_grad_norm": args.max_grad_norm,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "compute_loss_func": native.compute_loss_func,
            "label_smoother": native.label_smoother,
            "model_accepts_loss_kwargs": native.model_accepts_loss_kwargs,
            "optimizer": id(native.optimizer),
            "attributes": len(vars(native)),  # among them methods that are set on the object
        }

    def _read_evaluated(self) -> list[Any]:
        native = self._native
        names = ("eval_dataset", "data_collator", "compute_metrics", "preprocess_logits_for_metrics")
        return [*(id(getattr(native, name)) for name in names), {**vars(native.args)}]

"""Every attribute of a `transformers.Trainer`, and what becomes of it.

    attribute                                          becomes
    args                                               Settings, read field by field
    model, model_init                                  HFModule(model)
    processing_class, compute_metrics,
      compute_loss_func,
      preprocess_logits_for_metrics,
      optimizer_cls_and_kwargs                         arguments of HFModule of the same names
    optimizer, lr_scheduler                            HFModule(optimizers=)
    train_dataset, eval_dataset, data_collator         arguments of HFDataModule of the same names
    callback_handler                                   Trainer(callbacks=); migration/trainer_callbacks.py
    label_names, neftune_noise_alpha                   the settings of these names, if changed on the object
    what __init__ derives from model and settings      derived again; if changed on the object, read there
    the state of a run                                 new, as in the next `train`
    what belongs to its engine                         nothing: Lightning has its own

`KINDS` names each of them; a test fails when transformers has one more.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import nn
from transformers import Seq2SeqTrainer
from transformers import Trainer as NativeTrainer
from transformers.trainer_pt_utils import LabelSmoother

from hfbridge.errors import Problem
from hfbridge.losses.item_counts import read_traits
from hfbridge.models.signature import label_names_of
from hfbridge.settings.rules import show

Kind = Literal["converted", "derived", "state", "engine"]

_CONVERTED = (
    "args",
    "callback_handler",
    "compute_loss_func",
    "compute_metrics",
    "data_collator",
    "eval_dataset",
    "label_names",
    "lr_scheduler",
    "model",
    "model_init",
    "neftune_noise_alpha",
    "optimizer",
    "optimizer_cls_and_kwargs",
    "preprocess_logits_for_metrics",
    "processing_class",
    "train_dataset",
)
_DERIVED = (
    "_loss_shifts_labels",
    "_signature_columns",
    "_train_batch_size",
    "can_return_loss",
    "gather_function",
    "hp_search_backend",
    "is_distributed_loading_by_transformers",
    "is_in_train",
    "is_model_parallel",
    "label_smoother",
    "model_accepts_loss_kwargs",
    "model_wrapped",
)
_STATE = (
    "_attn_mask_causal_checked",
    "_created_lr_scheduler",
    "_gen_kwargs",
    "_globalstep_last_logged",
    "_initial_global_step",
    "_initial_num_input_tokens_seen",
    "_loggers_initialized",
    "_memory_tracker",
    "_mixed_mesh_grads",
    "_total_loss_scalar",
    "_tr_loss",
    "_trial",
    "compute_objective",
    "control",
    "current_flos",
    "current_gradient_accumulation_steps",
    "hp_name",
    "hp_space",
    "hub_model_id",
    "model_preparation_time",
    "neftune_hook_handle",
    "objective",
    "push_in_progress",
    "state",
)
_ENGINE = (
    "_eval_dataloaders",
    "accelerator",
    "deepspeed",
    "is_deepspeed_enabled",
    "is_fsdp_enabled",
    "is_fsdp_xla_enabled",
    "is_fsdp_xla_v1_enabled",
    "is_fsdp_xla_v2_enabled",
    "place_model_on_device",
)
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(_CONVERTED, "converted"),
    **dict.fromkeys(_DERIVED, "derived"),
    **dict.fromkeys(_STATE, "state"),
    **dict.fromkeys(_ENGINE, "engine"),
}
"""What becomes of each attribute of a `transformers.Trainer`."""


def find_unfit(native_trainer: NativeTrainer) -> Iterator[Problem]:
    """Find attributes with values that only the HF Trainer supports.

    Mirrors: transformers.Trainer.__init__
    Proved by: tests/unit/migration/test_trainer_attributes.py
    """
    for name, (text, is_wrong) in _WRONG.items():
        if is_wrong(native_trainer):
            yield Problem(show(name, getattr(native_trainer, name)), text)


def changed_settings(native_trainer: NativeTrainer) -> dict[str, Any]:
    """Read what was changed on the object and has a setting: label names, and noise on embeddings."""
    args, found = native_trainer.args, dict[str, Any]()
    concluded = label_names_of(_model_of(native_trainer))
    if native_trainer.label_names != (concluded if args.label_names is None else args.label_names):
        found["label_names"] = list(native_trainer.label_names)
    if native_trainer.neftune_noise_alpha != args.neftune_noise_alpha:
        found["neftune_noise_alpha"] = native_trainer.neftune_noise_alpha
    return found


def _model_of(native_trainer: NativeTrainer) -> nn.Module:
    model = native_trainer.model
    assert isinstance(model, nn.Module)
    return model


def has_trained(native_trainer: NativeTrainer) -> bool:
    """Whether `train` has been called before."""
    return native_trainer.state.global_step > 0


def _is_restarted(native_trainer: NativeTrainer) -> bool:
    return native_trainer.model_init is not None and has_trained(native_trainer)


def _is_wrapped(native_trainer: NativeTrainer) -> bool:
    wrapped, model = (
        getattr(found, "_orig_mod", found) for found in (native_trainer.model_wrapped, native_trainer.model)
    )
    return wrapped is not model


_WRONG: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "is_in_train": (
        "it is training. Convert it before, or when train() has returned",
        lambda native: native.is_in_train,
    ),
    "model_init": (
        "would build the model anew, and this Trainer has trained one. To train that further, make a new "
        "Trainer(model=trainer.model, ...); to begin again, one that has not trained",
        _is_restarted,
    ),
    "model_wrapped": (
        "the Trainer has trained on several ranks, which share the model. Make a new Trainer with the model, "
        "or resume from a checkpoint by ckpt_path=",
        _is_wrapped,
    ),
    "is_model_parallel": (
        "the model lies on several devices (device_map), and is not trained so. Load it without device_map, "
        'and share it by strategy="fsdp2" or "deepspeed_stage_3"',
        lambda native: native.is_model_parallel,
    ),
    "is_distributed_loading_by_transformers": (
        "the model was cut when it was loaded (distributed_config). Load it without, and share it by "
        'strategy="fsdp2" or "deepspeed_stage_3"',
        lambda native: native.is_distributed_loading_by_transformers,
    ),
    "hp_search_backend": (
        "a hyperparameter search is running. Convert the Trainer when it has ended",
        lambda native: native.hp_search_backend is not None,
    ),
}


def find_changed(native: Any) -> Iterator[str]:
    """Name attributes whose values differ from those that `__init__` derives from model and settings.

    Mirrors: transformers.Trainer.__init__
    """
    args, traits = native.args, read_traits(native.model)
    pairs = {
        "model_accepts_loss_kwargs": traits.takes_items,
        "can_return_loss": traits.returns_loss_alone,
        "_loss_shifts_labels": traits.native_shift,
    }
    yield from (name for name, concluded in pairs.items() if bool(getattr(native, name)) != concluded)
    smoother, is_multi_label = native.label_smoother, _is_multi_label(native.model)
    expected = 0.0 if is_multi_label else args.label_smoothing_factor
    is_plain = smoother is None or type(smoother) is LabelSmoother
    if not is_plain or (0.0 if smoother is None else smoother.epsilon) != expected:
        yield "label_smoother"
    if args.remove_unused_columns and native._signature_columns is not None:
        fresh = copy.copy(native)
        fresh._signature_columns = None
        fresh._set_signature_columns_if_needed()
        if set(fresh._signature_columns) != set(native._signature_columns):
            yield "_signature_columns"
    if native._train_batch_size != args.train_batch_size and not args.auto_find_batch_size:
        yield "_train_batch_size"
    gathers = native.gather_function
    gathers = gathers.func if isinstance(gathers, functools.partial) else gathers
    own = [native.accelerator.gather_for_metrics, native.accelerator.gather]  # the latter Seq2SeqTrainer's
    if gathers != own[0] and not (isinstance(native, Seq2SeqTrainer) and gathers == own[1]):
        yield "gather_function"


def _is_multi_label(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"

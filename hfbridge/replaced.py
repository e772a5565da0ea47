"""Methods of a native Trainer that Lightning would not call, and what does the same; names only, no library.

migrate/methods.py finds them on an object, explain/script.py in a script.
"""

from collections.abc import Mapping

CALLED_BY_USERS: frozenset[str] = frozenset(
    {
        "add_callback",
        "create_model_card",
        "end",
        "get_learning_rates",
        "get_num_trainable_parameters",
        "get_optimizer_group",
        "hyperparameter_search",
        "init_hf_repo",
        "log_metrics",
        "metrics_format",
        "pop_callback",
        "push_to_hub",
        "remove_callback",
        "save_metrics",
        "save_state",
    }
)
"""Methods that `train` does not call: whoever replaced one calls it on the native Trainer, as before."""

_LOSS = "pass compute_loss_func=..., a function of outputs, labels and num_items_in_batch, to the Trainer"
_STEP = f"{_LOSS}; for what happens around a step, use a TrainerCallback or a Lightning callback"
_LOADER = "pass the rows as train_dataset= and eval_dataset=, data_collator=, and the settings dataloader_..."
_ORDER = "order the rows of the dataset, or set train_sampling_strategy"
_OPTIMIZER = "pass optimizers=(optimizer, schedule) or optimizer_cls_and_kwargs=(class, arguments)"
_SCHEDULE = "set lr_scheduler_type and lr_scheduler_kwargs, or pass optimizers=(optimizer, schedule)"
_LOG = "use a TrainerCallback with on_log, in callbacks="
_SAVE = "use a TrainerCallback with on_save, in callbacks=; module.save_pretrained writes the model"
_EVALUATE = "pass compute_metrics= and preprocess_logits_for_metrics=, or a TrainerCallback with on_evaluate"
_INPUTS = "do this in the data_collator="
_FIT = "do this before and after trainer.fit, or in a TrainerCallback with on_train_begin and on_train_end"
_MODEL = "do this to the model before it is given to the Trainer"
_RESUME = "use trainer.fit(..., ckpt_path=...) and a TrainerCallback with on_train_begin"

INSTEAD: Mapping[str, str] = {
    "loss_is_scaled_for_ga": _LOSS,
    "compute_loss": _LOSS,
    "training_step": _STEP,
    "compute_loss_context_manager": "set bf16, or put the context into the model's forward",
    "autocast_smart_context_manager": "set bf16, or put the context into the model's forward",
    "_get_num_items_in_batch": _LOSS,
    "get_batch_samples": _INPUTS,
    "_prepare_input": _INPUTS,
    "_prepare_inputs": _INPUTS,
    "_track_num_input_tokens": "set include_num_input_tokens_seen",
    "get_train_dataloader": _LOADER,
    "get_eval_dataloader": _LOADER,
    "get_test_dataloader": _LOADER,
    "_get_dataloader": _LOADER,
    "num_examples": _LOADER,
    "_remove_unused_columns": "set remove_unused_columns=False, and drop columns in the dataset or collator",
    "_get_collator_with_removed_columns": "set remove_unused_columns=False, and drop columns in the collator",
    "_set_signature_columns_if_needed": "set remove_unused_columns=False, or label_names",
    "_get_train_sampler": _ORDER,
    "_get_eval_sampler": _ORDER,
    "create_optimizer_and_scheduler": _OPTIMIZER,
    "create_optimizer": _OPTIMIZER,
    "get_optimizer_cls_and_kwargs": _OPTIMIZER,
    "get_decay_parameter_names": _OPTIMIZER,
    "create_scheduler": _SCHEDULE,
    "_get_learning_rate": _LOG,
    "_clip_grad_norm": "set max_grad_norm, or use a TrainerCallback with on_pre_optimizer_step",
    "_get_grad_norm": "set max_grad_norm, or use a TrainerCallback with on_pre_optimizer_step",
    "log": _LOG,
    "store_flos": _LOG,
    "floating_point_ops": "give the model a method floating_point_ops",
    "_maybe_log_save_evaluate": "set control.should_log, should_evaluate or should_save in a TrainerCallback",
    "evaluate": _EVALUATE,
    "_evaluate": _EVALUATE,
    "evaluation_loop": _EVALUATE,
    "prediction_step": _EVALUATE,
    "predict": f"{_EVALUATE}; trainer.predict_dataset predicts a set",
    "_determine_best_metric": "set metric_for_best_model and greater_is_better",
    "_load_best_model": "set load_best_model_at_end, or load it in a TrainerCallback with on_train_end",
    "save_model": _SAVE,
    "_save": _SAVE,
    "_save_checkpoint": _SAVE,
    "_save_optimizer_and_scheduler": _SAVE,
    "_save_rng_state": _SAVE,
    "_get_output_dir": "set output_dir",
    "_load_from_checkpoint": _RESUME,
    "_load_optimizer_and_scheduler": _RESUME,
    "_load_rng_state": _RESUME,
    "_load_callback_state": _RESUME,
    "train": _FIT,
    "_inner_training_loop": _FIT,
    "_run_epoch": _FIT,
    "_finalize_training": _FIT,
    "_init_training_state": _FIT,
    "_prepare_for_training": _FIT,
    "call_model_init": "pass model_init=, a function without arguments",
    "_wrap_model": _MODEL,
    "_move_model_to_device": _MODEL,
}
"""What else does what somebody may have wanted of a method."""

OTHERWISE = "use the arguments of the native Trainer, its settings, or callbacks="
"""What does the same as any other method."""

"""One rule per setting: where its value goes, which values are supported, and why not the others.

    support   supported values
    all       every valid value
    some      the values it lists, or all but those it lists
    default   the default, and values that mean the same to transformers

Defaults are those of the installed transformers.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal

from transformers import Seq2SeqTrainingArguments, TrainingArguments

Value = Callable[[str], Any]
"""The value of a setting by its name, given or default."""

Complaint = tuple[str, str]
"""The name of a setting, and what is wrong with its value."""


class Unread(str):
    """What is wrong with a value that nothing reads beside the others; the HF Trainer ignores it."""

    __slots__ = ()


UNSUPPORTED = "not supported by hfbridge"

_SHOWN = 80  # characters of a value that a message shows


@dataclass(frozen=True, slots=True)
class Rule:
    """What hfbridge does with one setting.

    Attributes:
        name: the field of `TrainingArguments`.
        used_by: what uses the value, for readers who know transformers and Lightning, but not hfbridge.
        support: whether all, some or only default values are supported.
        values: with "some" the supported values, or all of them if empty; with "default" those that mean the
            default.
        unsupported: with "some", values that are not supported.
        keys: with "some", the keys a dictionary may have.
        reason: why other values are not supported, and what to do.
    """

    name: str
    used_by: str
    support: Literal["all", "some", "default"] = "all"
    values: tuple[object, ...] = ()
    unsupported: tuple[object, ...] = ()
    keys: tuple[str, ...] = ()
    reason: str = ""

    def supports(self, value: object) -> bool:
        """Whether a valid, plain value is supported."""
        if self.support == "all" or is_same(value, DEFAULTS[self.name]):
            return True
        if self.support == "default":
            return any(is_same(value, other) for other in self.values)
        if self.keys and isinstance(value, Mapping):
            return set(self.keys).issuperset(value)
        return value not in self.unsupported and (not self.values or value in self.values)


def is_same(one: object, other: object) -> bool:
    """Whether two settings values are equal, and neither is a bool where the other is a number."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def show(name: str, value: object) -> str:
    """Write a setting as messages show it: strings in double quotes, long values shortened, tokens hidden."""
    if name.endswith("_token") and value is not None:
        return f"{name} = <hidden>"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    return f"{name} = {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}"


def _default_values() -> Mapping[str, object]:
    """Read transformers' defaults, plain: enum members as their strings."""
    defaults: dict[str, object] = {}
    for field in fields(Seq2SeqTrainingArguments):
        if not field.init:
            continue
        value = field.default_factory() if field.default_factory is not MISSING else field.default
        defaults[field.name] = value.value if isinstance(value, Enum) else value
    return MappingProxyType(defaults)


DEFAULTS: Mapping[str, object] = _default_values()
"""Every setting's default value in the installed transformers."""

SEQ2SEQ_FIELDS: frozenset[str] = frozenset(DEFAULTS) - {field.name for field in fields(TrainingArguments)}
"""The settings that only `Seq2SeqTrainingArguments` has."""


def _default(used_by: str, reason: str, *names: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, used_by, "default", reason=reason) for name in names)


def _all(used_by: str, *names: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, used_by) for name in names)


# Plans, `hfbridge explain` and docs/settings.md show these.
_MODEL, _OPTIMIZER, _SCHEDULE, _LOSS = (
    "the model",
    "the optimizer",
    "the learning rate's schedule",
    "the loss",
)
_LOADER, _LOADERS, _STRATEGY = "the training loader", "the data loaders", "the strategy"
_LOGGING, _EVALUATING, _SAVING = "when to log, and where to", "when to evaluate", "when to save"
_EVALUATION, _WRITER, _BEST = "evaluation", "the checkpoints", "which checkpoint is the best"
_VERBOSITY = "transformers.logging: the process's verbosity"
_NOWHERE = "nowhere"

_RULES: tuple[Rule, ...] = (
    # Output, duration, batch size
    *_all("Trainer(default_root_dir=)", "output_dir"),
    *_all("the training loader: samples of a micro-batch", "per_device_train_batch_size"),
    Rule(
        "num_train_epochs",
        "Trainer(max_epochs=), rounded up; the exact number of steps once the data is known",
    ),
    *_all("Trainer(max_steps=)", "max_steps"),
    # Optimizer and schedule
    *_all(_OPTIMIZER, "learning_rate"),
    *_all(_SCHEDULE, "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    Rule(
        "optim",
        _OPTIMIZER,
        "some",
        unsupported=(
            "lomo",
            "adalomo",
            "adamw_torch_xla",
            "adamw_torch_npu_fused",
            "adamw_anyprecision",
            "galore_adamw_layerwise",
            "galore_adamw_8bit_layerwise",
            "galore_adafactor_layerwise",
            "apollo_adamw_layerwise",
        ),
        reason=(
            "LOMO and *_layerwise optimizers step during the backward pass, and in the HF Trainer neither "
            "schedule nor clipping reaches the latter; XLA, NPU and torchdistx are not available here; use "
            '"adamw_torch", "galore_adamw" or "apollo_adamw"'
        ),
    ),
    *_all(_OPTIMIZER, "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *_all(_OPTIMIZER, "optim_target_modules"),
    *_all("each optimizer step: its micro-batches", "gradient_accumulation_steps"),
    *_all(_LOSS, "average_tokens_across_devices"),
    *_all("each optimizer step: clips the gradients", "max_grad_norm"),
    *_all(_LOSS, "label_smoothing_factor"),
    # Precision, memory, compilation
    *_all("autocast around the model's forward", "bf16"),
    *_default(_MODEL, "there is no gradient scaler; use bf16=True, or the HF Trainer", "fp16"),
    *_all(_EVALUATION, "bf16_full_eval", "fp16_full_eval"),
    *_all("torch: a switch of the process", "tf32"),
    *_all(_MODEL, "activation_checkpointing", "activation_checkpointing_kwargs"),
    *_default(_MODEL, "now called activation_checkpointing", "gradient_checkpointing"),
    *_default(_MODEL, "now called activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
    *_all(_MODEL, "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *_all("the model, on a GPU; an error without one", "use_liger_kernel"),
    *_all("the model, on a GPU", "liger_kernel_config"),
    *_all("model.config.use_cache", "use_cache"),
    *_all("the model's embeddings", "neftune_noise_alpha"),
    *_all("each optimizer step", "torch_empty_cache_steps"),
    *_all("Trainer.fit: starts again with smaller micro-batches", "auto_find_batch_size"),
    # Logging and reporting
    *_all(_LOGGING, "logging_strategy", "logging_steps", "logging_first_step"),
    *_all(_VERBOSITY, "log_on_each_node"),
    *_all("the loss that is logged", "logging_nan_inf_filter"),
    *_all(_LOGGING, "include_num_input_tokens_seen"),
    *_all(_VERBOSITY, "log_level", "log_level_replica"),
    *_all("Trainer(enable_progress_bar=)", "disable_tqdm"),
    *_all(_LOGGING, "report_to", "run_name", "project"),
    *_all(_LOGGING, "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    # Evaluation and metrics
    *_all(_EVALUATING, "eval_strategy", "eval_steps", "eval_delay"),
    *_all("the evaluation loader", "per_device_eval_batch_size"),
    *_all(_EVALUATION, "prediction_loss_only"),
    *_all(_EVALUATING, "eval_on_start"),
    *_all(_EVALUATION, "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
    *_all(_EVALUATION, "include_for_metrics", "batch_eval_metrics"),
    # Checkpoints, Hub, best model, resuming
    *_all(_WRITER, "save_only_model"),
    *_all(_SAVING, "save_strategy", "save_steps"),
    *_all(_WRITER, "save_on_each_node", "save_total_limit"),
    *_all("SIGTERM saves a checkpoint, and ends the run", "enable_jit_checkpoint"),
    *_default(
        _NOWHERE,
        'nothing is pushed while training; call module.model.push_to_hub("name") after fit',
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
    ),
    *_all("the model, at the end: the best checkpoint's weights", "load_best_model_at_end"),
    *_all(_BEST, "metric_for_best_model", "greater_is_better"),
    *_all("the training loader of a resumed run", "ignore_data_skip"),
    *_all("the callbacks of a resumed run", "restore_callback_states_from_checkpoint"),
    # Reproducibility, hardware, accelerate
    *_all("transformers.enable_full_determinism before fit", "full_determinism"),
    *_all("transformers.set_seed before fit", "seed"),
    *_all(_LOADER, "data_seed"),
    *_all("Trainer(accelerator=)", "use_cpu"),
    Rule(
        "accelerator_config",
        _LOADERS,
        "some",
        keys=("split_batches", "dispatch_batches", "even_batches", "non_blocking", "use_seedable_sampler"),
        reason="leave the key out, and pass gradient_accumulation_steps as a setting of its own",
    ),
    *_default(_STRATEGY, "training runs in one process on one device; leave it out", "parallelism_config"),
    # Data loading
    *_all(_LOADERS, "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory"),
    *_all(_LOADERS, "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *_all(_LOADERS, "dataloader_multiprocessing_context", "dataloader_in_order"),
    *_all("the columns that the model is given", "remove_unused_columns"),
    *_all("the columns that are labels", "label_names"),
    *_all(_LOADER, "train_sampling_strategy", "length_column_name"),
    # DDP, FSDP, DeepSpeed, debugging, script flags
    *_all(_STRATEGY, "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *_all(_STRATEGY, "ddp_static_graph"),
    Rule(
        "ddp_backend",
        _STRATEGY,
        "some",
        values=("gloo", "nccl"),
        reason="Lightning opens groups of gloo and nccl only",
    ),
    *_all(_STRATEGY, "ddp_timeout"),
    *_all('the strategy: "fsdp2", or "fsdp"', "fsdp", "fsdp_config"),
    *_all(_STRATEGY, "deepspeed"),
    Rule(
        "debug",
        _MODEL,
        "some",
        values=("", "underflow_overflow"),
        reason='TPUs are not supported; use debug="underflow_overflow", or leave it out',
    ),
    *_all("the metrics of training and evaluation", "skip_memory_metrics"),
    *_all(_NOWHERE, "do_train", "do_eval", "do_predict"),
    *_all("Trainer.fit(ckpt_path=)", "resume_from_checkpoint"),
    *_default(_NOWHERE, "ranks come from the launcher's environment; leave it out", "local_rank"),
    # Seq2SeqTrainingArguments
    *_default(_NOWHERE, "the HF Trainer does not read it either; leave it out", "sortish_sampler"),
    *_all(_EVALUATION, "predict_with_generate"),
    *_all("evaluation: max_length of generate", "generation_max_length"),
    *_all("evaluation: num_beams of generate", "generation_num_beams"),
    *_all("model.generation_config", "generation_config"),
)

RULES: Mapping[str, Rule] = MappingProxyType({rule.name: rule for rule in _RULES})
"""The rule of every setting, by name."""

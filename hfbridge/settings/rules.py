"""One rule per setting: where its value goes in hfbridge, which values are carried, and why not the others.

Knows the fields of `transformers.TrainingArguments` and `Seq2SeqTrainingArguments` by name; their defaults
are read from the installed transformers. A rule carries

    all       every valid value
    some      the values it lists, or all but those it lists
    default   the default, and values that natively mean the same

and a value it does not carry is refused with its reason, which ends in what to do. A test fails when
transformers has a field without a rule, or a rule is without a field.
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


NOT_CARRIED = "not carried by this version of hfbridge"

_SHOWN = 80  # characters of a value that a message shows

_SCRIPT_FLAG = "a flag for scripts, read by neither the native Trainer nor hfbridge"


@dataclass(frozen=True, slots=True)
class Rule:
    """What hfbridge does with one setting.

    Attributes:
        name: the field of `TrainingArguments`.
        home: what uses the value, in words that need no knowledge of hfbridge.
        carried: whether all, some or only default values are honoured.
        values: with "some" the values honoured, or all of them if empty; with "default" those that mean the
            default.
        refused: with "some", values that are not honoured.
        keys: with "some", the keys a dictionary may have.
        reason: why other values are refused, and what to do.
        note: what one should know about a value that is carried and not the default.
    """

    name: str
    home: str
    carried: Literal["all", "some", "default"]
    values: tuple[object, ...] = ()
    refused: tuple[object, ...] = ()
    keys: tuple[str, ...] = ()
    reason: str = ""
    note: str = ""

    def carries(self, value: object) -> bool:
        """Whether a valid, plain value is honoured."""
        if self.carried == "all" or is_same(value, DEFAULTS[self.name]):
            return True
        if self.carried == "default":
            return any(is_same(value, other) for other in self.values)
        if self.keys and isinstance(value, Mapping):
            return set(self.keys).issuperset(value)
        return value not in self.refused and (not self.values or value in self.values)


def is_same(one: object, other: object) -> bool:
    """Whether two settings values are equal, and neither is a bool where the other is a number."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def show(name: str, value: object) -> str:
    """Write a setting as messages show it: strings in double quotes, long values cut, tokens hidden."""
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


def _all(name: str, home: str, note: str = "") -> Rule:
    return Rule(name, home, "all", note=note)


def _some(name: str, home: str, values: tuple[object, ...], reason: str) -> Rule:
    return Rule(name, home, "some", values=values, reason=reason)


def _default(name: str, home: str, reason: str, *same: object) -> Rule:
    return Rule(name, home, "default", values=same, reason=reason)


# In the words of those who know transformers' Trainer and Lightning: plans and `hfbridge explain` show them.
_MODEL, _OPTIMIZER, _SCHEDULE, _LOSS = (
    "the model",
    "the optimizer",
    "the learning rate's schedule",
    "the loss",
)
_STEP, _LOADER, _LOADERS = "each optimizer step", "the training loader", "the data loaders"
_LOGGING, _EVALUATING, _SAVING = "when to log, and where to", "when to evaluate", "when to save"
_EVALUATION, _WRITER, _BEST = "evaluation", "the checkpoints", "which checkpoint is the best"
_STRATEGY, _NOWHERE = "the strategy", "nowhere"

_OR_NATIVE = "or use the native Trainer"
_NO_HUB = 'nothing is pushed while training; call module.model.push_to_hub("name") after fit'
_NO_DDP = "training runs in one process on one device; leave it out"

_RULES = (
    # Output, duration, batch size
    _all("output_dir", "Trainer(default_root_dir=)"),
    _all("per_device_train_batch_size", "the training loader: samples of a micro-batch"),
    _all(
        "num_train_epochs",
        "Trainer(max_epochs=), rounded up; the exact number of steps once the data is known",
    ),
    _all("max_steps", "Trainer(max_steps=)"),
    # Optimizer and schedule
    _all("learning_rate", _OPTIMIZER),
    _all("lr_scheduler_type", _SCHEDULE),
    _all("lr_scheduler_kwargs", _SCHEDULE),
    _all("warmup_steps", _SCHEDULE),
    Rule(
        "optim",
        _OPTIMIZER,
        "some",
        refused=(
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
            "LOMO and *_layerwise optimizers step during the backward pass, and natively neither schedule "
            "nor clipping reaches the latter; XLA, NPU and torchdistx cannot be had here; use "
            '"adamw_torch", "galore_adamw" or "apollo_adamw"'
        ),
    ),
    _all("optim_args", _OPTIMIZER),
    _all("weight_decay", _OPTIMIZER),
    _all("adam_beta1", _OPTIMIZER),
    _all("adam_beta2", _OPTIMIZER),
    _all("adam_epsilon", _OPTIMIZER),
    _all("optim_target_modules", _OPTIMIZER),
    _all("gradient_accumulation_steps", "each optimizer step: its micro-batches"),
    _all("average_tokens_across_devices", _LOSS),
    _all("max_grad_norm", "each optimizer step: clips the gradients"),
    _all("label_smoothing_factor", _LOSS),
    # Precision, memory, compilation
    _all("bf16", "autocast around the model's forward"),
    _default("fp16", _MODEL, f"there is no gradient scaler; use bf16=True, {_OR_NATIVE}"),
    _all("bf16_full_eval", _EVALUATION),
    _all("fp16_full_eval", _EVALUATION),
    _all("tf32", "torch: a switch of the process"),
    _all("activation_checkpointing", _MODEL),
    _all("activation_checkpointing_kwargs", _MODEL),
    _default("gradient_checkpointing", _MODEL, "now called activation_checkpointing"),
    _default("gradient_checkpointing_kwargs", _MODEL, "now called activation_checkpointing_kwargs"),
    _all("torch_compile", _MODEL),
    _all("torch_compile_backend", _MODEL),
    _all("torch_compile_mode", _MODEL),
    _all("use_liger_kernel", "the model, on a GPU; refused off it"),
    _all("liger_kernel_config", "the model, on a GPU"),
    _all("use_cache", "model.config.use_cache"),
    _all("neftune_noise_alpha", "the model's embeddings"),
    _all("torch_empty_cache_steps", _STEP),
    _all("auto_find_batch_size", "Trainer.fit: begins again with smaller micro-batches"),
    # Logging and reporting
    _all("logging_strategy", _LOGGING),
    _all("logging_steps", _LOGGING),
    _all("logging_first_step", _LOGGING),
    _all("log_on_each_node", "transformers.logging: the process's verbosity"),
    _all("logging_nan_inf_filter", "the loss that is logged"),
    _all("include_num_input_tokens_seen", _LOGGING),
    _all("log_level", "transformers.logging: the process's verbosity"),
    _all("log_level_replica", "transformers.logging: the process's verbosity"),
    _all("disable_tqdm", "Trainer(enable_progress_bar=)"),
    _all("report_to", _LOGGING),
    _all("run_name", _LOGGING),
    _all("project", _LOGGING),
    _all("trackio_space_id", _LOGGING),
    _all("trackio_bucket_id", _LOGGING),
    _all("trackio_static_space_id", _LOGGING),
    # Evaluation and metrics
    _all("eval_strategy", _EVALUATING),
    _all("eval_steps", _EVALUATING),
    _all("eval_delay", _EVALUATING),
    _all("per_device_eval_batch_size", "the evaluation loader"),
    _all("prediction_loss_only", _EVALUATION),
    _all("eval_on_start", _EVALUATING),
    _all("eval_do_concat_batches", _EVALUATION),
    _all("eval_use_gather_object", _EVALUATION),
    _all("eval_accumulation_steps", _EVALUATION),
    _all("include_for_metrics", _EVALUATION),
    _all("batch_eval_metrics", _EVALUATION),
    # Checkpoints, Hub, best model, resuming
    _all("save_only_model", _WRITER),
    _all("save_strategy", _SAVING),
    _all("save_steps", _SAVING),
    _all("save_on_each_node", _WRITER),
    _all("save_total_limit", _WRITER),
    _all("enable_jit_checkpoint", "SIGTERM saves a checkpoint, and ends the run"),
    _default("push_to_hub", _NOWHERE, _NO_HUB),
    _default("hub_token", _NOWHERE, _NO_HUB),
    _default("hub_private_repo", _NOWHERE, _NO_HUB),
    _default("hub_model_id", _NOWHERE, _NO_HUB),
    _default("hub_strategy", _NOWHERE, _NO_HUB),
    _default("hub_always_push", _NOWHERE, _NO_HUB),
    _default("hub_revision", _NOWHERE, _NO_HUB),
    _all("load_best_model_at_end", "the model, at the end: the best checkpoint's weights"),
    _all("metric_for_best_model", _BEST),
    _all("greater_is_better", _BEST),
    _all("ignore_data_skip", "the training loader of a resumed run"),
    _all("restore_callback_states_from_checkpoint", "the callbacks of a resumed run"),
    # Reproducibility, hardware, accelerate
    _all("full_determinism", "transformers.enable_full_determinism before fit"),
    _all("seed", "transformers.set_seed before fit"),
    _all("data_seed", _LOADER),
    _all("use_cpu", "Trainer(accelerator=)"),
    Rule(
        "accelerator_config",
        _LOADERS,
        "some",
        keys=("split_batches", "dispatch_batches", "even_batches", "non_blocking", "use_seedable_sampler"),
        reason="leave the key out, and pass gradient_accumulation_steps as a setting of its own",
    ),
    _default("parallelism_config", _STRATEGY, "training runs in one process on one device; leave it out"),
    # Data loading
    _all("dataloader_drop_last", _LOADERS),
    _all("dataloader_num_workers", _LOADERS),
    _all("dataloader_pin_memory", _LOADERS),
    _all("dataloader_persistent_workers", _LOADERS),
    _all("dataloader_prefetch_factor", _LOADERS),
    _all("dataloader_multiprocessing_context", _LOADERS),
    _all("dataloader_in_order", _LOADERS),
    _all("remove_unused_columns", "the columns that the model is given"),
    _all("label_names", "the columns that are labels"),
    _all("train_sampling_strategy", _LOADER),
    _all("length_column_name", _LOADER),
    # DDP, FSDP, DeepSpeed, debugging, script flags
    _all("ddp_find_unused_parameters", _STRATEGY),
    _all("ddp_bucket_cap_mb", _STRATEGY),
    _all("ddp_broadcast_buffers", _STRATEGY),
    _all("ddp_static_graph", _STRATEGY),
    _some("ddp_backend", _STRATEGY, ("gloo", "nccl"), "Lightning opens groups of gloo and nccl only"),
    _all("ddp_timeout", _STRATEGY),
    _all("fsdp", 'the strategy: "fsdp2", or "fsdp"'),
    _all("fsdp_config", 'the strategy: "fsdp2", or "fsdp"'),
    _all("deepspeed", _STRATEGY),
    _some(
        "debug",
        _MODEL,
        ("", "underflow_overflow"),
        'there is no TPU here; use debug="underflow_overflow", or leave it out',
    ),
    _all("skip_memory_metrics", "the metrics of training and evaluation"),
    _all("do_train", _NOWHERE, _SCRIPT_FLAG),
    _all("do_eval", _NOWHERE, _SCRIPT_FLAG),
    _all("do_predict", _NOWHERE, _SCRIPT_FLAG),
    _all("resume_from_checkpoint", "Trainer.fit(ckpt_path=)"),
    _default("local_rank", _NOWHERE, "ranks come from the launcher's environment; leave it out"),
    # Seq2SeqTrainingArguments
    _default("sortish_sampler", _NOWHERE, "the native Trainer does not read it either; leave it out"),
    _all("predict_with_generate", _EVALUATION),
    _all("generation_max_length", "evaluation: max_length of generate"),
    _all("generation_num_beams", "evaluation: num_beams of generate"),
    _all("generation_config", "model.generation_config"),
)

RULES: Mapping[str, Rule] = MappingProxyType({rule.name: rule for rule in _RULES})
"""The rule of every setting, by name."""

"""Check values that depend on each other.

The conditions are those of `TrainingArguments._validate_args`, those that torch and transformers raise later,
and values without effect. Where that is harmless and common, there is a note instead: settings/notes.py.
"""

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch.utils.checkpoint import checkpoint

from hfbridge.errors import suggest
from hfbridge.settings.fsdp_config import fsdp_conflicts, fsdp_problems, version_of
from hfbridge.settings.optimizer_requirements import check_optimizer
from hfbridge.settings.rules import DEFAULTS, Complaint, Unread, Value, is_same
from hfbridge.settings.schedulers import FOLLOWING, check_schedule

_READ_BY_TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")

# What transformers itself takes out of activation_checkpointing_kwargs, and what torch takes by **kwargs.
_CHECKPOINT_ARGUMENTS = (
    "every_n_layers",
    "offload",
    "preserve_rng_state",
    *(
        name
        for name, parameter in inspect.signature(checkpoint).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ),
)
_CHECKPOINT_FLAGS = ("offload", "preserve_rng_state", "use_reentrant", "debug", "early_stop")


def check_together(given: Mapping[str, Any], *, wrong: Collection[str]) -> Iterator[Complaint]:
    """Check values that depend on each other.

    Args:
        given: the values set that are valid by themselves.
        wrong: settings whose value is wrong; checks that depend on one of them are left out.

    Yields:
        What conflicts with or lacks something else, under the name of a setting that was set.
    """
    for check in (
        _check_precision,
        _check_cadence,
        _check_workers,
        _check_lengths,
        _check_batch_size,
        check_optimizer,
        check_schedule,
        _check_compilation,
        _check_kernels,
        _check_recomputation,
        _check_fsdp,
        _check_best_metric,
        _check_best_model,
        _check_reporting,
    ):
        used: set[str] = set()

        def value(name: str, used: set[str] = used) -> Any:
            used.add(name)
            return given.get(name, DEFAULTS[name])

        complaints = list(check(value, given))
        if used.isdisjoint(wrong):
            yield from complaints


def _check_precision(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    if value("bf16") and value("fp16"):
        yield "fp16", "contradicts bf16=True; at most one of the two can be True"
    if value("bf16_full_eval") and value("fp16_full_eval"):
        yield "fp16_full_eval", "contradicts bf16_full_eval=True; at most one of the two can be True"
    if value("tf32") and value("use_cpu"):
        yield "tf32", "has no effect on a CPU, and use_cpu=True; leave it out"


def _check_cadence(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    used = {
        "logging_steps": value("logging_strategy"),
        "eval_steps": value("eval_strategy"),
        "save_steps": value("save_strategy"),
    }
    for name, strategy in used.items():
        steps = value(name)
        if name == "eval_steps" and not steps:
            if strategy == "steps" and value("logging_steps") <= 0:
                yield "eval_strategy", 'with "steps" needs eval_steps or logging_steps above 0'
        elif strategy == "steps" and (steps <= 0 or (steps > 1 and steps != int(steps))):
            blamed = name if name in given else f"{name.partition('_')[0]}_strategy"
            yield blamed, f"{name} must be a whole number of steps, or below 1 a share of them; it is {steps}"


def _check_lengths(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    reads = ("group_by_length", "batch_rebalance")
    is_named = value("length_column_name") != DEFAULTS["length_column_name"]
    if is_named and value("train_sampling_strategy") not in reads:
        text = f"is read only with train_sampling_strategy of {' or '.join(reads)}"
        yield "length_column_name", Unread(text)


def _check_batch_size(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    """Check that a smaller batch size takes effect; batch_rebalance keeps the first one."""
    if value("auto_find_batch_size") and value("train_sampling_strategy") == "batch_rebalance":
        yield "auto_find_batch_size", "does not reach the micro-batches of batch_rebalance; choose one"


def _check_kernels(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    if value("use_liger_kernel") and value("use_cpu"):
        yield "use_liger_kernel", "has kernels for GPUs only, and use_cpu=True; leave it out"
    if value("liger_kernel_config") and not value("use_liger_kernel"):
        text = "has no effect without use_liger_kernel=True; set that, or leave it out"
        yield "liger_kernel_config", Unread(text)


def _check_workers(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    """Check what needs worker processes, before torch builds the first loader."""
    if value("dataloader_num_workers") == 0:
        for name in (
            "dataloader_prefetch_factor",
            "dataloader_persistent_workers",
            "dataloader_multiprocessing_context",
        ):
            if value(name):
                yield name, "needs worker processes; set dataloader_num_workers to 1 or more, or leave it out"


def _check_compilation(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    """Check the backend and the mode of `torch.compile`, each of which switches it on."""
    backend, mode = value("torch_compile_backend"), value("torch_compile_mode")
    if "torch_compile" in given and not value("torch_compile"):
        for name, entry in (("torch_compile_backend", backend), ("torch_compile_mode", mode)):
            if entry is not None:
                yield name, "switches compilation on, and torch_compile=False; choose one"
    if mode not in (None, "default") and backend not in (None, "inductor"):
        yield "torch_compile_mode", f"is read by inductor only, not by {backend}; leave one of the two out"


def _check_recomputation(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    """Check the arguments of activation checkpointing, before the first forward."""
    name, kwargs = "activation_checkpointing_kwargs", value("activation_checkpointing_kwargs") or {}
    if kwargs and not value("activation_checkpointing"):
        text = "has no effect without activation_checkpointing=True; set that, or leave it out"
        yield name, Unread(text)
    for key, entry in kwargs.items():
        if key not in _CHECKPOINT_ARGUMENTS:
            possible = ", ".join(_CHECKPOINT_ARGUMENTS)
            text = f"{key} is no argument of activation checkpointing; possible are {possible}"
            yield name, text + suggest(key, _CHECKPOINT_ARGUMENTS)
        elif key in _CHECKPOINT_FLAGS and not isinstance(entry, bool):
            yield name, f"{key} must be True or False, not {entry!r}"
        elif key == "every_n_layers" and not _is_count(entry):
            yield name, f"every_n_layers must be a whole number, 1 or more, not {entry!r}"
    if kwargs.get("use_reentrant") is True:
        for key in {"context_fn", "determinism_check", "debug"} & kwargs.keys():
            yield name, f"{key} cannot be used with use_reentrant=True; leave one of the two out"


def _check_fsdp(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    """Check `fsdp_config`; without `fsdp`, `Trainer(strategy=)` may still select either version."""
    fsdp, config = value("fsdp"), value("fsdp_config")
    if fsdp:
        yield from fsdp_problems(fsdp, config, version=version_of(config))
        for name, text in fsdp_conflicts(value, config):
            yield (name if name in given else "fsdp"), text
        return
    found = [list(fsdp_problems(None, config, version=version)) for version in (1, 2)]
    if all(found):
        yield from found[version_of(config) - 1]


def _is_count(entry: object) -> bool:
    return isinstance(entry, int) and not isinstance(entry, bool) and entry >= 1


def _check_best_metric(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    metric = value("metric_for_best_model")
    if metric is not None and value("eval_strategy") == "no":
        text = 'needs evaluations; set eval_strategy to "steps" or "epoch"'
        yield "metric_for_best_model", Unread(text)
    finds_metric = value("load_best_model_at_end") or value("lr_scheduler_type") in FOLLOWING
    if value("greater_is_better") is not None and metric is None and not finds_metric:
        text = "has no effect without metric_for_best_model; set that, or leave it out"
        yield "greater_is_better", Unread(text)


def _check_best_model(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    """Check that the best model can be known and is saved.

    Mirrors: transformers.TrainingArguments._validate_args
    """
    saves, evaluates = value("save_strategy"), value("eval_strategy")
    if saves == "best":
        if value("metric_for_best_model") is None and not value("load_best_model_at_end"):
            yield "save_strategy", '"best" needs metric_for_best_model; set it, to "loss" for example'
        elif evaluates == "no":
            yield "save_strategy", '"best" needs evaluations; set eval_strategy to "steps" or "epoch"'
        return
    if not value("load_best_model_at_end"):
        return
    name = "load_best_model_at_end"
    if saves == "no" or evaluates == "no" or saves != evaluates:
        yield (
            name,
            "needs a checkpoint of each evaluation: save_strategy and eval_strategy must be equal, or "
            f'save_strategy="best"; they are "{saves}" and "{evaluates}"',
        )
    elif saves == "steps":
        eval_steps, save_steps = value("eval_steps") or value("logging_steps"), value("save_steps")
        if not _is_multiple(save_steps, eval_steps):
            yield (
                name,
                "needs an evaluation before each checkpoint: save_steps must be a multiple of eval_steps; "
                f"they are {save_steps} and {eval_steps}",
            )


def _is_multiple(many: float, few: float) -> bool:
    """Whether one number of steps, or share of them, is a multiple of another; a count is none of a share."""
    if (many < 1) != (few < 1):
        return False
    scale = 1 if few >= 1 else 1_000_000
    return round(many * scale) % max(round(few * scale), 1) == 0


def _check_reporting(value: Value, given: Collection[str]) -> Iterator[Complaint]:
    reporters = value("report_to")
    if reporters != "all" and "trackio" not in reporters:
        for name in _READ_BY_TRACKIO:
            if not is_same(value(name), DEFAULTS[name]):
                yield name, Unread('only trackio reads it; set report_to=["trackio"], or leave it out')

"""What one should know about values that are carried: that a value has no effect, above all.

A value without effect is an error where it shows a mistake (settings/cross_checks.py). It gets a note where
it is harmless and common, as in a file of settings that several runs share.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from hfbridge.settings.optimizer_requirements import ADAM_FIELDS, READERS
from hfbridge.settings.rules import DEFAULTS, RULES, Value, is_same
from hfbridge.settings.schedulers import CONSTANT, FOLLOWING

_READ_RUN_NAME = frozenset({"trackio", "wandb", "comet_ml", "mlflow", "dagshub", "swanlab"})


def standing_notes(value: Value, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Say what one should know about values that are carried.

    Args:
        value: a setting by its name, given or default.
        given: the values given, all of which are carried.

    Yields:
        The name of a setting, and the note.
    """
    for name, entry in given.items():
        rule = RULES[name]
        if rule.note and entry != DEFAULTS[name]:
            yield name, f"{name} is {rule.note}"
        if (name == "num_train_epochs" or not is_same(entry, DEFAULTS[name])) and (
            cause := _cause_without_effect(name, value)
        ):
            yield name, f"{name} has no effect{cause}"
    yield from _of_the_metric(value)


def _of_the_metric(value: Value) -> Iterator[tuple[str, str]]:
    """Tell of a schedule that waits for the metric to go the other way."""
    if (
        value("lr_scheduler_type") in FOLLOWING
        and _is_greater_better(value)
        and (value("lr_scheduler_kwargs") or {}).get("mode", "min") == "min"
    ):
        yield (
            "lr_scheduler_type",
            f"lr_scheduler_type={value('lr_scheduler_type')!r} waits for {value('metric_for_best_model')} to "
            'fall, and greater is better; lr_scheduler_kwargs={"mode": "max"} has it wait for a rise',
        )


def _is_greater_better(value: Value) -> bool:
    """Whether the best metric is the greatest.

    Mirrors: transformers.TrainingArguments.__post_init__
    """
    said = value("greater_is_better")
    metric = value("metric_for_best_model") or "loss"
    return bool(said) if said is not None else not metric.endswith("loss")


def _cause_without_effect(name: str, value: Value) -> str:
    """Say what leaves a value that is not the default without effect, or empty text."""
    optim, schedule = value("optim"), value("lr_scheduler_type")
    by_optim, by_schedule = f' with optim="{optim}"', f" with lr_scheduler_type={schedule!r}"
    if name == "num_train_epochs" and value("max_steps") > 0:
        return f": max_steps={value('max_steps')} decides"
    if name == "lr_scheduler_kwargs" and schedule in CONSTANT and value(name):
        return by_schedule
    if name == "warmup_steps" and schedule in ("constant", *FOLLOWING) and not _warms_up_itself(optim):
        return by_schedule
    if name in ADAM_FIELDS and name not in READERS[optim].adam:
        return by_optim
    if name == "weight_decay" and not READERS[optim].decays:
        return by_optim
    if name == "eval_steps" and value("eval_strategy") != "steps":
        return f' with eval_strategy="{value("eval_strategy")}"'
    if name == "eval_delay" and value("eval_strategy") == "no":
        return ' with eval_strategy="no"'
    if name == "logging_steps" and value("logging_strategy") != "steps" and not _counts_evaluations(value):
        return f' with logging_strategy="{value("logging_strategy")}"'
    if name == "data_seed" and value("train_sampling_strategy") == "sequential":
        return ' with train_sampling_strategy="sequential"'
    if name == "dataloader_in_order" and value("dataloader_num_workers") <= 1:
        return " with fewer than two workers"
    if name == "run_name" and value("report_to") != "all" and not _READ_RUN_NAME & {*value("report_to")}:
        return ": no reporter in report_to reads it"
    return _cause_without_checkpoints(name, value) or _cause_without_generation(name, value)


def _cause_without_checkpoints(name: str, value: Value) -> str:
    saves = value("save_strategy")
    if name == "save_steps" and saves != "steps":
        return f' with save_strategy="{saves}"'
    if (
        name in ("save_total_limit", "save_only_model")
        and saves == "no"
        and not value("enable_jit_checkpoint")
    ):
        return ' with save_strategy="no"'
    return ""


def _cause_without_generation(name: str, value: Value) -> str:
    if name in ("generation_max_length", "generation_num_beams") and not value("predict_with_generate"):
        return " without predict_with_generate=True"
    if name == "predict_with_generate" and value("prediction_loss_only"):
        return " with prediction_loss_only=True"
    return ""


def _warms_up_itself(optim: str) -> bool:
    return optim in ("schedule_free_adamw", "schedule_free_sgd")


def _counts_evaluations(value: Value) -> bool:
    """Whether logging_steps stands in for eval_steps."""
    return value("eval_strategy") == "steps" and not value("eval_steps")

"""Notes on supported values, above all that one has no effect.

A value without effect is an error where it shows a mistake (settings/cross_checks.py), and gets a note where
it is harmless and common, as in a file of settings that several runs share.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from hfbridge.settings.optimizer_requirements import ADAM_FIELDS, READERS
from hfbridge.settings.rules import DEFAULTS, Value, is_same
from hfbridge.settings.schedulers import CONSTANT, FOLLOWING

_READ_RUN_NAME = frozenset({"trackio", "wandb", "comet_ml", "mlflow", "dagshub", "swanlab"})
_SCRIPT_FLAGS = ("do_train", "do_eval", "do_predict")


def standing_notes(value: Value, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find what the user should know about supported values.

    Args:
        value: a setting by its name, set or default.
        given: the values set.

    Yields:
        The name of a setting, and the note.
    """
    for name, entry in given.items():
        is_default = is_same(entry, DEFAULTS[name])
        if name in _SCRIPT_FLAGS and not is_default:
            yield name, f"{name} is a flag for scripts, read by neither the HF Trainer nor hfbridge"
        if (name == "num_train_epochs" or not is_default) and (cause := _cause_without_effect(name, value)):
            yield name, f"{name} has no effect{cause}"
    schedule, metric = value("lr_scheduler_type"), value("metric_for_best_model")
    mode = (value("lr_scheduler_kwargs") or {}).get("mode", "min")
    if schedule in FOLLOWING and mode == "min" and _is_greater_better(value):
        yield (
            "lr_scheduler_type",
            f"lr_scheduler_type={schedule!r} waits for {metric} to fall, and greater is better; "
            'lr_scheduler_kwargs={"mode": "max"} has it wait for a rise',
        )


def _is_greater_better(value: Value) -> bool:
    """Whether the best metric is the greatest.

    Mirrors: transformers.TrainingArguments.__post_init__
    """
    explicit = value("greater_is_better")
    metric = value("metric_for_best_model") or "loss"
    return bool(explicit) if explicit is not None else not metric.endswith("loss")


def _cause_without_effect(name: str, value: Value) -> str:
    """Describe what leaves a value that is not the default without effect; empty if nothing does."""
    reader, reporters = READERS[value("optim")], value("report_to")
    schedule, sampling = value("lr_scheduler_type"), value("train_sampling_strategy")
    evaluating, logging, saving = value("eval_strategy"), value("logging_strategy"), value("save_strategy")
    by_optim, by_schedule = f' with optim="{value("optim")}"', f" with lr_scheduler_type={schedule!r}"
    warms_up_itself = value("optim") in ("schedule_free_adamw", "schedule_free_sgd")
    replaces_eval_steps = evaluating == "steps" and not value("eval_steps")
    is_saved = saving != "no" or value("enable_jit_checkpoint")
    without_generate = not value("predict_with_generate"), " without predict_with_generate=True"
    causes: dict[str, tuple[bool, str]] = {
        **{field: (field not in reader.adam, by_optim) for field in ADAM_FIELDS},
        "num_train_epochs": (value("max_steps") > 0, f": max_steps={value('max_steps')} decides"),
        "lr_scheduler_kwargs": (schedule in CONSTANT and bool(value("lr_scheduler_kwargs")), by_schedule),
        "warmup_steps": (schedule in ("constant", *FOLLOWING) and not warms_up_itself, by_schedule),
        "weight_decay": (not reader.decays, by_optim),
        "eval_steps": (evaluating != "steps", f' with eval_strategy="{evaluating}"'),
        "eval_delay": (evaluating == "no", ' with eval_strategy="no"'),
        "logging_steps": (
            logging != "steps" and not replaces_eval_steps,
            f' with logging_strategy="{logging}"',
        ),
        "data_seed": (sampling == "sequential", f' with train_sampling_strategy="{sampling}"'),
        "dataloader_in_order": (value("dataloader_num_workers") <= 1, " with fewer than two workers"),
        "run_name": (
            reporters != "all" and _READ_RUN_NAME.isdisjoint(reporters),
            ": no reporter in report_to reads it",
        ),
        "save_steps": (saving != "steps", f' with save_strategy="{saving}"'),
        "save_total_limit": (not is_saved, ' with save_strategy="no"'),
        "save_only_model": (not is_saved, ' with save_strategy="no"'),
        "generation_max_length": without_generate,
        "generation_num_beams": without_generate,
        "predict_with_generate": (value("prediction_loss_only"), " with prediction_loss_only=True"),
    }
    applies, text = causes.get(name, (False, ""))
    return text if applies else ""

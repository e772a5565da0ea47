"""Read what the user set from a `TrainingArguments`, without touching its device.

A finished `TrainingArguments` has set some fields from others. Such a value is left out here, because the
object built again from the rest has it again:

    value in the object                                 comes from
    output_dir="trainer_output"                         no output_dir
    disable_tqdm=False                                  the verbosity of transformers
    gradient_checkpointing(_kwargs)                     mirror activation_checkpointing(_kwargs)
    eval_steps=logging_steps                            eval_strategy="steps" without eval_steps
    do_eval=True                                        an eval_strategy
    dataloader_pin_memory=False                         use_cpu=True
    metric_for_best_model="loss"                        load_best_model_at_end, or a schedule that follows it
    greater_is_better                                   metric_for_best_model
    torch_compile=True                                  torch_compile_backend or _mode
    torch_compile_backend="inductor"                    torch_compile
"""

import logging
from dataclasses import MISSING, fields

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hfbridge.settings.rules import DEFAULTS, is_same
from hfbridge.settings.schedulers import FOLLOWING
from hfbridge.settings.validation import simplify


def read(arguments: TrainingArguments) -> dict[str, object]:
    """Read the values that differ from the defaults, those of a subclass's own fields included.

    Args:
        arguments: read field by field and left alone; its properties are not touched.

    Returns:
        Plain values by name.
    """
    found: dict[str, object] = {}
    for field in fields(arguments):
        if not field.init:
            continue
        value = simplify(field.name, getattr(arguments, field.name))
        default = DEFAULTS.get(field.name, field.default)
        if field.name not in DEFAULTS and field.default_factory is not MISSING:
            default = field.default_factory()
        if not is_same(value, default):
            found[field.name] = value
    kept = {name: value for name, value in found.items() if not _is_filled_in(name, value, found)}
    if isinstance(arguments, Seq2SeqTrainingArguments):
        kept["predict_with_generate"] = arguments.predict_with_generate
    return kept


def _is_filled_in(name: str, value: object, found: dict[str, object]) -> bool:
    """Whether `TrainingArguments` set a value itself.

    Mirrors: transformers.TrainingArguments.__post_init__
    """

    def final(other: str) -> object:
        return found.get(other, DEFAULTS[other])

    derived: dict[str, object] = {
        "output_dir": "trainer_output",
        "disable_tqdm": logging.getLogger("transformers.training_args").getEffectiveLevel() > logging.WARNING,
        "activation_checkpointing": False,
        "gradient_checkpointing": final("activation_checkpointing"),
        "gradient_checkpointing_kwargs": final("activation_checkpointing_kwargs"),
        "accelerator_config": {},
    }
    if final("eval_strategy") != "no":
        derived["do_eval"] = True
    if final("eval_strategy") == "steps":
        derived["eval_steps"] = final("logging_steps")
    if final("use_cpu"):
        derived["dataloader_pin_memory"] = False
    if final("torch_compile_mode") or final("torch_compile_backend") not in (None, "inductor"):
        derived["torch_compile"] = True
    if final("torch_compile"):
        derived["torch_compile_backend"] = "inductor"
    if final("load_best_model_at_end") or final("lr_scheduler_type") in FOLLOWING:
        derived["metric_for_best_model"] = "loss"
    if isinstance(best := final("metric_for_best_model"), str):
        derived["greater_is_better"] = not best.endswith("loss")
    # disable_tqdm=True is kept: without it the progress bar would come back.
    return name in derived and is_same(value, derived[name]) and not (name == "disable_tqdm" and value)

"""`TrainingArguments` objects: what their user gave, read without asking them for a device.

A finished `TrainingArguments` no longer tells given values from defaults, and has filled in some fields from
others. Such a value is left out here, because the object built again from the rest has it again:

    value in the object                                 comes from
    output_dir="trainer_output"                         no output_dir
    disable_tqdm=False                                  the verbosity of transformers
    activation_checkpointing=False, also the old name   neither given
    report_to=[], debug=[]                              "none", ""
    eval_steps=logging_steps                            eval_strategy="steps" without eval_steps
    do_eval=True                                        an eval_strategy
    dataloader_pin_memory=False                         use_cpu=True
    metric_for_best_model, greater_is_better            load_best_model_at_end, or each other
    accelerator_config=AcceleratorConfig()              no accelerator_config
"""

import logging
from dataclasses import MISSING, fields

from transformers import TrainingArguments

from hfbridge.settings.checks import simplify
from hfbridge.settings.fields import DEFAULTS, is_same


def read(arguments: TrainingArguments) -> dict[str, object]:
    """Read what differs from a `TrainingArguments` to which nothing was given.

    Args:
        arguments: read field by field and left alone; its properties are not touched.

    Returns:
        Plain values by name. Fields that a subclass adds are among them if they differ from its default.
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
    return {name: value for name, value in found.items() if not _is_filled_in(name, value, found)}


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
        "gradient_checkpointing": False,
        "report_to": [],
        "debug": [],
        "accelerator_config": {},
    }
    if final("eval_strategy") != "no":
        derived["do_eval"] = True
    if final("eval_strategy") == "steps":
        derived["eval_steps"] = final("logging_steps")
    if final("use_cpu"):
        derived["dataloader_pin_memory"] = False
    if final("load_best_model_at_end"):
        derived["metric_for_best_model"] = "loss"
    if isinstance(best := final("metric_for_best_model"), str):
        derived["greater_is_better"] = not best.endswith("loss")
    # True is kept: without it the progress bar would come back.
    return name in derived and is_same(value, derived[name]) and not (name == "disable_tqdm" and value)

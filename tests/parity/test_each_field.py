"""Every field of TrainingArguments and Seq2SeqTrainingArguments set to another value than its default.

Carried: both engines run live and are equal to the bit, and the run differs from one without the setting.
Carried, but of no consequence for numbers and rows: both engines are equal, and what it does is shown by the
test that is named.
Refused: by name, with the reason, before anything is made.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hfbridge.settings.rules import DEFAULTS, RULES
from tests.parity.engines import BASE, Job, Record, run_both, run_theirs
from tests.parity.test_data_options import WithoutLengths, with_lengths
from tests.parity.test_model_options import with_float_masks

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
ACCUMULATED = {"gradient_accumulation_steps": 3, "num_train_epochs": 3}


@dataclass(frozen=True)
class Field:
    """How one setting is tried.

    Attributes:
        value: given to both engines.
        others: settings it needs, given to the run it is compared with, too.
        shown_by: the test that shows its effect, where numbers, rows and events are those of the default.
        job: further parts of the job.
    """

    value: Any
    others: dict[str, Any] = field(default_factory=dict)
    shown_by: str = ""
    job: dict[str, Any] = field(default_factory=dict)


def by_batch(prediction: Any, compute_result: bool) -> dict[str, float]:
    """Metrics of the last batch."""
    return {"mean": float(prediction.predictions.mean())} if compute_result else {}


CARRIED: dict[str, Field] = {
    "output_dir": Field("elsewhere", shown_by="tests/unit/settings/test_to_lightning.py"),
    "per_device_train_batch_size": Field(5),
    "num_train_epochs": Field(1.5),
    "max_steps": Field(3),
    "learning_rate": Field(3e-3),
    "lr_scheduler_type": Field("cosine"),
    "lr_scheduler_kwargs": Field({"power": 2.0}, {"lr_scheduler_type": "polynomial"}),
    "warmup_steps": Field(0.5),
    "optim": Field("adafactor"),
    "optim_args": Field("momentum=0.9", {"optim": "sgd"}),
    "weight_decay": Field(0.3),
    "adam_beta1": Field(0.5),
    "adam_beta2": Field(0.5),
    "adam_epsilon": Field(1e-2),
    "gradient_accumulation_steps": Field(2),
    "average_tokens_across_devices": Field(False, shown_by="tests/parity/test_each_field.py"),
    "max_grad_norm": Field(0.05),
    "label_smoothing_factor": Field(0.2),
    "bf16": Field(True),
    "activation_checkpointing": Field(True, shown_by="tests/parity/test_model_options.py"),
    "activation_checkpointing_kwargs": Field(
        {"every_n_layers": 2},
        {"activation_checkpointing": True},
        shown_by="tests/parity/test_model_options.py",
    ),
    "gradient_checkpointing": Field(True, shown_by="tests/parity/test_model_options.py"),
    "gradient_checkpointing_kwargs": Field(
        {"use_reentrant": False},
        {"gradient_checkpointing": True},
        shown_by="tests/parity/test_model_options.py",
    ),
    "use_cache": Field(True, shown_by="tests/unit/test_module.py"),
    "neftune_noise_alpha": Field(5.0),
    "torch_empty_cache_steps": Field(2, shown_by="tests/parity/test_model_options.py"),
    "logging_strategy": Field("epoch"),
    "logging_steps": Field(2),
    "logging_first_step": Field(True, {"logging_steps": 100}),
    "logging_nan_inf_filter": Field(False, shown_by="tests/unit/losses/test_running_loss.py"),
    "include_num_input_tokens_seen": Field("all"),
    "disable_tqdm": Field(False, shown_by="tests/unit/test_trainer.py"),
    "eval_strategy": Field("epoch"),
    "eval_steps": Field(3, {"eval_strategy": "steps"}),
    "eval_delay": Field(3, EVALUATED),
    "per_device_eval_batch_size": Field(3, EVALUATED),
    "prediction_loss_only": Field(True, EVALUATED),
    "eval_on_start": Field(True, EVALUATED),
    "eval_accumulation_steps": Field(1, EVALUATED, shown_by="tests/unit/evaluation/test_collector.py"),
    "metric_for_best_model": Field("mean", EVALUATED),
    "greater_is_better": Field(True, {**EVALUATED, "metric_for_best_model": "loss"}),
    "save_strategy": Field("no", shown_by="tests/parity/test_checkpoints.py"),
    "full_determinism": Field(True, shown_by="tests/parity/test_model_options.py"),
    "seed": Field(7),
    "data_seed": Field(7),
    "use_cpu": Field(True, shown_by="tests/unit/settings/test_to_lightning.py"),
    "dataloader_drop_last": Field(True),
    "dataloader_num_workers": Field(1, shown_by="tests/parity/test_order.py"),
    "dataloader_pin_memory": Field(False, shown_by="tests/unit/test_datamodule.py"),
    "dataloader_persistent_workers": Field(
        True, {"dataloader_num_workers": 1}, shown_by="tests/unit/test_datamodule.py"
    ),
    "dataloader_prefetch_factor": Field(
        3, {"dataloader_num_workers": 1}, shown_by="tests/unit/test_datamodule.py"
    ),
    "dataloader_multiprocessing_context": Field(
        "fork", {"dataloader_num_workers": 1}, shown_by="tests/unit/test_datamodule.py"
    ),
    "dataloader_in_order": Field(False, shown_by="tests/unit/test_datamodule.py"),
    "train_sampling_strategy": Field("sequential"),
    "do_train": Field(True, shown_by="tests/unit/settings/test_rules.py"),
    "do_eval": Field(True, shown_by="tests/unit/settings/test_rules.py"),
    "do_predict": Field(True, shown_by="tests/unit/settings/test_rules.py"),
    "run_name": Field("mine", {"report_to": "none"}, shown_by="tests/parity/test_reports.py"),
    "optim_target_modules": Field(
        ["lin"],
        {"optim": "galore_adamw", "optim_args": "rank=4", "optim_target_modules": ["q_lin"]},
    ),
    "bf16_full_eval": Field(True, EVALUATED, shown_by="tests/parity/test_evaluation_options.py"),
    "fp16_full_eval": Field(True, EVALUATED, shown_by="tests/parity/test_evaluation_options.py"),
    "tf32": Field(False, shown_by="tests/unit/settings/test_machine.py"),
    "torch_compile_backend": Field("eager", shown_by="tests/parity/test_model_options.py"),
    "log_on_each_node": Field(False, shown_by="tests/parity/test_reports.py"),
    "log_level": Field("error", shown_by="tests/parity/test_reports.py"),
    "log_level_replica": Field("error", shown_by="tests/parity/test_reports.py"),
    "eval_do_concat_batches": Field(
        False,
        EVALUATED,
        shown_by="tests/parity/test_evaluation_options.py",
        job={"compute_metrics": lambda prediction: {"batches": len(prediction.predictions)}},
    ),
    "eval_use_gather_object": Field(True, EVALUATED, shown_by="tests/parity/test_evaluation_options.py"),
    "include_for_metrics": Field(["loss"], EVALUATED, shown_by="tests/parity/test_evaluation_options.py"),
    "batch_eval_metrics": Field(
        True,
        EVALUATED,
        shown_by="tests/parity/test_evaluation_options.py",
        job={"compute_metrics": by_batch},
    ),
    "accelerator_config": Field({"use_seedable_sampler": False}),
    "remove_unused_columns": Field(
        True, shown_by="tests/parity/test_data_options.py", job={"has_ids": False}
    ),
    "label_names": Field([], EVALUATED),
    "length_column_name": Field(
        "size",
        {"train_sampling_strategy": "group_by_length"},
        job={"as_dataset": with_lengths, "collator": WithoutLengths},
    ),
    "debug": Field(
        "underflow_overflow",
        shown_by="tests/parity/test_model_options.py",
        job={"model": with_float_masks},
    ),
    "auto_find_batch_size": Field(True, shown_by="tests/parity/test_batch_size.py"),
    "skip_memory_metrics": Field(False, shown_by="tests/parity/test_evaluation_options.py"),
}
# Settings that the suite's base already changes.
SAID_BY_THE_BASE = ("use_cpu", "save_strategy")
# Shown elsewhere alone: what they need cannot be had in every run.
ELSEWHERE = {
    "save_steps": "tests/parity/test_checkpoints.py",
    "save_only_model": "tests/parity/test_checkpoints.py",
    "save_total_limit": "tests/parity/test_checkpoints.py",
    "save_on_each_node": "tests/unit/settings/test_rules.py",
    "load_best_model_at_end": "tests/parity/test_checkpoints.py",
    "enable_jit_checkpoint": "tests/faults/test_saving.py",
    "ignore_data_skip": "tests/parity/test_resume.py",
    "restore_callback_states_from_checkpoint": "tests/parity/test_checkpoints.py",
    "resume_from_checkpoint": "tests/parity/test_resume.py",
    "torch_compile": "tests/parity/test_model_options.py",
    "torch_compile_mode": "tests/unit/settings/test_cross_checks.py",
    "use_liger_kernel": "tests/parity/test_model_options.py",
    "liger_kernel_config": "tests/parity/test_model_options.py",
    "report_to": "tests/parity/test_reports.py",
    **{
        f"ddp_{name}": "tests/distributed/test_ddp.py"
        for name in (
            "find_unused_parameters",
            "bucket_cap_mb",
            "broadcast_buffers",
            "static_graph",
            "backend",
            "timeout",
        )
    },
    "deepspeed": "tests/distributed/test_deepspeed.py",
    "fsdp": "tests/distributed/test_fsdp.py",
    "fsdp_config": "tests/unit/settings/test_fsdp_config.py",
    "project": "tests/unit/settings/test_cross_checks.py",
    "trackio_space_id": "tests/unit/settings/test_cross_checks.py",
    "trackio_bucket_id": "tests/unit/settings/test_cross_checks.py",
    "trackio_static_space_id": "tests/unit/settings/test_cross_checks.py",
    "predict_with_generate": "tests/parity/test_generation.py",
    "generation_max_length": "tests/parity/test_generation.py",
    "generation_num_beams": "tests/parity/test_generation.py",
    "generation_config": "tests/parity/test_generation.py",
}


def shown_by(name: str) -> str:
    """Name the test that shows what a setting does, or that it is refused."""
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    if name in CARRIED:
        own = f"tests/parity/test_each_field.py::test_a_carried_setting_does_what_it_does_natively[{name}]"
        return CARRIED[name].shown_by or own
    return f"tests/unit/settings/test_rules.py::test_another_value_is_refused_by_name_with_what_to_do[{name}]"


def test_every_field_is_here_or_refused() -> None:
    refused = {name for name, rule in RULES.items() if rule.support == "default"}
    assert set(CARRIED) | set(ELSEWHERE) | refused == set(RULES)
    assert not set(CARRIED) & set(ELSEWHERE)
    root = Path(__file__).parents[2]
    missing = {name for name in RULES if not (root / shown_by(name).partition("::")[0]).is_file()}
    assert not missing


def differs(one: Record, other: Record) -> bool:
    """Tell whether two native runs are told apart by anything that the parity suite compares."""
    return any(
        str(getattr(one, name)) != str(getattr(other, name))
        for name in ("steps", "log_history", "events", "state", "collated")
    )


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning")  # galore_torch
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning")
def test_a_carried_setting_does_what_it_does_natively(name: str) -> None:
    tried = CARRIED[name]
    assert tried.value != BASE.get(name, DEFAULTS[name]) or name in SAID_BY_THE_BASE
    settings = {**ACCUMULATED, **tried.others, name: tried.value}
    job = Job("distilbert", settings, rows=30, **tried.job)
    theirs, _ = run_both(job)
    if not tried.shown_by:
        others = {**ACCUMULATED, **tried.others}
        others.setdefault(name, BASE.get(name, DEFAULTS[name]))
        assert differs(theirs, run_theirs(Job("distilbert", others, rows=30, **tried.job)))

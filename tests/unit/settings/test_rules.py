"""One rule per field, and each says what it must."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.training_args import OptimizerNames

import hfbridge
from hfbridge.errors import SettingsError
from hfbridge.settings import Settings
from hfbridge.settings.rules import DEFAULTS, RULES, SEQ2SEQ_FIELDS, UNSUPPORTED, is_same, show

CARRIED = {
    "output_dir": "elsewhere",
    "per_device_train_batch_size": 2,
    "num_train_epochs": 1.5,
    "max_steps": 7,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"last_epoch": -1},
    "warmup_steps": 0.1,
    "optim": "adamw_torch",
    "optim_args": "momentum=0.9",
    "optim_target_modules": "all-linear",
    "weight_decay": 0.01,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "gradient_accumulation_steps": 4,
    "average_tokens_across_devices": False,
    "max_grad_norm": 0.5,
    "label_smoothing_factor": 0.1,
    "bf16": True,
    "tf32": False,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": True},
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "use_cache": True,
    "neftune_noise_alpha": 5.0,
    "torch_empty_cache_steps": 1,
    "logging_strategy": "epoch",
    "logging_steps": 0.1,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "include_num_input_tokens_seen": "all",
    "disable_tqdm": True,
    "report_to": ["tensorboard"],
    "run_name": "run",
    "project": "other",
    "trackio_space_id": "space",
    "trackio_bucket_id": "bucket",
    "trackio_static_space_id": False,
    "eval_strategy": "epoch",
    "eval_steps": 10,
    "eval_delay": 2,
    "per_device_eval_batch_size": 16,
    "prediction_loss_only": True,
    "eval_on_start": True,
    "eval_accumulation_steps": 2,
    "save_strategy": "no",
    "save_only_model": True,
    "save_steps": 10,
    "save_on_each_node": True,
    "save_total_limit": 2,
    "enable_jit_checkpoint": True,
    "load_best_model_at_end": True,
    "ignore_data_skip": True,
    "restore_callback_states_from_checkpoint": True,
    "resume_from_checkpoint": "checkpoint-1",
    "metric_for_best_model": "accuracy",
    "greater_is_better": True,
    "full_determinism": True,
    "seed": 1,
    "data_seed": 2,
    "use_cpu": True,
    "dataloader_drop_last": True,
    "dataloader_num_workers": 1,
    "dataloader_pin_memory": False,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_in_order": False,
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "train_sampling_strategy": "sequential",
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "debug": "underflow_overflow",
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "log_on_each_node": False,
    "log_level": "info",
    "log_level_replica": "info",
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "accelerator_config": {"split_batches": True},
    "length_column_name": "size",
    "skip_memory_metrics": False,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "auto_find_batch_size": True,
    "deepspeed": {"zero_optimization": {"stage": 1}},
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 10,
    "ddp_broadcast_buffers": False,
    "ddp_static_graph": True,
    "ddp_backend": "gloo",
    "ddp_timeout": 10,
    "fsdp": True,
    "fsdp_config": {"version": 1},
    "predict_with_generate": True,
    "generation_max_length": 10,
    "generation_num_beams": 2,
    "generation_config": {"max_new_tokens": 5},
}

# Names of transformers 4 that transformers 5 still has, and the new one that carries the value.
MIRRORS = {
    "gradient_checkpointing": ("activation_checkpointing", True),
    "gradient_checkpointing_kwargs": ("activation_checkpointing_kwargs", {"use_reentrant": True}),
}

REFUSED = {
    "fp16": True,
    "push_to_hub": True,
    "hub_token": "hf_secret",
    "hub_private_repo": True,
    "hub_model_id": "me/model",
    "hub_strategy": "end",
    "hub_always_push": True,
    "hub_revision": "main",
    "parallelism_config": object(),
    "local_rank": 0,
    "sortish_sampler": True,
}

WORKERS, TRACKIO = {"dataloader_num_workers": 1}, {"report_to": ["trackio"]}
# What a value cannot be without.
NEEDS = {
    "dataloader_persistent_workers": WORKERS,
    "dataloader_prefetch_factor": WORKERS,
    "dataloader_multiprocessing_context": WORKERS,
    "optim_args": {"optim": "sgd"},
    "optim_target_modules": {"optim": "galore_adamw"},
    "length_column_name": {"train_sampling_strategy": "group_by_length"},
    "activation_checkpointing_kwargs": {"activation_checkpointing": True},
    "gradient_checkpointing_kwargs": {"activation_checkpointing": True},
    "liger_kernel_config": {"use_liger_kernel": True},
    "metric_for_best_model": {"eval_strategy": "epoch"},
    "greater_is_better": {"eval_strategy": "epoch", "metric_for_best_model": "f1"},
    "project": TRACKIO,
    "trackio_space_id": TRACKIO,
    "trackio_bucket_id": TRACKIO,
    "trackio_static_space_id": TRACKIO,
    "load_best_model_at_end": {"save_strategy": "epoch", "eval_strategy": "epoch"},
}


def fields_of(kind):
    return {field.name for field in dataclasses.fields(kind) if field.init}


def test_every_field_of_transformers_has_a_rule_and_every_rule_a_field():
    assert set(RULES) == fields_of(Seq2SeqTrainingArguments)
    assert len(RULES) == 119
    assert len(fields_of(TrainingArguments)) == 114
    assert fields_of(Seq2SeqTrainingArguments) - fields_of(TrainingArguments) == SEQ2SEQ_FIELDS
    assert all(name == rule.name for name, rule in RULES.items())


def test_the_tables_here_have_every_field_once():
    assert not CARRIED.keys() & REFUSED.keys()
    assert CARRIED.keys() | REFUSED.keys() == RULES.keys() - MIRRORS.keys()
    assert all(value != DEFAULTS[name] for name, value in (CARRIED | REFUSED).items())


@pytest.mark.parametrize("name", CARRIED)
def test_another_value_is_carried(name):
    settings = Settings(**{name: CARRIED[name]} | NEEDS.get(name, {}))
    assert getattr(settings, name) == CARRIED[name]
    assert settings.given[name] == CARRIED[name]


@pytest.mark.parametrize("name", MIRRORS)
def test_an_old_name_that_transformers_still_has_is_read_as_the_new_one(name):
    new, value = MIRRORS[name]
    settings = Settings(**{name: value} | NEEDS.get(name, {}))
    assert getattr(settings, new) == getattr(settings, name) == value
    assert new in settings.given
    assert name not in settings.given
    assert f"{name} is now called {new}" in settings.notes


def test_an_old_name_may_stand_beside_the_new_one_if_it_says_the_same():
    settings = Settings(gradient_checkpointing=True, activation_checkpointing=True, save_strategy="no")
    assert settings.notes == ()
    with pytest.raises(SettingsError, match="contradicts activation_checkpointing = False"):
        Settings(gradient_checkpointing=True, activation_checkpointing=False)


@pytest.mark.parametrize("name", REFUSED)
def test_another_value_is_refused_by_name_with_what_to_do(name):
    with pytest.raises(SettingsError) as caught:
        Settings(**{name: REFUSED[name]})
    message = str(caught.value)
    assert message.startswith("1 of 1 setting cannot be used; nothing was started.\n")
    assert f"  {name} = " in message
    assert caught.value.problems[0].text == f"{UNSUPPORTED}: {RULES[name].reason}"
    assert "hf_secret" not in message


@pytest.mark.parametrize("name", RULES)
def test_a_default_is_never_refused(name):
    settings = Settings(**{name: DEFAULTS[name]})
    assert getattr(settings, name) == DEFAULTS[name]


def test_homes_speak_of_what_users_of_the_trainer_and_lightning_know() -> None:
    """No class of hfbridge's: plans and `hfbridge explain` show them to people who have yet to see one."""
    ours = [
        node.name
        for path in Path(hfbridge.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name != "Trainer"
    ]
    assert {"CallbackHost", "TrainLoader", "HFModule"} <= set(ours)
    found = {rule.name for rule in RULES.values() if re.search(rf"\b({'|'.join(ours)})\b", rule.used_by)}
    assert found == set()


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_a_rule_says_where_the_value_goes_and_why_not(rule):
    assert rule.used_by
    refuses = rule.support == "default" or bool(rule.values or rule.unsupported or rule.keys)
    assert bool(rule.reason) == refuses


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("report_to", []),
        ("report_to", ["none"]),
        ("debug", []),
        ("debug", None),
        ("debug", " "),
        ("activation_checkpointing", False),
        ("gradient_checkpointing", False),
        ("gradient_checkpointing_kwargs", {}),
        ("include_num_input_tokens_seen", False),
        ("fsdp", ""),
        ("fsdp", False),
        ("fsdp_config", {}),
        ("deepspeed", {}),
        ("accelerator_config", {}),
        ("accelerator_config", {"split_batches": False}),
        ("optim_args", ""),
        ("hub_token", "<HUB_TOKEN>"),
    ],
)
def test_a_value_that_means_the_default_is_not_refused(name, value):
    Settings(**{name: value}).as_training_arguments(use_cpu=True)


@pytest.mark.parametrize("name", ["save_steps", "save_total_limit", "save_only_model"])
def test_how_to_save_has_no_effect_when_nothing_is_saved(name):
    settings = Settings(**{name: CARRIED[name], "save_strategy": "no"})
    assert settings.notes == (f'{name} has no effect with save_strategy="no"',)


@pytest.mark.parametrize("name", ["do_train", "do_eval", "do_predict"])
def test_script_flags_leave_a_note(name):
    assert f"{name} is a flag for scripts" in Settings(**{name: True}).notes[-1]
    assert Settings(**{name: False, "save_strategy": "no"}).notes == ()


@pytest.mark.parametrize("value", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_a_metric_need_evaluations(value):
    assert Settings(lr_scheduler_type=value, eval_strategy="epoch").lr_scheduler_type == value
    with pytest.raises(SettingsError) as caught:
        Settings(lr_scheduler_type=value)
    assert [problem.text for problem in caught.value.problems] == [
        'follows a metric; set eval_strategy to "steps" or "epoch"'
    ]


@pytest.mark.parametrize("optim", RULES["optim"].unsupported)
def test_optimizers_that_cannot_be_had_are_refused_with_another(optim):
    with pytest.raises(SettingsError, match=f'(?s){UNSUPPORTED}: .*use\\s+"adamw_torch"'):
        Settings(optim=optim)


def test_layerwise_optimizers_are_refused():
    layerwise = {name.value for name in OptimizerNames if name.value.endswith("layerwise")}
    assert len(layerwise) == 4
    assert layerwise < {*RULES["optim"].unsupported}
    assert "neither schedule nor clipping" in RULES["optim"].reason


def test_a_bool_is_not_a_number():
    assert not is_same(True, 1)
    assert is_same(1, 1.0)
    assert is_same(False, False)


def test_values_are_shown_short_and_tokens_never():
    assert show("optim", "x") == 'optim = "x"'
    assert show("hub_token", "hf_secret") == "hub_token = <hidden>"
    assert show("hub_token", None) == "hub_token = None"
    assert len(show("deepspeed", {"key": "x" * 500})) < 100

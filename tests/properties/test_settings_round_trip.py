"""Settings survive every way of writing them down."""

import pickle
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from hfbridge.settings import Settings, translate

counts = st.integers(1, 10_000)
shares = st.floats(0, 1, exclude_min=True, exclude_max=True)
numbers = st.floats(0, 1e3)
flags = st.booleans()
steps = st.one_of(counts, shares)
intervals = st.sampled_from(["no", "steps", "epoch"])

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "output_dir": st.sampled_from(["out", "~/out", "/tmp/out", "trainer_output"]),
    "per_device_train_batch_size": counts,
    "per_device_eval_batch_size": counts,
    "num_train_epochs": st.one_of(counts, st.floats(0.1, 100)),
    "max_steps": st.one_of(st.just(-1), counts),
    "learning_rate": st.floats(1e-6, 1),
    "lr_scheduler_type": st.sampled_from(["linear", "cosine", "polynomial", "constant", "inverse_sqrt"]),
    "warmup_steps": st.one_of(st.just(0), steps),
    "optim": st.sampled_from(["adamw_torch", "adamw_torch_fused"]),
    "weight_decay": numbers,
    "adam_beta1": shares,
    "adam_beta2": shares,
    "adam_epsilon": shares,
    "gradient_accumulation_steps": counts,
    "average_tokens_across_devices": flags,
    "max_grad_norm": numbers,
    "bf16": flags,
    "seed": st.integers(0, 2**32 - 1),
    "data_seed": st.one_of(st.none(), st.integers(0, 2**63)),
    "logging_strategy": intervals,
    "logging_steps": steps,
    "logging_first_step": flags,
    "logging_nan_inf_filter": flags,
    "disable_tqdm": st.sampled_from([None, True, False]),
    "eval_strategy": intervals,
    "eval_steps": st.one_of(st.none(), st.just(0), steps),
    "eval_delay": numbers,
    "eval_on_start": flags,
    "prediction_loss_only": flags,
    "eval_accumulation_steps": st.one_of(st.none(), counts),
    "save_strategy": st.sampled_from(["no", "steps"]),
    "dataloader_drop_last": flags,
    "dataloader_num_workers": st.integers(1, 4),
    "dataloader_pin_memory": flags,
    "dataloader_in_order": flags,
    "remove_unused_columns": flags,
    "label_names": st.one_of(st.none(), st.lists(st.sampled_from(["labels", "start_positions"]))),
    "use_cache": flags,
    "train_sampling_strategy": st.sampled_from(["random", "sequential"]),
    "do_train": flags,
    "do_eval": flags,
    "do_predict": flags,
    "report_to": st.sampled_from(["none", []]),
    "debug": st.sampled_from(["", []]),
    "accelerator_config": st.sampled_from([None, {}, {"even_batches": True}]),
    "hub_strategy": st.just("every_save"),
}

some_values = st.fixed_dictionaries({}, optional=VALUES)
fast = settings(max_examples=60, deadline=None)


@fast
@given(some_values)
def test_given_values_make_the_same_settings_again(values):
    ours = Settings(**values)
    assert Settings(**ours.given) == ours
    assert Settings.of(dict(ours.given)) == ours
    assert Settings().replace(**values) == ours
    assert pickle.loads(pickle.dumps(ours)) == ours


@fast
@given(some_values)
def test_arguments_survive_the_way_through_settings(values):
    theirs = TrainingArguments(**values | {"use_cpu": True})
    direct = Settings(**values | {"use_cpu": True})
    assert direct.as_training_arguments().to_dict() == theirs.to_dict()
    again = Settings.of(theirs)
    assert again.as_training_arguments().to_dict() == theirs.to_dict()
    assert Settings.of(again.as_training_arguments()) == again


@fast
@given(some_values)
def test_translation_changes_no_setting_and_can_be_repeated(values):
    ours = Settings(**values)
    plan = translate(ours, {})
    assert plan.settings == ours
    assert {row.field for row in plan.rows} - {"save_strategy"} == ours.given.keys() - {"save_strategy"}
    said = dict(plan.trainer_arguments)
    if ours.bf16:
        del said["precision"]  # "32-true" beside bf16=True is a contradiction when a user says it
    again = translate(ours, said)
    assert again.trainer_arguments == plan.trainer_arguments
    assert str(plan)

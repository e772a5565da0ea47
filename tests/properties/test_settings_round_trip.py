"""Settings survive every way of writing them down."""

import os
import pickle
from pathlib import Path
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
    "report_to": st.sampled_from(["none", [], "tensorboard", ["wandb"], ["tensorboard", "wandb"]]),
    "run_name": st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=8)),
    "debug": st.sampled_from(["", [], "underflow_overflow", ["underflow_overflow"]]),
    "label_smoothing_factor": st.floats(0, 1),
    "neftune_noise_alpha": st.one_of(st.none(), numbers.filter(bool)),
    "torch_empty_cache_steps": st.one_of(st.none(), counts),
    "full_determinism": flags,
    "include_num_input_tokens_seen": st.sampled_from(["no", "all", "non_padding", True, False]),
    "activation_checkpointing": st.sampled_from([None, True, False]),
    "tf32": st.sampled_from([None, False]),
    "accelerator_config": st.sampled_from([None, {}, {"even_batches": True}]),
    "hub_strategy": st.just("every_save"),
}

# Values that need each other.
GROUPS: list[st.SearchStrategy[dict[str, Any]]] = [
    st.just({}),
    st.just({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}),
    st.fixed_dictionaries({"optim": st.just("sgd"), "optim_args": st.sampled_from(["", "momentum=0.9"])}),
    st.fixed_dictionaries(
        {
            "optim": st.sampled_from(["galore_adamw", "apollo_adamw"]),
            "optim_target_modules": st.sampled_from(["all-linear", "all_linear", ["attn", "mlp"]]),
            "optim_args": st.sampled_from([None, "rank=4", "rank=4, scale=0.5"]),
        }
    ),
    st.fixed_dictionaries(
        {
            "lr_scheduler_type": st.sampled_from(["greedy", "reduce_lr_on_plateau"]),
            "eval_strategy": st.sampled_from(["steps", "epoch"]),
            "lr_scheduler_kwargs": st.fixed_dictionaries({}, optional={"patience": counts, "factor": shares}),
        },
        optional={"metric_for_best_model": st.sampled_from(["loss", "f1"]), "greater_is_better": flags},
    ),
    st.fixed_dictionaries(
        {"eval_strategy": st.just("epoch"), "metric_for_best_model": st.sampled_from(["eval_loss", "f1"])},
        optional={"greater_is_better": st.one_of(st.none(), flags)},
    ),
    st.fixed_dictionaries(
        {"torch_compile_backend": st.just("inductor")},
        optional={"torch_compile_mode": st.sampled_from(["default", "reduce-overhead"])},
    ),
    st.fixed_dictionaries({"torch_compile": flags}),
]

some_values = st.builds(
    lambda values, group: values | group,
    st.fixed_dictionaries({}, optional=VALUES),
    st.one_of(GROUPS),
)
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
@given(some_values, st.sampled_from([".yaml", ".yml", ".json"]))
def test_settings_survive_a_file(values, suffix):
    ours, path = Settings(**values), Path(f"run{suffix}")
    ours.save(path)
    assert Settings.load(path) == ours
    assert Settings.load(path).notes == tuple(note for note in ours.notes if "is now called" not in note)
    first = path.read_bytes()
    Settings.load(path).save(path)
    assert path.read_bytes() == first
    path.unlink()
    assert os.listdir() == []


@fast
@given(some_values)
def test_settings_survive_the_way_through_arguments(values):
    ours = Settings(**values | {"use_cpu": True})
    native = ours.as_training_arguments()
    again = Settings.of(native)
    assert again.as_training_arguments().to_dict() == native.to_dict()
    # What says the same as a default, or follows from other values, does not come back; the rest does.
    implied = {"output_dir"}
    if ours.given.get("torch_compile_backend") or ours.given.get("torch_compile_mode"):
        assert native.torch_compile
        implied.add("torch_compile")
    assert {name: value for name, value in again.given.items() if name not in implied} == {
        name: ours.given[name] for name in again.given if name not in implied
    }


@fast
@given(some_values)
def test_translation_changes_no_setting_and_can_be_repeated(values):
    ours = Settings(**values)
    plan = translate(ours, {})
    assert plan.settings == ours
    assert {row.field for row in plan.rows} == ours.given.keys()
    said = dict(plan.trainer_arguments)
    if ours.bf16:
        del said["precision"]  # "32-true" beside bf16=True is a contradiction when a user says it
    again = translate(ours, said)
    assert again.trainer_arguments == plan.trainer_arguments
    assert str(plan)

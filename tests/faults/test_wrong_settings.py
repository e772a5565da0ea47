"""Wrong settings of every kind: each is refused before anything starts, by its name and with what to do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import hfbridge
from hfbridge import SettingsError

NAN, INF = float("nan"), float("inf")
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
CHECKPOINTING = {"activation_checkpointing": True}
GALORE = {"optim": "galore_adamw", "optim_target_modules": "all-linear"}

# what the user writes, the name that the message must give, a piece of what it must say to do
WRONG: list[tuple[dict[str, Any], str, str]] = [
    # Names
    ({"learning_rat": 1e-3}, "learning_rat", "did you mean learning_rate?"),
    ({"gradient_acumulation_steps": 4}, "gradient_acumulation_steps", "did you mean gradient_accumulation"),
    ({"per_device_batch_size": 4}, "per_device_batch_size", "did you mean per_device_"),
    ({"warmup_ration": 0.1}, "warmup_ration", "did you mean warmup_ratio?"),
    ({"lr_scheduler": "cosine"}, "lr_scheduler", "did you mean lr_scheduler_type?"),
    ({"evaluation_startegy": "epoch"}, "evaluation_startegy", "did you mean evaluation_strategy?"),
    ({"optimizer": "sgd"}, "optimizer", "unknown"),
    ({"color": 1}, "color", "names of transformers.TrainingArguments"),
    # Types
    ({"learning_rate": "fast"}, "learning_rate", "must be a number, not str"),
    ({"learning_rate": None}, "learning_rate", "must be a number"),
    ({"learning_rate": True}, "learning_rate", "must be a number, not bool"),
    ({"learning_rate": [1e-3]}, "learning_rate", "must be a number, not list"),
    ({"num_train_epochs": "three"}, "num_train_epochs", "must be a number"),
    ({"max_steps": 10.0}, "max_steps", "must be a whole number, not float"),
    ({"max_steps": "10"}, "max_steps", "must be a whole number, not str"),
    ({"seed": True}, "seed", "must be a whole number, not bool"),
    ({"data_seed": 1.5}, "data_seed", "must be a whole number or None"),
    ({"bf16": 1}, "bf16", "must be True or False, not int"),
    ({"bf16": "true"}, "bf16", "must be True or False, not str"),
    ({"use_cache": None}, "use_cache", "must be True or False"),
    ({"full_determinism": "yes"}, "full_determinism", "must be True or False"),
    ({"activation_checkpointing": "yes"}, "activation_checkpointing", "must be True or False or None"),
    ({"torch_compile": 1}, "torch_compile", "must be True or False"),
    ({"output_dir": 3}, "output_dir", "must be a string or None"),
    ({"label_names": "labels"}, "label_names", "must be a list of strings or None"),
    ({"label_names": [1]}, "label_names", "must be a list of strings or None"),
    ({"lr_scheduler_kwargs": "num_cycles=1"}, "lr_scheduler_kwargs", "must be a dictionary or None"),
    ({"lr_scheduler_kwargs": "{broken"}, "lr_scheduler_kwargs", "must be a dictionary or None"),
    ({**CHECKPOINTING, "activation_checkpointing_kwargs": [1]}, "activation_checkpointing_kwargs", "a dict"),
    ({"report_to": None}, "report_to", 'must be a list of names, "all" or "none"'),
    ({"report_to": 3}, "report_to", "a list of strings"),
    ({"report_to": [3]}, "report_to", "a list of strings"),
    ({"run_name": 17}, "run_name", "must be a string or None"),
    ({"debug": True}, "debug", "must be a string or a list of strings"),
    ({"neftune_noise_alpha": "strong"}, "neftune_noise_alpha", "must be a number or None"),
    ({"torch_empty_cache_steps": 2.5}, "torch_empty_cache_steps", "must be a whole number or None"),
    ({"metric_for_best_model": 1, "eval_strategy": "epoch"}, "metric_for_best_model", "must be a string"),
    ({"trackio_static_space_id": True, "report_to": "trackio"}, "trackio_static_space_id", "False or None"),
    # Ranges, and numbers that are none
    ({"max_steps": 0}, "max_steps", "1 or more, or -1"),
    ({"max_steps": -5}, "max_steps", "1 or more, or -1"),
    ({"num_train_epochs": 0}, "num_train_epochs", "call validate"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size", "1 or more"),
    ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size", "1 or more"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps", "1 or more"),
    ({"learning_rate": -1e-5}, "learning_rate", "0 or more"),
    ({"learning_rate": NAN}, "learning_rate", "finite"),
    ({"learning_rate": "inf"}, "learning_rate", "finite"),
    ({"num_train_epochs": INF}, "num_train_epochs", "finite"),
    ({"weight_decay": -0.1}, "weight_decay", "0 or more"),
    ({"weight_decay": NAN}, "weight_decay", "finite"),
    ({"max_grad_norm": -1}, "max_grad_norm", "0 (no clipping) or more"),
    ({"max_grad_norm": NAN}, "max_grad_norm", "finite"),
    ({"warmup_steps": -1}, "warmup_steps", "never negative"),
    ({"adam_beta1": 1.0}, "adam_beta1", "below 1"),
    ({"adam_beta2": -0.1}, "adam_beta2", "from 0"),
    ({"adam_epsilon": -1e-8}, "adam_epsilon", "0 or more"),
    ({"label_smoothing_factor": 1.1}, "label_smoothing_factor", "from 0 to 1"),
    ({"label_smoothing_factor": -0.1}, "label_smoothing_factor", "from 0 to 1"),
    ({"neftune_noise_alpha": 0}, "neftune_noise_alpha", "more than 0"),
    ({"neftune_noise_alpha": NAN}, "neftune_noise_alpha", "finite"),
    ({"torch_empty_cache_steps": 0}, "torch_empty_cache_steps", "1 or more"),
    ({"seed": -1}, "seed", "2**32"),
    ({"data_seed": 2**64}, "data_seed", "2**64"),
    ({"eval_delay": -1}, "eval_delay", "0 or more"),
    ({"eval_accumulation_steps": 0}, "eval_accumulation_steps", "1 or more"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers", "0 or more"),
    ({"metric_for_best_model": "", "eval_strategy": "epoch"}, "metric_for_best_model", "leave it out"),
    # Words
    ({"optim": "adamw"}, "optim", "did you mean adamw_torch?"),
    ({"optim": "adamw_hf"}, "optim", "did you mean adamw_"),
    ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type", "did you mean cosine?"),
    ({"eval_strategy": "step"}, "eval_strategy", "did you mean steps?"),
    ({"eval_strategy": True}, "eval_strategy", 'is not one of "no", steps, epoch'),
    ({"logging_strategy": "epochs"}, "logging_strategy", "did you mean epoch?"),
    ({"train_sampling_strategy": "shuffle"}, "train_sampling_strategy", "random, sequential"),
    ({"report_to": "tensorbord"}, "report_to", "did you mean tensorboard?"),
    ({"report_to": ["wandb", "none"]}, "report_to", "stands alone"),
    ({"report_to": ["wandb", "wandb"]}, "report_to", "write each once"),
    ({"report_to": "wandb,tensorboard"}, "report_to", 'write a list: ["wandb", "tensorboard"]'),
    ({"debug": "underflow"}, "debug", "did you mean underflow_overflow?"),
    ({"debug": "tpu_metrics_debug"}, "debug", 'use debug="underflow_overflow"'),
    ({"debug": ["tpu_metrics_debug"]}, "debug", 'use debug="underflow_overflow"'),
    ({"debug": "underflow_overflow tpu_metrics_debug"}, "debug", 'use debug="underflow_overflow"'),
    ({"include_num_input_tokens_seen": "yes"}, "include_num_input_tokens_seen", '"no", all, non_padding'),
    ({"torch_compile_mode": "fast"}, "torch_compile_mode", "default, reduce-overhead, max-autotune"),
    ({"torch_compile_backend": "inducter"}, "torch_compile_backend", "did you mean inductor?"),
    ({"torch_compile_backend": "no"}, "torch_compile_backend", "is not one of"),
    ({"dataloader_multiprocessing_context": "thread"}, "dataloader_multiprocessing_context", "fork, spawn"),
    # Contradictions, and values that something else is missing for
    ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio", "give only one of the two"),
    ({"no_cuda": True, "use_cpu": False}, "no_cuda", "give only one of the two"),
    ({"gradient_checkpointing": True, **CHECKPOINTING} | {"activation_checkpointing": False},
     "gradient_checkpointing", "give only one of the two"),
    ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor", "set dataloader_num_workers"),
    ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers", "set dataloader_num_workers"),
    ({"logging_steps": 0}, "logging_steps", "whole number of steps"),
    ({"logging_steps": 1.5}, "logging_steps", "whole number of steps"),
    ({"eval_strategy": "steps", "eval_steps": 2.5}, "eval_steps", "whole number of steps"),
    ({"liger_kernel_config": {"rope": True}}, "liger_kernel_config", "use_liger_kernel=True"),
    ({"use_liger_kernel": True, "use_cpu": True}, "use_liger_kernel", "leave it out"),
    ({"auto_find_batch_size": True, "train_sampling_strategy": "batch_rebalance"},
     "auto_find_batch_size", "choose one"),
    ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "activation_checkpointing_kwargs",
     "set that, or leave it out"),
    ({**CHECKPOINTING, "activation_checkpointing_kwargs": {"reentrant": True}},
     "activation_checkpointing_kwargs", "did you mean use_reentrant?"),
    ({"torch_compile": False, "torch_compile_mode": "default"}, "torch_compile_mode", "choose one"),
    ({"torch_compile_backend": "eager", "torch_compile_mode": "max-autotune"}, "torch_compile_mode",
     "leave one of the two out"),
    ({"tf32": True, "use_cpu": True}, "tf32", "leave it out"),
    ({"metric_for_best_model": "f1"}, "metric_for_best_model", "set eval_strategy"),
    ({"greater_is_better": True}, "greater_is_better", "without metric_for_best_model"),
    ({"project": "mine"}, "project", 'set report_to=["trackio"]'),
    ({"trackio_bucket_id": "me/bucket", "report_to": "wandb"}, "trackio_bucket_id", "only trackio reads it"),
    # Optimizers
    ({"optim": "galore_adamw"}, "optim", "needs optim_target_modules"),
    ({"optim_target_modules": "all-linear"}, "optim_target_modules", "leave it out"),
    ({**GALORE, "optim_target_modules": "*"}, "optim_target_modules", "no regular expression"),
    ({"optim_args": "betas=0.9"}, "optim_args", "does not read it"),
    ({"optim": "sgd", "optim_args": "momentum"}, "optim_args", 'write "key=value,key=value"'),
    ({"optim": "sgd", "optim_args": "momentun=0.9"}, "optim_args", "did you mean momentum?"),
    ({"optim": "sgd", "optim_args": "momentum=nan"}, "optim_args", "finite"),
    ({"optim": "sgd", "optim_args": "nesterov=True"}, "optim_args", "requires a momentum"),
    ({"optim": "sgd", "optim_args": "weight_decay=0.1"}, "optim_args", "the setting weight_decay"),
    ({"optim": "rmsprop_bnb", "optim_args": "alpha=0.9"}, "optim_args", "leave it out"),
    ({"optim": "stable_adamw", "optim_args": "kahan_sum=False"}, "optim_args", "leave it out"),
    ({**GALORE, "optim_args": "rank=0"}, "optim_args", "1 or more"),
    ({"optim": "lomo"}, "optim", 'use "adamw_torch"'),
    ({**GALORE, "optim": "galore_adamw_layerwise"}, "optim", '"galore_adamw"'),
    # Schedules
    ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 1}}, "lr_scheduler_kwargs",
     "did you mean num_cycles?"),
    ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": NAN}}, "lr_scheduler_kwargs",
     "finite number"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type", "either min_lr or min_lr_rate"),
    ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "1e-6"}},
     "lr_scheduler_kwargs", "1.0e-6 a number"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type", "num_decay_steps"),
    ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "lr_scheduler_type", "below learning_rate"),
    ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type", "set eval_strategy"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type", "set eval_strategy"),
    ({**PLATEAU, "lr_scheduler_kwargs": {"patiense": 1}}, "lr_scheduler_kwargs", "did you mean patience?"),
    ({**PLATEAU, "lr_scheduler_kwargs": {"factor": 1.5}}, "lr_scheduler_kwargs", "should be < 1.0"),
    ({**PLATEAU, "lr_scheduler_kwargs": {"mode": "up"}}, "lr_scheduler_kwargs", "mode up is unknown"),
    # What this version does not carry, and what transformers no longer has
    ({"fp16": True}, "fp16", "use bf16=True"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end", '"steps" and "no"'),
    ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "load_best_model_at_end", "must be equal"),
    ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 6},
     "load_best_model_at_end", "save_steps must be a multiple of eval_steps; they are 6 and 4"),
    ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.2, "save_steps": 6},
     "load_best_model_at_end", "must be a multiple"),
    ({"save_strategy": "best"}, "save_strategy", "needs metric_for_best_model"),
    ({"save_strategy": "best", "metric_for_best_model": "f1"}, "save_strategy", "needs evaluations"),
    ({"save_strategy": "always"}, "save_strategy", "epoch"),
    ({"save_strategy": "steps", "save_steps": 0}, "save_steps", "whole number of steps"),
    ({"save_strategy": "steps", "save_steps": 1.5}, "save_steps", "whole number of steps"),
    ({"save_total_limit": "two"}, "save_total_limit", "number"),
    ({"push_to_hub_token": "hf_secret"}, "push_to_hub_token", "push_to_hub"),
    ({"logging_dir": "logs"}, "logging_dir", "give it to a logger"),
    ({"tokenizer": "bert"}, "tokenizer", "processing_class="),
    ({"sharded_ddp": "simple"}, "sharded_ddp", "leave it out"),
    ({"warmup_ratio": 1.0}, "warmup_ratio", "give the number of steps as warmup_steps"),
    ({"fp16_backend": "apex"}, "fp16_backend", "removed from transformers"),
]  # fmt: skip


def written(values: Mapping[str, Any]) -> str:
    """What a test is called by."""
    return ",".join(f"{name}={value}" for name, value in values.items())


@pytest.mark.parametrize(
    ("values", "name", "cure"), WRONG, ids=[f"{n:03}-{written(case[0])}" for n, case in enumerate(WRONG)]
)
def test_a_wrong_setting(values: dict[str, Any], name: str, cure: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        hfbridge.Trainer({"output_dir": "out"} | values)
    problems = [problem for problem in caught.value.problems if problem.subject.startswith(f"{name} = ")]
    assert problems, str(caught.value)
    assert cure in " ".join(problem.text for problem in problems)
    message = str(caught.value)
    assert "nothing was started" in message
    assert "hf_secret" not in message
    assert all(problem.subject.split(" = ")[0] in values for problem in caught.value.problems)
    assert list(tmp_path.iterdir()) == []


def test_there_are_many_and_no_two_are_the_same() -> None:
    assert len(WRONG) >= 100
    assert len({written(values) for values, _, _ in WRONG}) == len(WRONG)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("nowhere.yaml", None, "cannot be read"),
        ("folder.yaml", "", "cannot be read"),
        ("run.toml", "seed = 1", "it may be .yaml, .yml or .json"),
        ("run.yaml", "seed: [1", "is no YAML: line 1"),
        ("run.yaml", "- seed", "must be a mapping of names to values"),
        ("run.yaml", "seed: 1\nseed: 2", "line 2, column 1: seed stands there twice"),
        ("run.yaml", "learning_rat: 1", "did you mean learning_rate?"),
        ("run.yaml", "learning_rate: .nan", "finite"),
        ("run.json", "{'seed': 1}", "is no JSON: line 1, column 2"),
        ("run.json", '{"seed": 1.5}', "must be a whole number"),
        ("run.json", "\x00", "is no JSON"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_file_that_cannot_be_used(name: str, text: str | None, says: str) -> None:
    if text == "":
        Path(name).mkdir()
    elif text is not None:
        Path(name).write_text(text)
    with pytest.raises(SettingsError) as caught:
        hfbridge.Trainer(name)
    assert name in str(caught.value)
    assert says in str(caught.value)


def test_everything_wrong_is_told_at_once_in_the_order_written() -> None:
    values = {
        "learning_rat": 1,
        "max_steps": 0,
        "optim": "sgd",
        "optim_args": "momentun=0.9,nesterov=maybe",
        "report_to": "tensorbord",
        "label_smoothing_factor": 2.0,
        "torch_compile_mode": "fast",
        "greater_is_better": True,
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycle": 1, "last_epoch": "x"},
    }
    with pytest.raises(SettingsError) as caught:
        hfbridge.Trainer(values)
    assert str(caught.value).startswith("8 of 10 settings cannot be used; nothing was started.")
    names = [problem.subject.split(" = ")[0] for problem in caught.value.problems]
    wrong = [name for name in values if name not in ("optim", "lr_scheduler_type")]
    assert list(dict.fromkeys(names)) == wrong
    assert len(names) == 10

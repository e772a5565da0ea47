"""Parametrized tests of which `make test` runs some cases, and `make test-all` the others, too.

Each kind of case stays; what goes takes a third of the time. A test that is left out as a whole carries the
mark `long` itself.
"""

from itertools import cycle

STRATEGIES = ("ddp", "fsdp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
OWN = ("fsdp", "mesh", "mesh by hand", "deepspeed 2", "deepspeed 3")


def _in_turns(*sides: str) -> tuple[str, ...]:
    """Take the sides in turns, one for each of Lightning's own strategies."""
    return tuple(f"2-{name}-{side}" for name, side in zip(OWN, cycle(sides), strict=False))


KEPT: dict[str, tuple[str, ...]] = {
    "compare/test_report.py::test_long_names_make_no_page_wider": ("390",),
    "compare/test_report.py::test_a_browser_shows_the_report_in_light_and_dark": ("390",),
    "distributed/test_adapters.py::test_any_strategy_goes_the_way_of_one_process": ("fsdp2",),
    "distributed/test_ddp.py::test_every_kind_of_model": (
        "llama-bf16",
        "distilbert-fp32",
        "bert-qa-fp32",
        "gpt2-bf16",
        "t5-fp32",
        "bert-mlm-fp32",
        "albert-bf16",
    ),
    "distributed/test_deepspeed.py::test_bf16_equals_native": ("llama-3", "bert-regression-2"),
    "distributed/test_deepspeed.py::test_either_engine_goes_on_from_either_checkpoint": ("2",),
    "distributed/test_deepspeed.py::test_every_name_validates_predicts_and_trains": (
        "deepspeed_stage_2",
        "deepspeed_stage_3",
    ),
    "distributed/test_deepspeed.py::test_sections_that_deepspeed_builds_equal_native": ("both-2", "both-3"),
    "distributed/test_deepspeed.py::test_zero_equals_native": (
        "llama-2",
        "distilbert-1",
        "gpt2-3",
        "bert-qa-2",
    ),
    "distributed/test_evaluation.py::test_exact_is_that_of_one_process": (
        "distilbert-2",
        "llama-2",
        "bert-qa-3",
        "t5-2",
        "bert-token-2",
    ),
    "distributed/test_evaluation.py::test_exact_with_any_option_is_that_of_one_process": ("2",),
    "distributed/test_evaluation.py::test_ranks_that_pad_to_different_lengths": ("t5-2",),
    "distributed/test_fsdp.py::test_sharded_models_generate_and_are_saved_whole": (
        "llama-fsdp",
        "t5-fsdp2",
        "lora-llama-fsdp2",
    ),
    "distributed/test_fsdp.py::test_states_are_whole_and_any_strategy_goes_on_from_them": (
        "gpt2-fsdp",
        "lora-llama-fsdp2",
    ),
    "distributed/test_lightning_strategies.py::test_it_builds_a_named_model_and_clips": (
        "fsdp-lightning",
        "mesh-hfbridge",
        "deepspeed 3-hfbridge",
    ),
    "distributed/test_lightning_strategies.py::test_it_is_resumed_from_lightnings_own_checkpoint": _in_turns(
        "hfbridge", "lightning"
    ),
    "distributed/test_lightning_strategies.py::test_it_trains_as_under_ddp": _in_turns(
        "lightning", "hfbridge"
    ),
    "distributed/test_matrix.py::test_one_trajectory": (
        *(f"sequence classification-{name}" for name in STRATEGIES),
        *(f"causal language model, tied weights-{name}" for name in ("ddp", "fsdp2", "deepspeed_stage_2")),
        *(f"causal language model, LoRA-{name}" for name in ("fsdp2", "deepspeed_stage_3")),
    ),
    "distributed/test_resume_by_strategy.py::test_the_same_strategy_goes_on_to_the_bit": tuple(
        f"{name}-llama" for name in STRATEGIES
    ),
    "distributed/test_resume_by_strategy.py::test_whole_checkpoints_fit_any_strategy_that_reads_them": (
        "ddp-fsdp2",
        "fsdp-ddp",
        "fsdp2-fsdp",
    ),
    "dropin/test_libraries.py::test_sentence_transformers_and_setfit": ("embed: two losses", "few_shot"),
    "dropin/test_libraries.py::test_trl": ("sft: packed", "dpo: LoRA"),
    "dropin/test_from_trainer.py::test_a_method_of_a_subclass_is_called": (
        "compute_loss: popped labels",
        "training_step: two backwards",
        "get_train_dataloader",
        "create_optimizer",
        "prediction_step",
        "_save_checkpoint",
    ),
    "examples/test_pairs.py::test_scores_are_equal": (
        "sst2",
        "tinyshakespeare",
        "tatoeba",
        "digits",
        "tones",
    ),
    "examples/test_team_project.py::test_each_step_of_the_adoption_learns_logs_and_writes": (
        "plain-hfbridge",
        "data_module_only-lightning",
        "module_only-hfbridge",
        "both-hfbridge",
    ),
    "parity/test_batch_size.py::test_training_begins_again_with_smaller_batches": (
        "plain-after 0 forwards",
        "accumulated-after 5 forwards",
        "greedy-after 5 forwards",
    ),
    "parity/test_callbacks.py::test_early_stopping": (
        "steps-1-0.0-True",
        "steps-2-0.004-False",
        "epoch-1-0.004-None",
        "epoch-2-0.0-False",
    ),
    "parity/test_data_options.py::test_order_by_length_otherwise": (
        "drop last-batch_rebalance",
        "data seed-group_by_length",
        "max steps-batch_rebalance",
        "part of an epoch-group_by_length",
        "larger batches-batch_rebalance",
    ),
    "parity/test_model_options.py::test_compiled": ("eager-distilbert",),
    "parity/test_real_models.py::test_causal_lm_on_shakespeare": ("1-bf16", "4-fp32"),
    "parity/test_real_models.py::test_minilm_on_sst2": ("4-fp32",),
    "parity/test_resume.py::test_all_routes_between_directories": (
        "boundary-0",
        "mid-epoch-0",
        "mid-epoch-2",
        "after-evaluation-0",
    ),
    "parity/test_resume.py::test_from_files_of_lightning": (
        "boundary-0",
        "mid-epoch-0",
        "after-evaluation-0",
    ),
    "parity/test_resume.py::test_where_collating_or_ordering_draws": (
        "collator-boundary",
        "collator-in-workers-mid-epoch",
        "order-by-length-after-evaluation",
        "order-by-length-in-workers-mid-epoch",
        "sampler-without-a-seed-mid-epoch",
        "workers-that-live-on-mid-epoch",
    ),
    "parity/test_streams.py::test_resuming_in_the_middle_of_a_pass": ("0-PadRows", "0-Noisy", "2-Noisy"),
    "distributed/test_streams.py::test_rows_are_dealt_natively": (
        "config0-Plain-True",
        "config2-sharded-True",
        "config4-Plain-True",
        "config6-sharded-False",
    ),
    "dropin/test_changed_in_the_run.py::test_what_a_callback_changes": tuple(
        f"{name}-on_step_end-4"
        for name in (
            "max_grad_norm",
            "no clipping",
            "compute_loss",
            "compute_loss_func",
            "label_smoother",
            "compute_metrics",
            "eval_dataset",
            "per_device_eval_batch_size",
            "optimizer",
        )
    ),
    "faults/test_signals.py::test_saved_on_an_exception": (
        "on_train_batch_start-9-ModelCheckpoint-hfbridge",
        "on_after_backward-10-OnExceptionCheckpoint-lightning",
        "on_train_batch_end-8-afterwards-hfbridge",
        "on_train_batch_end-12-ModelCheckpoint-lightning",
        "on_validation_batch_end-2-OnExceptionCheckpoint-hfbridge",
        "on_train_epoch_end-1-afterwards-lightning",
    ),
}

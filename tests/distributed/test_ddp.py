"""DDP: the same job on the native Trainer and on hfbridge, both live under torchrun, equal to the bit.

46 rows in micro-batches of 4: the last one is short, and with windows of 3 the last window of a pass, too.
"""

from datetime import timedelta

import pytest

from tests.distributed.jobs import (
    group_timeout,
    run_job_on_both,
    run_native,
    several_buckets,
    stops_early,
)
from tests.parity.engines import Job

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ACCUMULATED = {"gradient_accumulation_steps": 3, "num_train_epochs": 2}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "distilbert", "bert-qa", "gpt2", "t5", "bert-mlm", "albert"])
def test_every_kind_of_model(ranks, kind, bf16):
    job = Job(kind, {**ACCUMULATED, **EVALUATED, "bf16": bf16})
    if kind == "bert-mlm":
        job = with_masking(job)
    first, second = ranks(2).run(run_job_on_both, job)
    assert first["collated"] != second["collated"]
    assert [s["weights"] for s in first["steps"] if "weights" in s] == [
        s["weights"] for s in second["steps"] if "weights" in s
    ]


def with_masking(job):
    """Let the collator of masked language models draw what is masked."""
    from dataclasses import replace

    from transformers import DataCollatorForLanguageModeling

    from tests.tiny import make_tokenizer

    return replace(job, collator=Masking(DataCollatorForLanguageModeling(make_tokenizer())))


class Masking:
    """Make a collator; pickles."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self):
        return self.collator


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 1},
        {"gradient_accumulation_steps": 4, "max_grad_norm": 0.0},
        {"num_train_epochs": 1.5, "logging_steps": 3},
        {"max_steps": 5, "lr_scheduler_type": "cosine", "max_grad_norm": 0.1},
        {"average_tokens_across_devices": False},
        {"dataloader_drop_last": True},
        {"accelerator_config": {"split_batches": True}},
        {"accelerator_config": {"use_seedable_sampler": False}},
        {"train_sampling_strategy": "sequential"},
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "batch_rebalance"},
        {"dataloader_num_workers": 2},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"data_seed": 11},
        {"include_num_input_tokens_seen": "non_padding"},
        {"activation_checkpointing": True},
        {"neftune_noise_alpha": 5.0},
        {"label_smoothing_factor": 0.1},
        {"optim": "adafactor"},
        {"eval_strategy": "epoch", "metric_for_best_model": "loss"},
        {"full_determinism": True},
    ],
    ids=str,
)
def test_every_setting_that_several_ranks_could_change(ranks, settings):
    ranks(2).run(run_job_on_both, Job("llama", {**ACCUMULATED, **settings}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ddp_find_unused_parameters", False),
        ("ddp_bucket_cap_mb", 1),
        ("ddp_bucket_cap_mb", 25),
        ("ddp_broadcast_buffers", False),
        ("ddp_static_graph", True),
        ("ddp_backend", "gloo"),
    ],
)
def test_what_ddp_is_made_with(ranks, field, value):
    # With accumulation, torch has no static graph.
    accumulated = {} if field == "ddp_static_graph" else ACCUMULATED
    found = ranks(2).run(run_job_on_both, Job("distilbert", {**accumulated, field: value}))[0]
    theirs, ours = found["wrappers"]
    assert theirs == ours
    default = ranks(2).run(run_job_on_both, Job("distilbert", {"max_steps": 1}))[0]["wrappers"][0]
    assert (theirs != default) is ((field, value) not in (("ddp_backend", "gloo"), ("ddp_bucket_cap_mb", 25)))


@pytest.mark.long
def test_collectives_wait_as_long_as_ddp_timeout(ranks):
    ranks(2).close()  # whose group is natively open; one store connects a single group reliably
    found = ranks(2).run(group_timeout, Job(settings={"max_steps": 1, "ddp_timeout": 77}))
    ranks(2).close()
    assert found == [timedelta(seconds=77)] * 2


@pytest.mark.long
def test_three_ranks_and_several_buckets(ranks):
    job = Job("llama", {**ACCUMULATED, "max_steps": 4}, model=several_buckets)
    ranks(3).run(run_job_on_both, job)


def test_without_padding_of_the_pass_three_ranks_take_turns(ranks):
    """22 rows in batches of 4 for 3 ranks: the last round is filled with rows from the beginning."""
    found = ranks(3).run(run_job_on_both, Job(rows=22))
    dealt = [ids for rank in found for ids in rank["collated"]]
    assert all(len(ids) == 4 for ids in dealt)
    assert {i for ids in dealt for i in ids} == set(range(22))


def test_a_callback_stops_all_ranks_in_mid_epoch(ranks):
    found = ranks(2).run(run_job_on_both, Job(settings=ACCUMULATED, callbacks=stops_early))
    assert [step["step"] for step in found[0]["steps"]] == [1, 2, 3, 3]


def test_what_is_compared_tells_runs_apart(ranks):
    """The same job with another number of ranks takes other steps: equality is not for want of difference."""
    two, three = (ranks(n).run(run_native, Job("llama", {"max_steps": 2}))[0] for n in (2, 3))
    assert two[0]["clipped gradients"] != three[0]["clipped gradients"]

"""The order of samples: a function of seed and epoch."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import set_seed

from hfbridge.data.samplers import HFSamplers, micro_batches_of
from hfbridge.settings import Settings

SIZE = 3  # rows of a micro-batch
ROWS = list(range(20))


def train_sampler(rows, *, strategy, data_seed, **more):
    settings = Settings(train_sampling_strategy=strategy, data_seed=data_seed, use_cpu=True, **more)
    return HFSamplers(settings.as_training_arguments(), None).train_sampling(rows, 8)["sampler"]


def test_torchs_own_sampler_if_asked_for():
    config = {"use_seedable_sampler": False}
    sampler = train_sampler(ROWS, strategy="random", data_seed=3, accelerator_config=config)
    assert isinstance(sampler, RandomSampler)


@pytest.mark.parametrize("strategy", ["random", "batch_rebalance"])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_micro_batches_are_counted_before_there_are_rows_to_look_at(strategy, drop_last, accumulation):
    settings = Settings(
        use_cpu=True,
        train_sampling_strategy=strategy,
        per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=drop_last,
    )
    rows = [{"input_ids": [1] * (1 + i % 5)} for i in range(20)]
    parts = HFSamplers(settings.as_training_arguments(), None).train_sampling(rows, SIZE)
    assert micro_batches_of(20, SIZE, settings, world_size=1) == len(DataLoader(rows, **parts))


def test_sequential_is_the_datasets_order():
    sampler = train_sampler(ROWS, strategy="sequential", data_seed=3)
    assert isinstance(sampler, SequentialSampler)
    assert list(sampler) == ROWS


def test_random_is_accelerates_sampler_and_a_permutation():
    sampler = train_sampler(ROWS, strategy="random", data_seed=3)
    assert isinstance(sampler, SeedableRandomSampler)
    assert sorted(sampler) == ROWS


def test_an_epochs_order_depends_on_the_seed_and_the_epoch_alone():
    one, two = (train_sampler(ROWS, strategy="random", data_seed=3) for _ in range(2))
    first = list(one)
    torch.rand(5)
    assert list(two) == first
    one.set_epoch(1)
    other = train_sampler(ROWS, strategy="random", data_seed=4)
    assert list(one) == list(other) != first


def test_without_a_data_seed_the_runs_seed_counts():
    set_seed(11)
    sampler = train_sampler(ROWS, strategy="random", data_seed=None)
    assert list(sampler) == list(train_sampler(ROWS, strategy="random", data_seed=11))


def test_a_data_seed_of_zero_is_a_seed():
    set_seed(11)
    sampler = train_sampler(ROWS, strategy="random", data_seed=0)
    assert sampler.initial_seed == 0


def evaluation_batches(rows, ranks, *, repeats, **config):
    """Deal the batches of an evaluation set of some rows to all ranks; a list for each rank."""
    dealt = []
    for rank in range(ranks):
        args = SimpleNamespace(
            world_size=ranks,
            process_index=rank,
            eval_batch_size=4,
            dataloader_drop_last=config.get("drop_last", False),
            train_sampling_strategy="random",
            accelerator_config=SimpleNamespace(
                split_batches=config.get("splits", False), use_seedable_sampler=True
            ),
        )
        parts = HFSamplers(args, None).eval_sampling(
            range(rows), "eval", batch_size=args.eval_batch_size, repeats=repeats
        )
        dealt.append(list(parts["batch_sampler"]))
        assert len(dealt[-1]) == len(parts["batch_sampler"])
    return dealt


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 11, 12, 13, 22, 24])
@pytest.mark.parametrize("splits", [False, True])
def test_without_repeats_ranks_have_the_batches_of_one_process(ranks, rows, splits):
    if splits and ranks == 3:
        ranks = 4
    repeated, dealt = (
        evaluation_batches(rows, ranks, repeats=repeats, splits=splits) for repeats in (True, False)
    )
    assert [len(batches) for batches in dealt] == [len(batches) for batches in repeated]
    size = 4 // ranks if splits else 4
    alone = [list(range(first, min(first + size, rows))) for first in range(0, rows, size)]
    taking_turns = [batch for together in zip(*dealt, strict=True) for batch in together]
    assert taking_turns[: len(alone)] == alone
    for batch in taking_turns[len(alone) :]:
        assert len(batch) == size
        assert set(batch) <= set(range(rows))


def test_dropped_rounds_have_nothing_to_repeat():
    for repeats in (True, False):
        first, second = evaluation_batches(15, 2, repeats=repeats, drop_last=True)
        assert (first, second) == ([[0, 1, 2, 3]], [[4, 5, 6, 7]])

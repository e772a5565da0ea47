"""The order of samples: a function of seed and epoch."""

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import set_seed

from hfbridge.data.order import NativeSamplers, micro_batches_of
from hfbridge.settings import Settings

SIZE = 3  # rows of a micro-batch
ROWS = list(range(20))


def train_sampler(rows, *, strategy, data_seed, **more):
    settings = Settings(train_sampling_strategy=strategy, data_seed=data_seed, use_cpu=True, **more)
    return NativeSamplers(settings.as_training_arguments(), None).of_training(rows, 8)["sampler"]


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
    parts = NativeSamplers(settings.as_training_arguments(), None).of_training(rows, SIZE)
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

"""The order of samples: a function of seed and epoch."""

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import SequentialSampler
from transformers import set_seed

from hfbridge.data.order import train_sampler

ROWS = list(range(20))


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

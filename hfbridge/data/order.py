"""The order of samples, as the native Trainer has it; knows Hugging Face.

train_sampling_strategy     sampler (one process)
random                      accelerate's SeedableRandomSampler: epoch e shuffles with seed + e
sequential                  the dataset's order
evaluation                  the dataset's order
"""

from collections.abc import Sized
from typing import Literal

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler, SequentialSampler


def train_sampler(
    dataset: Sized, *, strategy: Literal["random", "sequential"], data_seed: int | None
) -> Sampler[int]:
    """Order the training samples.

    Args:
        dataset: what is sampled; its length counts.
        strategy: `train_sampling_strategy` of the settings.
        data_seed: seed of the first epoch's order; `None` takes the seed the global generator was last given,
            so call this after the run has been seeded.

    Mirrors: transformers.Trainer._get_train_sampler
    Mirrors: accelerate.data_loader.prepare_data_loader
    Proved by: tests/parity/test_order.py
    """
    if strategy == "sequential":
        return SequentialSampler(dataset)
    sampler: Sampler[int] = SeedableRandomSampler(dataset, data_seed=data_seed)
    return sampler

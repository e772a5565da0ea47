"""The order of samples, as the native Trainer has it; knows Hugging Face.

train_sampling_strategy     sampler of training (one process)                           of evaluation
random                      accelerate's SeedableRandomSampler: epoch e shuffles with   the dataset's order
                            seed + e; torch's own with use_seedable_sampler=False
sequential                  the dataset's order                                         the dataset's order
group_by_length             long rows together, drawn from the global generator         long rows together,
                                                                                        the same each time
batch_rebalance             micro-batches of equal cost, not of equal size              the dataset's order
"""

import math
from collections.abc import Sized
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler
from transformers import Trainer as NativeTrainer
from transformers import TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler

from hfbridge.errors import DataError


class NativeSamplers(NativeTrainer):
    """The native Trainer's methods that choose samplers, without the Trainer around them.

    Args:
        args: strategy, batch sizes and seeds.
        processing_class: names the column whose lengths count.

    Mirrors: transformers.Trainer._get_train_sampler
    Mirrors: transformers.Trainer._get_eval_sampler
    Proved by: tests/parity/test_data_options.py
    """

    def __init__(self, args: TrainingArguments, processing_class: Any) -> None:
        self.args, self.processing_class = args, processing_class

    def of_training(self, dataset: Sized, batch_size: int) -> dict[str, Any]:
        """Choose the sampler of the training set; call it after the run has been seeded.

        Args:
            dataset: the training set.
            batch_size: rows of a micro-batch.

        Returns:
            `batch_sampler`, or `sampler`, `batch_size` and `drop_last`, for a DataLoader.

        Raises:
            DataError: lengths are needed, and the rows do not have them.

        Mirrors: accelerate.data_loader.prepare_data_loader
        """
        sampler = self._choose(self._get_train_sampler, dataset, "train")
        if isinstance(sampler, BatchRebalanceSampler):
            return {"batch_sampler": sampler}
        config: Any = self.args.accelerator_config
        if isinstance(sampler, RandomSampler) and config.use_seedable_sampler:
            sampler = SeedableRandomSampler(dataset, data_seed=self.args.data_seed)
        drop_last = self.args.dataloader_drop_last
        return {"sampler": sampler, "batch_size": batch_size, "drop_last": drop_last}

    def of_evaluation(self, dataset: Sized, split: str) -> dict[str, Any]:
        """Choose the sampler of an evaluation or prediction set, in the same form.

        Raises:
            DataError: lengths are needed, and the rows do not have them.
        """
        sampler = self._choose(self._get_eval_sampler, dataset, split)
        drop_last = self.args.dataloader_drop_last
        return {"sampler": sampler, "batch_size": self.args.eval_batch_size, "drop_last": drop_last}

    def _choose(self, choose: Any, dataset: Sized, split: str) -> Sampler[Any]:
        try:
            sampler: Sampler[Any] = choose(dataset)
        except ValueError as error:
            strategy, column = self.args.train_sampling_strategy, self.args.length_column_name
            raise DataError(
                f"train_sampling_strategy={str(strategy)!r} needs the length of every row, and those of the "
                f"{split} set do not tell it: {error} Give the rows that column, or, with "
                f"remove_unused_columns=False, a column {column!r} (length_column_name)."
            ) from error
        return sampler


def micro_batches_of(rows: int, size: int, settings: Any) -> int:
    """Count the micro-batches of one pass over the training set, in one process.

    Args:
        rows: of the training set.
        size: rows of a micro-batch.
        settings: strategy and accumulation.
    """
    accumulation = settings.gradient_accumulation_steps
    if settings.train_sampling_strategy == "batch_rebalance":
        sampler = BatchRebalanceSampler(
            lengths=[1] * rows,
            effective_batch_size=size * accumulation,
            dp_size=1,
            grad_accum=accumulation,
            drop_last=settings.dataloader_drop_last,
        )
        return len(sampler)
    return int(rows // size if settings.dataloader_drop_last else math.ceil(rows / size))

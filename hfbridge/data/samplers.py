"""The order of samples, as in the HF Trainer.

train_sampling_strategy     sampler of training                                         of evaluation
random                      accelerate's SeedableRandomSampler: epoch e shuffles with   the dataset's order
                            seed + e; torch's own with use_seedable_sampler=False
sequential                  the dataset's order                                         the dataset's order
group_by_length             long rows together, drawn from the global generator         long rows together,
                                                                                        the same each time
batch_rebalance             micro-batches of equal cost, not of equal size              the dataset's order

Of several ranks, rank r of W takes the batches r, r + W, ... of that order (accelerate's BatchSamplerShard,
which pads the last round with the first samples of the epoch); batch_rebalance assigns batches to ranks
itself.
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler

from hfbridge.data.length_grouping import Regrouped
from hfbridge.errors import DataError


class HFSamplers(Trainer):
    """The HF Trainer's methods that choose samplers, without the Trainer.

    Args:
        args: of the run.
        processing_class: its first input name is the column whose lengths count.

    Mirrors: transformers.Trainer._get_train_sampler
    Mirrors: transformers.Trainer._get_eval_sampler
    Proved by: tests/parity/test_data_options.py
    """

    def __init__(self, args: TrainingArguments, processing_class: Any) -> None:
        self.args, self.processing_class = args, processing_class

    def train_sampling(self, dataset: Sized, batch_size: int, *, in_order: bool = False) -> dict[str, Any]:
        """Choose the sampler of the training set; call it after the run has been seeded.

        Args:
            dataset: the training set.
            batch_size: samples of a micro-batch.
            in_order: keep the order of the set, whatever the strategy (`overfit_batches`).

        Returns:
            `batch_sampler`, or `sampler`, `batch_size` and `drop_last`, for a DataLoader.

        Raises:
            DataError: the strategy needs lengths, which the samples do not have.

        Mirrors: accelerate.data_loader.prepare_data_loader
        """
        if in_order:
            return self._sharded(SequentialSampler(dataset), batch_size, self.args.dataloader_drop_last)
        sampler = self._choose(self._get_train_sampler, dataset, "train")
        if isinstance(sampler, BatchRebalanceSampler):
            return {"batch_sampler": sampler}
        config: Any = self.args.accelerator_config
        if isinstance(sampler, RandomSampler) and config.use_seedable_sampler:
            sampler = SeedableRandomSampler(dataset, data_seed=self.args.data_seed)
        return self._sharded(sampler, batch_size, self.args.dataloader_drop_last)

    def eval_sampling(
        self,
        dataset: Sized,
        split: str,
        *,
        batch_size: int,
        repeats: bool,
        order: Sequence[int] | None = None,
        drop_last: bool | None = None,
    ) -> dict[str, Any]:
        """Choose the sampler of an evaluation or prediction set, in the same form.

        Args:
            dataset: the set.
            split: its name.
            batch_size: samples of a batch.
            repeats: pad a rank's last batch with the first samples, as the HF Trainer does; otherwise only a
                batch that would be empty.
            order: sample indices in the order to read them; `None` is the HF Trainer's.
            drop_last: drop a short last batch; `None` is `dataloader_drop_last`.

        Raises:
            DataError: the strategy needs lengths, which the samples do not have.
        """
        # On several ranks the HF Trainer leaves the choice to torch's DataLoader, which keeps the set's
        # order.
        sampler: Any = order
        if order is None:
            sampler = self._choose(self._get_eval_sampler, dataset, split) or SequentialSampler(dataset)
        drop_last = self.args.dataloader_drop_last if drop_last is None else drop_last
        return self._sharded(sampler, batch_size, drop_last, repeats=repeats)

    def _sharded(
        self, sampler: Sampler[Any], batch_size: int, drop_last: bool, *, repeats: bool = True
    ) -> dict[str, Any]:
        """Split a sampler's batches between the ranks.

        Mirrors: accelerate.data_loader.prepare_data_loader
        """
        args = self.args
        if args.world_size == 1:
            return {"sampler": sampler, "batch_size": batch_size, "drop_last": drop_last}
        config: Any = args.accelerator_config
        if isinstance(sampler, RandomSampler) and not config.use_seedable_sampler:
            # Drawn in the same state on all ranks, which have just been seeded.
            sampler.generator = torch.Generator()
            sampler.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        shard = (BatchSamplerShard if repeats else _UnpaddedShard)(
            BatchSampler(sampler, batch_size, drop_last),
            num_processes=args.world_size,
            process_index=args.process_index,
            split_batches=config.split_batches,
        )
        return {"batch_sampler": shard}

    def _choose(self, choose: Any, dataset: Sized, split: str) -> Sampler[Any]:
        try:
            sampler: Sampler[Any] = choose(dataset)
        except ValueError as error:
            strategy, column = self.args.train_sampling_strategy, self.args.length_column_name
            raise DataError(
                f"train_sampling_strategy={str(strategy)!r} needs the length of every row of the {split} "
                f"set: {error} Add that column, or, with remove_unused_columns=False, a column {column!r} "
                "(length_column_name)."
            ) from error
        return sampler


class _UnpaddedShard(BatchSamplerShard):
    """A rank's batches, without repeated samples.

    Only a rank without a batch of its own in the last round has one of repeated samples, so that all ranks
    have the same number of batches.
    """

    def __iter__(self) -> Iterator[list[int]]:
        sampler: Any = self.batch_sampler.sampler
        for index, batch in enumerate(super().__iter__()):  # type: ignore[no-untyped-call]
            own = own_rows(self, index, rows=len(sampler))
            yield batch[:own] if own > 0 else batch


def own_rows(batches: Any, index: int, *, rows: int) -> int:
    """Count the samples of a rank's batch that are not repeated; of a full batch it may be more."""
    if not isinstance(batches, BatchSamplerShard):
        return rows
    parts = batches.num_processes if batches.split_batches else 1
    size = batches.batch_size // parts
    return max(rows - (index * batches.num_processes + batches.process_index) * size, 0)


def micro_batches_of(rows: int, size: int, settings: Any, *, world_size: int) -> int:
    """Count the micro-batches of `size` samples in an epoch of `rows` samples, on each rank."""
    accumulation, drop_last = settings.gradient_accumulation_steps, settings.dataloader_drop_last
    if settings.train_sampling_strategy == "batch_rebalance":
        sampler = BatchRebalanceSampler(
            lengths=[1] * rows,
            effective_batch_size=size * accumulation * world_size,
            dp_size=world_size,
            grad_accum=accumulation,
            drop_last=drop_last,
        )
        return len(sampler)
    batches = BatchSampler(range(rows), size, drop_last)
    if world_size == 1:
        return len(batches)
    shard = BatchSamplerShard(batches, num_processes=world_size, split_batches=splits_batches(settings))
    return len(shard)


def splits_batches(settings: Any) -> bool:
    """Whether the batch size in the settings is that of all ranks together."""
    return bool((settings.accelerator_config or {}).get("split_batches", False))


def rows_of_micro_batch(size: int, settings: Any, *, ranks: int) -> int:
    """Count the samples of a rank's micro-batch, from the batch size in the settings."""
    return size // ranks if splits_batches(settings) else size


def is_order_layout_dependent(settings: Any) -> bool:
    """Whether another number of ranks, or other batches, would change the order of samples in an epoch."""
    config = settings.accelerator_config or {}
    seedable = config.get("use_seedable_sampler", True)
    strategy = settings.train_sampling_strategy
    return bool(strategy != "sequential" and (strategy != "random" or not seedable))


def batches_from(
    loader: DataLoader[Any], first_row: int, *, steps: int = 0, accumulation: int = 1
) -> Iterator[list[int]]:
    """Draw the order of an epoch, and yield this rank's remaining batches.

    Args:
        loader: of the micro-batches.
        first_row: sample at which the present layout begins.
        steps: full optimizer steps after that sample, which are skipped now.
        accumulation: micro-batches of each.

    Proved by: tests/properties/test_rest_of_pass.py
    """
    batches: Any = loader.batch_sampler
    whole = getattr(batches, "batch_sampler", batches)
    rest = whole
    if type(whole) is BatchSampler and (first_row > 0 or steps > 1):
        per_step = whole.batch_size * accumulation * _ranks_of(batches)
        order = _RemainingOrder(whole.sampler, first_row, kept=per_step, skipped=max(steps - 1, 0) * per_step)
        rest = BatchSampler(order, whole.batch_size, whole.drop_last)
        steps = min(steps, 1)
    if isinstance(batches, Regrouped):
        return batches.regroup(rest, skipped=steps)
    shard: Any = rest
    if rest is whole:
        shard = batches
    elif isinstance(batches, BatchSamplerShard):
        shard = BatchSamplerShard(
            rest,
            num_processes=batches.num_processes,
            process_index=batches.process_index,
            split_batches=batches.split_batches,
            even_batches=batches.even_batches,
        )
    remaining: Iterator[list[int]] = iter(shard)
    for _ in islice(remaining, steps * accumulation):
        pass
    return remaining


class _RemainingOrder:
    """The order of an epoch without its completed samples, skipped sample by sample and not batch by batch.

    The samples of the first step stay: accelerate pads the last round of several ranks with them.

    Args:
        sampler: the order of the full epoch, drawn when it is iterated.
        first_row: sample at which the present layout begins.
        kept: samples from there that stay.
        skipped: samples after these that do not.
    """

    def __init__(self, sampler: Iterable[int], first_row: int, *, kept: int, skipped: int) -> None:
        self._sampler, self._first_row, self._kept, self._skipped = sampler, first_row, kept, skipped

    def __iter__(self) -> Iterator[int]:
        samples = islice(self._sampler, self._first_row, None)
        yield from islice(samples, self._kept)
        yield from islice(samples, self._skipped, None)


def _ranks_of(batches: Any) -> int:
    """Count the ranks whose micro-batches are batches of their own."""
    shard: Any = batches.batches if isinstance(batches, Regrouped) else batches
    is_shard = isinstance(shard, BatchSamplerShard) and not shard.split_batches
    return int(shard.num_processes) if is_shard else 1


def sampler_of(loader: DataLoader[Any]) -> Any:
    """Return the sampler of a loader's batches, also where they are split between ranks."""
    batches: Any = loader.batch_sampler
    batches = getattr(batches, "batch_sampler", batches)
    return getattr(batches, "sampler", loader.sampler)

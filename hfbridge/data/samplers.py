"""The order of samples, as the native Trainer has it; knows Hugging Face.

train_sampling_strategy     sampler of training                                         of evaluation
random                      accelerate's SeedableRandomSampler: epoch e shuffles with   the dataset's order
                            seed + e; torch's own with use_seedable_sampler=False
sequential                  the dataset's order                                         the dataset's order
group_by_length             long rows together, drawn from the global generator         long rows together,
                                                                                        the same each time
batch_rebalance             micro-batches of equal cost, not of equal size              the dataset's order

With several ranks, rank r of W takes the batches r, r + W, ... of that order, by accelerate's own
BatchSamplerShard, which fills the last round with rows from the beginning of the pass; batch_rebalance deals
batches to ranks itself.
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler
from transformers import Trainer as NativeTrainer
from transformers import TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler

from hfbridge.data.length_grouping import Regrouped
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

    def of_training(self, dataset: Sized, batch_size: int, *, in_order: bool = False) -> dict[str, Any]:
        """Choose the sampler of the training set; call it after the run has been seeded.

        Args:
            dataset: the training set.
            batch_size: rows of a micro-batch.
            in_order: take the order of the set, whatever the strategy (`overfit_batches`).

        Returns:
            `batch_sampler`, or `sampler`, `batch_size` and `drop_last`, for a DataLoader.

        Raises:
            DataError: lengths are needed, and the rows do not have them.

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
        drop_last = self.args.dataloader_drop_last
        return self._sharded(sampler, batch_size, drop_last)

    def of_evaluation(
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
            batch_size: rows of a batch.
            repeats: rows from the beginning fill up a rank's last batch, as natively; otherwise only a batch
                that has no others.
            order: the rows' numbers in the order they are to be read in, in place of the native one.
            drop_last: leave out a short last batch; `None` is `dataloader_drop_last`.

        Raises:
            DataError: lengths are needed, and the rows do not have them.
        """
        # Natively, several ranks leave the choice to torch's DataLoader, which takes the dataset's order.
        sampler: Any = order
        if order is None:
            sampler = self._choose(self._get_eval_sampler, dataset, split) or SequentialSampler(dataset)
        drop_last = self.args.dataloader_drop_last if drop_last is None else drop_last
        return self._sharded(sampler, batch_size, drop_last, repeats=repeats)

    def _sharded(
        self, sampler: Sampler[Any], batch_size: int, drop_last: bool, *, repeats: bool = True
    ) -> dict[str, Any]:
        """Deal a sampler's batches to the ranks.

        Mirrors: accelerate.data_loader.prepare_data_loader
        """
        args = self.args
        if args.world_size == 1:
            return {"sampler": sampler, "batch_size": batch_size, "drop_last": drop_last}
        config: Any = args.accelerator_config
        if isinstance(sampler, RandomSampler) and not config.use_seedable_sampler:
            # Drawn in the same state on all ranks, who have just been seeded.
            sampler.generator = torch.Generator()
            sampler.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        shard = (BatchSamplerShard if repeats else _WithoutRepeats)(
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
                f"train_sampling_strategy={str(strategy)!r} needs the length of every row, and those of the "
                f"{split} set do not tell it: {error} Give the rows that column, or, with "
                f"remove_unused_columns=False, a column {column!r} (length_column_name)."
            ) from error
        return sampler


class _WithoutRepeats(BatchSamplerShard):
    """A rank's share of the batches, where no row comes twice.

    A rank that has no batch of its own in the last round has one of repeated rows all the same: all ranks
    have the same number of batches.
    """

    def __iter__(self) -> Iterator[list[int]]:
        sampler: Any = self.batch_sampler.sampler
        for index, batch in enumerate(super().__iter__()):  # type: ignore[no-untyped-call]
            own = own_rows(self, index, rows=len(sampler))
            yield batch[:own] if own > 0 else batch


def own_rows(batches: Any, index: int, *, rows: int) -> int:
    """Count the rows of one of a rank's batches that are not repeated; a full one's may be counted as more.

    Args:
        batches: of this rank.
        index: number of the batch.
        rows: of the set.
    """
    if not isinstance(batches, BatchSamplerShard):
        return rows
    parts = batches.num_processes if batches.split_batches else 1
    size = batches.batch_size // parts
    return max(rows - (index * batches.num_processes + batches.process_index) * size, 0)


def micro_batches_of(rows: int, size: int, settings: Any, *, world_size: int) -> int:
    """Count the micro-batches of one pass over the training set, on each rank.

    Args:
        rows: of the training set.
        size: rows of a micro-batch.
        settings: strategy, accumulation and loader options.
        world_size: ranks that share the pass.
    """
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
    splits = splits_batches(settings)
    return len(BatchSamplerShard(batches, num_processes=world_size, split_batches=splits))


def splits_batches(settings: Any) -> bool:
    """Whether a batch size that is set is that of all ranks together."""
    return bool((settings.accelerator_config or {}).get("split_batches", False))


def rows_of_micro_batch(size: int, settings: Any, *, ranks: int) -> int:
    """Count the rows of a micro-batch on one of some ranks, given the batch size that is set."""
    return size // ranks if splits_batches(settings) else size


def depends_on_the_cut(settings: Any) -> bool:
    """Whether another number of ranks, or other batches, would give a pass another order of rows."""
    config = settings.accelerator_config or {}
    seedable = config.get("use_seedable_sampler", True)
    strategy = settings.train_sampling_strategy
    return bool(strategy != "sequential" and (strategy != "random" or not seedable))


def batches_from(
    loader: DataLoader[Any], first_row: int, *, windows: int = 0, accumulation: int = 1
) -> Iterator[list[int]]:
    """Draw the order of a pass, and deal this rank its batches of what comes behind some rows.

    Args:
        loader: of the micro-batches.
        first_row: row at which the present cut begins.
        windows: full optimizer steps behind that row, which are left out now.
        accumulation: micro-batches of each.

    Proved by: tests/properties/test_rest_of_pass.py
    """
    batches: Any = loader.batch_sampler
    whole = getattr(batches, "batch_sampler", batches)
    rest = whole
    if type(whole) is BatchSampler and (first_row > 0 or windows > 1):
        of_window = whole.batch_size * accumulation * _ranks_of(batches)
        left_out = max(windows - 1, 0) * of_window
        order = _Behind(whole.sampler, first_row, kept=of_window, left_out=left_out)
        rest = BatchSampler(order, whole.batch_size, whole.drop_last)
        windows = min(windows, 1)
    if isinstance(batches, Regrouped):
        return batches.batches_of(rest, behind=windows)
    share = _share_of(batches, rest)
    for _ in islice(share, windows * accumulation):
        pass
    return share


class _Behind:
    """The order of a pass without the rows that are behind, left out row by row and not batch by batch.

    The rows of the first window stay: accelerate fills up the last round of several ranks with them.

    Args:
        sampler: the order of the whole pass, drawn when the first row is asked for.
        first_row: row at which the present cut begins.
        kept: rows from there on that stay.
        left_out: rows behind these that do not.
    """

    def __init__(self, sampler: Iterable[int], first_row: int, *, kept: int, left_out: int) -> None:
        self._sampler, self._first_row, self._kept, self._left_out = sampler, first_row, kept, left_out

    def __iter__(self) -> Iterator[int]:
        rows = islice(self._sampler, self._first_row, None)
        yield from islice(rows, self._kept)
        yield from islice(rows, self._left_out, None)


def _ranks_of(batches: Any) -> int:
    """Count the ranks whose micro-batches are batches of their own."""
    shard: Any = batches.batches if isinstance(batches, Regrouped) else batches
    is_dealt = isinstance(shard, BatchSamplerShard) and not shard.split_batches
    return int(shard.num_processes) if is_dealt else 1


def _share_of(batches: Any, rest: Any) -> Iterator[list[int]]:
    """Deal a rank its batches of what is left of all."""
    if rest is getattr(batches, "batch_sampler", batches):
        return iter(batches)
    if not isinstance(batches, BatchSamplerShard):
        return iter(rest)
    shard = BatchSamplerShard(
        rest,
        num_processes=batches.num_processes,
        process_index=batches.process_index,
        split_batches=batches.split_batches,
        even_batches=batches.even_batches,
    )
    return iter(shard)


def sampler_of(loader: DataLoader[Any]) -> Any:
    """Return the sampler behind a loader's batches, whether or not they are dealt to ranks."""
    batches: Any = loader.batch_sampler
    batches = getattr(batches, "batch_sampler", batches)
    return getattr(batches, "sampler", loader.sampler)

"""Loaders: what HFDataModule's sets are read through, as the native Trainer reads them; knows both worlds.

read by                              columns                      order and split between ranks
HFModule                             those its model takes        the HF Trainer's
a LightningModule of the user's      all that tensors can hold    the HF Trainer's; nothing is counted
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from datasets import Dataset
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker, unwrap_peft_model

from hfbridge.data.columns import (
    Collator,
    check_labels,
    default_collator,
    keep_columns,
    keep_tensor_columns,
)
from hfbridge.data.dataloaders import EvalLoader, TrainLoader
from hfbridge.data.iterable import StreamEvalLoader, StreamLoader, WatchedCollator, is_stream, read_stream
from hfbridge.data.length_grouping import Regroup, Regrouped
from hfbridge.data.lengths import Lengths, lengths_in, longest_first
from hfbridge.data.limits import Limits, check_padding, check_rows, check_tensors
from hfbridge.data.packing import PackCollator, Packed, check_packs
from hfbridge.data.sample_errors import Source, check_missing_labels, is_known
from hfbridge.data.samplers import NativeSamplers, own_rows
from hfbridge.errors import DataError
from hfbridge.models.packing_check import check_class
from hfbridge.models.signature import accepted_columns, positions_of, vocabulary_of
from hfbridge.settings import Settings
from hfbridge.strategies import needs_equal_batches
from hfbridge.utilities.rng import preserve_generators


@dataclass(frozen=True)
class BatchConsumer:
    """What loaders read of the module that takes their batches.

    Attributes:
        args: of the run.
        model: the Hugging Face model; `None` in a LightningModule of the user's, of which nothing is known.
        label_names: the names under which labels reach the model.
        processing_class: tokenizer or processor of the module.
        loss_normalization: of HFModule.
        resumption: where HFModule resumes; `None` for a new run.
        tell: gives a note.
    """

    args: TrainingArguments
    model: nn.Module | None = None
    label_names: tuple[str, ...] = ()
    processing_class: Any = None
    loss_normalization: str = "exact"
    resumption: Any = None
    tell: Callable[[str], None] = rank_zero_info

    @classmethod
    def of(cls, module: Any) -> "BatchConsumer":
        """Read an HFModule, whose model is built."""
        return cls(
            module.args,
            module.model,
            tuple(module.label_names),
            module.processing_class,
            module.loss_normalization,
            module.resumption,
            module.info_once,
        )

    def with_batch_sizes(self, settings: Settings) -> "BatchConsumer":
        """Return one whose arguments have the batch sizes of settings, which may have changed in the run."""
        names = ("per_device_train_batch_size", "per_device_eval_batch_size")
        sizes = {name: getattr(settings, name) for name in names}
        if all(getattr(self.args, name) == size for name, size in sizes.items()):
            return self
        args = copy(self.args)
        vars(args).update(sizes)
        return replace(self, args=args)


class Loaders:
    """Make the loaders of a run, whose model is built.

    Args:
        trainer: of the run.
        consumer: the module that takes the batches.
        settings: of the run.
        data_collator: the user's; `None` chooses the native default.
        processing_class: tokenizer or processor; HFModule's is used without one.
        checked: sets of the run whose rows have been looked at; added to.
        regroup: whether, or within how many tokens, rows of an optimizer step are dealt by length.
        eval_by_length: whether evaluations take rows by length.
        has_own_loop: hfbridge's epoch loop runs.

    Mirrors: transformers.Trainer.get_train_dataloader
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        consumer: BatchConsumer,
        settings: Settings,
        *,
        data_collator: Collator | None,
        processing_class: Any,
        checked: set[str],
        regroup: Regroup = False,
        eval_by_length: bool = False,
        has_own_loop: bool = True,
    ) -> None:
        self._limit: int | None = None
        self._has_own_loop = has_own_loop
        self._checked, self._regroup, self._eval_by_length = checked, regroup, eval_by_length
        self._trainer, self._settings = trainer, settings
        self._consumer, self._is_any_module = consumer, consumer.model is None
        self._given_collator = data_collator
        self._processing_class = processing_class or consumer.processing_class

    def training(
        self,
        dataset: Any,
        *,
        batch_size: int,
        micro_batches: int | None,
        is_packed: bool = False,
        limit: int | None = None,
    ) -> TrainLoader | StreamLoader:
        """Make the loader of the training micro-batches.

        Args:
            dataset: mapped.
            batch_size: rows of a micro-batch.
            micro_batches: of an epoch; `None` if it ends with a stream whose length is not known.
            is_packed: rows hold several samples each.
            limit: micro-batches of an epoch, if fewer than there are.
        """
        self._limit = limit
        whole = dataset  # with the column of lengths
        if is_packed:
            collator = self._collator_of_packs(dataset, batch_size)
        else:
            dataset, collator = self._prepare(dataset, "train")
        loader: TrainLoader | StreamLoader
        if is_stream(dataset):
            loader = self._stream_loader(dataset, collator, batch_size, micro_batches)
        else:
            in_order = bool(getattr(self._trainer, "overfit_batches", 0))
            sampling = self._samplers().of_training(dataset, batch_size, in_order=in_order)
            if self._regroup:
                sampling = {"batch_sampler": self._regrouped(whole, sampling)}
            loader = self._train_loader(dataset, collator, sampling)
        loader.explaining = self._source(whole, dataset, "train").explaining
        if self._consumer.resumption is not None:
            loader.start_at(self._consumer.resumption.start)
        return loader

    def _collator_of_packs(self, dataset: Any, batch_size: int) -> Collator:
        """See that the model can be given packs, and say how a micro-batch is made of them."""
        model = self._consumer.model
        assert model is not None
        config = getattr(model, "config", None)
        check_class(model, packs_per_batch=batch_size)
        if isinstance(dataset, Packed):
            accepted = accepted_columns(model, self._consumer.label_names)
            check_packs(dataset, positions=positions_of(model), accepted=accepted)
        return PackCollator(getattr(config, "pad_token_id", None) or 0)

    def _regrouped(self, dataset: Any, sampling: dict[str, Any]) -> Regrouped:
        """Deal the rows of each optimizer step to its micro-batches by length."""
        return Regrouped(
            sampling.get("batch_sampler") or BatchSampler(**sampling),
            self._lengths_in(dataset),
            accumulation=self._trainer.accumulate_grad_batches,
            max_tokens=None if self._regroup is True else self._regroup,
            limit=self._limit,
        )

    def _lengths_in(self, dataset: Any) -> Lengths:
        names = getattr(self._processing_class, "model_input_names", None)
        input_name = names[0] if names else "input_ids"
        return lengths_in(dataset, column=self._settings.length_column_name, input_name=input_name)

    def _train_loader(self, dataset: Any, collator: Collator, sampling: dict[str, Any]) -> TrainLoader:
        settings = self._settings
        workers = settings.dataloader_num_workers
        loader: DataLoader[Any] = DataLoader(
            dataset,
            **sampling,
            collate_fn=collator,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=self._trainer.global_rank),
            **self._loading(),
        )
        trainer = self._trainer
        return TrainLoader(
            loader,
            accumulation=lambda: trainer.accumulate_grad_batches,
            limit=self._limit,
            is_stateful=self._is_any_module,
        )

    def _stream_loader(
        self, dataset: Any, collator: Collator, batch_size: int, micro_batches: int | None
    ) -> StreamLoader:
        args = self._consumer.args
        config: Any = args.accelerator_config
        watched = WatchedCollator(
            collator,
            watches=self._settings.dataloader_num_workers == 0,
            round_size=1 if config.split_batches or config.dispatch_batches is False else args.world_size,
        )
        loader = self._read(dataset, collate_fn=watched, batch_size=batch_size)
        return StreamLoader(
            loader,
            watched,
            micro_batches=micro_batches,
            accumulation=self._trainer.accumulate_grad_batches,
            keeps_short=self._consumer.loss_normalization == "exact",
            limit=self._limit,
            is_stateful=self._is_any_module,
            is_read_ahead=not self._has_own_loop,
        )

    def _read(self, dataset: Any, **loading: Any) -> Any:
        device = self._trainer.strategy.root_device
        return read_stream(dataset, args=self._consumer.args, device=device, **loading, **self._loading())

    def evaluation(
        self, dataset: Any, split: str, *, prefix: str | None = None, keeps_indices: bool = False
    ) -> EvalLoader | StreamEvalLoader:
        """Make the loader of an evaluation or prediction set.

        Args:
            dataset: mapped.
            split: its name.
            prefix: what the names of its metrics begin with; `None` is the split's name.
            keeps_indices: for Lightning's `predict`: rows are read in the order of the set, each once, and
                their numbers are kept.
        """
        whole = dataset  # with the column of lengths
        dataset, collator = self._prepare(dataset, split)
        size = self._settings.per_device_eval_batch_size
        if is_stream(dataset):
            make = partial(self._read, dataset, collate_fn=collator, batch_size=size)
            stream = StreamEvalLoader(
                make, prefix=prefix or split, batch_size=size, has_length=not self._is_any_module
            )
            stream.explaining = self._source(whole, dataset, split).explaining
            return stream
        repeats, order = self._consumer.loss_normalization == "native" and not keeps_indices, None
        if self._eval_by_length and not keeps_indices:
            order = longest_first(self._lengths_in(whole), len(whole))
        sampling = self._samplers().of_evaluation(
            dataset,
            split,
            batch_size=size,
            repeats=repeats,
            order=order,
            drop_last=False if keeps_indices else None,
        )
        if keeps_indices:
            sampling = {
                "batch_sampler": RecordedBatches(
                    sampling, rows=len(dataset), fills_up=needs_equal_batches(self._trainer.strategy)
                )
            }
        batches: DataLoader[Any] = DataLoader(
            dataset,
            **sampling,
            collate_fn=collator,
            **self._loading(),
        )
        resumption, prefix = self._consumer.resumption, prefix or split
        loader = EvalLoader(
            batches,
            prefix=prefix,
            batch_size=size,
            is_first_pass=resumption is None or not resumption.has_evaluated(prefix),
            order=order,
        )
        loader.explaining = self._source(whole, dataset, split).explaining
        return loader

    def first_batch(self, dataset: Any, split: str) -> Mapping[str, Any]:
        """Collate the first rows of an evaluation set, without a loader."""
        whole = dataset
        dataset, collator = self._prepare(dataset, split)
        rows = min(len(dataset), self._settings.per_device_eval_batch_size)
        with preserve_generators(self._given_collator), self._source(whole, dataset, split).explaining():
            return collator([dataset[i] for i in range(rows)])

    def _source(self, whole: Any, kept: Any, split: str) -> Source:
        """Describe a set and what is kept of it, for explaining why reading it failed."""
        model, before = self._consumer.model, getattr(whole, "column_names", None) or ()
        if isinstance(whole, list) and isinstance(whole[0], Mapping):
            before = tuple(whole[0])
        base = None if model is None else unwrap_peft_model(model)
        is_theirs = type(base).__module__.startswith("transformers.")
        accepted = before
        if model is not None and self._settings.remove_unused_columns:
            accepted = accepted_columns(model, self._consumer.label_names)
        return Source(
            split,
            kept,
            self._given_collator or default_collator(self._processing_class),
            dropped=tuple(name for name in before if name not in accepted),
            reader=type(base).__name__,
            needs=getattr(base, "main_input_name", None) if is_theirs else None,
        )

    def _samplers(self) -> NativeSamplers:
        return NativeSamplers(self._consumer.args, self._processing_class)

    def _prepare(self, dataset: Any, split: str) -> tuple[Any, Collator]:
        model = self._consumer.model
        collator = self._given_collator or default_collator(self._processing_class)
        if isinstance(dataset, TensorDataset) and self._given_collator is None:
            raise DataError(
                f"The {split} set is a TensorDataset, whose columns have no names. Pass a data_collator that "
                "makes a dict of tensors, or datasets.Dataset.from_dict."
            )
        if split not in self._checked:
            self._check(dataset, collator, split)
            self._checked.add(split)
        if not self._settings.remove_unused_columns:
            return dataset, collator
        if model is None:
            return keep_tensor_columns(dataset, collator, split=split)
        return keep_columns(
            dataset, collator, model=model, label_names=self._consumer.label_names, split=split
        )

    def _check(self, dataset: Any, collator: Collator, split: str) -> None:
        """See that rows fit the model: once for each set, however many loaders of it are made."""
        model = self._consumer.model
        check_tensors(collator, split)
        check_padding(collator, split)
        if model is None:
            return
        check_labels(dataset, model=model, split=split)
        if is_known(collator):
            if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
                check_missing_labels(dataset, split)
            name = type(unwrap_peft_model(model)).__name__
            limits = Limits(name, vocabulary_of(model), positions_of(model))
            note = check_rows(dataset, limits, split=split)
            if note:
                self._consumer.tell(note)

    def _loading(self) -> dict[str, Any]:
        settings, on_gpu = self._settings, self._trainer.strategy.root_device.type == "cuda"
        return {
            "num_workers": settings.dataloader_num_workers,
            "pin_memory": settings.dataloader_pin_memory and on_gpu,
            "persistent_workers": settings.dataloader_persistent_workers,
            "prefetch_factor": settings.dataloader_prefetch_factor,
            "multiprocessing_context": settings.dataloader_multiprocessing_context,
            "in_order": settings.dataloader_in_order,
        }


class RecordedBatches(_IndexBatchSamplerWrapper):
    """The batches of a rank that predicts, and Lightning's record of their rows: each row on one rank, once.

    Args:
        sampling: a batch sampler, or a sampler and a batch size.
        rows: of the set.
        fills_up: all ranks have as many batches; one of repeated rows, of which none is recorded, fills up
            the last round.
    """

    def __init__(self, sampling: Mapping[str, Any], *, rows: int, fills_up: bool) -> None:
        batches: Any = sampling.get("batch_sampler") or BatchSampler(**sampling)
        super().__init__(batches)
        self.seen_batch_indices = []  # Lightning's wrapper has no record before its first pass
        self._rows, self._fills_up = rows, fills_up

    def __len__(self) -> int:
        batches = super().__len__()
        is_repeated = batches > 0 and own_rows(self._batch_sampler, batches - 1, rows=self._rows) == 0
        return batches - 1 if is_repeated and not self._fills_up else batches

    def __next__(self) -> list[int]:
        number = len(self.seen_batch_indices)
        own = own_rows(self._batch_sampler, number, rows=self._rows)
        if own == 0 and not self._fills_up:
            raise StopIteration
        batch = super().__next__()
        self.seen_batch_indices[number] = batch[:own]
        return batch

"""Make the loaders of HFDataModule's sets, with the HF Trainer's order and split between ranks.

module                               columns
HFModule                             those that its model accepts
a LightningModule of the user's      all that tensors can hold
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
from hfbridge.data.samplers import HFSamplers, own_rows
from hfbridge.errors import DataError
from hfbridge.models.packing_check import check_class
from hfbridge.models.signature import accepted_columns, positions_of, vocabulary_of
from hfbridge.settings import Settings
from hfbridge.strategies import needs_equal_batches
from hfbridge.utilities.rng import preserve_generators


@dataclass(frozen=True)
class BatchConsumer:
    """What loaders need of the module that consumes their batches.

    Attributes:
        args: of the run.
        model: the Hugging Face model; `None` for a LightningModule of the user's.
        label_names: the model's label columns.
        processing_class: tokenizer or processor of the module.
        loss_normalization: of HFModule.
        resumption: resume state of HFModule; `None` for a new run.
        log_info: logs a note.
    """

    args: TrainingArguments
    model: nn.Module | None = None
    label_names: tuple[str, ...] = ()
    processing_class: Any = None
    loss_normalization: str = "exact"
    resumption: Any = None
    log_info: Callable[[str], None] = rank_zero_info

    @classmethod
    def of(cls, module: Any) -> "BatchConsumer":
        """Describe an HFModule, whose model is built."""
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
        """Return this one, or a copy with the batch sizes of settings where they have changed in the run."""
        names = ("per_device_train_batch_size", "per_device_eval_batch_size")
        sizes = {name: getattr(settings, name) for name in names}
        if sizes.items() <= vars(self.args).items():
            return self  # callbacks may change these args, and the loaders read them
        args = copy(self.args)
        vars(args).update(sizes)
        return replace(self, args=args)


class Loaders:
    """Make the loaders of a run, whose model is built.

    Args:
        trainer: of the run.
        consumer: the module that consumes the batches.
        settings: of the run.
        data_collator: the user's; `None` is the HF Trainer's default.
        processing_class: tokenizer or processor; `None` is the module's.
        checked: names of the sets that were checked, which is updated.
        regroup: of HFDataModule.
        eval_by_length: of HFDataModule.
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
        self._consumer, self._user_collator = consumer, data_collator
        self._processing_class = processing_class or consumer.processing_class
        self._collator = data_collator or default_collator(self._processing_class)

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
            batch_size: samples of a micro-batch.
            micro_batches: of an epoch; `None` for a stream of unknown length.
            is_packed: rows are packs.
            limit: micro-batches of an epoch, if fewer.
        """
        self._limit = limit
        full = dataset  # with the column of lengths
        if is_packed:
            collator = self._pack_collator(dataset, batch_size)
        else:
            dataset, collator = self._prepare(dataset, "train")
        loader: TrainLoader | StreamLoader
        if is_stream(dataset):
            loader = self._stream_loader(dataset, collator, batch_size, micro_batches)
        else:
            in_order = bool(getattr(self._trainer, "overfit_batches", 0))
            sampling = HFSamplers(self._consumer.args, self._processing_class).train_sampling(
                dataset, batch_size, in_order=in_order
            )
            if self._regroup:
                sampling = {"batch_sampler": self._regrouped(full, sampling)}
            loader = self._train_loader(dataset, collator, sampling)
        loader.explain_errors = self._source(full, dataset, "train").explain_errors
        if self._consumer.resumption is not None:
            loader.start_at(self._consumer.resumption.start)
        return loader

    def _pack_collator(self, dataset: Any, batch_size: int) -> Collator:
        """Return the collator of packs, which the model must support."""
        model = self._consumer.model
        assert model is not None
        config = getattr(model, "config", None)
        check_class(model, packs_per_batch=batch_size)
        if isinstance(dataset, Packed):
            accepted = accepted_columns(model, self._consumer.label_names)
            check_packs(dataset, positions=positions_of(model), accepted=accepted)
        return PackCollator(getattr(config, "pad_token_id", None) or 0)

    def _regrouped(self, dataset: Any, sampling: dict[str, Any]) -> Regrouped:
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
        trainer, workers = self._trainer, self._settings.dataloader_num_workers
        loader: DataLoader[Any] = DataLoader(
            dataset,
            **sampling,
            collate_fn=collator,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=trainer.global_rank),
            **self._loading(),
        )
        return TrainLoader(
            loader,
            accumulation=lambda: trainer.accumulate_grad_batches,
            limit=self._limit,
            is_stateful=self._consumer.model is None,
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
            is_stateful=self._consumer.model is None,
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
            prefix: of the metrics' names; `None` is the split's name.
            keeps_indices: for Lightning's `predict`: each sample is read once, in the order of the set, and
                its index is kept.
        """
        full, prefix = dataset, prefix or split  # with the column of lengths
        dataset, collator = self._prepare(dataset, split)
        size = self._settings.per_device_eval_batch_size
        if is_stream(dataset):
            make = partial(self._read, dataset, collate_fn=collator, batch_size=size)
            stream = StreamEvalLoader(
                make, prefix=prefix, batch_size=size, has_length=self._consumer.model is not None
            )
            stream.explain_errors = self._source(full, dataset, split).explain_errors
            return stream
        repeats, order = self._consumer.loss_normalization == "native" and not keeps_indices, None
        if self._eval_by_length and not keeps_indices:
            order = longest_first(self._lengths_in(full), len(full))
        sampling = HFSamplers(self._consumer.args, self._processing_class).eval_sampling(
            dataset,
            split,
            batch_size=size,
            repeats=repeats,
            order=order,
            drop_last=False if keeps_indices else None,
        )
        if keeps_indices:
            pads = needs_equal_batches(self._trainer.strategy)
            sampling = {"batch_sampler": RecordedBatches(sampling, rows=len(dataset), pads=pads)}
        batches: DataLoader[Any] = DataLoader(dataset, **sampling, collate_fn=collator, **self._loading())
        resumption = self._consumer.resumption
        loader = EvalLoader(
            batches,
            prefix=prefix,
            batch_size=size,
            draws_worker_seed=resumption is None or not resumption.has_evaluated(prefix),
            order=order,
        )
        loader.explain_errors = self._source(full, dataset, split).explain_errors
        return loader

    def first_batch(self, dataset: Any, split: str) -> Mapping[str, Any]:
        """Collate the first samples of an evaluation set, without a loader."""
        kept, collator = self._prepare(dataset, split)
        size = min(len(kept), self._settings.per_device_eval_batch_size)
        with preserve_generators(self._user_collator), self._source(dataset, kept, split).explain_errors():
            return collator([kept[i] for i in range(size)])

    def _source(self, full: Any, kept: Any, split: str) -> Source:
        """Describe a set before and after columns were dropped, to explain errors of reading it."""
        model, before = self._consumer.model, getattr(full, "column_names", None) or ()
        if isinstance(full, list) and isinstance(full[0], Mapping):
            before = tuple(full[0])
        base = None if model is None else unwrap_peft_model(model)
        is_theirs = type(base).__module__.startswith("transformers.")
        accepted = before
        if model is not None and self._settings.remove_unused_columns:
            accepted = accepted_columns(model, self._consumer.label_names)
        return Source(
            split,
            kept,
            self._collator,
            dropped=tuple(name for name in before if name not in accepted),
            reader=type(base).__name__,
            needs=getattr(base, "main_input_name", None) if is_theirs else None,
        )

    def _prepare(self, dataset: Any, split: str) -> tuple[Any, Collator]:
        model, collator = self._consumer.model, self._collator
        if isinstance(dataset, TensorDataset) and self._user_collator is None:
            raise DataError(
                f"The {split} set is a TensorDataset, whose columns have no names. Pass a data_collator that "
                "returns a dict of tensors, or a datasets.Dataset."
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
        """Check that samples fit the model, once for each set."""
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
                self._consumer.log_info(note)

    def _loading(self) -> dict[str, Any]:
        settings, on_gpu = self._settings, self._trainer.strategy.root_device.type == "cuda"
        loading = {name: getattr(settings, f"dataloader_{name}") for name in _LOADING}
        return {**loading, "pin_memory": settings.dataloader_pin_memory and on_gpu}


_LOADING = ("num_workers", "persistent_workers", "prefetch_factor", "multiprocessing_context", "in_order")


class RecordedBatches(_IndexBatchSamplerWrapper):
    """A predicting rank's batches with Lightning's record of their indices, each on one rank, once.

    Args:
        sampling: a batch sampler, or a sampler and a batch size.
        rows: samples of the set.
        pads: give all ranks as many batches; the last one may have repeated samples only, which are not
            recorded.
    """

    def __init__(self, sampling: Mapping[str, Any], *, rows: int, pads: bool) -> None:
        batches: Any = sampling.get("batch_sampler") or BatchSampler(**sampling)
        super().__init__(batches)
        self.seen_batch_indices = []  # Lightning's wrapper has no record before it is iterated
        self._rows, self._pads = rows, pads

    def __len__(self) -> int:
        batches = super().__len__()
        is_repeated = batches > 0 and own_rows(self._batch_sampler, batches - 1, rows=self._rows) == 0
        return batches - 1 if is_repeated and not self._pads else batches

    def __next__(self) -> list[int]:
        number = len(self.seen_batch_indices)
        own = own_rows(self._batch_sampler, number, rows=self._rows)
        if own == 0 and not self._pads:
            raise StopIteration
        batch = super().__next__()
        self.seen_batch_indices[number] = batch[:own]
        return batch

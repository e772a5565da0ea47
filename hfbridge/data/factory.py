"""Loaders: what HFDataModule's sets are read through, as the native Trainer reads them; knows both worlds."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from transformers.trainer_utils import seed_worker, unwrap_peft_model

from hfbridge.data.accumulation import MicroBatch, Schedule
from hfbridge.data.columns import Collator, accepted_columns, check_labels, default_collator, keep_columns
from hfbridge.data.dataloaders import EvalLoader, TrainLoader
from hfbridge.data.iterable import StreamEvalLoader, StreamLoader, WatchedCollator, is_stream, read_stream
from hfbridge.data.length_grouping import Regroup, Regrouped
from hfbridge.data.lengths import Lengths, lengths_in, longest_first
from hfbridge.data.limits import Limits, check_padding, check_rows, check_tensors, is_known
from hfbridge.data.packing import PackCollator, Packed, check_packs
from hfbridge.data.samplers import NativeSamplers
from hfbridge.errors import DataError
from hfbridge.generators import keeping
from hfbridge.model.failures import positions_of, vocabulary_of
from hfbridge.model.packed import check_class
from hfbridge.settings import Settings


class Loaders:
    """Make the loaders of a run, whose model is built.

    Args:
        trainer: of the run.
        settings: likewise.
        data_collator: the user's; `None` chooses the native default.
        processing_class: tokenizer or processor; HFModule's is used without one.
        checked: sets of the run whose rows have been looked at; added to.
        regroup: whether, or within how many tokens, rows of an optimizer step are dealt by length.
        eval_by_length: whether evaluations take rows by length.

    Mirrors: transformers.Trainer.get_train_dataloader
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        settings: Settings,
        *,
        data_collator: Collator | None,
        processing_class: Any,
        checked: set[str],
        regroup: Regroup = False,
        eval_by_length: bool = False,
    ) -> None:
        self._limit: int | None = None
        self._checked, self._regroup, self._eval_by_length = checked, regroup, eval_by_length
        self._trainer, self._settings = trainer, settings
        self._module: Any = trainer.lightning_module
        self._given_collator = data_collator
        self._processing_class = processing_class or self._module.processing_class

    def training(
        self,
        dataset: Any,
        *,
        batch_size: int,
        schedule: Schedule,
        is_packed: bool = False,
        limit: int | None = None,
    ) -> TrainLoader | StreamLoader:
        """Make the loader of the training micro-batches.

        Args:
            dataset: mapped.
            batch_size: rows of a micro-batch.
            schedule: of the run.
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
            loader = self._stream_loader(dataset, collator, batch_size, schedule)
        else:
            sampling = self._samplers().of_training(dataset, batch_size)
            if self._regroup:
                sampling = {"batch_sampler": self._regrouped(whole, sampling)}
            loader = self._train_loader(dataset, collator, sampling)
        if self._module.resumption is not None:
            loader.start_at(self._module.resumption.start)
        return loader

    def _collator_of_packs(self, dataset: Any, batch_size: int) -> Collator:
        """See that the model can be given packs, and say how a micro-batch is made of them."""
        module, config = self._module, getattr(self._module.model, "config", None)
        check_class(module.model, packs_per_batch=batch_size)
        if isinstance(dataset, Packed):
            accepted = accepted_columns(module.model, module.label_names)
            check_packs(dataset, positions=positions_of(module.model), accepted=accepted)
        return PackCollator(getattr(config, "pad_token_id", None) or 0)

    def _regrouped(self, dataset: Any, sampling: dict[str, Any]) -> Regrouped:
        """Deal the rows of each optimizer step to its micro-batches by length."""
        return Regrouped(
            sampling.get("batch_sampler") or BatchSampler(**sampling),
            self._lengths_in(dataset),
            accumulation=self._settings.gradient_accumulation_steps,
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
        return TrainLoader(loader, accumulation=lambda: trainer.accumulate_grad_batches, limit=self._limit)

    def _stream_loader(
        self, dataset: Any, collator: Collator, batch_size: int, schedule: Schedule
    ) -> StreamLoader:
        args = self._module.args
        config: Any = args.accelerator_config
        watched = WatchedCollator(
            collator,
            watches=self._settings.dataloader_num_workers == 0,
            round_size=1 if config.split_batches else args.world_size,
        )
        loader = self._read(dataset, collate_fn=watched, batch_size=batch_size)
        return StreamLoader(
            loader,
            watched,
            schedule=schedule,
            accumulation=self._settings.gradient_accumulation_steps,
            keeps_short=self._module.loss_normalization == "exact",
            limit=self._limit,
        )

    def _read(self, dataset: Any, **loading: Any) -> Any:
        device = self._trainer.strategy.root_device
        return read_stream(dataset, args=self._module.args, device=device, **loading, **self._loading())

    def evaluation(
        self, dataset: Any, split: str, *, prefix: str | None = None, keeps_order: bool = False
    ) -> EvalLoader | StreamEvalLoader:
        """Make the loader of an evaluation or prediction set.

        Args:
            dataset: mapped.
            split: its name.
            prefix: what the names of its metrics begin with; `None` is the split's name.
            keeps_order: rows are read in the order of the set, whatever the data module says.
        """
        whole = dataset  # with the column of lengths
        dataset, collator = self._prepare(dataset, split)
        size = self._settings.per_device_eval_batch_size
        if is_stream(dataset):
            make = partial(self._read, dataset, collate_fn=collator, batch_size=size)
            return StreamEvalLoader(make, prefix=prefix or split, batch_size=size)
        repeats, order = self._module.loss_normalization == "native", None
        if self._eval_by_length and not keeps_order:
            order = longest_first(self._lengths_in(whole), len(whole))
        batches: DataLoader[Any] = DataLoader(
            dataset,
            **self._samplers().of_evaluation(dataset, split, batch_size=size, repeats=repeats, order=order),
            collate_fn=collator,
            **self._loading(),
        )
        resumption, prefix = self._module.resumption, prefix or split
        return EvalLoader(
            batches,
            prefix=prefix,
            batch_size=size,
            is_first_pass=resumption is None or not resumption.has_evaluated(prefix),
            order=order,
        )

    def first_batch(self, dataset: Any, split: str) -> MicroBatch:
        """Collate the first rows of an evaluation set, without a loader."""
        dataset, collator = self._prepare(dataset, split)
        rows = min(len(dataset), self._settings.per_device_eval_batch_size)
        with keeping(self._given_collator):
            return collator([dataset[i] for i in range(rows)])

    def _samplers(self) -> NativeSamplers:
        return NativeSamplers(self._module.args, self._processing_class)

    def _prepare(self, dataset: Any, split: str) -> tuple[Any, Collator]:
        module = self._module
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
        return keep_columns(
            dataset, collator, model=module.model, label_names=module.label_names, split=split
        )

    def _check(self, dataset: Any, collator: Collator, split: str) -> None:
        """See that rows fit the model: once for each set, however many loaders of it are made."""
        module = self._module
        check_labels(dataset, model=module.model, split=split)
        check_tensors(collator, split)
        check_padding(collator, split)
        if is_known(collator):
            name = type(unwrap_peft_model(module.model)).__name__
            limits = Limits(name, vocabulary_of(module.model), positions_of(module.model))
            note = check_rows(dataset, limits, split=split)
            if note:
                module.tell(note)

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

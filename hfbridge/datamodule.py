"""HFDataModule: Hugging Face datasets as Lightning wants them; knows both worlds.

given                            becomes
a DatasetDict                    its splits train, validation (or eval, dev) and test; without a validation
                                 split, all validation_... splits, each evaluated by itself
train_dataset=, eval_dataset=    used as they are; they win over a split
eval_dataset={"a": ..., ...}     sets that are evaluated one after the other: eval_a_loss, ...
map_function                     datasets.map, once, with its cache
the columns                      those the model's forward takes
data_collator                    the native default without one
"""

from collections.abc import Callable, Mapping, Sized
from functools import partial
from typing import Any

import datasets
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers.trainer_utils import seed_worker

from hfbridge.attach import end_with, settings_of, take_over
from hfbridge.data.columns import Collator, check_labels, default_collator, keep_columns
from hfbridge.data.loader import EvalLoader, WindowLoader
from hfbridge.data.order import NativeSamplers, micro_batches_of, rows_of_micro_batch, splits_batches
from hfbridge.data.window import Cut, MicroBatch, Schedule, plan_schedule
from hfbridge.errors import DataError, SettingsError
from hfbridge.settings import Settings, SettingsSource

_SPLITS = {"train": ("train",), "eval": ("validation", "eval", "dev"), "predict": ("test",)}
_SEVERAL = "validation_"
# The set that a stage of Lightning's cannot do without, and what to say if it is not there.
_REQUIRED = {"fit": "train", "validate": "eval", "test": "eval", "predict": "predict"}
_MISSING = {
    "train": "nothing to train on: pass train_dataset=, or a DatasetDict with a train split.",
    "eval": "nothing to evaluate on: pass eval_dataset=, or a DatasetDict with a validation split.",
    "predict": "nothing to predict: pass predict_dataset=, or a DatasetDict with a test split.",
}


class HFDataModule(pl.LightningDataModule):
    """Feed Hugging Face datasets to Lightning in the native Trainer's order.

    Args:
        dataset: a DatasetDict, or one Dataset to train on.
        train_dataset: anything with a length and rows; wins over `dataset`.
        eval_dataset: evaluated when the settings say so, and by `trainer.validate`; or several by name.
        predict_dataset: for `trainer.predict` and `trainer.predict_dataset`.
        map_function: given to `datasets.map` for every split: rows to columns, a tokenizer's call, say.
        map_kwargs: further arguments of `datasets.map`; `batched=True` unless you say otherwise.
        processing_class: tokenizer or processor; chooses the default collator. HFModule's is used without
        one. data_collator: makes a micro-batch (a mapping of tensors) from a list of rows.
        settings: only under a plain `lightning.Trainer`, unless HFModule has them.

    Raises:
        DataError: no dataset, or something that is none.

    Mirrors: transformers.Trainer.get_train_dataloader
    """

    def __init__(
        self,
        dataset: Any = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        predict_dataset: Any = None,
        map_function: Callable[..., Any] | None = None,
        map_kwargs: Mapping[str, Any] | None = None,
        processing_class: Any = None,
        data_collator: Collator | None = None,
        settings: SettingsSource | None = None,
    ) -> None:
        super().__init__()
        self.given_settings = None if settings is None else Settings.of(settings)
        self._settings: Settings | None = None
        explicit = {"train": train_dataset, "eval": eval_dataset, "predict": predict_dataset}
        found = _split(dataset, explicit)
        self._raw = {split: given for split, given in found.items() if given is not None}
        if isinstance(sets := self._raw.get("eval"), Mapping):
            del self._raw["eval"]
            self._raw |= _named(sets)
        if not self._raw:
            raise DataError(
                "HFDataModule was given no dataset: pass a DatasetDict, or train_dataset= and eval_dataset=."
            )
        for split, given in self._raw.items():
            _check_dataset(given, split)
        self._map_function = map_function
        self._map_kwargs = {"batched": True, **(map_kwargs or {})}
        self._mapped: dict[str, Any] = {}
        self._schedule: Schedule | None = None
        self.processing_class = processing_class
        self.data_collator = data_collator

    @property
    def settings(self) -> Settings:
        """The settings of the run; known once it is set up."""
        assert self._settings is not None
        return self._settings

    @property
    def schedule(self) -> Schedule:
        """Steps and epochs of the run; known once `fit` has set the data up."""
        assert self._schedule is not None
        return self._schedule

    @property
    def train_batch_size(self) -> int:
        """Rows of a micro-batch: `per_device_train_batch_size`, or fewer with `auto_find_batch_size`."""
        size: int = getattr(self._trainer(), "train_batch_size", self.settings.per_device_train_batch_size)
        return size

    @property
    def cut(self) -> Cut:
        """How the rows of a pass are cut into optimizer steps."""
        settings, ranks = self.settings, self._trainer().world_size
        rows = rows_of_micro_batch(self.train_batch_size, settings, ranks=ranks)
        return Cut(ranks, rows, settings.gradient_accumulation_steps)

    def micro_batches(self, *, first_row: int = 0, cut: Cut | None = None) -> int:
        """Count the micro-batches of a pass on each rank, or of what is left of it from a row on."""
        cut = self.cut if cut is None else cut
        size = cut.rows * cut.ranks if splits_batches(self.settings) else cut.rows
        return micro_batches_of(
            len(self._mapped["train"]) - first_row, size, self.settings, world_size=cut.ranks
        )

    def lengthen(self, steps: int) -> None:
        """Have the run end some optimizer steps later, or earlier, than its settings alone would tell."""
        self._schedule = self.schedule.lengthened(steps, max_steps=self.settings.max_steps)
        end_with(self._trainer(), self._schedule)

    @property
    def eval_splits(self) -> tuple[str, ...]:
        """What the metrics of each evaluation set begin with: "eval", or "eval_<key>" for several."""
        return tuple(split for split in self._raw if split not in ("train", "predict"))

    @property
    def has_eval(self) -> bool:
        """Whether there is something to evaluate on."""
        return bool(self.eval_splits)

    def setup(self, stage: str) -> None:
        """Map the splits this stage needs, and for `fit` count its steps and take the Trainer over.

        Raises:
            DataError: the set of this stage is not there, a map function that returns nothing, or a set
                without rows or batches.
            SettingsError: evaluation without an evaluation set, or settings that contradict the Trainer.
        """
        self._settings = settings = settings_of(self._trainer())
        required = _REQUIRED[stage]
        needed = self.eval_splits if required == "eval" else (required,)
        if not needed or needed[0] not in self._raw:
            raise DataError(f"There is {_MISSING[required]}")
        if stage == "fit":
            self._check_evaluation(settings)
            needed += self.eval_splits
        for split in needed:
            if split not in self._mapped:
                self._mapped[split] = self._map(split)
            self._check_batches(split, settings)
        if stage == "fit":
            self._schedule = self._plan(settings)
            take_over(self._trainer(), settings, self._schedule)

    def train_dataloader(self) -> WindowLoader:
        """Make the loader of the training windows; the model is known by now."""
        settings = self.settings
        dataset, collator = self._prepare("train")
        workers = settings.dataloader_num_workers
        loader: DataLoader[Any] = DataLoader(
            dataset,
            **self._samplers().of_training(dataset, self.train_batch_size),
            collate_fn=collator,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=self._trainer().global_rank),
            **self._loading(settings),
        )
        windows = WindowLoader(loader, accumulation=settings.gradient_accumulation_steps)
        module: Any = self._trainer().lightning_module
        if module.resumption is not None:
            windows.start_at(module.resumption.start)
        return windows

    def val_dataloader(self) -> EvalLoader | list[Any]:
        """Make the loader of the evaluation set; a list of none or of several."""
        loaders = [self._eval_loader(split, prefix=split) for split in self.eval_splits]
        return loaders[0] if len(loaders) == 1 else loaders

    def predict_dataloader(self) -> EvalLoader:
        """Make the loader of the prediction set."""
        return self._eval_loader("predict", prefix="test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Let the module take a window or a batch in: it knows what to count before it is moved."""
        module: Any = self._trainer().lightning_module
        return module.receive(batch, device)

    def first_eval_batch(self, split: str) -> MicroBatch:
        """Collate the first rows of an evaluation set, without a loader."""
        dataset, collator = self._prepare(split)
        rows = min(len(dataset), self.settings.per_device_eval_batch_size)
        return collator([dataset[i] for i in range(rows)])

    def _eval_loader(self, split: str, *, prefix: str) -> EvalLoader:
        settings = self.settings
        dataset, collator = self._prepare(split)
        batches: DataLoader[Any] = DataLoader(
            dataset,
            **self._samplers().of_evaluation(dataset, split),
            collate_fn=collator,
            **self._loading(settings),
        )
        module: Any = self._trainer().lightning_module
        resumption = module.resumption
        return EvalLoader(
            batches,
            prefix=prefix,
            batch_size=settings.per_device_eval_batch_size,
            is_first_pass=resumption is None or not resumption.has_evaluated(prefix),
        )

    def _samplers(self) -> NativeSamplers:
        module: Any = self._trainer().lightning_module
        return NativeSamplers(module.args, self.processing_class or module.processing_class)

    def _prepare(self, split: str) -> tuple[Any, Collator]:
        module: Any = self._trainer().lightning_module
        dataset = self._mapped[split]
        collator = self.data_collator or default_collator(self.processing_class or module.processing_class)
        if isinstance(dataset, TensorDataset) and self.data_collator is None:
            raise DataError(
                f"The {split} set is a TensorDataset, whose columns have no names. Pass a data_collator that "
                "makes a dict of tensors, or datasets.Dataset.from_dict."
            )
        check_labels(dataset, model=module.model, split=split)
        if not self.settings.remove_unused_columns:
            return dataset, collator
        return keep_columns(
            dataset, collator, model=module.model, label_names=module.label_names, split=split
        )

    def _loading(self, settings: Settings) -> dict[str, Any]:
        on_gpu = self._trainer().strategy.root_device.type == "cuda"
        return {
            "num_workers": settings.dataloader_num_workers,
            "pin_memory": settings.dataloader_pin_memory and on_gpu,
            "persistent_workers": settings.dataloader_persistent_workers,
            "prefetch_factor": settings.dataloader_prefetch_factor,
            "multiprocessing_context": settings.dataloader_multiprocessing_context,
            "in_order": settings.dataloader_in_order,
        }

    def _map(self, split: str) -> Any:
        dataset = self._raw[split]
        if self._map_function is None:
            return dataset
        if not isinstance(dataset, datasets.Dataset):
            raise DataError(
                f"map_function needs a datasets.Dataset, and the {split} set is a {type(dataset).__name__}. "
                "Map its rows yourself, or build it with datasets.Dataset.from_list."
            )
        self._try_map_function(dataset, split)
        mapped = dataset.map(self._map_function, **{"desc": f"Mapping the {split} set", **self._map_kwargs})
        if len(mapped) == 0:
            raise DataError(
                f"No rows of the {split} set are left: map_function ({_name_of(self._map_function)}) made "
                f"none of its {len(dataset)} rows."
            )
        return mapped

    def _try_map_function(self, dataset: datasets.Dataset, split: str) -> None:
        """Call the function on two rows: `datasets.map` takes None for "no change" and goes on silently."""
        known = {"input_columns", "with_indices", "with_rank", "fn_kwargs"} & self._map_kwargs.keys()
        if known:
            return
        assert self._map_function is not None
        returned = self._map_function(dataset[:2] if self._map_kwargs["batched"] else dataset[0])
        if returned is None:
            raise DataError(
                f"map_function ({_name_of(self._map_function)}) returned None for the first rows of the "
                f"{split} set; it must return a dict of columns. Is its return statement missing?"
            )

    def _check_evaluation(self, settings: Settings) -> None:
        asked, instead = f"eval_strategy={settings.eval_strategy!r}", 'set eval_strategy="no"'
        if settings.eval_strategy == "no":
            if not settings.eval_on_start:
                return
            asked, instead = "eval_on_start=True", "leave it out"
        if not self.has_eval:
            raise SettingsError(
                f"{asked} needs an evaluation set, and HFDataModule has none. Pass eval_dataset=, or "
                f"{instead}."
            )

    def _check_batches(self, split: str, settings: Settings) -> None:
        """See that dropping a short last batch leaves one."""
        name = f"per_device_{'train' if split == 'train' else 'eval'}_batch_size"
        rows = len(self._mapped[split])
        size = self.train_batch_size if split == "train" else settings.per_device_eval_batch_size
        if settings.dataloader_drop_last and rows < size:
            raise DataError(
                f"The {split} set has {rows} rows, which is not one batch of {size} with "
                f"dataloader_drop_last=True. Use a smaller {name}, or keep the last batch."
            )

    def _plan(self, settings: Settings) -> Schedule:
        rows, size, ranks = len(self._mapped["train"]), self.train_batch_size, self._trainer().world_size
        batches = micro_batches_of(rows, size, settings, world_size=ranks)
        return plan_schedule(
            samples_per_epoch=rows,
            micro_batches_per_epoch=batches,
            accumulation=settings.gradient_accumulation_steps,
            total_batch_size=size * settings.gradient_accumulation_steps * ranks,
            max_steps=settings.max_steps,
            num_train_epochs=settings.num_train_epochs,
        )

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise DataError(
                "This HFDataModule is not attached to a Trainer yet: pass it to trainer.fit(module, data)."
            )
        return self.trainer


def _name_of(function: Any) -> str:
    return getattr(function, "__qualname__", repr(function))


def _split(dataset: Any, explicit: dict[str, Any]) -> dict[str, Any]:
    """Sort what was given into training, evaluation and prediction set."""
    if dataset is None:
        return explicit
    if not isinstance(dataset, Mapping):
        return {**explicit, "train": dataset if explicit["train"] is None else explicit["train"]}
    found = dict(explicit)
    for split, names in _SPLITS.items():
        if found[split] is None:
            found[split] = next((dataset[name] for name in names if name in dataset), None)
    if found["eval"] is None:
        several = {name: dataset[name] for name in dataset if str(name).startswith(_SEVERAL)}
        found["eval"] = several or None
    if all(given is None for given in found.values()):
        raise DataError(
            f"The dataset has the splits {', '.join(map(str, dataset)) or 'none'}; HFDataModule looks for "
            "train, validation (or eval, dev, validation_...) and test. Pass train_dataset= and "
            "eval_dataset= by hand."
        )
    return found


def _named(sets: Mapping[Any, Any]) -> dict[str, Any]:
    """Name the evaluation sets of a dict by what their metrics begin with."""
    if not sets:
        raise DataError("eval_dataset is an empty dict: give it a set for each name, or leave it out.")
    for key in sets:
        if not isinstance(key, str):
            raise DataError(
                f"eval_dataset has the key {key!r}, a {type(key).__name__}; keys must be strings, since the "
                "names of the metrics begin with eval_<key>_."
            )
    return {f"eval_{key}": given for key, given in sets.items()}


def _check_dataset(dataset: Any, split: str) -> None:
    if isinstance(dataset, (datasets.IterableDataset, TorchIterableDataset)):
        raise DataError(
            f"The {split} set is a {type(dataset).__name__}: streaming is not carried by this version. Load "
            "it with streaming=False."
        )
    if isinstance(dataset, Mapping):
        raise DataError(
            f"The {split} set is a dict ({', '.join(map(str, dataset))}); only eval_dataset may be a dict of "
            "datasets. Pass one of them."
        )
    if (
        isinstance(dataset, (str, bytes))
        or not isinstance(dataset, Sized)
        or not hasattr(dataset, "__getitem__")
    ):
        raise DataError(
            f"The {split} set is {dataset!r}; it must be a datasets.Dataset, or anything with a length and "
            "rows."
        )
    if isinstance(dataset, torch.Tensor) or len(dataset) == 0:
        raise DataError(
            f"The {split} set has no rows of columns ({type(dataset).__name__}, length {len(dataset)})."
        )

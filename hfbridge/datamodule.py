"""HFDataModule: Hugging Face datasets for Lightning.

passed                           becomes
a DatasetDict                    its splits train, validation (or eval, dev) and test; without a validation
                                 split, all validation_... splits, each evaluated by itself
train_dataset=, eval_dataset=,   used as they are; they win over a split; the test split serves
  test_dataset=, predict_dataset=  trainer.test and trainer.predict
a stream                         read as it comes; data/iterable.py
eval_dataset={"a": ..., ...}     sets that are evaluated one after the other: eval_a_loss, ...
map_function                     datasets.map, once on each node; data/mapping.py
the columns                      those the model's forward takes; under any other LightningModule all that
                                 tensors can hold
data_collator                    transformers' default without one
packing                          several examples of the train set become one; data/packing.py
regroup                          samples of a step are assigned by length; data/length_grouping.py
eval_by_length                   evaluations take the longest samples first; data/lengths.py
"""

import warnings
from collections.abc import Callable, Mapping, Sized
from itertools import chain
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from transformers import TrainingArguments

from hfbridge.callbacks.connector import (
    configure_trainer,
    done_by,
    end_with,
    epoch_limit,
    has_own_loop,
    is_hf_module,
    is_read,
    settings_of,
)
from hfbridge.callbacks.run_data import plan_run
from hfbridge.data.accumulation import BatchLayout, Schedule
from hfbridge.data.columns import Collator
from hfbridge.data.dataloaders import EvalLoader, TrainLoader
from hfbridge.data.factory import BatchConsumer, Loaders
from hfbridge.data.iterable import (
    StreamEvalLoader,
    StreamLoader,
    check_stream,
    has_unknown_length,
    is_split_by_rank,
    is_stream,
    plan_stream,
)
from hfbridge.data.length_grouping import check_regroup, check_regrouped
from hfbridge.data.lengths import check_sorted
from hfbridge.data.mapping import Mapper, facts_of, pack, unpack
from hfbridge.data.packing import check_max_tokens, pack_set
from hfbridge.data.samplers import micro_batches_of, rows_of_micro_batch, splits_batches
from hfbridge.distributed.collectives import gather, raise_on_all_ranks
from hfbridge.distributed.consistency import compare, explain, has_ranks
from hfbridge.errors import BridgeWarning, DataError, SettingsError
from hfbridge.settings import Settings, SettingsSource
from hfbridge.settings.fingerprint import facts_of_settings
from hfbridge.strategies import close_group_at_exit, rank_variables
from hfbridge.utilities.instantiate import ProcessorSource, SetSource, make_processor, make_set

_SPLITS = {
    "train": ("train",),
    "eval": ("validation", "eval", "dev"),
    "test": ("test",),
    "predict": ("test",),
}
_SEVERAL = "validation_"
# The set that a stage of Lightning's cannot do without, and what to say if it is not there.
_REQUIRED = {"fit": "train", "validate": "eval", "test": "test", "predict": "predict"}
_MISSING = {
    "train": "nothing to train on: pass train_dataset=, or a DatasetDict with a train split.",
    "eval": "nothing to evaluate on: pass eval_dataset=, or a DatasetDict with a validation split.",
    "test": "nothing to test: pass test_dataset=, or a DatasetDict with a test split.",
    "predict": "nothing to predict: pass predict_dataset=, or a DatasetDict with a test split.",
}
_SPLIT_TWICE = (
    "The {} set is a stream that is split between the ranks already (split_dataset_by_node), and would be "
    "split once more: a part of its samples would never be read. Pass the whole stream; each rank gets its "
    "part."
)


class HFDataModule(pl.LightningDataModule):
    """Feed Hugging Face datasets to Lightning in the order of `transformers.Trainer`.

    Args:
        dataset: a DatasetDict, or one Dataset to train on. Each set may be a function that returns it.
        train_dataset: anything with a length and indexed samples, or a stream; wins over `dataset`.
        eval_dataset: evaluated when the settings say so, and by `trainer.validate`; or several by name.
        test_dataset: for `trainer.test`, whose metrics begin with `test_`.
        predict_dataset: for `trainer.predict` and `trainer.predict_dataset`.
        batch_size: samples of a micro-batch of each loader, on each rank; without it the settings'
            `per_device_train_batch_size` and `per_device_eval_batch_size`.
        map_function: function of `datasets.map` for every split, such as a tokenizer's call. One rank of each
            node maps, and the others read its result.
        map_kwargs: further arguments of `datasets.map`; `batched=True` by default.
        processing_class: tokenizer or processor, or the name or folder of one; chooses the default collator.
            By default HFModule's.
        data_collator: makes a micro-batch (a mapping of tensors) from a list of samples.
        packing: length in tokens into which full examples of the train set are packed, for causal language
            models. `data_collator` then makes the batches of the other sets only.
        regroup: assign the samples of each optimizer step to its micro-batches by length, for less padding:
            the same samples and steps. A number is the most tokens of a micro-batch, padding included, in
            place of a fixed number of samples.
        eval_by_length: evaluate the longest samples first, for less padding, and restore the order of
            predictions. Another order of sums, and padding, change the last digits.
        settings: only under a plain `lightning.Trainer`, unless HFModule has them.

    Raises:
        DataError: no dataset, or something that is none; or a `packing` or `regroup` that is no number of
            tokens.

    Mirrors: transformers.Trainer.get_train_dataloader
    """

    def __init__(
        self,
        dataset: SetSource | None = None,
        *,
        train_dataset: SetSource | None = None,
        eval_dataset: SetSource | None = None,
        test_dataset: SetSource | None = None,
        predict_dataset: SetSource | None = None,
        batch_size: int | None = None,
        map_function: Callable[..., Any] | None = None,
        map_kwargs: Mapping[str, Any] | None = None,
        processing_class: ProcessorSource | None = None,
        data_collator: Collator | None = None,
        packing: int | None = None,
        regroup: bool | int = False,
        eval_by_length: bool = False,
        settings: SettingsSource | None = None,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank may have nothing to predict
        if packing is not None:
            check_max_tokens(packing)
        self.given_settings = None if settings is None else Settings.of(settings)
        self._settings: Settings | None = None
        given = {
            "train": train_dataset,
            "eval": eval_dataset,
            "test": test_dataset,
            "predict": predict_dataset,
        }
        explicit = {split: make_set(source, f"{split}_dataset") for split, source in given.items()}
        whole = make_set(dataset, "dataset")
        found = _split(whole, explicit)
        self._splits = _describe_splits(whole)
        self._raw = {split: samples for split, samples in found.items() if samples is not None}
        if isinstance(sets := self._raw.get("eval"), Mapping):
            del self._raw["eval"]
            self._raw |= _named(sets)
        if not self._raw:
            raise DataError(
                "HFDataModule was given no dataset: pass a DatasetDict, or train_dataset= and eval_dataset=."
            )
        for split, samples in self._raw.items():
            _check_dataset(samples, split)
        self.mapping: dict[str, Any] = {"map_function": map_function, "map_kwargs": map_kwargs}
        self._mapper = None if map_function is None else Mapper(map_function, map_kwargs or {})
        self._mapping_failure: Exception | None = None
        self._mapped: dict[str, Any] = {}
        self._schedule: Schedule | None = None
        self.processing_class = make_processor(processing_class)
        self.data_collator = data_collator
        self.packing = packing
        self.regroup = check_regroup(regroup)
        self.eval_by_length = eval_by_length
        self._is_packed = False
        self._checked: set[str] = set()
        self.given_batch_size = self._batch_size = check_batch_size(batch_size)
        self._planned_for: int | None = None
        self._is_new_plan = False
        self._args: TrainingArguments | None = None

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
    def batch_size(self) -> int | None:
        """Samples of a micro-batch of each loader.

        Without one, that of the training loader; `None` before a run is set up. Loaders that are made after
        it is set have the new size, as Lightning's `Tuner` and `BatchSizeFinder` expect.
        """
        if self._batch_size is not None or self._settings is None:
            return self._batch_size
        return self.train_batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        self.given_batch_size = None
        self._batch_size = check_batch_size(batch_size)
        if self._settings is not None:
            self._settings = self._with_batch_size(self._settings)

    @property
    def train_batch_size(self) -> int:
        """Samples of a micro-batch: `per_device_train_batch_size`, or fewer with `auto_find_batch_size`."""
        settings = self.settings
        if self._batch_size is not None and not settings.auto_find_batch_size:
            return self._batch_size
        size: int = getattr(self._trainer(), "train_batch_size", settings.per_device_train_batch_size)
        return size if self._batch_size is None else min(size, self._batch_size)

    @property
    def layout(self) -> BatchLayout:
        """How the samples of an epoch are grouped into optimizer steps."""
        settings, ranks = self.settings, self._trainer().world_size
        rows = rows_of_micro_batch(self.train_batch_size, settings, ranks=ranks)
        return BatchLayout(ranks, rows, settings.gradient_accumulation_steps)

    def micro_batches(self, *, first_row: int = 0, layout: BatchLayout | None = None) -> int:
        """Count the micro-batches of an epoch on each rank, or of what is left of it from a sample on."""
        layout = self.layout if layout is None else layout
        if has_unknown_length(self._mapped["train"]):
            return int(self.settings.max_steps) * layout.accumulation
        size = layout.rows * layout.ranks if splits_batches(self.settings) else layout.rows
        rows = len(self._mapped["train"]) - first_row
        return self._limited(micro_batches_of(rows, size, self.settings, world_size=layout.ranks))

    def _limited(self, micro_batches: int) -> int:
        """Cut the micro-batches of an epoch to `limit_train_batches`, as Lightning does.

        Mirrors: lightning.pytorch.trainer.connectors.data_connector._parse_num_batches
        """
        limit = self._trainer().limit_train_batches
        if limit is None:
            return micro_batches
        return min(micro_batches, limit) if isinstance(limit, int) else int(micro_batches * limit)

    def lengthen(self, steps: int) -> None:
        """End the run some optimizer steps later, or earlier, than its settings say."""
        self._schedule = self.schedule.lengthened(steps, max_steps=self.settings.max_steps)
        end_with(self._trainer(), self._schedule)

    def is_streamed(self, split: str) -> bool:
        """Whether a set can only be iterated."""
        return is_stream(self._raw[split])

    @property
    def eval_splits(self) -> tuple[str, ...]:
        """What the metrics of each evaluation set begin with: "eval", or "eval_<key>" for several."""
        return tuple(split for split in self._raw if split not in _SPLITS or split == "eval")

    def prepare_data(self) -> None:
        """On several ranks, map on one of each node, where Lightning calls this; `setup` raises errors."""
        stage = None if self.trainer is None else self.trainer.state.fn
        if self._mapper is None or stage is None or self._trainer().world_size == 1:
            return
        if not is_read(self._trainer(), self):
            return
        self._mapping_failure = None
        try:
            for split in self._needed(stage.value):
                if split not in self._mapped and not self.is_streamed(split):
                    self._mapped[split] = self._mapper.map(self._raw[split], split, to_file=True)
        except Exception as error:  # raised by setup, on all ranks
            self._mapping_failure = error

    def setup(self, stage: str) -> None:
        """Map the splits of a stage, and for `fit` count its steps and configure the Trainer.

        Raises:
            DataError: the set of this stage is missing or has no samples or batches.
            SettingsError: evaluation without an evaluation set, or settings that conflict with the Trainer's.
            RankError: settings or data differ between ranks, or another rank has failed.
        """
        if not is_read(self._trainer(), self):
            return
        if has_ranks():
            close_group_at_exit()  # as none of Lightning's own strategies does on CPUs
        with raise_on_all_ranks():
            self._begin(stage)
        settings, needed = self.settings, self._needed(stage)
        compare(
            lambda: chain(
                facts_of_settings(settings), *(facts_of(self._raw[split], split) for split in needed)
            )
        )
        self._share_mapped(needed)
        for split in needed:
            if split not in self._mapped:
                self._mapped[split] = self._map(split)
            if split == "train" and self.packing is not None and not self._is_packed:
                self._mapped[split], self._is_packed = pack_set(self._mapped[split], self.packing), True
            self._check_batches(split, settings)
        trainer = self._trainer()
        if not is_hf_module(trainer):
            with rank_variables(trainer.strategy):
                on_cpu = trainer.strategy.root_device.type == "cpu"
                self._args = settings.as_training_arguments(use_cpu=on_cpu)
        elif stage == "fit":
            configure_trainer(trainer, settings)
            self._schedule, self._planned_for = self._plan(settings), self.train_batch_size
            end_with(trainer, self._schedule)

    def teardown(self, stage: str) -> None:
        """Restore the evaluation loader, which a run without an evaluation set hides from Lightning."""
        vars(self).pop("val_dataloader", None)

    def on_exception(self, exception: BaseException) -> None:
        """Explain a lost connection to another rank."""
        self.teardown("fit")
        settings = self._settings or getattr(self.trainer, "settings", None) or Settings()
        explain(exception, timeout_s=settings.ddp_timeout)

    def train_dataloader(self) -> TrainLoader | StreamLoader:
        """Make the loader of the training micro-batches; the model is known by now."""
        trainer, limit = self._trainer(), None
        is_limited = trainer.limit_train_batches not in (None, 1.0)
        if is_hf_module(trainer):
            self._plan_again()
            micro_batches: int | None = self.schedule.micro_batches_per_epoch
            limit = micro_batches if is_limited else None
        elif has_unknown_length(self._mapped["train"]):
            micro_batches = None
            limit = trainer.limit_train_batches if isinstance(trainer.limit_train_batches, int) else None
        else:
            micro_batches = self.micro_batches()
            limit = micro_batches if is_limited else None
        return self._loaders.training(
            self._mapped["train"],
            batch_size=self.train_batch_size,
            micro_batches=micro_batches,
            is_packed=self.packing is not None,
            limit=limit,
        )

    def val_dataloader(self) -> EvalLoader | StreamEvalLoader | list[Any]:
        """Make the loader of the evaluation set, or a list of those of several."""
        loaders = [self._loaders.evaluation(self._mapped[split], split) for split in self.eval_splits]
        return loaders[0] if len(loaders) == 1 else loaders

    def test_dataloader(self) -> EvalLoader | StreamEvalLoader:
        """Make the loader of the test set."""
        return self._loaders.evaluation(self._mapped["test"], "test")

    def predict_dataloader(self) -> EvalLoader | StreamEvalLoader:
        """Make the loader of the prediction set; Lightning's own `predict` reads each sample once."""
        module: Any = self._trainer().lightning_module
        is_lightnings = not is_hf_module(self._trainer()) or module.evaluator.predicts is None
        return self._loaders.evaluation(
            self._mapped["predict"], "predict", prefix="test", keeps_indices=is_lightnings
        )

    def first_eval_batch(self, split: str) -> Mapping[str, Any] | None:
        """Collate the first samples of an evaluation set, without a loader; `None` if it is empty."""
        samples = self._mapped[split]
        return self._loaders.first_batch(samples, split) if len(samples) else None

    @property
    def _loaders(self) -> Loaders:
        module: Any = self._trainer().lightning_module
        if is_hf_module(self._trainer()):
            module.begin_run(builds=True)  # Lightning's finders look at loaders before modules are set up
        consumer = BatchConsumer(self._args) if self._args is not None else BatchConsumer.of(module)
        return Loaders(
            self._trainer(),
            consumer.with_batch_sizes(self.settings),
            self.settings,
            data_collator=self.data_collator,
            processing_class=self.processing_class,
            checked=self._checked,
            regroup=self.regroup,
            eval_by_length=self.eval_by_length,
            has_own_loop=has_own_loop(self._trainer()),
        )

    def _begin(self, stage: str) -> None:
        """Find the settings and the sets of a stage, and raise what the mapping has failed with."""
        settings = settings_of(self._trainer())
        _check_batch_sizes(self.given_batch_size, settings)
        self._settings = settings = self._with_batch_size(settings)
        self._checked, self._args = set(), None  # the model may be another
        required = _REQUIRED[stage]
        if not (self.eval_splits if required == "eval" else required in self._raw):
            raise DataError(f"There is {_MISSING[required]}{self._splits}")
        if stage == "fit":
            self._check_evaluation(settings)
            if not self.eval_splits:  # then Lightning does not validate; an empty list gives a warning
                self.val_dataloader = MethodType(pl.LightningDataModule.val_dataloader, self)  # type: ignore[method-assign]
            _check_packing(self.packing, self._trainer())
        _check_lengths(self, stage, settings)
        if self._mapping_failure is not None:
            raise self._mapping_failure

    def _with_batch_size(self, settings: Settings) -> Settings:
        """Return settings with the batch size of this data module, if it has one."""
        size = self._batch_size
        if size is None:
            return settings
        return settings.replace(per_device_train_batch_size=size, per_device_eval_batch_size=size)

    def _plan_again(self) -> None:
        """Count the steps again after another batch size was set, and have the run end with them."""
        trainer, size = self._trainer(), self.train_batch_size
        if self._planned_for != size:
            self._schedule, self._planned_for, self._is_new_plan = self._plan(self.settings), size, True
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self._is_new_plan and callbacks and is_hf_module(trainer):
            self._is_new_plan = False
            end_with(trainer, self.schedule)

    def _map(self, split: str) -> Any:
        """Map a set, unless the same one was mapped for another stage."""
        raw = self._raw[split]
        if self._mapper is None:
            return raw
        for other in ("test", "predict"):
            if other in self._mapped and self._raw[other] is raw and split in ("test", "predict"):
                return self._mapped[other]
        return self._mapper.map(raw, split)

    def _needed(self, stage: str) -> tuple[str, ...]:
        """The sets of a stage that are there."""
        required = _REQUIRED[stage]
        needed = (required,) if required in self._raw and required != "eval" else ()
        return needed + (self.eval_splits if stage == "fit" or required == "eval" else ())

    def _share_mapped(self, needed: tuple[str, ...]) -> None:
        """Take from the rank that has mapped on this node what it has made."""
        if self._mapper is None or not has_ranks():
            return
        node = self._trainer().node_rank
        mine = {split: self._mapped[split] for split in needed if split in self._mapped}
        offers = gather((node, pack(mine) if mine else None))
        packed = next((packed for of_node, packed in offers if of_node == node and packed), None)
        self._mapped = {**unpack(packed), **self._mapped}

    def _check_evaluation(self, settings: Settings) -> None:
        setting, instead = f"eval_strategy={settings.eval_strategy!r}", 'set eval_strategy="no"'
        if settings.eval_strategy == "no":
            if not settings.eval_on_start:
                return
            setting, instead = "eval_on_start=True", "leave it out"
        if not self.eval_splits:
            raise SettingsError(
                f"{setting} needs an evaluation set, and HFDataModule has none. Pass eval_dataset=, or "
                f"{instead}.{self._splits}"
            )

    def _check_batches(self, split: str, settings: Settings) -> None:
        """Check that `dataloader_drop_last` leaves a batch."""
        self._check_dispatch(split, settings)
        if self.is_streamed(split):
            check_stream(self._mapped[split], split, settings, needs_steps=is_hf_module(self._trainer()))
            return
        name = f"per_device_{'train' if split == 'train' else 'eval'}_batch_size"
        samples, ranks = len(self._mapped[split]), self._trainer().world_size
        size = self.train_batch_size if split == "train" else settings.per_device_eval_batch_size
        splits = bool((settings.accelerator_config or {}).get("split_batches", False))
        if settings.dataloader_drop_last and samples < size * (1 if splits else ranks):
            raise DataError(
                f"The {split} set has {samples} rows, which is not one batch of {size} "
                f"{'' if splits or ranks == 1 else f'on each of {ranks} ranks '}with "
                f"dataloader_drop_last=True. Use a smaller {name}, or keep the last batch."
            )

    def _check_dispatch(self, split: str, settings: Settings) -> None:
        """Check that `dispatch_batches` gives each rank its own samples of a set, each once."""
        dispatches, trainer = (settings.accelerator_config or {}).get("dispatch_batches"), self._trainer()
        if trainer.world_size == 1:
            return
        is_exact = getattr(trainer.lightning_module, "loss_normalization", "native") == "exact"
        if is_split_by_rank(self._mapped[split]):
            text = _SPLIT_TWICE.format(split)
            if is_exact:
                raise DataError(text)
            warnings.warn(
                f"{text} It is read all the same, as by transformers.Trainer.", BridgeWarning, stacklevel=2
            )
        if dispatches is None:
            return
        text = f"accelerator_config={settings.accelerator_config!r}, and the {split} set"
        if dispatches and not self.is_streamed(split):
            raise SettingsError(f"{text} is no stream: each rank reads its own batches. Leave it out.")
        if not dispatches and is_exact and split != "train" and self.is_streamed(split):
            raise SettingsError(
                f'{text} is a stream, of which accelerate repeats samples at the end; "exact" counts each '
                'once. Leave it out, or use loss_normalization="native".'
            )

    def _plan(self, settings: Settings) -> Schedule:
        size, ranks = self.train_batch_size, self._trainer().world_size
        total = size * settings.gradient_accumulation_steps * ranks
        if has_unknown_length(self._mapped["train"]):
            return plan_stream(settings, total_batch_size=total)
        full = micro_batches_of(len(self._mapped["train"]), size, settings, world_size=ranks)
        batches = self._limited(full)
        return plan_run(
            settings,
            samples=len(self._mapped["train"]) if batches == full else batches * size * ranks,
            micro_batches=batches,
            accumulation=settings.gradient_accumulation_steps,
            total_batch_size=total,
            epochs=epoch_limit(self._trainer()),
            trainer=self._trainer(),
            done=done_by(self._trainer()),
        )

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise DataError(
                "This HFDataModule is not attached to a Trainer yet: pass it to trainer.fit(module, data)."
            )
        return self.trainer


def check_batch_size(batch_size: Any) -> int | None:
    """Return a batch size.

    Raises:
        DataError: it is no positive number.
    """
    if batch_size is None or (
        isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size > 0
    ):
        return batch_size
    raise DataError(f"batch_size={batch_size!r}: it must be a number of samples, 1 or more.")


def _check_batch_sizes(batch_size: int | None, settings: Settings) -> None:
    """Check that a batch size does not conflict with the settings."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        value = settings.given.get(name)
        if batch_size is not None and value not in (None, batch_size):
            raise SettingsError(
                f"`batch_size={batch_size}` of HFDataModule conflicts with `{name}={value}` in the settings; "
                "set only one."
            )


def predicting(data: HFDataModule, dataset: SetSource) -> HFDataModule:
    """Make a data module that predicts another set in the way of a given one.

    Raises:
        DataError: it is no set.
    """
    return HFDataModule(
        predict_dataset=dataset,
        batch_size=data.given_batch_size,
        **data.mapping,
        processing_class=data.processing_class,
        data_collator=data.data_collator,
        eval_by_length=data.eval_by_length,
        settings=data.given_settings,
    )


def _split(dataset: Any, explicit: dict[str, Any]) -> dict[str, Any]:
    """Sort what was given into training, evaluation, test and prediction set."""
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


def _describe_splits(dataset: Any) -> str:
    """Say which splits a DatasetDict has, and what each is read for; nothing of any other set."""
    if not isinstance(dataset, Mapping):
        return ""
    hint = " To evaluate the test split: eval_dataset=splits['test']." if "test" in dataset else ""
    return (
        f" The dataset has the splits {', '.join(map(str, dataset))}; train is for training, validation (or "
        f"eval, dev, validation_...) for evaluation, test for trainer.test.{hint}"
    )


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
    if is_stream(dataset):
        return
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
    if isinstance(dataset, torch.Tensor) or (len(dataset) == 0 and not split.startswith("eval")):
        raise DataError(
            f"The {split} set has no rows of columns ({type(dataset).__name__}, length {len(dataset)})."
        )


def _check_token_budget(regroup: bool | int, trainer: pl.Trainer) -> None:
    """Check that optimizer steps of different numbers of micro-batches can be taken."""
    if isinstance(regroup, bool) or (has_own_loop(trainer) and is_hf_module(trainer)):
        return
    if not has_own_loop(trainer):
        reason = "lightning.Trainer takes a step after accumulate_grad_batches of them. Use hfbridge.Trainer"
    else:
        name = type(trainer.lightning_module).__name__
        reason = f"Lightning divides the loss of {name} by accumulate_grad_batches. Use HFModule"
    raise SettingsError(
        f"regroup={regroup} makes optimizer steps of different numbers of micro-batches, and {reason}, or "
        "regroup=True."
    )


def _check_packing(packing: int | None, trainer: pl.Trainer) -> None:
    """Check that packed examples are kept apart."""
    if packing is None or is_hf_module(trainer):
        return
    raise DataError(
        f"packing={packing} needs a model whose attention keeps packed examples apart, which HFModule "
        f"checks and {type(trainer.lightning_module).__name__} cannot. Use HFModule, or leave packing out."
    )


def _check_lengths(data: HFDataModule, stage: str, settings: Settings) -> None:
    """Check that samples can be grouped by length, where `regroup` or `eval_by_length` is set."""
    trainer = data._trainer()
    module: Any = trainer.lightning_module
    exactly: Any = module.loss_normalization if is_hf_module(trainer) else "exact"
    if data.regroup and stage == "fit":
        _check_token_budget(data.regroup, trainer)
        check_regrouped(
            settings,
            loss_normalization=exactly,
            is_stream=data.is_streamed("train"),
            is_packed=data.packing is not None,
        )
    if data.eval_by_length:
        streams = [split for split in data._needed(stage) if split != "train" and data.is_streamed(split)]
        check_sorted(settings, loss_normalization=exactly, is_stream=bool(streams))

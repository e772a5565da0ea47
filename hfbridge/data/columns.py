"""Select the columns of a dataset that reach the model, and its collator.

column of the dataset                          in the micro-batch
a parameter of the model's forward             kept
label, label_ids, the label names              kept (the collator renames the first two to labels)
anything else                                  dropped, unless remove_unused_columns=False

A LightningModule of the user's, whose signature is unknown, gets every column that tensors can hold.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.models.auto import modeling_auto
from transformers.trainer_utils import RemoveColumnsCollator, unwrap_peft_model

from hfbridge.data.sample_errors import is_known, listed
from hfbridge.errors import BridgeWarning, DataError
from hfbridge.models.signature import accepted_columns

logger = logging.getLogger(__name__)

Collator = Callable[[list[Any]], Mapping[str, Any]]

_REGRESSION = (
    "The column {!r} of the train set holds the integers 0 and 1, and {} has num_labels=1: it trains a "
    "regression. To classify, set num_labels=2; for a regression, model.config.problem_type = 'regression'."
)
_BLOCK, _BLOCKS = 10_000, 100  # rows, and blocks of them, whose labels are checked

# Heads whose integer labels are class ids in [0, config.num_labels).
_CLASSIFIER_NAMES = frozenset(
    name
    for table in (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    )
    for name in table.values()
)


def default_collator(processing_class: object | None) -> Collator:
    """Choose the HF Trainer's collator: padding for tokenizers, plain stacking otherwise."""
    if isinstance(processing_class, (PreTrainedTokenizerBase, SequenceFeatureExtractor)):
        return DataCollatorWithPadding(processing_class)  # type: ignore[arg-type]
    return default_data_collator


def keep_columns(
    dataset: Any, collator: Collator, *, model: nn.Module, label_names: Sequence[str], split: str
) -> tuple[Any, Collator]:
    """Drop columns that the model's forward does not accept: from a `datasets.Dataset`, else while collating.

    Returns:
        The dataset and its collator.

    Raises:
        DataError: the model accepts none of the columns, or only labels.

    Mirrors: transformers.Trainer._get_dataloader
    """
    accepted = accepted_columns(model, label_names)
    name = type(model).__name__
    if not isinstance(dataset, datasets.Dataset):
        wrapped: Collator = RemoveColumnsCollator(
            data_collator=collator,
            signature_columns=accepted,
            logger=logger,
            model_name=name,
            description=split,
        )
        return dataset, wrapped
    kept = [column for column in dataset.column_names if column in accepted]
    only_labels = {"label", "label_ids", *label_names}.issuperset(kept) and _computes_from_others(
        dataset, collator, model
    )
    if not kept or only_labels:
        raise DataError(
            f"The {split} dataset has no column that {name}.forward takes{' but labels' if kept else ''}: "
            f"its columns are {listed(dataset.column_names)}. The model takes {listed(accepted)}. "
            "Pass a map_function that tokenizes, rename the columns, or set remove_unused_columns=False if "
            "your data_collator makes them."
        )
    dropped = [column for column in dataset.column_names if column not in kept]
    if dropped:
        logger.info("%s set: %s does not take %s; dropped.", split, name, listed(dropped))
    return dataset.remove_columns(dropped), collator


def _computes_from_others(dataset: datasets.Dataset, collator: Collator, model: nn.Module) -> bool:
    """Whether labels alone are not enough: no transform or collator of the user's adds to them."""
    is_theirs = type(unwrap_peft_model(model)).__module__.startswith("transformers.")
    return is_theirs and is_known(collator) and dataset.format["type"] != "custom"


def keep_tensor_columns(dataset: Any, collator: Collator, *, split: str) -> tuple[Any, Collator]:
    """Drop columns that tensors cannot hold, such as texts: from a `datasets.Dataset`, else while collating.

    Returns:
        The dataset and its collator.

    Raises:
        DataError: no column is left.
    """
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] is not None:
        return dataset, TensorColumnsCollator(collator, split)
    types = {field.name: field.type for field in dataset.features.arrow_schema}
    dropped = [name for name in dataset.column_names if not _is_numeric_type(types[name])]
    if len(dropped) == len(types):
        raise DataError(_no_tensors(split, dropped))
    if dropped:
        logger.info("%s set: no tensor holds %s; dropped.", split, listed(dropped))
    return dataset.remove_columns(dropped), collator


class TensorColumnsCollator:
    """Collate the columns that tensors can hold; samples that are no mappings stay as they are."""

    def __init__(self, collator: Collator, split: str) -> None:
        self._collator, self._split = collator, split

    def __call__(self, rows: list[Any]) -> Mapping[str, Any]:
        """Collate a micro-batch.

        Raises:
            DataError: no column is left.
        """
        if not isinstance(rows[0], Mapping):
            return self._collator(rows)
        kept = [name for name in rows[0] if all(name in row and _is_numeric(row[name]) for row in rows)]
        if not kept:
            raise DataError(_no_tensors(self._split, rows[0]))
        return self._collator([{name: row[name] for name in kept} for row in rows])


def _no_tensors(split: str, columns: Iterable[object]) -> str:
    return (
        f"The {split} dataset has no column that a tensor can hold: its columns are {listed(columns)}. Pass "
        "a map_function that tokenizes, or set remove_unused_columns=False if your data_collator makes them."
    )


def _is_numeric_type(kind: Any) -> bool:
    """Whether an Arrow type is a number, or a list of them."""
    if isinstance(kind, pa.ExtensionType):
        kind = kind.storage_type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_numeric(value: Any) -> bool:
    """Whether a tensor can hold a value."""
    if isinstance(value, (list, tuple)):
        return not value or _is_numeric(value[0])
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    return isinstance(value, (bool, int, float, np.number, np.bool_, Tensor))


def check_labels(dataset: Any, *, model: nn.Module, split: str) -> None:
    """Check before training that the class ids of the dataset are valid for the model.

    Only stored integer columns of classification heads are checked, at most a million rows of them, spread
    over the set; -100 is always allowed. The labels 0 and 1 of a model with one label, a regression, get a
    warning.

    Raises:
        DataError: a label is not in [0, num_labels).
    """
    config = getattr(model, "config", None)
    name = type(unwrap_peft_model(model)).__name__
    if not isinstance(dataset, datasets.Dataset) or name not in _CLASSIFIER_NAMES or config is None:
        return
    count = int(config.num_labels)
    if getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        return
    for column in ("labels", "label", "label_ids"):
        if column in dataset.column_names:
            found = _integers_in(dataset, column)
            wrong = [v for v in found if v != -100 and not 0 <= v < count]
            if count == 1:
                if found == {0, 1} and split == "train":
                    warnings.warn(_REGRESSION.format(column, name), BridgeWarning, stacklevel=2)
            elif wrong:
                raise DataError(
                    f"The {split} dataset has labels that {name} does not support: column {column!r} holds "
                    f"{listed(sorted(wrong)[:10])}. With num_labels={count} they must be 0 to {count - 1} "
                    "(-100 is ignored). Set num_labels, or map the labels."
                )


def _integers_in(dataset: datasets.Dataset, column: str) -> set[int]:
    """Collect the distinct integers of a flat or nested column; empty for another type."""
    found: set[int] = set()
    read = dataset.select_columns([column]).with_format("arrow")
    for start in _checked_starts(len(dataset)):
        values = read[start : start + _BLOCK][column].combine_chunks()
        while hasattr(values, "flatten") and str(values.type).startswith(
            ("list", "large_list", "fixed_size_list")
        ):
            values = values.flatten()
        if not str(values.type).startswith(("int", "uint")):
            return set()
        found.update(v for v in values.unique().to_pylist() if v is not None)
    return found


def _checked_starts(rows: int) -> Iterable[int]:
    """Choose the first rows of the blocks to check, spread over the set, which may be sorted by label."""
    blocks = math.ceil(rows / _BLOCK)
    if blocks <= _BLOCKS:
        return range(0, rows, _BLOCK)
    return (_BLOCK * (number * (blocks - 1) // (_BLOCKS - 1)) for number in range(_BLOCKS))

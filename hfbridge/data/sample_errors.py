"""What is wrong with the samples of a set, where reading, mapping or collating them failed.

failed                     because
map_function, transform    a column is not there, or was dropped since the model does not take it
a collator                 of transformers: texts, missing values, lists that are not padded, columns of some
                           samples only; of the user's: a dropped column
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets

from hfbridge.errors import BridgeError, DataError, name_of

_SEEN, _MANY = 64, 20_000  # samples that are looked at; labels
_LABELS = ("label", "labels", "label_ids")


def is_known(collator: object) -> bool:
    """Whether a collator is one of transformers, which never truncates."""
    module = str(getattr(collator, "__module__", None) or type(collator).__module__)
    return module.startswith("transformers.")


def listed(names: Any) -> str:
    """Join names; "none" if there are none."""
    return ", ".join(str(name) for name in names) or "none"


@contextmanager
def name_missing_column(function: Callable[..., Any], split: str, columns: Sequence[str]) -> Iterator[None]:
    """List the columns of a set where its map function raises a KeyError for another one.

    Raises:
        DataError: it does.
    """
    try:
        yield
    except KeyError as error:
        if _key_of(error) in columns:
            raise
        raise DataError(
            f"map_function ({name_of(function)}) found no {_key_of(error)!r}. The columns of the {split} set "
            f"are {listed(columns)}."
        ) from error


class StreamMapFunction:
    """A map function of a stream, within `name_missing_column`."""

    def __init__(self, function: Callable[..., Any], split: str) -> None:
        self._function, self._split = function, split

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the function."""
        columns = list(arguments[0]) if arguments and isinstance(arguments[0], Mapping) else []
        with name_missing_column(self._function, self._split, columns):
            return self._function(*arguments, **named)


@dataclass(frozen=True)
class Source:
    """The set that a loader reads, to explain why reading it failed.

    Attributes:
        split: its name.
        samples: the set.
        collator: of its micro-batches.
        dropped: columns that the model does not accept.
        reader: name of the model's class.
        needs: the model's main input; `None` if unknown.
    """

    split: str
    samples: Any
    collator: Any
    dropped: tuple[str, ...] = ()
    reader: str = "the module"
    needs: str | None = None

    @contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Explain an error of reading or collating by the samples.

        Raises:
            DataError: something is wrong with them.
        """
        try:
            yield
        except BridgeError:
            raise
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            found = self._explain_dropped(error) or self._explain_samples()
            if not found:
                raise
            raise DataError(f"The {self.split} set {found}") from error

    def _explain_dropped(self, error: Exception) -> str:
        name = _key_of(error)
        if not isinstance(error, KeyError) or name not in self.dropped:
            return ""
        return (
            f"has the column {name!r}, which its transform or data_collator reads, and which was dropped: "
            f"{self.reader}.forward does not take it. Set remove_unused_columns=False."
        )

    def _explain_samples(self) -> str:
        if not is_known(self.collator):
            return ""
        rows: list[Any] = []
        with suppress(Exception):
            rows = [self.samples[i] for i in range(min(len(self.samples), _SEEN))]
        if not rows and isinstance(self.samples, datasets.IterableDataset):
            with suppress(Exception):
                rows = list(islice(self.samples, _SEEN))
        rows = [dict(row) for row in rows if isinstance(row, Mapping)]
        if not rows:
            return ""
        known = list(dict.fromkeys(name for row in rows for name in row))
        columns = listed([*known, *(name for name in self.dropped if name not in known)])
        if self.needs is not None and not {self.needs, "inputs_embeds"}.intersection(known):
            return (
                f"has no column {self.needs!r}, which {self.reader} needs; its columns are {columns}. Set "
                "map_function=lambda rows: tokenizer(rows[...], truncation=True), say."
            )
        found = (self._explain_column(name, [row.get(name) for row in rows]) for name in known)
        return next(filter(None, found), "")

    def _explain_column(self, name: str, values: list[Any]) -> str:
        """Explain why a tensor cannot hold the values of a column; empty if it can."""
        texts, is_label = [value for value in values if isinstance(value, str)], name in _LABELS
        if texts and is_label:
            return (
                f"has texts in the column {name!r} ({listed(dict.fromkeys(texts[:3]))}), and labels must be "
                f"numbers. Map them: dataset.class_encode_column({name!r}), say."
            )
        if texts:
            return f"has texts in the column {name!r}, which no tensor holds. Tokenize or remove them."
        missing = [number for number, value in enumerate(values) if value is None]
        if missing:
            return _missing(name, missing[0])
        lengths = sorted({len(value) for value in values if isinstance(value, (list, tuple))})
        if len(lengths) < 2 or self._is_padded(name):
            return ""
        kind = getattr(self.collator, "__name__", type(self.collator).__name__)
        advice = "Pass processing_class=tokenizer, or data_collator=DataCollatorWithPadding(tokenizer)."
        if hasattr(self.collator, "tokenizer"):
            advice = "Remove it, or pass a data_collator that does."
            if is_label:
                advice = (
                    "Pass data_collator=DataCollatorForTokenClassification(tokenizer), or for a language "
                    "model DataCollatorForSeq2Seq(tokenizer)."
                )
        return (
            f"has lists of {lengths[0]} to {lengths[-1]} values in the column {name!r}, which {kind} does "
            f"not pad. {advice}"
        )

    def _is_padded(self, name: str) -> bool:
        names = getattr(getattr(self.collator, "tokenizer", None), "model_input_names", ())
        return name in names or (name in _LABELS and hasattr(self.collator, "label_pad_token_id"))


def check_missing_labels(dataset: datasets.Dataset, split: str) -> None:
    """Check that all samples have a label, or none: collators of transformers do not support both.

    Raises:
        DataError: some have none.
    """
    for name in set(_LABELS).intersection(dataset.column_names):
        labels = dataset.select_columns([name]).with_format("arrow")[:_MANY][name]
        if 0 < labels.null_count < len(labels):
            number = labels.is_null().to_pylist().index(True)
            raise DataError(f"The {split} set {_missing(name, number)}")


def _missing(name: str, number: int) -> str:
    return f"has no value in the column {name!r} of sample {number}. Filter such samples out."


def _key_of(error: Exception) -> str:
    """Return the key of a KeyError, which stands last in a worker's error."""
    return str(error).rstrip("\n").rsplit("KeyError: ", maxsplit=1)[-1].strip("'\"\n ")

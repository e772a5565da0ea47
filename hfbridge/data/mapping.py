"""Call the user's map function on a dataset, once on each node.

Local rank 0 maps and sends the others the result, which pickles as the paths of its files:

    the set                                   its mapped rows
    has files (load_dataset, load_from_disk)  in the cache beside them, as on one rank
    is in memory (from_list, from_dict),      in a temporary folder of the node, which is deleted when the
      or keep_in_memory=True                  mapping rank ends; on one rank in memory
"""

import hashlib
import os
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets

from hfbridge.data.iterable import facts_of_stream, is_stream, map_stream
from hfbridge.data.sample_errors import name_missing_column
from hfbridge.distributed.consistency import Fact
from hfbridge.errors import DataError, name_of

_SAMPLED = 64
_HINT = (
    "Load the same files on every rank, and set a seed in shuffle(seed=...) and train_test_split(seed=...)."
)


class Mapper:
    """A map function and the arguments of `datasets.map`.

    Args:
        function: the user's.
        arguments: of `datasets.map`; `batched=True` is the default.

    Proved by: tests/distributed/test_mapping.py
    """

    def __init__(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        self._function = function
        self._arguments: dict[str, Any] = {"batched": True, **arguments}
        self._folder: Path | None = None

    def map(self, dataset: Any, split: str, *, to_file: bool = False) -> Any:
        """Map a set; a stream is mapped lazily.

        Args:
            dataset: the set.
            split: its name, for messages.
            to_file: write the result to a file, not to memory.

        Raises:
            DataError: it is no datasets.Dataset, or the function returns nothing.
        """
        if is_stream(dataset):
            return map_stream(dataset, self._function, self._arguments, split)
        if not isinstance(dataset, datasets.Dataset):
            raise DataError(
                f"map_function needs a datasets.Dataset, and the {split} set is a {type(dataset).__name__}. "
                "Build it with datasets.Dataset.from_list, or map it yourself."
            )
        with name_missing_column(self._function, split, dataset.column_names):
            return self._map(dataset, split, to_file=to_file)

    def _map(self, dataset: datasets.Dataset, split: str, *, to_file: bool) -> Any:
        self._try(dataset, split)
        arguments = {"desc": f"Mapping the {split} set", **self._arguments}
        if to_file and (arguments.pop("keep_in_memory", False) or not dataset.cache_files):
            arguments.setdefault("cache_file_name", str(self._make_folder() / f"{split}.arrow"))
        mapped: datasets.Dataset = dataset.map(self._function, **arguments)
        if len(mapped) == 0:
            raise DataError(
                f"No rows of the {split} set are left: map_function ({name_of(self._function)}) returned "
                f"none for its {len(dataset)} rows."
            )
        return mapped

    def _try(self, dataset: datasets.Dataset, split: str) -> None:
        """Call the function on two rows, since `datasets.map` silently takes None for "no change"."""
        if {"input_columns", "with_indices", "with_rank", "fn_kwargs"} & self._arguments.keys():
            return
        returned = self._function(dataset[:2] if self._arguments["batched"] else dataset[0])
        if returned is None:
            raise DataError(
                f"map_function ({name_of(self._function)}) returned None for the first rows of the {split} "
                "set; it must return a dict of columns. Is its return statement missing?"
            )

    def _make_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="hfbridge-map-"))
            weakref.finalize(self, _delete, self._folder, os.getpid())
        return self._folder


def _delete(folder: Path, owner: int) -> None:
    """Delete a folder, unless this is a worker that was forked from the process that made it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def pack(mapped: Mapping[str, datasets.Dataset]) -> bytes | None:
    """Pickle mapped sets for the other ranks of a node; `None` if a transform in them does not pickle."""
    try:
        return pickle.dumps(dict(mapped))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


def unpack(packed: bytes | None) -> dict[str, datasets.Dataset]:
    """Open the sets that another rank has mapped; none if its files are not accessible from this node."""
    if packed is None:
        return {}
    try:
        return dict(pickle.loads(packed))
    except OSError:
        return {}


def facts_of(dataset: Any, split: str) -> list[Fact]:
    """Describe a set for comparison across ranks: number of rows, columns, and a digest of some rows.

    Stored rows of a `datasets.Dataset` are read without transforms, which may draw numbers; those of other
    sets are not read.
    """
    subject = f"the {split} set"
    if is_stream(dataset):
        return facts_of_stream(dataset, split)
    facts = [Fact(f"rows of {subject}", str(len(dataset)), _HINT)]
    if isinstance(dataset, datasets.Dataset):
        facts.append(Fact(f"columns of {subject}", ", ".join(dataset.column_names), _HINT))
        stored = dataset.with_format("arrow")
        step = max(1, len(dataset) // _SAMPLED)
        digest = hashlib.sha256()
        for row in range(0, len(dataset), step):
            digest.update(repr(stored[row].to_pydict()).encode())
        facts.append(Fact(f"contents of {subject}", f"digest {digest.hexdigest()[:12]}", _HINT))
    return facts

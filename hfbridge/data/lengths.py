"""The lengths of samples, without reading their other columns."""

from collections.abc import Callable, Sequence, Sized
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from hfbridge.errors import DataError, Problem, SettingsError, raise_problems

Lengths = Callable[[Sequence[int]], list[int]]
_READ = 10_000  # rows at a time


def lengths_in(dataset: Any, *, column: str, input_name: str) -> Lengths:
    """Return a function from sample indices to lengths; of a `datasets.Dataset` it reads one column alone.

    Args:
        dataset: the training set, mapped.
        column: holds the lengths, if there is such a column (`length_column_name`).
        input_name: the column whose length counts otherwise, usually "input_ids".

    Raises:
        DataError: there is neither column.
    """
    names = getattr(dataset, "column_names", None)
    is_table = isinstance(names, list) and hasattr(dataset, "with_format")
    row = {} if is_table else dataset[0]
    known = names if isinstance(names, list) and is_table else list(row)
    name = next((name for name in (column, input_name) if name in known), None)
    if name is not None and is_table:
        read = dataset.select_columns(name).with_format("arrow")
        kind = read[:1].column(name).type
        if pa.types.is_integer(kind):
            return lambda rows: read[list(rows)].column(name).to_pylist()
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            return lambda rows: pc.list_value_length(read[list(rows)].column(name)).to_pylist()
    elif name is not None and name == column:
        return lambda rows: [int(dataset[number][name]) for number in rows]
    elif name is not None and isinstance(row[name], Sized):
        return lambda rows: [len(dataset[number][name]) for number in rows]
    raise DataError(
        f"Grouping by length needs numbers in a column {column!r} (length_column_name), or lists in "
        f"{input_name!r}; the columns are {', '.join(map(str, known))}. Add one of these."
    )


def longest_first(lengths: Lengths, rows: int) -> list[int]:
    """Sort the sample indices of a set by length, stably, the longest first."""
    found: list[int] = []
    for start in range(0, rows, _READ):
        found += lengths(range(start, min(start + _READ, rows)))
    order: list[int] = np.argsort(-np.asarray(found), kind="stable").tolist()
    return order


def check_sorted(args: Any, *, loss_normalization: str, is_stream: bool) -> None:
    """Check that evaluations can take their samples by length; `is_stream`: one of the sets is a stream.

    Raises:
        SettingsError: they cannot; it lists all reasons.
    """
    conflicts = {
        f'loss_normalization="{loss_normalization}"': loss_normalization != "exact"
        and 'its mean loss depends on which rows share a batch; use the default, "exact".',
        "batch_eval_metrics=True": args.batch_eval_metrics
        and "compute_metrics would see batches of other rows; leave one of them out.",
        "eval_do_concat_batches=False": not args.eval_do_concat_batches
        and "predictions that are not joined cannot be put back in order; leave one of them out.",
        "a stream to evaluate": is_stream
        and "its rows are read one after the other; use a set with a length, or leave it out.",
    }
    raise_conflicts("eval_by_length=True", conflicts)


def raise_conflicts(setting: str, conflicts: dict[str, str | bool]) -> None:
    """Raise if a setting conflicts with others.

    Args:
        setting: as the user wrote it.
        conflicts: for each other setting the reason and what to do; `False` where there is no conflict.

    Raises:
        SettingsError: there are conflicts; it lists them all.
    """
    problems = [Problem(name, text) for name, text in conflicts.items() if isinstance(text, str)]
    if problems:
        raise_problems(SettingsError, f"{setting} cannot be honoured. Nothing was started.", problems)

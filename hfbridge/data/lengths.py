"""The lengths of rows, without reading the rest of them; knows Hugging Face."""

from collections.abc import Callable, Sequence, Sized
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from hfbridge.errors import DataError, Problem, SettingsError, raise_problems

Lengths = Callable[[Sequence[int]], list[int]]
_READ = 10_000  # rows at a time


def lengths_in(dataset: Any, *, column: str, input_name: str) -> Lengths:
    """Find out how the lengths of rows are known.

    Args:
        dataset: the training set, mapped.
        column: holds the lengths, if the rows have it (`length_column_name`).
        input_name: the column whose length counts otherwise, "input_ids" mostly.

    Returns:
        A function of row numbers. Of a `datasets.Dataset` it reads this column alone.

    Raises:
        DataError: the rows have neither.
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
        f"Dealing by length needs that of every row, and they have neither numbers in a column {column!r} "
        f"(length_column_name) nor lists in {input_name!r}. They have {', '.join(map(str, known))}. Give "
        "them one of these."
    )


def longest_first(lengths: Lengths, rows: int) -> list[int]:
    """Order the rows of a set by length; those of one length stay in their order."""
    found: list[int] = []
    for start in range(0, rows, _READ):
        found += lengths(range(start, min(start + _READ, rows)))
    order: list[int] = np.argsort(-np.asarray(found), kind="stable").tolist()
    return order


def check_sorted(args: Any, *, loss_normalization: str, is_stream: bool) -> None:
    """See that evaluations can take their rows by length.

    Args:
        args: the settings.
        loss_normalization: of the run.
        is_stream: a set to evaluate is one.

    Raises:
        SettingsError: they cannot; all reasons are named.
    """
    problems = []
    if loss_normalization != "exact":
        text = 'its mean loss depends on which rows share a batch; use the default, "exact".'
        problems.append(Problem(f'loss_normalization="{loss_normalization}"', text))
    if args.batch_eval_metrics:
        text = "compute_metrics would see batches of other rows; leave one of them out."
        problems.append(Problem("batch_eval_metrics=True", text))
    if not args.eval_do_concat_batches:
        text = "predictions that are not joined cannot be put back in order; leave one of them out."
        problems.append(Problem("eval_do_concat_batches=False", text))
    if is_stream:
        text = "its rows are read one after the other; use a set with a length, or leave it out."
        problems.append(Problem("a stream to evaluate", text))
    if problems:
        headline = "eval_by_length=True cannot be honoured. Nothing was started."
        raise_problems(SettingsError, headline, problems)

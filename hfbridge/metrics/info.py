"""What every metric says about itself, and the types of its columns."""

from typing import Any

import datasets
import evaluate

INTEGER, FLOAT, STRING = datasets.Value("int32"), datasets.Value("float"), datasets.Value("string")


def list_of(value: datasets.Value) -> datasets.Sequence:
    """Type of a column whose rows are lists."""
    return datasets.Sequence(value)


def describe(text: str, *columns: dict[str, Any], arguments: str = "") -> evaluate.MetricInfo:
    """Make the information of a metric.

    Args:
        text: what it computes.
        columns: type of each column; several if the metric takes rows of several types.
        arguments: what `compute` takes beside the columns.
    """
    new: Any = datasets.Features
    features = [new(one) for one in columns]
    return evaluate.MetricInfo(
        description=text,
        citation="",
        inputs_description=f"\n\n{text}\n{arguments}",
        features=features if len(features) > 1 else features[0],
    )

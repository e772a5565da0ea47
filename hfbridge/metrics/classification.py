"""Metrics of predicted classes and of scores of classes, computed by scikit-learn.

The configuration "multilabel" takes lists of 0 and 1, and ROC AUC in "multiclass" one of scores.
"""

from typing import Any

import evaluate
import numpy as np
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    matthews_corrcoef,
    precision_score,
    recall_score,
    roc_auc_score,
)

from hfbridge.metrics.info import FLOAT, INTEGER, describe, list_of

_OF_CLASSES = "Further arguments of compute: labels, pos_label, average, sample_weight"


class _OfClasses(evaluate.Metric):
    """Takes the predicted and the true classes of each sample."""

    text, arguments = "", "Further arguments of compute: sample_weight"

    def _info(self) -> evaluate.MetricInfo:
        column = list_of(INTEGER) if self.config_name == "multilabel" else INTEGER
        return describe(
            self.text, {"predictions": column, "references": column}, arguments=f"{self.arguments}."
        )


class Accuracy(_OfClasses):
    """The share of samples that are predicted right, or their number with `normalize=False`."""

    text, arguments = "Share of right predictions.", "Further arguments of compute: normalize, sample_weight"

    def _compute(  # type: ignore[override]
        self, predictions: Any, references: Any, normalize: bool = True, sample_weight: Any = None
    ) -> dict[str, Any]:
        score = accuracy_score(references, predictions, normalize=normalize, sample_weight=sample_weight)
        return {"accuracy": float(score)}


class F1(_OfClasses):
    """The harmonic mean of precision and recall."""

    text, arguments = "Harmonic mean of precision and recall.", _OF_CLASSES

    def _compute(self, predictions: Any, references: Any, **averaging: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"f1": _number(f1_score(references, predictions, **_checked(averaging, "f1")))}


class Precision(_OfClasses):
    """The share of what was predicted as a class that is of this class."""

    text, arguments = "Share of positive predictions that are right.", f"{_OF_CLASSES}, zero_division"

    def _compute(self, predictions: Any, references: Any, **averaging: Any) -> dict[str, Any]:  # type: ignore[override]
        given = _checked(averaging, "precision", "zero_division")
        return {"precision": _number(precision_score(references, predictions, **given))}


class Recall(_OfClasses):
    """The share of a class that was predicted as this class."""

    text, arguments = "Share of positive samples that are found.", f"{_OF_CLASSES}, zero_division"

    def _compute(self, predictions: Any, references: Any, **averaging: Any) -> dict[str, Any]:  # type: ignore[override]
        given = _checked(averaging, "recall", "zero_division")
        return {"recall": _number(recall_score(references, predictions, **given))}


class MatthewsCorrelation(_OfClasses):
    """The correlation between predicted and true classes; of several labels one each, or their mean."""

    text = "Matthews correlation coefficient."
    arguments = "Further arguments of compute: sample_weight, average"

    def _compute(  # type: ignore[override]
        self, predictions: Any, references: Any, sample_weight: Any = None, average: str | None = None
    ) -> dict[str, Any]:
        if self.config_name != "multilabel":
            score = matthews_corrcoef(references, predictions, sample_weight=sample_weight)
            return {"matthews_correlation": float(score)}
        if average not in (None, "macro"):
            raise ValueError(f"average={average!r}; it may be None or 'macro'.")
        scores = [
            float(matthews_corrcoef(true, predicted, sample_weight=sample_weight))
            for true, predicted in zip(
                zip(*references, strict=True), zip(*predictions, strict=True), strict=True
            )
        ]
        return {"matthews_correlation": sum(scores) / len(scores) if average else scores}


class RocAuc(evaluate.Metric):
    """The area under the curve of true over false positives."""

    def _info(self) -> evaluate.MetricInfo:
        scores = list_of(FLOAT) if self.config_name in ("multiclass", "multilabel") else FLOAT
        classes = list_of(INTEGER) if self.config_name == "multilabel" else INTEGER
        return describe(
            "Area under the receiver operating characteristic.",
            {"prediction_scores": scores, "references": classes},
            arguments="Further arguments of compute: average, sample_weight, max_fpr, multi_class, labels.",
        )

    def _compute(  # type: ignore[override]
        self,
        references: Any,
        prediction_scores: Any,
        average: str | None = "macro",
        sample_weight: Any = None,
        max_fpr: float | None = None,
        multi_class: str = "raise",
        labels: Any = None,
    ) -> dict[str, Any]:
        score = roc_auc_score(
            references,
            prediction_scores,
            average=average,
            sample_weight=sample_weight,
            max_fpr=max_fpr,
            multi_class=multi_class,
            labels=labels,
        )
        return {"roc_auc": score}


def _checked(given: dict[str, Any], name: str, *further: str) -> dict[str, Any]:
    """Return the arguments; raises TypeError for one that the metric does not take."""
    known = ("labels", "pos_label", "average", "sample_weight", *further)
    for argument in given:
        if argument not in known:
            raise TypeError(f"{name}.compute takes no argument {argument!r}; it takes {', '.join(known)}.")
    return given


def _number(score: Any) -> Any:
    """Return one score as a Python number, several (`average=None`) as they are."""
    return np.asarray(score).item() if np.size(score) == 1 else score

"""Precision, recall and F1 of entities in tagged sequences, computed by seqeval."""

from collections.abc import Sequence
from typing import Any

import evaluate
from seqeval import scheme as schemes
from seqeval.metrics import accuracy_score, classification_report

from hfbridge.metrics.info import STRING, describe, list_of

SCHEMES = ("IOB1", "IOB2", "IOE1", "IOE2", "IOBES", "BILOU")


class Seqeval(evaluate.Metric):
    """Scores of each type of entity, and of all together."""

    def _info(self) -> evaluate.MetricInfo:
        tags = list_of(STRING)
        return describe(
            "Precision, recall and F1 of entities in sequences of tags.",
            {"predictions": tags, "references": tags},
            arguments="Further arguments of compute: suffix, scheme, mode, sample_weight, zero_division.",
        )

    def _compute(  # type: ignore[override]
        self,
        predictions: Sequence[Sequence[str]],
        references: Sequence[Sequence[str]],
        suffix: bool = False,
        scheme: str | None = None,
        mode: str | None = None,
        sample_weight: Sequence[float] | None = None,
        zero_division: str | int = "warn",
    ) -> dict[str, Any]:
        if scheme is not None and scheme not in SCHEMES:
            raise ValueError(f"scheme={scheme!r}; it may be {', '.join(SCHEMES)}.")
        true, predicted = [list(row) for row in references], [list(row) for row in predictions]
        report = classification_report(
            y_true=true,
            y_pred=predicted,
            suffix=suffix,
            output_dict=True,
            scheme=None if scheme is None else getattr(schemes, scheme),
            mode=mode,
            sample_weight=sample_weight,
            zero_division=zero_division,
        )
        overall = report["micro avg"]
        scores: dict[str, Any] = {
            name: {
                "precision": found["precision"],
                "recall": found["recall"],
                "f1": found["f1-score"],
                "number": found["support"],
            }
            for name, found in report.items()
            if name not in ("micro avg", "macro avg", "weighted avg")
        }
        return {
            **scores,
            "overall_precision": overall["precision"],
            "overall_recall": overall["recall"],
            "overall_f1": overall["f1-score"],
            "overall_accuracy": accuracy_score(y_true=true, y_pred=predicted),
        }

"""Metrics of texts that are right or wrong: answers of SQuAD, exact matches."""

import logging
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from hfbridge.metrics.info import STRING, describe

logger = logging.getLogger(__name__)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGITS = str.maketrans("", "", string.digits)


def words_of(answer: str) -> list[str]:
    """Split an answer into words, without case, punctuation and English articles."""
    return re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(_PUNCTUATION)).split()


def overlap(answer: Sequence[str], truth: Sequence[str]) -> float:
    """Compute F1 of the words of an answer against those of a true one; 0 if they share none."""
    shared = (Counter(answer) & Counter(truth)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(answer), shared / len(truth)
    return 2 * precision * recall / (precision + recall)


class Squad(evaluate.Metric):
    """Exact match and F1 of answers, in percent, as the script of SQuAD 1.1 computes them.

    An answer counts by the true one it is nearest to; a question without a prediction counts as wrong.
    """

    def _info(self) -> evaluate.MetricInfo:
        answers = datasets.Sequence({"text": STRING, "answer_start": datasets.Value("int32")})
        return describe(
            "Exact match and F1 of answers to questions, in percent.",
            {
                "predictions": {"id": STRING, "prediction_text": STRING},
                "references": {"id": STRING, "answers": answers},
            },
        )

    def _compute(self, predictions: Iterable[Any], references: Sequence[Any]) -> dict[str, float]:  # type: ignore[override]
        predicted = {one["id"]: words_of(one["prediction_text"]) for one in predictions}
        if not references:
            raise ValueError("There are no questions; squad needs at least one.")
        matches, f1 = 0, 0.0
        for question in references:
            truths = [words_of(text) for text in question["answers"]["text"]]
            if not truths:
                raise ValueError(f"The question {question['id']!r} has no answers; squad needs at least one.")
            if question["id"] not in predicted:
                logger.warning("The question %s has no prediction, which counts as wrong.", question["id"])
                continue
            answer = predicted[question["id"]]
            matches += answer in truths
            f1 += max(overlap(answer, truth) for truth in truths)
        return {"exact_match": 100.0 * matches / len(references), "f1": 100.0 * f1 / len(references)}


class ExactMatch(evaluate.Metric):
    """The share of texts that equal their references."""

    def _info(self) -> evaluate.MetricInfo:
        return describe(
            "Share of predicted texts that equal their references.",
            {"predictions": STRING, "references": STRING},
            arguments="Further arguments of compute: regexes_to_ignore, ignore_case, ignore_punctuation, "
            "ignore_numbers.",
        )

    def _compute(  # type: ignore[override]
        self,
        predictions: Iterable[str],
        references: Iterable[str],
        regexes_to_ignore: Sequence[str] | None = None,
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        ignore_numbers: bool = False,
    ) -> dict[str, float]:
        def reduced(text: str) -> str:
            for pattern in regexes_to_ignore or ():
                text = re.sub(pattern, "", text)
            text = text.lower() if ignore_case else text
            text = text.translate(_PUNCTUATION) if ignore_punctuation else text
            return text.translate(_DIGITS) if ignore_numbers else text

        equal = [
            reduced(predicted) == reduced(true)
            for predicted, true in zip(predictions, references, strict=True)
        ]
        return {"exact_match": float(np.mean(equal))}

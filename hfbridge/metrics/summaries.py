"""ROUGE of summaries, computed by rouge-score."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import evaluate
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator

from hfbridge.metrics.info import STRING, describe, list_of


class Rouge(evaluate.Metric):
    """F-measures of common n-grams and subsequences.

    The mean is the middle of a bootstrap, as in `evaluate`: it depends a little on NumPy's random state when
    the metric is loaded, or on the `seed` that is given then.
    """

    def _info(self) -> evaluate.MetricInfo:
        return describe(
            "ROUGE of texts, each with one reference or several.",
            {"predictions": STRING, "references": list_of(STRING)},
            {"predictions": STRING, "references": STRING},
            arguments="Further arguments of compute: rouge_types, use_aggregator, use_stemmer, tokenizer.",
        )

    def _compute(  # type: ignore[override]
        self,
        predictions: Sequence[str],
        references: Sequence[Any],
        rouge_types: Sequence[str] | None = None,
        use_aggregator: bool = True,
        use_stemmer: bool = False,
        tokenizer: Callable[[str], list[str]] | None = None,
    ) -> dict[str, Any]:
        types = ["rouge1", "rouge2", "rougeL", "rougeLsum"] if rouge_types is None else list(rouge_types)
        split = None if tokenizer is None else SimpleNamespace(tokenize=tokenizer)
        scorer = RougeScorer(types, use_stemmer=use_stemmer, tokenizer=split)
        scores = [
            scorer.score(true, text) if isinstance(true, str) else scorer.score_multi(true, text)
            for true, text in zip(references, predictions, strict=True)
        ]
        if not use_aggregator:
            return {name: [score[name].fmeasure for score in scores] for name in types}
        aggregator = BootstrapAggregator()
        for score in scores:
            aggregator.add_scores(score)
        return {name: score.mid.fmeasure for name, score in aggregator.aggregate().items()}

"""BLEU of translations, computed by sacrebleu."""

from collections.abc import Callable, Sequence
from typing import Any

import evaluate
import sacrebleu

from hfbridge.metrics.info import STRING, describe, list_of


class Sacrebleu(evaluate.Metric):
    """BLEU of whole, untokenized texts, each with one reference or equally many."""

    def _info(self) -> evaluate.MetricInfo:
        return describe(
            "BLEU of texts.",
            {"predictions": STRING, "references": list_of(STRING)},
            {"predictions": STRING, "references": STRING},
            arguments="Further arguments of compute: smooth_method, smooth_value, force, lowercase, "
            "tokenize, use_effective_order.",
        )

    def _compute(  # type: ignore[override]
        self,
        predictions: Sequence[str],
        references: Sequence[Any],
        smooth_method: str = "exp",
        smooth_value: float | None = None,
        force: bool = False,
        lowercase: bool = False,
        tokenize: str | Callable[[str], str] | None = None,
        use_effective_order: bool = False,
    ) -> dict[str, Any]:
        listed = [[one] if isinstance(one, str) else one for one in references]
        counts = sorted({len(one) for one in listed})
        if len(counts) > 1:
            raise ValueError(
                f"Some texts have {counts[0]} references and some {counts[-1]}; sacrebleu needs equally many."
            )
        given: dict[str, Any] = {"tokenize": tokenize} if tokenize else {}
        score = sacrebleu.corpus_bleu(
            list(predictions),
            [list(column) for column in zip(*listed, strict=True)],
            smooth_method=smooth_method,
            smooth_value=smooth_value,
            force=force,
            lowercase=lowercase,
            use_effective_order=use_effective_order,
            **given,
        )
        names = ("score", "counts", "totals", "precisions", "bp", "sys_len", "ref_len")
        return {name: getattr(score, name) for name in names}

"""Metrics of predicted numbers, computed by scikit-learn and SciPy.

The configuration "multilist" of the errors takes a list of numbers for each sample.
"""

from typing import Any

import evaluate
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_absolute_error, mean_squared_error, root_mean_squared_error

from hfbridge.metrics.info import FLOAT, describe, list_of


class _OfNumbers(evaluate.Metric):
    """Takes the predicted and the true numbers of each sample."""

    text, arguments = "", ""

    def _info(self) -> evaluate.MetricInfo:
        column = list_of(FLOAT) if self.config_name == "multilist" else FLOAT
        return describe(self.text, {"predictions": column, "references": column}, arguments=self.arguments)


class Mse(_OfNumbers):
    """The mean squared error, or its root with `squared=False`."""

    text = "Mean squared error."
    arguments = "Further arguments of compute: sample_weight, multioutput, squared."

    def _compute(  # type: ignore[override]
        self,
        predictions: Any,
        references: Any,
        sample_weight: Any = None,
        multioutput: Any = "uniform_average",
        squared: bool = True,
    ) -> dict[str, Any]:
        error = mean_squared_error if squared else root_mean_squared_error
        found = error(references, predictions, sample_weight=sample_weight, multioutput=multioutput)
        return {"mse": found}


class Mae(_OfNumbers):
    """The mean absolute error."""

    text = "Mean absolute error."
    arguments = "Further arguments of compute: sample_weight, multioutput."

    def _compute(  # type: ignore[override]
        self,
        predictions: Any,
        references: Any,
        sample_weight: Any = None,
        multioutput: Any = "uniform_average",
    ) -> dict[str, Any]:
        found = mean_absolute_error(
            references, predictions, sample_weight=sample_weight, multioutput=multioutput
        )
        return {"mae": found}


class Pearsonr(_OfNumbers):
    """The linear correlation."""

    text, arguments = "Pearson correlation.", "Further arguments of compute: return_pvalue."

    def _compute(self, predictions: Any, references: Any, return_pvalue: bool = False) -> dict[str, Any]:  # type: ignore[override]
        found = pearsonr(references, predictions)
        return {"pearsonr": float(found[0]), **({"p-value": float(found[1])} if return_pvalue else {})}


class Spearmanr(_OfNumbers):
    """The correlation of ranks."""

    text, arguments = "Spearman rank correlation.", "Further arguments of compute: return_pvalue."

    def _compute(self, predictions: Any, references: Any, return_pvalue: bool = False) -> dict[str, Any]:  # type: ignore[override]
        found = spearmanr(references, predictions)
        p_value = {"spearmanr_pvalue": float(found[1])} if return_pvalue else {}
        return {"spearmanr": float(found[0]), **p_value}

"""load_metric: a metric by its name, on a machine with a hub and without.

    name                        script                           packages
    accuracy f1 precision ...   metrics/classification.py        scikit-learn
    mse mae pearsonr spearmanr  metrics/regression.py            scikit-learn, SciPy
    squad exact_match           metrics/answers.py
    sacrebleu                   metrics/translation.py           sacrebleu
    rouge                       metrics/summaries.py             rouge-score
    seqeval                     metrics/entities.py              seqeval
    perplexity                  metrics/perplexity.py

None of these, nor `evaluate`, is imported before a metric is loaded.
"""

import difflib
import importlib
import os
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

from hfbridge.errors import MetricsError
from hfbridge.utilities.imports import require

if TYPE_CHECKING:
    from evaluate import EvaluationModule


class Shipped(NamedTuple):
    """A metric of this package.

    Attributes:
        module: the file with its class.
        class_name: its class.
        packages: what has to be installed.
    """

    module: str
    class_name: str
    packages: tuple[str, ...] = ()


SHIPPED = {
    "accuracy": Shipped("classification", "Accuracy", ("sklearn",)),
    "exact_match": Shipped("answers", "ExactMatch"),
    "f1": Shipped("classification", "F1", ("sklearn",)),
    "mae": Shipped("regression", "Mae", ("sklearn", "scipy")),
    "matthews_correlation": Shipped("classification", "MatthewsCorrelation", ("sklearn",)),
    "mse": Shipped("regression", "Mse", ("sklearn", "scipy")),
    "pearsonr": Shipped("regression", "Pearsonr", ("sklearn", "scipy")),
    "perplexity": Shipped("perplexity", "Perplexity"),
    "precision": Shipped("classification", "Precision", ("sklearn",)),
    "recall": Shipped("classification", "Recall", ("sklearn",)),
    "roc_auc": Shipped("classification", "RocAuc", ("sklearn",)),
    "rouge": Shipped("summaries", "Rouge", ("rouge_score",)),
    "sacrebleu": Shipped("translation", "Sacrebleu", ("sacrebleu",)),
    "seqeval": Shipped("entities", "Seqeval", ("seqeval",)),
    "spearmanr": Shipped("regression", "Spearmanr", ("sklearn", "scipy")),
    "squad": Shipped("answers", "Squad"),
}


def load_metric(
    name: str, config_name: str | None = None, *, keep_in_memory: bool | None = None, **kwargs: Any
) -> "EvaluationModule":
    """Load a metric as `evaluate.load` does, without needing its hub.

    A script at the path `name`, and one that `evaluate` has in its cache, are loaded by `evaluate`; the other
    metrics of the table are shipped here, with the same columns, arguments and results. A name with an owner
    ("owner/metric") goes to `evaluate`, which queries the hub.

    Args:
        name: "accuracy", or the folder or file of a metric script.
        config_name: a variant, such as "multilabel".
        keep_in_memory: keep samples in memory and not in a file; `None`: in memory, unless several processes
            (`num_process`) compute one metric together.
        kwargs: of `evaluate.load`: `seed`, `cache_dir`, `num_process`, `process_id`, `experiment_id`. Without
            an `experiment_id`, each metric has a file of its own.

    Returns:
        An `evaluate.EvaluationModule`, with `compute`, `add` and `add_batch`.

    Raises:
        MetricsError: there is no metric of this name.
        MissingDependencyError: the package that computes it is not installed.

    Mirrors: evaluate.load
    Proved by: tests/unit/metrics/test_load.py, tests/unit/metrics/test_equal.py
    """
    alone = kwargs.get("num_process", 1) == 1
    in_memory = alone if keep_in_memory is None else keep_in_memory
    kwargs["keep_in_memory"] = in_memory
    if alone and not in_memory:
        kwargs.setdefault("experiment_id", uuid.uuid4().hex)
    hub: Any = importlib.import_module("hfbridge.metrics.hub")
    has_owner = name.count("/") == 1 and name[0] not in "./~" and not os.path.exists(name)
    if hub.is_script(name) or hub.is_cached(name) or has_owner:
        loaded: EvaluationModule = hub.load_script(name, config_name, **kwargs)
        return loaded
    if name not in SHIPPED:
        raise MetricsError(_unknown(name))
    shipped = SHIPPED[name]
    for package in shipped.packages:
        require(package, extra="metrics", for_=f'load_metric("{name}")')
    module: Any = importlib.import_module(f"hfbridge.metrics.{shipped.module}")
    made: EvaluationModule = getattr(module, shipped.class_name)(config_name=config_name, **kwargs)
    return made


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), SHIPPED, n=len(SHIPPED), cutoff=0.6)
    others = [known for known in SHIPPED if known not in close]
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"load_metric({name!r}): there is no such metric.{meant} Those that need no hub are "
        f"{', '.join([*close, *others])}. Others are loaded from the folder of their script, or by "
        "evaluate.load, which queries the hub."
    )

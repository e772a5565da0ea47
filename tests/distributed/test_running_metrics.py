"""metrics= on several ranks: the numbers of one process, whatever rows a rank has.

Grade: exact for what counts; where numbers are summed that round, a few ulps, since each rank sums its own
(and a stream's last round is cut otherwise than in one process, whose loss sums otherwise, too).
"""

import pytest

from tests.distributed.evaluations import rows_of_many_lengths
from tests.distributed.running import error_of, evaluate, load_and_compute, train_on_both
from tests.distributed.test_streams import Square
from tests.parity.test_running_metrics import job
from tests.parity.test_streams import Plain

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


# torchmetrics, of the AUROC of a few rows
@pytest.mark.filterwarnings("ignore:No (positive|negative) samples in targets:UserWarning")
@pytest.mark.parametrize("normalization", ["native", "exact"])
@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.long)])
def test_as_in_one_process(ranks, n, normalization):
    """One row leaves ranks without any; the others end in rounds that are not full."""
    jobs = [
        job(kind, {"eval_strategy": "no"}, validation_rows=rows_of_many_lengths(kind, rows))
        for kind, sizes in {"distilbert": (1, 11), "bert-token": (13,), "llama": (1, 24)}.items()
        for rows in sizes
    ]
    jobs += [job("bert-regression", {"eval_strategy": "no"}, eval_rows=rows) for rows in (13,)]
    streamed = {"as_dataset": Plain, "collator": Square, "has_ids": False}
    jobs.append(job("distilbert", {"eval_strategy": "no"}, eval_rows=13, **streamed))
    alone = evaluate(jobs, normalization)
    for rank in ranks(n).run(evaluate, jobs, normalization):
        for found, expected in zip(rank, alone, strict=True):
            assert found.keys() == expected.keys()
            for name, value in found.items():
                rounds = any(part in name for part in ("perplexity", "mse", "auroc", "loss"))
                assert value == (
                    pytest.approx(expected[name], rel=1e-6, nan_ok=True) if rounds else expected[name]
                )


def test_training_is_that_of_both_engines(ranks):
    first, second = ranks(2).run(train_on_both, job(settings={"max_steps": 2}, eval_keys=["a", "b"]))
    assert first == second
    assert any("eval_b_f1" in row for row in first)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("lists", "equally long on all ranks"),
        ("others", "metrics= differ by rank"),
        ("unfit", "mse does not take a batch"),
    ],
)
def test_what_fails_is_told_on_all_ranks(ranks, what, text):
    for kind, message in ranks(2).run(error_of, job(settings={"eval_strategy": "no"}, eval_rows=7), what):
        assert kind == "MetricsError"
        assert text in message


@pytest.mark.parametrize("waits_in_file", [False, True])
def test_a_loaded_metric_of_each_rank_and_of_all(ranks, tmp_path, waits_in_file):
    """Of the rows of one rank, four of four are right; of the other's, two."""
    first, second = ranks(2).run(load_and_compute, str(tmp_path), waits_in_file)
    assert first == (1.0, 0.75)
    assert second == (0.5, -1.0)

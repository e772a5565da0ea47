"""Every strategy and one process go one way, to the last bits, for every kind of task.

benchmarks/matrix.py writes the table.
"""

import pytest

from tests.distributed.matrix import STRATEGIES, TASKS, deviation, run

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft
]

# Sums are taken in another order: over fewer, larger parts on each rank, and then over the ranks. That is one
# unit in the last place (1.2e-7) of each, and 20 steps of Adam do not make more than ten of it.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def alone():
    """The trajectories of one process."""
    found = {}

    def of(task):
        if task not in found:
            found[task] = run(task, "auto", 1)
        return found[task]

    return of


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("task", TASKS)
def test_one_trajectory(ranks, alone, task, strategy):
    first, *_ = ranks(2).run(run, task, strategy, 2)
    apart = deviation(alone(task), first)
    assert all(value < TOLERANCE for value in apart.values()), apart

"""How far trajectories lie apart, by strategy and number of ranks, beside one process."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from measure import write  # noqa: E402

from tests.distributed.matrix import STEPS, STRATEGIES, TASKS, deviation, run  # noqa: E402
from tests.distributed.pool import Pool  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/matrix.json")
    given = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    pools = {ranks: Pool(ranks) for ranks in given.ranks}
    for task in TASKS:
        alone = run(task, "auto", 1)
        results[task] = {}
        for ranks, pool in pools.items():
            for strategy in STRATEGIES:
                found = deviation(alone, pool.run(run, task, strategy, ranks)[0])
                results[task][f"{strategy}, {ranks} ranks"] = found
                shown = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
                print(f"{task}, {strategy}, {ranks} ranks: {shown}")
    for pool in pools.values():
        pool.close()
    print(f"written to {write('matrix', {'steps': STEPS, 'deviation': results}, given)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

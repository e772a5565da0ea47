"""A rank is killed at a random moment: torchrun restarts all, and they go on from the last checkpoint."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import TORCHRUN, launcher_in

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANKS = 2


def run(folder: Path, **job: Any) -> dict[int, dict[str, Any]]:
    """Train under torchrun, which restarts at most twice; returns what each rank has written."""
    folder.mkdir()
    settings = {
        "output_dir": str(folder / "out"),
        "num_train_epochs": 12,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    with launcher_in(folder) as launcher:
        one = launcher.start(
            *TORCHRUN,
            "--standalone",
            f"--nproc-per-node={RANKS}",
            "--max-restarts=2",
            settings=settings,
            resumes=True,
            **job,
        )
        assert one.wait() == 0, one.output[-3000:]
        assert not one.left()
        return launcher.results()


def kill(folder: Path, times: int, seed: int) -> list[dict[str, Any]]:
    """Kill a rank of so many runs; returns what was found, and sees that each ended as an undisturbed one."""
    expected = run(folder / "undisturbed", fault="none")
    assert [result["attempt"] for result in expected.values()] == ["0"] * RANKS
    draw, found = random.Random(seed), []
    while len(found) < times:
        victim, after_s = draw.randrange(RANKS), draw.uniform(0, expected[0]["trained_s"])
        results = run(
            folder / f"run-{len(found)}-{after_s}", fault="kill later", victim=victim, after_s=after_s
        )
        assert {r: results[r]["weights"] for r in results} == {r: expected[r]["weights"] for r in expected}
        assert results[0]["rows"][-1] == expected[0]["rows"][-1]
        if results[0]["attempt"] == "1":  # else it came too late, and was none
            was = {name: results[0][name] for name in ("attempt", "resumed")}
            found.append({"victim": victim, "after_s": round(after_s, 3), **was})
    return found


@pytest.mark.long
def test_restarted_ranks_end_as_if_nothing_had_been(tmp_path: Path) -> None:
    found = kill(tmp_path, 2, seed=3)
    assert any(one["resumed"] for one in found)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_restarts(tmp_path: Path) -> None:
    found = kill(tmp_path, 20, seed=0)
    assert sum(one["resumed"] for one in found) >= 10


if __name__ == "__main__":  # python -m tests.faults.test_restarts FOLDER FILE: the twenty, as a result
    found = kill(Path(sys.argv[1]), 20, seed=0)
    Path(sys.argv[2]).write_text(json.dumps({"kills": len(found), "each": found}, indent=2) + "\n")

"""SIGKILL at any moment costs the steps since the last checkpoint, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def kill(times: int, seed: int, module: str = "tests.faults.kills") -> dict[str, Any]:
    output = Path("kills.json").resolve()
    command = [sys.executable, "-m", module, "--kills", str(times), "--seed", str(seed)]
    done = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def check(found: dict[str, Any], times: int) -> None:
    assert found["kills"] >= times
    assert found["ended_with_the_same_weights"] == found["kills"]
    assert 3 * found["resumed_from_a_checkpoint"] >= found["kills"]


def test_a_killed_run_goes_on() -> None:
    check(kill(6, seed=1), 6)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_fifty_kills() -> None:
    check(kill(50, seed=0), 50)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.long
def test_killed_ranks_go_on() -> None:
    check(kill(3, seed=1, module="tests.distributed.kills"), 3)


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twenty_kills_of_ranks() -> None:
    check(kill(20, seed=0, module="tests.distributed.kills"), 20)

"""What becomes of a run of several ranks when one of them dies, hangs or errs: it ends soon, and says why."""

import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import TORCHRUN, Launcher, Started, launcher_in

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LIMIT_S = 30
TWO: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
LONG: dict[str, Any] = {"fault": "none", "step_s": 0.2, "rows": 1000}  # 250 steps
ENDED = "stops because another rank has ended"


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    with launcher_in(tmp_path) as found:
        yield found


def start(launcher: Launcher, how: str, **job: Any) -> Started:
    if how == "torchrun":
        return launcher.start(*TORCHRUN, "--standalone", "--nproc-per-node=2", **job)
    return launcher.start(trainer=TWO, **job)


def wait_for_end(one: Started, *, limit_s: float = LIMIT_S) -> float:
    """Wait until a command and all it has started have ended; returns how long that took."""
    begun = time.monotonic()
    one.wait(limit_s)
    left = one.left(limit_s - (time.monotonic() - begun))
    assert not left, one.output[-3000:]
    return time.monotonic() - begun


def process_of(launcher: Launcher, rank: int) -> int:
    return int((launcher.folder / f"process-{rank}").read_text())


@pytest.mark.parametrize(
    ("how", "victim"),
    [
        ("lightning", 1),
        pytest.param("torchrun", 0, marks=pytest.mark.long),
        pytest.param("lightning", 0, marks=pytest.mark.long),
        pytest.param("torchrun", 1, marks=pytest.mark.long),
    ],
)
def test_a_rank_is_killed(launcher, how, victim):
    one = start(launcher, how, **LONG)
    launcher.wait_for(f"step-1-{victim}")
    time.sleep(random.SystemRandom().uniform(0, 1.5))
    os.kill(process_of(launcher, victim), signal.SIGKILL)
    wait_for_end(one)
    assert one.process.returncode != 0
    assert not launcher.results()
    if how == "torchrun":
        assert "SIGKILL" in one.output or "Signal 9" in one.output
    else:
        assert f"hfbridge: rank {1 - victim} {ENDED}" in one.output
    if (how, victim) == ("lightning", 1):
        assert "hfbridge: rank 1 has ended: killed by SIGKILL" in one.output
        assert one.process.returncode == 1


@pytest.mark.long
def test_a_rank_is_killed_before_it_has_come(launcher):
    """The first rank waits for it in the rendezvous, which Python code cannot leave."""
    one = launcher.start(trainer=TWO, **LONG)
    end = time.monotonic() + 120
    while len(one.members()) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    child = next(process for process in one.members() if process != one.process.pid)
    os.kill(child, signal.SIGKILL)
    wait_for_end(one)
    assert one.process.returncode == 1
    assert "hfbridge: rank 1 has ended: killed by SIGKILL" in one.output


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "victim"),
    [("lightning", 1), ("torchrun", 1), ("lightning", 0)],
)
def test_a_rank_raises(launcher, how, victim):
    one = start(launcher, how, fault="raise", victim=victim)
    launcher.wait_for("fault")
    wait_for_end(one)
    assert one.process.returncode != 0
    assert "ValueError: this rank has an error" in one.output
    assert "terminate called" not in one.output
    if how == "lightning":
        assert f"hfbridge: rank {1 - victim} {ENDED}" in one.output


@pytest.mark.long
def test_a_rank_exits(launcher):
    one = launcher.start(trainer=TWO, fault="exit")
    launcher.wait_for("fault")
    wait_for_end(one)
    assert one.process.returncode == 1
    assert "hfbridge: rank 1 has ended: exit code 3" in one.output


@pytest.mark.long
@pytest.mark.parametrize("how", ["torchrun", pytest.param("lightning", marks=pytest.mark.long)])
def test_a_rank_hangs(launcher, how):
    one = start(launcher, how, fault="stop", settings={"ddp_timeout": 5})
    launcher.wait_for("fault")
    # The one that hangs is given time to end: 20 s by hfbridge, 30 s by torchrun.
    wait_for_end(one, limit_s=LIMIT_S + 30)
    assert one.process.returncode != 0
    assert "hfbridge: rank 0 has waited for another rank for more than ddp_timeout=5 s" in one.output


@pytest.mark.long
def test_a_group_that_training_arguments_has_opened_knows_the_time_limit(launcher):
    one = launcher.start(trainer=TWO, source="arguments", fault="stop", victim=0, settings={"ddp_timeout": 5})
    launcher.wait_for("fault")
    begun = time.monotonic()
    while len(one.members()) > 1:  # the first rank, which is stopped, stays
        assert time.monotonic() < begun + LIMIT_S, one.output[-3000:]
        time.sleep(0.1)
    assert "hfbridge: rank 1 has waited for another rank for more than ddp_timeout=5 s" in one.output


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


def test_the_port_is_taken(launcher, taken_port):
    one = launcher.start(trainer=TWO, variables={"MASTER_PORT": str(taken_port)})
    assert one.wait() == 1
    assert f"RankError: MASTER_PORT={taken_port}, where the ranks are to meet, is in use" in one.output
    assert "set MASTER_PORT to a free port" in one.output
    assert not (launcher.folder / "process-1").exists()


@pytest.mark.long
def test_the_port_is_taken_where_another_has_started_the_ranks(launcher, taken_port):
    variables = {
        "LOCAL_RANK": "0",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(taken_port),
    }
    one = launcher.start(trainer=TWO, variables=variables)
    assert one.wait() == 1
    assert f"RankError: MASTER_PORT={taken_port}, where the ranks are to meet, is in use" in one.output

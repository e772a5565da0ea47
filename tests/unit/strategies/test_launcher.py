"""Processes and groups, as far as one process shows them; see tests/distributed/test_launchers.py."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment

from hfbridge import RankError
from hfbridge.strategies import launched_ranks, launcher, rank_variables
from hfbridge.strategies.launcher import (
    Children,
    ScriptLauncher,
    agree_on_attempt,
    name_end,
    open_group,
    require_free_port,
)

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "train"}


def sleeper(seconds: float, code: int = 0) -> subprocess.Popen[bytes]:
    program = f"import sys, time; time.sleep({seconds}); sys.exit({code})"
    return subprocess.Popen([sys.executable, "-S", "-c", program])


# How many ranks a launcher has started.


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (TORCHRUN, (8, 4)),
        (SRUN, (8, 4)),
        ({**SRUN, **TORCHRUN, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, (2, 2)),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}, (1, 1)),
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, None),
        ({**SRUN, "SLURM_JOB_NAME": "interactive"}, None),
    ],
)
def test_launched_ranks(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_ranks() == expected


def test_rank_variables_are_there_for_a_time(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "7")
    strategy = SimpleNamespace(global_rank=3, local_rank=1, world_size=4, parallel_devices=[0, 1])
    with rank_variables(strategy):
        assert {
            name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        } == {
            "RANK": "3",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "4",
            "LOCAL_WORLD_SIZE": "2",
        }
    assert os.environ["WORLD_SIZE"] == "7"
    assert "RANK" not in os.environ


def test_one_rank_has_no_variables():
    with rank_variables(SimpleNamespace()):
        assert "RANK" not in os.environ


# Children.


def test_children_start_as_the_script_was_started(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "train.py", "--steps", "3"])
    monkeypatch.setattr(sys, "argv", ["other"])
    command, folder = launcher._command(1)
    assert command == [sys.executable, "-X", "dev", "train.py", "--steps", "3"]
    assert folder == launcher._FIRST_FOLDER


def test_hydra_starts_its_children_in_its_own_way(monkeypatch):
    hydra = SimpleNamespace(HydraConfig=SimpleNamespace(initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "hydra.core.hydra_config", hydra)
    monkeypatch.setattr(
        launcher, "_hydra_subprocess_cmd", lambda local_rank: (["hydra", str(local_rank)], "/x")
    )
    assert launcher._command(2) == (["hydra", "2"], "/x")


def test_the_end_of_a_child_is_named():
    assert name_end(-9) == "killed by SIGKILL"
    assert name_end(-99) == "killed by signal 99"
    assert name_end(3) == "exit code 3; its output says why"


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((0, 3), 1), ((), 0)])
def test_a_launcher_waits_as_long_as_its_ranks_need(codes, expected):
    starts = ScriptLauncher(LightningEnvironment(), 1 + len(codes), 1)
    processes = [sleeper(0.3, code) for code in codes]
    starts._children = Children(processes, first_rank=1)
    assert starts.wait() == expected
    assert [process.returncode for process in processes] == list(codes)


def test_children_are_waited_for_and_killed_if_they_stay(caplog):
    soon, never, fails = sleeper(0), sleeper(60), sleeper(0, 3)
    with caplog.at_level(logging.ERROR):
        Children([soon, never, fails], first_rank=1).end(grace_s=2)
    assert "rank 2 has not ended, and is killed" in caplog.text
    assert "rank 3 has ended: exit code 3" in caplog.text
    assert "rank 1" not in caplog.text
    assert caplog.text.count("rank 2") == 1
    assert soon.returncode == 0
    assert never.returncode == -9


@pytest.mark.parametrize("is_needed", [True, False])
def test_a_child_that_fails_ends_the_others_if_they_are_needed(monkeypatch, caplog, is_needed):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(launcher, "_GRACE_S", 0.2)
    monkeypatch.setattr(launcher.os, "_exit", lambda code: (codes.append(code), ended.set()))
    fails, stays = sleeper(0, 3), sleeper(60)
    with caplog.at_level(logging.ERROR):
        children = Children([stays, fails], first_rank=1)
        children.watch(is_needed=lambda: is_needed)
        ended.wait(10 if is_needed else 2)
    assert "hfbridge: rank 2 has ended: exit code 3" in caplog.text
    assert codes == ([1] if is_needed else [])
    assert (stays.poll() is None) != is_needed
    children.end(grace_s=0)
    assert caplog.text.count("rank 2 has ended") == 1


def test_children_that_end_well_are_not_spoken_of(caplog):
    Children([sleeper(0)], first_rank=1).watch(is_needed=lambda: True)
    end_s = time.monotonic() + 10
    while any(thread.name == "hfbridge-watch" for thread in threading.enumerate()):
        assert time.monotonic() < end_s
        time.sleep(0.05)
    assert not caplog.text


# Groups.


@pytest.fixture
def port():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_that_is_taken_is_named(port):
    with pytest.raises(RankError, match=rf"MASTER_PORT={port}, .*set MASTER_PORT to a free port"):
        require_free_port(port)


def test_a_free_port_stays_free():
    with socket.socket() as other:
        other.bind(("", 0))
        free = other.getsockname()[1]
    require_free_port(free)
    require_free_port(free)


def test_a_group_is_opened_once_and_knows_its_time_limit():
    environment = LightningEnvironment()
    environment.set_world_size(1)
    device = torch.device("cpu")
    assert open_group(environment, "gloo", timeout=timedelta(seconds=50), device=device)
    assert not open_group(environment, "gloo", timeout=timedelta(seconds=20), device=device)
    backend = dist.distributed_c10d._get_default_group()._get_backend(device)
    assert backend.options._timeout == timedelta(seconds=20)


def test_the_port_of_a_group_is_taken(monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", str(port))
    environment = LightningEnvironment()
    environment.set_world_size(1)
    with pytest.raises(RankError, match=f"MASTER_PORT={port}"):
        open_group(environment, "gloo", timeout=None, device=torch.device("cpu"))


def agree(store: dist.Store, ranks: list[int], world_size: int) -> dict[int, int]:
    found: dict[int, int] = {}

    def agree_as(rank: int) -> None:
        found[rank] = agree_on_attempt(store, rank, world_size)

    threads = [threading.Thread(target=agree_as, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_every_attempt_has_a_number_of_its_own():
    store = dist.HashStore()
    assert agree(store, [0, 1, 2], 3) == {0: 1, 1: 1, 2: 1}
    # An attempt that dies before all have come: ranks 1 and 2 have asked, and nobody has answered.
    store.set("hfbridge/requests/1", "word")
    store.set("hfbridge/requests/2", "another")
    assert agree(store, [2, 1, 0], 3) == {0: 2, 1: 2, 2: 2}
    # One in which only the first rank had come.
    store.add("hfbridge/attempts", 1)
    assert agree(store, [1, 2, 0], 3) == {0: 4, 1: 4, 2: 4}


def test_ranks_that_do_not_come_are_named():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.3))
    with pytest.raises(RankError, match=r"Of 3 ranks these have not come in 0\.3 s: 1, 2"):
        agree_on_attempt(store, 0, 3)

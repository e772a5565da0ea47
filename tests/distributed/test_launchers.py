"""One script under every launcher: the same numbers on each rank, a clean end, nothing left behind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import TORCHRUN, Launcher, Started, free_port, launcher_in

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TWO: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
# What a process says that did not close its process group, or died on the way out.
ABORTED = ("terminate called", "core dumped", "destroy_process_group", "Segmentation", "leaked")


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    with launcher_in(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a run of two ranks gives under torchrun."""
    with launcher_in(tmp_path_factory.mktemp("expected")) as found:
        one = found.start(*TORCHRUN, "--standalone", "--nproc-per-node=2")
        assert one.wait() == 0, one.output
        results = found.results()
        assert numbers(results[0]) == numbers(results[1])
        yield numbers(results[0])


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {"rows": result["rows"], "weights": result["weights"], "world_size": result["world_size"]}


def ended_well(*started: Started) -> None:
    for one in started:
        assert one.wait() == 0, one.output
        assert not one.left(), one.output
        assert not any(said in one.output for said in ABORTED), one.output


def slurm(rank: int, port: int) -> dict[str, str]:
    """What srun sets for one of two tasks on one node."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.mark.long
@pytest.mark.parametrize("source", ["settings", "arguments"])
def test_lightnings_own_launcher(launcher, expected, source):
    one = launcher.start(source=source, trainer=TWO)
    ended_well(one)
    results = launcher.results()
    assert [numbers(results[rank]) for rank in (0, 1)] == [expected] * 2
    assert results[0]["argv"] == results[1]["argv"] == [json.dumps({"source": source, "trainer": TWO})]
    assert results[0]["strategy"] == "hfbridge"


@pytest.mark.long
def test_four_ranks(launcher):
    ended_well(launcher.start(source="arguments", trainer={**TWO, "devices": 4}))
    ours = launcher.results()
    ended_well(launcher.start(*TORCHRUN, "--standalone", "--nproc-per-node=4", source="arguments"))
    theirs = launcher.results()
    assert [ours[rank]["world_size"] for rank in range(4)] == [4] * 4
    assert [numbers(ours[rank]) for rank in range(4)] == [numbers(theirs[rank]) for rank in range(4)]


@pytest.mark.long
def test_torchrun_with_a_training_arguments_at_the_top(launcher, expected):
    ended_well(launcher.start(*TORCHRUN, "--standalone", "--nproc-per-node=2", source="arguments"))
    results = launcher.results()
    assert [numbers(results[rank]) for rank in (0, 1)] == [expected] * 2


@pytest.mark.long
def test_accelerate_launch(launcher, expected):
    accelerate = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1")
    accelerate += ("--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}")
    ended_well(launcher.start(*accelerate, source="arguments"))
    results = launcher.results()
    assert [numbers(results[rank]) for rank in (0, 1)] == [expected] * 2


@pytest.mark.long
def test_accelerate_launch_on_cpus_starts_one_process_only(launcher):
    accelerate = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1")
    one = launcher.start(*accelerate, "--mixed_precision=no", "--dynamo_backend=no", source="arguments")
    assert one.wait() != 0
    assert "torchrun --nproc-per-node=2" in one.output
    assert not launcher.results()


def test_slurm(launcher, expected):
    port = free_port()
    ended_well(*(launcher.start(variables=slurm(rank, port)) for rank in (0, 1)))
    results = launcher.results()
    assert [numbers(results[rank]) for rank in (0, 1)] == [expected] * 2


@pytest.mark.long
def test_an_interactive_job_of_slurm_is_none(launcher, expected):
    variables = {**slurm(0, free_port()), "SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1"}
    ended_well(launcher.start(variables=variables, trainer=TWO))
    results = launcher.results()
    assert [numbers(results[rank]) for rank in (0, 1)] == [expected] * 2


@pytest.mark.long
def test_two_agents_of_torchrun(launcher, expected):
    port = free_port()
    agents = [
        launcher.start(
            *TORCHRUN,
            *("--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1"),
            *("--master-addr=127.0.0.1", f"--master-port={port}"),
            map=True,
        )
        for node in (0, 1)
    ]
    ended_well(*agents)
    results = launcher.results()
    assert [numbers(results[rank]) for rank in (0, 1)] == [expected] * 2
    # On each node two rows for trial, and all rows.
    assert sorted((launcher.folder / "calls").read_text().split()) == ["2", "2", "21", "21"]


@pytest.mark.long
def test_two_nodes_of_lightnings_own_launcher(launcher):
    """Two ranks on each of two nodes."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [
        launcher.start(
            variables={**address, "NODE_RANK": str(node)}, trainer={**TWO, "num_nodes": 2}, map=True
        )
        for node in (0, 1)
    ]
    ended_well(*nodes)
    results = launcher.results()
    assert [results[rank]["world_size"] for rank in range(4)] == [4] * 4
    assert len({results[rank]["weights"] for rank in range(4)}) == 1
    assert sorted((launcher.folder / "calls").read_text().split()) == ["2", "2", "21", "21"]


@pytest.mark.long
def test_plain_lightning_with_its_own_ddp(launcher, expected):
    ended_well(launcher.start(plain=True, trainer=TWO))
    results = launcher.results()
    assert [numbers(results[rank]) for rank in (0, 1)] == [expected] * 2
    assert results[0]["strategy"] == "lightning"


# A restart.


@pytest.mark.long
@pytest.mark.parametrize("where", ["standalone", "static"])
def test_torchrun_restarts_after_a_kill(launcher, expected, where):
    place = "--standalone" if where == "standalone" else f"--master-port={free_port()}"
    one = launcher.start(*TORCHRUN, place, "--nproc-per-node=2", "--max-restarts=1", fault="kill")
    ended_well(one)
    results = launcher.results()
    assert [numbers(results[rank]) for rank in (0, 1)] == [expected] * 2
    assert [results[rank]["attempt"] for rank in (0, 1)] == ["1", "1"]
    assert (launcher.folder / "fault").exists()


@pytest.mark.long
def test_restarts_with_a_training_arguments_at_the_top(launcher, expected):
    """It opens the process group by itself, at a store that torchrun must not have kept."""
    restarting = (*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    one = launcher.start(*restarting, variables=own_store, fault="kill", source="arguments")
    ended_well(one)
    results = launcher.results()
    assert [numbers(results[rank]) for rank in (0, 1)] == [expected] * 2
    assert [results[rank]["attempt"] for rank in (0, 1)] == ["1", "1"]
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in one.output


@pytest.mark.long
def test_what_a_restart_would_need_is_told_before(launcher):
    restarting = (*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    one = launcher.start(*restarting, source="arguments")
    ended_well(one)
    assert one.output.count("Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == 1


@pytest.mark.long
def test_two_agents_restart_after_a_kill(launcher, expected):
    """The agent whose rank was killed counts a restart, the other one may not."""
    port = free_port()
    where = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job")
    two = ("--nnodes=2", "--nproc-per-node=1", "--max-restarts=2")
    agents = [launcher.start(*TORCHRUN, *two, f"--node-rank={n}", *where, fault="kill") for n in (0, 1)]
    ended_well(*agents)
    results = launcher.results()
    assert [numbers(results[rank]) for rank in (0, 1)] == [expected] * 2
    assert (launcher.folder / "fault").exists()


# What contradicts.


@pytest.mark.long
def test_devices_beside_torchrun(launcher):
    one = launcher.start(*TORCHRUN, "--standalone", "--nproc-per-node=2", trainer={**TWO, "devices": 3})
    assert one.wait() != 0
    assert "Trainer(devices=3)" in one.output
    assert "WORLD_SIZE=2" in one.output


# What is on the console.


@pytest.mark.long
def test_the_console(launcher):
    """Notes come from the first rank only, there is one bar, and no warning of what hfbridge does."""
    one = launcher.start(trainer=TWO, bar=True, settings={"eval_steps": 7}, source="arguments")
    ended_well(one)
    output = one.output
    assert output.count("hfbridge: eval_steps has no effect") == 1
    assert 1 <= output.count("Epoch 1/1: 100%") <= 2  # drawn again when it is closed
    for unwanted in ("broadcast_buffers", "Traceback", "OMP_NUM_THREADS", "All distributed processes"):
        assert unwanted not in output


@pytest.mark.long
def test_rows_are_printed_once(launcher):
    one = launcher.start(trainer=TWO)
    ended_well(one)
    assert one.output.count("{'loss': ") == 3

"""A native Trainer that a script has made, moved to several ranks: the numbers that it has on them itself."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfbridge.settings.deepspeed_config import preset
from tests.distributed.launch import TORCHRUN, Launcher, free_port, launcher_in

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TWO_OF_TORCHRUN = (*TORCHRUN, "--standalone", "--nproc-per-node=2")


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    with launcher_in(tmp_path) as found:
        yield found


def run(launcher: Launcher, *arguments: str, **job: Any) -> dict[int, dict[str, Any]]:
    """Run the script; returns what its ranks have written."""
    shutil.copy(Path(__file__).with_name("moved_script.py"), launcher.folder / "moved.py")
    on_cpu = {"DS_ACCELERATOR": "cpu"}
    started = launcher.start(*arguments, "moved.py", json.dumps(job), script=False, variables=on_cpu)
    assert started.wait() == 0, started.output
    assert not started.left(), started.output
    return launcher.results()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, dict[str, Any]]]:
    """What the native Trainer does on two ranks."""
    with launcher_in(tmp_path_factory.mktemp("theirs")) as launcher:
        yield run(launcher, *TWO_OF_TORCHRUN, engine="native")


def assert_same(theirs: dict[int, dict[str, Any]], ours: dict[int, dict[str, Any]], strategy: str) -> None:
    """Compare the rows of the first rank, where natively all are kept, and the weights of all."""
    assert [ours[rank]["strategy"] for rank in (0, 1)] == [strategy] * 2
    assert [ours[rank]["world_size"] for rank in (0, 1)] == [2, 2]
    assert ours[0]["rows"] == theirs[0]["rows"]
    assert [ours[rank]["weights"] for rank in (0, 1)] == [theirs[rank]["weights"] for rank in (0, 1)]


@pytest.mark.long
def test_lightnings_own_launcher(launcher: Launcher, theirs: Any) -> None:
    assert_same(theirs, run(launcher, engine="moved", trainer={"strategy": "ddp", "devices": 2}), "ddp")


@pytest.mark.long
@pytest.mark.deepspeed
def test_another_strategy_than_the_script_has(
    launcher: Launcher, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The numbers are those of the native Trainer with that strategy."""
    with launcher_in(tmp_path_factory.mktemp("theirs")) as native:
        theirs = run(native, *TWO_OF_TORCHRUN, engine="native", settings={"deepspeed": preset(2)})
    ours = run(launcher, engine="moved", trainer={"strategy": "deepspeed_stage_2", "devices": 2})
    assert_same(theirs, ours, "deepspeed")


@pytest.mark.long
def test_torchrun(launcher: Launcher, theirs: Any) -> None:
    assert_same(theirs, run(launcher, *TWO_OF_TORCHRUN, engine="moved"), "ddp")


@pytest.mark.long
def test_an_accelerate_config(launcher: Launcher, theirs: Any) -> None:
    config = {
        "distributed_type": "MULTI_CPU",
        "num_processes": 2,
        "main_process_port": free_port(),
        "mixed_precision": "no",
    }
    path = launcher.folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(config))
    ours = run(launcher, engine="moved", trainer={"accelerate_config": str(path)})
    assert_same(theirs, ours, "ddp")

"""Processes of an engine are followed, and ended with all that they have started."""

import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hfbridge.compare import processes
from hfbridge.compare.engines import Engine
from hfbridge.compare.processes import Processes, last_lines

# Starts another process in a session of its own, as torchrun does, and does not listen to SIGTERM.
PARENT = """
import pathlib, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path("started").write_text(str(child.pid))
time.sleep(600)
"""
WRITER = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
(folder / "begun.json").write_text('{"steps": 3}')
with (folder / "rank-0.jsonl").open("w") as file:
    for _ in range(3):
        file.write("{}\\n")
print("RANK" in os.environ, os.environ.get("PYTHONHASHSEED"))
sys.exit(int(sys.argv[2]))
"""


def start(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> Processes:
    command = [sys.executable, "-c", script, *arguments]
    monkeypatch.setattr(processes, "_command", lambda *given, **named: command)
    Path("engine").mkdir(exist_ok=True)
    return Processes(Engine.parse("native"), Path("job.py"), Path("engine"), ranks=1, steps=None)


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE_S", 0.5)
    seen: list[int] = []

    def interrupt(done: int, total: int | None) -> None:
        if Path("started").exists() and (text := Path("started").read_text()):
            seen.append(int(text))
            raise KeyboardInterrupt

    def follow() -> None:
        with start(monkeypatch, PARENT) as found:
            seen.append(found.pid)
            found.follow(interrupt)

    with pytest.raises(KeyboardInterrupt):
        follow()
    assert len(seen) == 2
    end = time.monotonic() + 5
    while any(psutil.pid_exists(pid) for pid in seen) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in seen if psutil.pid_exists(pid)]


@pytest.mark.parametrize("code", [0, 3])
def test_steps_are_followed_to_the_end(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setenv("RANK", "1")
    shown: list[tuple[int, int | None]] = []
    with start(monkeypatch, WRITER, "engine", str(code)) as found:
        assert found.follow(lambda *step: shown.append(step)) is (code == 0)
    assert shown[-1] == (3, 3)
    assert Path("engine/output.txt").read_text() == "False 0\n"


def test_the_command_asks_torchrun_for_ranks_and_for_strategies() -> None:
    def command(name: str, **given: Any) -> str:
        values = {"ranks": 1, "steps": None, **given}
        return " ".join(processes._command(Engine.parse(name), Path("job.py"), Path("out"), **values))

    assert "torch.distributed.run" not in command("native")
    assert "--nproc-per-node=2 -m hfbridge.compare.worker" in command("native", ranks=2)
    assert "--nproc-per-node=1" in command("lightning:fsdp2")
    assert command("native", steps=5).endswith("--steps=5")


def test_without_an_error_the_end_of_the_output_is_told(tmp_path: Path) -> None:
    (tmp_path / "output.txt").write_text("\n".join(f"line {n}" for n in range(100)))
    assert last_lines(tmp_path).splitlines()[0] == "line 60"
    (tmp_path / "output.txt").write_text("")
    assert last_lines(tmp_path) == "It has ended without any output."

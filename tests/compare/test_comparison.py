"""compare: what it refuses, what it writes, and how it goes on; its processes are stood in for here."""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hfbridge import JobError
from hfbridge.compare import Comparison, compare, comparison, files
from hfbridge.compare.engines import Engine
from hfbridge.compare.job import digest_of
from hfbridge.compare.record import Step

SCRIPT = "from rows import ROWS\n\n\ndef build():\n    return ROWS\n"
ENGINES = ("native", "accelerate", "lightning:deepspeed_stage_2")
STEP = Step(1, 0.5, 1.0, 2.0, 0.1, "a", 4, "r", "p", 3.0, 0.5, 2**20)


class StandIn:
    """In place of `Processes`: leaves what they leave, or fails, for each engine as it is told."""

    started: list[str]
    plans: dict[str, Callable[[Path], bool]]

    def __init__(self, engine: Engine, job: Path, folder: Path, *, ranks: int, steps: int | None) -> None:
        self.started.append(engine.name)
        self._engine, self._job, self._folder, self._ranks = engine, job, folder, ranks
        (folder / "output.txt").write_text("")

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def follow(self, show: Callable[[int, int | None], None]) -> bool:
        show(0, None)
        if self._engine.name in self.plans:
            return self.plans[self._engine.name](self._folder)
        near = self._job.resolve().parent
        for rank in range(self._ranks):
            rows = [replace(STEP, step=n, samples=f"{n}{rank}").as_row() for n in (1, 2, 3)]
            files.write_lines(self._folder / f"rank-{rank}.jsonl", rows)
            result = {
                "settings": {"learning_rate": 0.1, "kind": self._engine.kind},
                "notes": [],
                "seconds_training": 2.0 + rank,
                "seconds_startup": 1.0,
                "peak_memory_bytes": 2**20 * (rank + 1),
                "first_parameters": "w",
                "sources": {name: digest_of(near / name) for name in ("job.py", "rows.py")},
            }
            files.write_json(self._folder / f"result-{rank}.json", result)
        files.write_lines(self._folder / "metrics.jsonl", [{"step": 3, "eval_loss": 0.5}])
        (self._folder / "saved").mkdir()
        show(3, 3)
        return True


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """Start no processes; beside the script lies what it imports."""
    Path("job.py").write_text(SCRIPT)
    Path("rows.py").write_text("ROWS = 3\n")
    monkeypatch.setattr(StandIn, "started", [], raising=False)
    monkeypatch.setattr(StandIn, "plans", {}, raising=False)
    monkeypatch.setattr(comparison, "Processes", StandIn)
    return StandIn


def run(out: str = "out", **options: Any) -> Comparison:
    given = {"job": Path("job.py"), "engines": ENGINES, "ranks": 2, "show_progress": False, **options}
    return compare(given.pop("job"), out=Path(out), **given)


def started() -> list[str]:
    """Which engines have been started since the last time."""
    found = list(StandIn.started)
    StandIn.started.clear()
    return found


def fail(folder: Path) -> bool:
    (folder / "error-1.txt").write_text("Traceback\nValueError: rank 1 has no rows\n")
    os.utime(folder / "error-1.txt", (1, 1))
    (folder / "error-0.txt").write_text("RuntimeError: connection closed\n")
    return False


def be_interrupted(folder: Path) -> bool:
    raise KeyboardInterrupt


def be_refused(folder: Path) -> bool:
    (folder / "refused.txt").write_text("job.py: build() returns None. Write def build().")
    return False


# What is written.


def test_the_files_have_the_form_that_is_told() -> None:
    found = run()
    assert found.agrees
    told = json.loads(Path("out/comparison.json").read_text())
    assert list(told) == [
        "schema", "job", "digest", "engines", "ranks", "steps", "environment", "date", "settings", "verdicts"
    ]  # fmt: skip
    assert (told["schema"], told["job"], told["engines"], told["ranks"], told["steps"]) == (
        1,
        "job.py",
        list(ENGINES),
        2,
        3,
    )
    assert {"versions", "cpu", "cores", "system", "python"} == set(told["environment"])
    kinds = next(row for row in told["settings"] if row["name"] == "kind")
    assert kinds["values"] == {ENGINES[0]: "native", ENGINES[1]: "accelerate", ENGINES[2]: "lightning"}
    assert [(row["theirs"], row["ours"], row["grade"]) for row in told["verdicts"]] == [
        ("native", "accelerate", "exact"),
        ("native", "lightning:deepspeed_stage_2", "exact"),
    ]
    folder = Path("out/lightning-deepspeed_stage_2")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["done.json", "metrics.jsonl", "output.txt", "steps.jsonl"]
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert set(steps[0]) == set(STEP.as_row())
    assert steps[0]["rows"] == 8
    done = json.loads((folder / "done.json").read_text())
    assert (done["engine"], done["seconds_training"], done["peak_memory_bytes"]) == (ENGINES[2], 3.0, 2**21)
    assert done["samples_per_second"] == pytest.approx(24 / 1.5)
    assert done["final_parameters"] == "p"


def test_no_paths_and_no_names_of_machines_are_written(tmp_path: Path) -> None:
    run()
    text = Path("out/comparison.json").read_text() + Path("out/native/done.json").read_text()
    assert str(tmp_path) not in text
    assert socket.gethostname() not in text


def test_the_table_can_be_read() -> None:
    StandIn.plans["accelerate"] = fail
    text = str(run())
    assert "native                           3       16.0      3.0         2" in text
    assert "accelerate                   failed" in text
    assert "lightning:deepspeed_stage_2 beside native: exact\n  All 3 steps are equal to the bit" in text
    assert "  accelerate has failed: ValueError: rank 1 has no rows" in text


def test_progress_is_told_of_each_engine(capsys: pytest.CaptureFixture[str]) -> None:
    StandIn.plans["accelerate"] = fail
    run(show_progress=True)
    shown = capsys.readouterr().err
    assert "native                      3/3" in shown
    assert "done in" in shown
    assert "failed: ValueError: rank 1 has no rows" in shown
    run(show_progress=True)
    assert "recorded before" in capsys.readouterr().err
    run(show_progress=False)
    assert capsys.readouterr() == ("", "")


# Engines that fail.


def test_an_engine_that_fails_is_told_and_the_others_go_on() -> None:
    StandIn.plans["accelerate"] = fail
    found = run()
    assert started() == list(ENGINES)
    assert [verdict.grade for verdict in found.verdicts] == ["failed", "exact"]
    assert not found.agrees
    assert "rank 1 has no rows" in Path("out/accelerate/failed.txt").read_text()  # the error that came first
    assert "accelerate" not in found.results


def test_beside_a_reference_that_fails_all_have_failed() -> None:
    StandIn.plans["native"] = fail
    assert [verdict.grade for verdict in run().verdicts] == ["failed", "failed"]


def test_a_job_that_is_wrong_ends_the_comparison() -> None:
    StandIn.plans["native"] = be_refused
    with pytest.raises(JobError, match=r"build\(\) returns None"):
        run()
    assert started() == ["native"]


# Going on.


def test_an_interrupted_comparison_goes_on() -> None:
    StandIn.plans[ENGINES[2]] = be_interrupted
    with pytest.raises(KeyboardInterrupt):
        run()
    assert started() == list(ENGINES)
    StandIn.plans.clear()
    found = run()
    assert started() == [ENGINES[2]]
    assert found.agrees
    assert [len(result["sources"]) for result in found.results.values()] == [2, 2, 2]


def test_what_has_failed_is_tried_again() -> None:
    StandIn.plans["accelerate"] = fail
    run()
    StandIn.plans.clear()
    started()
    assert run().agrees
    assert started() == ["accelerate"]
    assert not Path("out/accelerate/failed.txt").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda: Path("job.py").write_text(SCRIPT + "\n\nMORE = 1\n"),
        lambda: Path("rows.py").write_text("ROWS = 4\n"),
        lambda: Path("out/native/done.json").write_text(
            Path("out/native/done.json").read_text().replace('"torch": "', '"torch": "0.')
        ),
    ],
)
def test_a_changed_job_or_version_is_trained_anew(change: Callable[[], object]) -> None:
    run()
    started()
    change()
    run()
    assert started()[:1] == ["native"]


@pytest.mark.parametrize("options", [{"ranks": 1}, {"steps": 2}, {"resume": False}])
def test_other_options_are_trained_anew(options: dict[str, Any]) -> None:
    run()
    started()
    run(**options)
    assert started() == list(ENGINES)


def test_engines_may_be_added() -> None:
    run(engines=ENGINES[:2])
    started()
    found = run(engines=[*ENGINES[:2], "lightning@exact"])
    assert started() == ["lightning@exact"]
    assert found.engines == ("native", "accelerate", "lightning@exact")


# What is refused, before anything is started or written.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engines": ["native", "lightening"]}, "did you mean lightning"),
        ({"ranks": 0}, "ranks = 0"),
        ({"ranks": True}, "ranks = True"),
        ({"ranks": 0, "steps": 0}, "steps = 0"),
        ({"steps": 1.5}, "must be a whole number, 1 at least"),
        ({"job": Path("jobb.py")}, "no such file"),
        ({"job": Path("rows.py")}, "has no build"),
        ({"out": "job.py"}, "is a file"),
        ({"out": "."}, "holds other files, and no comparison"),
    ],
)
def test_wrong_input_is_told_before_anything_is_done(options: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as caught:
        run(**options)
    assert said in str(caught.value)
    assert started() == []
    assert sorted(os.listdir()) == ["job.py", "rows.py"]


def test_the_folder_of_another_job_is_left_alone() -> None:
    run()
    started()
    Path("other.py").write_text(SCRIPT)
    with pytest.raises(JobError, match=r"holds the comparison of another job, job\.py, and not of other\.py"):
        run(job=Path("other.py"))
    assert started() == []


def test_a_damaged_file_is_named() -> None:
    run()
    Path("out/native/done.json").write_text("{")
    with pytest.raises(JobError, match=r"native/done\.json: cannot be read .* Delete it"):
        run()
    Path("out/comparison.json").write_text("[]")
    with pytest.raises(JobError, match=r"comparison\.json: holds no object"):
        run()

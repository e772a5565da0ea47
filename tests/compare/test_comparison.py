"""compare: what it refuses, what it writes, and how it goes on; its processes are stood in for here."""

import json
import os
import re
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
from hfbridge.compare.report import write_report

SCRIPT = "from rows import ROWS\n\n\ndef build():\n    return ROWS\n"
ENGINES = ("native", "accelerate", "lightning:deepspeed_stage_2")
STEP = Step(1, 0.5, 1.0, 2.0, 0.1, "a", 4, "r", "p", 3.0, 0.5, 2**20)


class StandIn:
    """In place of `Processes`: leaves what they leave, or fails, for each engine as it is told."""

    started: list[str]
    plans: dict[str, Callable[[Path], bool]]
    steps = 3
    other: dict[str, float]

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
            rows = [self._step(n, rank).as_row() for n in range(1, self.steps + 1)]
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

    def _step(self, number: int, rank: int) -> Step:
        """Make a step, whose gradient norm is so many times that of others."""
        norm = (STEP.grad_norm or 0.0) * self.other.get(self._engine.name, 1.0)
        return replace(STEP, step=number, samples=f"{number}{rank}", grad_norm=norm)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """Start no processes; beside the script lies what it imports."""
    Path("job.py").write_text(SCRIPT)
    Path("rows.py").write_text("ROWS = 3\n")
    monkeypatch.setattr(StandIn, "started", [], raising=False)
    monkeypatch.setattr(StandIn, "plans", {}, raising=False)
    monkeypatch.setattr(StandIn, "other", {}, raising=False)
    monkeypatch.setattr(StandIn, "steps", 3)
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


def fail_otherwise(folder: Path) -> bool:
    lines = "".join(f"line {n}\n" for n in range(10))
    (folder / "error-0.txt").write_text(f"Traceback\n{lines}KeyError: 'labels'\n")
    return False


def be_interrupted(folder: Path) -> bool:
    raise KeyboardInterrupt


def be_refused(folder: Path) -> bool:
    (folder / "job-error.txt").write_text("job.py: build() returns None. Write def build().")
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


def test_what_came_of_it_can_be_read() -> None:
    StandIn.plans["accelerate"] = fail
    lines = str(run()).splitlines()
    assert lines[0] == "accelerate failed; lightning:deepspeed_stage_2 equals native to the bit."
    assert [line.split() for line in lines[2:7]] == [
        ["steps", "samples/s", "start-up", "training", "in", "all", "peak", "MiB"],
        ["native", "3", "n/a", "1", "s", "3", "s", lines[3].split()[7], lines[3].split()[8], "2"],
        ["accelerate", "failed"],
        [ENGINES[2], "3", "n/a", "1", "s", "3", "s", lines[5].split()[7], lines[5].split()[8], "2"],
        ["Too", "few", "steps", "for", "a", "speed", "(3;", "20", "are", "needed)."],
    ]
    text = "\n".join(lines)
    assert "lightning:deepspeed_stage_2 beside native: exact\n  All 3 steps are equal to the bit" in text
    assert "0.0e+00" not in text
    assert "accelerate beside native: failed\n  accelerate has failed: ValueError: rank 1 has no rows" in text


def test_speeds_are_told_of_enough_steps() -> None:
    StandIn.steps = 20
    text = str(run())
    assert "16.0" in text
    assert "Too few" not in text
    assert text.splitlines()[0] == (
        "accelerate and lightning:deepspeed_stage_2 equal native to the bit, over 20 steps."
    )


def test_each_failed_engine_tells_its_own_error_and_where_all_of_it_is() -> None:
    StandIn.plans |= {"native": fail, "accelerate": fail_otherwise}
    text = str(run())
    first, second = text.index("native has failed; all"), text.index("accelerate has failed; all")
    assert f"is in {Path('out/native/output.txt')}, and its error ends with:" in text[first:second]
    assert "  ValueError: rank 1 has no rows" in text[first:second]
    assert "  KeyError: 'labels'" in text[second:]
    assert "  line 9\n" in text[second:]
    assert "  line 2\n" not in text[second:]  # but the end alone
    assert "native has failed: ValueError: rank 1 has no rows; accelerate has failed: KeyError" in text
    assert text.startswith("native and accelerate failed.")


def test_an_engine_of_lightning_is_judged_beside_the_native_one_of_its_strategy() -> None:
    StandIn.other["native:ddp"] = StandIn.other["lightning:ddp"] = 1 + 1e-6
    found = run(engines=["native", "lightning:ddp", "native:ddp"])
    assert [(v.theirs, v.ours, v.grade) for v in found.verdicts] == [
        ("native", "lightning:ddp", "close"),
        ("native", "native:ddp", "close"),
        ("native:ddp", "lightning:ddp", "exact"),
    ]
    assert str(found).startswith(
        "lightning:ddp equals native:ddp to the bit; lightning:ddp and native:ddp are close to native "
        "(differences of at most 1e-06), over 3 steps."
    )
    assert "lightning:ddp beside native:ddp: exact" in str(found)
    assert "  Largest relative differences: gradient norm 1.0e-06.\n" in str(found)
    page = write_report(Path("out")).read_text()
    assert "lightning:ddp equals native:ddp to the bit; lightning:ddp and native:ddp are close" in page
    assert "beside native:ddp</span>" in page


def test_progress_is_told_of_each_engine(capsys: pytest.CaptureFixture[str]) -> None:
    StandIn.plans["accelerate"] = fail
    run(show_progress=True)
    shown = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in shown[:4]] == ["native (1 of 3)"] * 2 + [
        "accelerate (2 of 3)"
    ] * 2
    assert shown[0].endswith(": begins")
    assert re.search(r": done in [0-9.]+ m?s$", shown[1])
    assert re.search(r": failed after [0-9.]+ m?s: ValueError: rank 1 has no rows$", shown[3])
    run(show_progress=True)
    assert "native (1 of 3): recorded before\n" in capsys.readouterr().err
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
@pytest.mark.parametrize("options", [{}, {"resume": False}])
def test_records_of_a_changed_job_are_replaced_if_that_is_said(
    change: Callable[[], object], options: dict[str, Any]
) -> None:
    run()
    started()
    change()
    before = Path("out/comparison.json").read_bytes(), Path("out/native/steps.jsonl").stat().st_mtime_ns
    with pytest.raises(JobError, match="--overwrite"):
        run(**options)
    after = Path("out/comparison.json").read_bytes(), Path("out/native/steps.jsonl").stat().st_mtime_ns
    assert (started(), after) == ([], before)
    assert run(**options, overwrite=True).agrees
    assert started()[:1] == ["native"]


@pytest.mark.parametrize("options", [{"ranks": 1}, {"steps": 2}])
def test_records_with_other_options_are_replaced_if_that_is_said(options: dict[str, Any]) -> None:
    run()
    started()
    with pytest.raises(JobError, match="holds records that were made otherwise"):
        run(**options)
    assert started() == []
    run(**options, overwrite=True)
    assert started() == list(ENGINES)


def test_the_same_job_is_trained_anew_if_that_is_said() -> None:
    run()
    started()
    run(resume=False)
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
    with pytest.raises(JobError, match=r"it is of another job, job\.py"):
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

"""What is in a comparison's folder already: nothing of it is lost unless that is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest

from hfbridge import JobError
from hfbridge.compare import files
from hfbridge.compare.earlier import differences, is_recorded, open_folder
from hfbridge.compare.engines import Engine, parse_engines
from hfbridge.compare.job import digest_of

JOB, OUT = Path("job.py"), Path("out")
OPTIONS: dict[str, Any] = {"ranks": 2, "steps": None}
NAMES = ("native", "lightning:fsdp2")


@pytest.fixture(autouse=True)
def recorded() -> None:
    """A job, what it imports, and a comparison of two engines that are done."""
    JOB.write_text("from rows import ROWS\n")
    Path("rows.py").write_text("ROWS = 3\n")
    OUT.mkdir()
    (OUT / files.COMPARISON).write_text(json.dumps({"engines": NAMES}))
    for engine in parse_engines(NAMES):
        (OUT / engine.slug).mkdir()
        write_done(engine)


def write_done(engine: Engine, **other: Any) -> None:
    sources = {name: digest_of(Path(name)) for name in ("job.py", "rows.py")}
    done = {"engine": engine.name, **OPTIONS, "versions": files.versions(), "sources": sources, **other}
    files.write_json(OUT / engine.slug / "done.json", done)


def opens(names: tuple[str, ...] = NAMES, *, overwrites: bool = False, **options: Any) -> None:
    open_folder(OUT, JOB, parse_engines(names), {**OPTIONS, **options}, overwrites=overwrites)


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in OUT.rglob("*") if path.is_file()}


def test_records_of_the_same_job_are_taken_over() -> None:
    opens()
    opens((*NAMES, "lightning@exact"))
    assert all(is_recorded(engine, JOB, OUT / engine.slug, OPTIONS) for engine in parse_engines(NAMES))


CHANGES = [
    ({"ranks": 1}, "ranks was 2 and is 1"),
    ({"steps": 5}, "steps was not given and is 5"),
]


@pytest.mark.parametrize(("options", "said"), CHANGES)
def test_records_with_other_options_are_named_and_kept(options: dict[str, Any], said: str) -> None:
    before = contents()
    with pytest.raises(JobError) as caught:
        opens(**options)
    text = " ".join(str(caught.value).split())
    assert "nothing was started" in text
    assert f"native, lightning:fsdp2 {said}." in text
    assert "another folder (--out)" in text
    assert "--overwrite" in text
    assert contents() == before


def test_files_that_have_changed_are_named() -> None:
    Path("rows.py").write_text("ROWS = 4\n")
    with pytest.raises(JobError, match=r"rows\.py has changed"):
        opens()
    Path("rows.py").unlink()
    with pytest.raises(JobError, match=r"rows\.py is no longer there"):
        opens()


def test_another_job_of_the_same_folder_is_named() -> None:
    other = Path("other.py")
    other.write_text("")
    with pytest.raises(JobError, match=r"it is of another job, job\.py, rows\.py"):
        open_folder(OUT, other, parse_engines(NAMES), OPTIONS, overwrites=False)


def test_other_versions_are_named() -> None:
    native = Engine.parse("native")
    write_done(native, versions={**files.versions(), "torch": "0.1", "apex": "1"})
    with pytest.raises(JobError) as caught:
        opens()
    now = files.versions()["torch"]
    text = " ".join(str(caught.value).split())
    assert f"native apex was 1 and is not installed; torch was 0.1 and is {now}." in text


def test_another_engine_in_the_same_folder_is_named() -> None:
    ours, other = Engine.parse("lightning:fsdp2"), Engine.parse("lightning")
    done = files.read_done(OUT / ours.slug)
    assert done is not None
    assert list(differences(done, other, JOB, OPTIONS)) == ["it is of the engine lightning:fsdp2"]


def test_engines_that_are_not_asked_for_are_looked_at_too() -> None:
    """Their verdicts stand in the file that would be written anew."""
    with pytest.raises(JobError, match=r"lightning:fsdp2 +ranks was 2"):
        opens(("accelerate", "lightning"), ranks=1)


def test_overwriting_deletes_what_does_not_fit_and_nothing_else() -> None:
    write_done(Engine.parse("native"), ranks=1)
    (OUT / "mine").mkdir()
    opens(overwrites=True)
    assert sorted(path.name for path in OUT.iterdir()) == ["comparison.json", "lightning-fsdp2", "mine"]


def test_names_of_the_file_lead_to_no_other_folder() -> None:
    (OUT / files.COMPARISON).write_text(json.dumps({"engines": ["..", "native:../..", 3, "native"]}))
    Path("done.json").write_text(json.dumps({"engine": "..", "versions": {}, "sources": {}}))
    with pytest.raises(JobError) as caught:
        opens(ranks=1)
    assert [problem.subject for problem in caught.value.problems] == ["native, lightning:fsdp2"]
    opens(ranks=1, overwrites=True)
    assert JOB.exists()


def test_what_has_no_end_is_nothing_to_lose() -> None:
    for engine in parse_engines(NAMES):
        (OUT / engine.slug / "done.json").unlink()
    opens(ranks=1)

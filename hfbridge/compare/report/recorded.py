"""Reading the files of a comparison, none trusted; knows neither world.

| file | what is read |
| --- | --- |
| `comparison.json` | job, engines, ranks, environment, settings, verdicts; `schema` says which form |
| `<slug>/steps.jsonl` | a line an optimizer step |
| `<slug>/metrics.jsonl` | a line an evaluation; may be missing |
| `<slug>/done.json` | totals, notes; missing when the engine did not reach its end |
| `<slug>/failed.txt` | the last lines of an engine that failed; may be missing |
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfbridge.errors import Problem, ReportError, raise_problems

SCHEMA = 1
GRADES = ("exact", "close", "same trajectory", "differs", "failed")
NUMBERS = ("epoch", "loss", "grad_norm", "learning_rate", "parameter_norm", "seconds", "memory_bytes", "rows")
CHECKSUMS = ("samples", "random", "parameters")
AGAIN = "run `hfbridge compare` again with the same --out"

Column = list[Any]


@dataclass(frozen=True)
class Verdict:
    """What was found about one pair of engines.

    Attributes:
        theirs: the engine compared with.
        ours: the engine that was compared.
        grade: one of `GRADES`.
        first_step: the first step that differs; `None` where none does.
        quantity: what differs there.
        theirs_value: the quantity at that step.
        ours_value: likewise.
        largest: the largest relative difference of each quantity.
        tolerance: what a difference may be at most.
        why: why this grade and tolerance.
        cause: what probably makes the difference.
    """

    theirs: str
    ours: str
    grade: str
    first_step: int | None = None
    quantity: str | None = None
    theirs_value: Any = None
    ours_value: Any = None
    largest: dict[str, float] = field(default_factory=dict)
    tolerance: float | None = None
    why: str = ""
    cause: str | None = None


@dataclass(frozen=True)
class Run:
    """What one engine left.

    Attributes:
        engine: its name.
        steps: numbers of the optimizer steps, ascending.
        columns: of each quantity its value at each of the steps; `None` where there is none.
        metrics: the evaluations, each with its `step`.
        done: the content of `done.json`; `None` if the engine did not reach its end.
        failure: the last lines of an engine that failed; `None` if they were not kept.
    """

    engine: str
    steps: list[int]
    columns: dict[str, Column]
    metrics: list[dict[str, Any]]
    done: dict[str, Any] | None
    failure: str | None

    @property
    def notes(self) -> list[str]:
        """What the engine told about itself."""
        return [str(note) for note in (self.done or {}).get("notes") or []]

    def total(self, name: str) -> float | None:
        """A number of `done.json`; `None` where it is missing."""
        value: Any = (self.done or {}).get(name)
        return float(value) if is_number(value) else None


@dataclass(frozen=True)
class Recorded:
    """A whole comparison; the first of the runs is the one compared with."""

    job: str
    ranks: int
    steps: int | None
    date: str
    environment: dict[str, Any]
    settings: list[dict[str, Any]]
    verdicts: list[Verdict]
    runs: list[Run]


def slug_of(engine: str) -> str:
    """Name of an engine's folder: `lightning-deepspeed_stage_2` of `lightning:deepspeed_stage_2`."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", engine).strip(".") or "-"


def read_comparison(folder: Path) -> Recorded:
    """Read the files of a comparison.

    Args:
        folder: the `--out` of the comparison.

    Returns:
        What was recorded. An engine that failed has what it wrote until then.

    Raises:
        ReportError: files are missing or damaged, or have another form; all of them are named.
    """
    if not folder.is_dir():
        message = f"{folder} is no folder; give the folder that `hfbridge compare --out` wrote."
        raise ReportError(message)
    problems: list[Problem] = []
    content = _read_overview(folder / "comparison.json", problems)
    if problems:
        _refuse(folder, problems)
    verdicts = [_verdict(row) for row in content.get("verdicts", [])]
    failed = {verdict.ours for verdict in verdicts if verdict.grade == "failed"}
    runs = [_read_run(folder, engine, engine in failed, problems) for engine in content["engines"]]
    if problems:
        _refuse(folder, problems)
    return Recorded(
        job=content["job"],
        ranks=content["ranks"],
        steps=content.get("steps"),
        date=str(content.get("date") or ""),
        environment=content.get("environment") or {},
        settings=content.get("settings") or [],
        verdicts=verdicts,
        runs=runs,
    )


def _refuse(folder: Path, problems: list[Problem]) -> None:
    """Name everything that is wrong."""
    raise_problems(ReportError, f"The comparison in {folder} cannot be shown; nothing was written.", problems)


def is_number(value: Any) -> bool:
    """Whether a value of a file is a number, and not a whole one too large to be computed with."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_absent_or(accepts: Callable[[Any], bool], row: dict[str, Any], name: str) -> bool:
    return row.get(name) is None or accepts(row[name])


def _is_setting(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("name"), str) and isinstance(row.get("values"), dict)


def _is_verdict(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("theirs"), str)
        and isinstance(row.get("ours"), str)
        and row.get("grade") in GRADES
        and (row.get("first_step") is None or _is_count(row["first_step"]))
        and (row.get("tolerance") is None or is_number(row["tolerance"]))
        and isinstance(row.get("largest") or {}, dict)
    )


def _is_list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(accepts, value))


# Key of comparison.json -> what it has to be, in a word and as a function.
FORM: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "job": ("a text", _is_text),
    "engines": (
        "a list of different names of at most 200 letters, the first that of the engine compared with",
        lambda value: (
            bool(value)
            and _is_list_of(_is_text)(value)
            and len(set(map(slug_of, value))) == len(value)
            and max(map(len, value)) <= 200
        ),
    ),
    "ranks": ("a whole number", _is_count),
}
MAY_BE_MISSING: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "steps": ("a whole number", _is_count),
    "environment": ("an object", lambda value: isinstance(value, dict)),
    "settings": ('a list of {"name": ..., "values": {engine: value}}', _is_list_of(_is_setting)),
    "verdicts": (
        'a list of {"theirs": ..., "ours": ..., "grade": ..., ...} with a grade of ' + ", ".join(GRADES),
        _is_list_of(_is_verdict),
    ),
}


def _read_overview(path: Path, problems: list[Problem]) -> dict[str, Any]:
    """The content of `comparison.json`, of the form that is known."""
    content = _read_object(path, problems)
    if content is None:
        return {}
    if content.get("schema") != SCHEMA:
        text = f"this version reads schema {SCHEMA}; {AGAIN}, or use the version of hfbridge that wrote it."
        problems.append(Problem(f"{path.name}: schema = {content.get('schema')!r}", text))
        return {}
    for key, (form, accepts) in {**FORM, **MAY_BE_MISSING}.items():
        value = content.get(key)
        if (value is None and key in MAY_BE_MISSING) or accepts(value):
            continue
        shown = repr(value) if len(repr(value)) < 40 else f"{repr(value)[:40]}..."
        problems.append(Problem(f"{path.name}: {key} = {shown}", f"has to be {form}; {AGAIN}."))
    return content


def _verdict(row: dict[str, Any]) -> Verdict:
    """One row of `verdicts`, whose form has been checked."""
    known: dict[str, Any] = {
        name: row[name] for name in Verdict.__dataclass_fields__ if row.get(name) is not None
    }
    told: dict[str, Any] = known.pop("largest", {})
    largest = {name: value for name, value in told.items() if is_number(value)}
    for name in {"quantity", "why", "cause"} & known.keys():
        known[name] = str(known[name])
    return Verdict(**known, largest=largest)


def _read_run(folder: Path, engine: str, has_failed: bool, problems: list[Problem]) -> Run:
    """What one engine left in its folder."""
    home = folder / slug_of(engine)
    done_path, failed_path = home / "done.json", home / "failed.txt"
    done = _read_object(done_path, problems) if done_path.exists() else None
    failure = failed_path.read_text(encoding="utf-8", errors="replace") if failed_path.exists() else None
    if not done_path.exists() and failure is None and not has_failed:
        text = f"is missing, and {engine} is not known to have failed: the comparison stopped; {AGAIN}."
        problems.append(Problem(f"{home.name}/done.json", text))
    if not isinstance((done or {}).get("notes") or [], list):
        problems.append(Problem(f"{home.name}/done.json", f"notes has to be a list of texts; {AGAIN}."))
    is_whole = done_path.exists()
    rows = _read_lines(home / "steps.jsonl", problems, needed=is_whole, is_whole=is_whole)
    steps, columns = _columns(home / "steps.jsonl", rows, problems)
    metrics = _read_lines(home / "metrics.jsonl", problems, needed=False, is_whole=is_whole)
    for number, row in enumerate(metrics, 1):
        if not _is_count(row.get("step")):
            text = f"step = {row.get('step')!r} has to be a whole number; {AGAIN}."
            problems.append(Problem(f"{home.name}/metrics.jsonl, line {number}", text))
    return Run(engine, steps, columns, metrics, done, failure)


def _columns(
    path: Path, rows: list[dict[str, Any]], problems: list[Problem]
) -> tuple[list[int], dict[str, Column]]:
    """Rows as columns, the first row of a wrong form named."""
    last = -1
    for number, row in enumerate(rows, 1):
        wrong = [
            *(
                f"{n} = {row[n]!r} has to be a number"
                for n in NUMBERS
                if not _is_absent_or(is_number, row, n)
            ),
            *(f"{n} = {row[n]!r} has to be a text" for n in CHECKSUMS if not _is_absent_or(_is_text, row, n)),
        ]
        step: Any = row.get("step")
        if not _is_count(step):
            wrong.append(f"step = {step!r} has to be a whole number")
        elif step <= last:
            wrong.append(f"step = {step} has to be greater than the one before it, {last}")
        if wrong:
            problems.append(
                Problem(f"{path.parent.name}/{path.name}, line {number}", f"{wrong[0]}; {AGAIN}.")
            )
            return [], {}
        last = row["step"]
    return [row["step"] for row in rows], {
        name: [row.get(name) for row in rows] for name in (*NUMBERS, *CHECKSUMS)
    }


def _read_object(path: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """The JSON object in a file; `None` and a problem if there is none."""
    name = path.name if path.name == "comparison.json" else f"{path.parent.name}/{path.name}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(Problem(name, f"is missing; {AGAIN}."))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(Problem(name, f"is damaged ({error}); delete it and {AGAIN}."))
    else:
        if isinstance(content, dict):
            return content
        problems.append(Problem(name, f"is damaged (it holds no JSON object); delete it and {AGAIN}."))
    return None


def _read_lines(path: Path, problems: list[Problem], *, needed: bool, is_whole: bool) -> list[dict[str, Any]]:
    """The JSON objects in a file, one a line.

    Args:
        path: the file.
        problems: to which is added what is wrong.
        needed: whether there must be one.
        is_whole: whether the last line must be whole, too; an engine that was killed may have left a part.
    """
    name = f"{path.parent.name}/{path.name}"
    again = f"delete {path.parent.name}/done.json and {AGAIN}"
    if not path.is_file():
        if needed:
            problems.append(Problem(name, f"is missing; {again}."))
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not is_whole and not lines[-1].endswith(b"\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = error
        if not isinstance(row, dict):
            reason = row if isinstance(row, Exception) else "no JSON object"
            problems.append(Problem(f"{name}, line {number}", f"is damaged ({reason}); {again}."))
            return []
        rows.append(row)
    if needed and not rows:
        problems.append(Problem(name, f"is empty; {again}."))
    return rows

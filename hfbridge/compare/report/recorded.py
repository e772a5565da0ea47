"""Read and check the files of a comparison.

| file | what is read |
| --- | --- |
| `comparison.json` | job, engines, ranks, environment, settings, verdicts; `schema` says which form |
| `<slug>/steps.jsonl` | a line per optimizer step |
| `<slug>/metrics.jsonl` | a line per evaluation; may be missing |
| `<slug>/done.json` | totals, notes; missing if the engine did not finish |
| `<slug>/failed.txt` | the last lines of an engine that failed; may be missing |
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from hfbridge.compare.engines import slug_of
from hfbridge.compare.files import COMPARISON, SCHEMA
from hfbridge.compare.verdict import Grade, Verdict
from hfbridge.errors import Problem, ReportError, raise_problems

GRADES: tuple[str, ...] = get_args(Grade)
_NUMBERS = (
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "parameter_norm",
    "seconds",
    "memory_bytes",
    "rows",
)
_CHECKSUMS = ("samples", "random", "parameters")
_AGAIN = "run `hfbridge compare` again with the same --out"


@dataclass(frozen=True)
class Run:
    """What one engine recorded.

    Attributes:
        engine: its name.
        steps: numbers of the optimizer steps, ascending.
        columns: of each quantity its value at each of the steps; `None` where there is none.
        metrics: the evaluations, each with its `step`.
        done: the content of `done.json`; `None` if the engine did not finish.
        failure: the last lines of an engine that failed; `None` if they were not kept.
    """

    engine: str
    steps: list[int]
    columns: dict[str, list[Any]]
    metrics: list[dict[str, Any]]
    done: dict[str, Any] | None
    failure: str | None

    def total(self, name: str) -> float | None:
        """Return a number of `done.json`; `None` where it is missing."""
        value: Any = (self.done or {}).get(name)
        return float(value) if is_number(value) else None


@dataclass(frozen=True)
class Recorded:
    """A comparison; the first of the runs is the one compared with."""

    job: str
    ranks: int
    steps: int | None
    date: str
    environment: dict[str, Any]
    settings: list[dict[str, Any]]
    verdicts: list[Verdict]
    runs: list[Run]


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
        raise ReportError(f"{folder} is no folder; give the folder that `hfbridge compare --out` wrote.")
    problems: list[Problem] = []
    content = _read_overview(folder / COMPARISON, problems)
    verdicts, runs = [], []
    if not problems:
        verdicts = [_to_verdict(row) for row in content.get("verdicts") or []]
        failed = {verdict.ours for verdict in verdicts if verdict.grade == "failed"}
        runs = [_read_run(folder, engine, engine in failed, problems) for engine in content["engines"]]
    if problems:
        headline = f"The comparison in {folder} cannot be shown; nothing was written."
        raise_problems(ReportError, headline, problems)
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


def is_number(value: Any) -> bool:
    """Whether a value of a file is a number, and not an integer too large for floating point."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(name, str) and len(name) <= 200 for name in value)
        and len(set(map(slug_of, value))) == len(value)
    )


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


# Key of comparison.json -> what it has to be, in words and as a function, and whether it may be missing.
_FORM: dict[str, tuple[str, Callable[[Any], bool], bool]] = {
    "job": ("a text", _is_text, False),
    "engines": ("a list of different names of at most 200 letters, the reference first", _is_names, False),
    "ranks": ("a whole number", _is_count, False),
    "steps": ("a whole number", _is_count, True),
    "environment": ("an object", lambda value: isinstance(value, dict), True),
    "settings": ('a list of {"name": ..., "values": {engine: value}}', _is_list_of(_is_setting), True),
    "verdicts": (
        f'a list of {{"theirs": ..., "ours": ..., "grade": ...}} with a grade of {", ".join(GRADES)}',
        _is_list_of(_is_verdict),
        True,
    ),
}


def _read_overview(path: Path, problems: list[Problem]) -> dict[str, Any]:
    content = _read_object(path, path.name, problems)
    if content is None:
        return {}
    if content.get("schema") != SCHEMA:
        text = f"this version reads schema {SCHEMA}; {_AGAIN}, or use the version of hfbridge that wrote it."
        problems.append(Problem(f"{path.name}: schema = {content.get('schema')!r}", text))
        return {}
    for key, (form, accepts, may_be_missing) in _FORM.items():
        value = content.get(key)
        if not accepts(value) and not (value is None and may_be_missing):
            shown = repr(value) if len(repr(value)) < 40 else f"{repr(value)[:40]}..."
            problems.append(Problem(f"{path.name}: {key} = {shown}", f"has to be {form}; {_AGAIN}."))
    return content


def _to_verdict(row: dict[str, Any]) -> Verdict:
    known: dict[str, Any] = {
        field.name: row[field.name] for field in fields(Verdict) if row.get(field.name) is not None
    }
    for name in {"quantity", "why", "cause"} & known.keys():
        known[name] = str(known[name])
    known["largest"] = {name: v for name, v in known.get("largest", {}).items() if is_number(v)}
    return Verdict(**known)


def _read_run(folder: Path, engine: str, has_failed: bool, problems: list[Problem]) -> Run:
    slug = slug_of(engine)
    home = folder / slug
    done_path, failed_path = home / "done.json", home / "failed.txt"
    is_done = done_path.exists()
    done = _read_object(done_path, f"{slug}/done.json", problems) if is_done else None
    failure = failed_path.read_text(encoding="utf-8", errors="replace") if failed_path.exists() else None
    if not is_done and failure is None and not has_failed:
        text = f"is missing, and {engine} is not known to have failed: the comparison stopped; {_AGAIN}."
        problems.append(Problem(f"{slug}/done.json", text))
    if not isinstance((done or {}).get("notes") or [], list):
        problems.append(Problem(f"{slug}/done.json", f"notes has to be a list of texts; {_AGAIN}."))
    steps = _read_lines(home / "steps.jsonl", problems, needed=is_done, is_complete=is_done)
    metrics = _read_lines(home / "metrics.jsonl", problems, needed=False, is_complete=is_done)
    return Run(
        engine,
        [row["step"] for row in steps],
        {name: [row.get(name) for row in steps] for name in (*_NUMBERS, *_CHECKSUMS)} if steps else {},
        metrics,
        done,
        failure,
    )


def _find_mistake(row: dict[str, Any], last: int) -> str | None:
    """Say what is wrong with a line whose predecessor has the step `last`; -1 before the first."""
    for names, accepts, form in ((_NUMBERS, is_number, "number"), (_CHECKSUMS, _is_text, "text")):
        for name in names:
            if row.get(name) is not None and not accepts(row[name]):
                return f"{name} = {row[name]!r} has to be a {form}"
    step = row.get("step")
    if not _is_count(step):
        return f"step = {step!r} has to be a whole number"
    return f"step = {step} has to be greater than the one before it, {last}" if row["step"] <= last else None


def _read_object(path: Path, name: str, problems: list[Problem]) -> dict[str, Any] | None:
    """Read the JSON object in a file; `None` and a problem if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(Problem(name, f"is missing; {_AGAIN}."))
        return None
    except (OSError, ValueError, RecursionError) as error:
        content = error
    if isinstance(content, dict):
        return content
    reason = content if isinstance(content, Exception) else "it holds no JSON object"
    problems.append(Problem(name, f"is damaged ({reason}); delete it and {_AGAIN}."))
    return None


def _read_lines(
    path: Path, problems: list[Problem], *, needed: bool, is_complete: bool
) -> list[dict[str, Any]]:
    """Read JSON lines and check them; none, and a problem, if one is wrong.

    Args:
        path: of the file; "steps.jsonl" has ascending steps.
        problems: to which is added what is wrong.
        needed: whether there must be a line.
        is_complete: whether the last line must be complete; an engine that was killed may have left a part.
    """
    name = f"{path.parent.name}/{path.name}"
    again = f"delete {path.parent.name}/done.json and {_AGAIN}"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if needed and not lines:
        problems.append(Problem(name, f"is {'empty' if path.is_file() else 'missing'}; {again}."))
    if lines and not is_complete and not lines[-1].endswith(b"\n"):
        lines.pop()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = error
        if not isinstance(row, dict):
            reason = row if isinstance(row, Exception) else "no JSON object"
            problems.append(Problem(f"{name}, line {number}", f"is damaged ({reason}); {again}."))
            return []
        last = rows[-1]["step"] if rows and path.name == "steps.jsonl" else -1
        mistake = _find_mistake(row, last)
        if mistake:
            problems.append(Problem(f"{name}, line {number}", f"{mistake}; {_AGAIN}."))
            return []
        rows.append(row)
    return rows

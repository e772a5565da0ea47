"""What an earlier comparison has left in a folder: reused if it is of the same job, else named."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfbridge.compare import files
from hfbridge.compare.engines import Engine
from hfbridge.compare.job import digest_of
from hfbridge.errors import JobError, Problem, raise_problems

Options = Mapping[str, Any]


def open_folder(
    out: Path, job: Path, engines: Sequence[Engine], options: Options, *, overwrites: bool
) -> None:
    """Make the folder of a comparison, or check that no record there would be lost.

    Args:
        out: the folder.
        job: the script.
        engines: that are to be compared.
        options: ranks and steps.
        overwrites: records that are made otherwise are deleted.

    Raises:
        JobError: something else is there, or records that would be lost; all are named.

    Proved by: tests/compare/test_earlier.py
    """
    if out.exists() and not out.is_dir():
        raise JobError(f"{out}: is a file; the results of a comparison need a folder. Choose another name.")
    if (out / files.COMPARISON).exists():
        others = dict(_others(out, job, engines, options))
        if others and not overwrites:
            _raise_lost(out, others)
        for engine in others:
            shutil.rmtree(out / engine.slug)
    elif out.exists() and any(out.iterdir()):
        raise JobError(f"{out}: holds other files, and no comparison. Choose a new or empty folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"{out}: cannot be made ({error.strerror}). Choose another folder.") from error


def is_recorded(engine: Engine, job: Path, folder: Path, options: Options) -> bool:
    """Whether an engine has trained this very job, with these options and versions."""
    found = files.read_done(folder)
    return found is not None and not list(differences(found, engine, job, options))


def differences(done: Mapping[str, Any], engine: Engine, job: Path, options: Options) -> Iterator[str]:
    """Yield what about the record of an engine, its `done.json`, is not as it would be now."""
    if done["engine"] != engine.name:
        yield f"it is of the engine {done['engine']}"
    for name, value in options.items():
        if done.get(name) != value:
            yield f"{name} was {_shown(done.get(name))} and is {_shown(value)}"
    now, then = files.versions(), done["versions"]
    for package in sorted({*now, *then}):
        if now.get(package) != then.get(package):
            before, here = then.get(package, "not installed"), now.get(package, "not installed")
            yield f"{package} was {before} and is {here}"
    yield from _changed_files(done["sources"], job)


def _changed_files(sources: Mapping[str, str], job: Path) -> Iterator[str]:
    near = job.resolve().parent
    if job.name not in sources:
        yield f"it is of another job, {', '.join(sources)}"
        return
    for name, digest in sources.items():
        if not (near / name).is_file():
            yield f"{name} is no longer there"
        elif digest_of(near / name) != digest:
            yield f"{name} has changed"


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


def _others(
    out: Path, job: Path, engines: Sequence[Engine], options: Options
) -> Iterator[tuple[Engine, str]]:
    """Find the records in a folder that are not of this comparison, each with what is not the same."""
    known = {engine.slug: engine for engine in [*_engines_of(out), *engines]}
    for engine in known.values():
        done = files.read_done(out / engine.slug)
        found = [] if done is None else list(differences(done, engine, job, options))
        if found:
            yield engine, "; ".join(found)


def _engines_of(out: Path) -> Iterator[Engine]:
    """Read which engines a comparison has had; no other names lead to folders."""
    names: Any = files.read_json(out / files.COMPARISON).get("engines")
    for name in names if isinstance(names, list) else []:
        try:
            yield Engine.parse(str(name))
        except ValueError:  # of another version of hfbridge, whose records are not touched
            continue


def _raise_lost(out: Path, others: Mapping[Engine, str]) -> None:
    by_reason: dict[str, list[str]] = {}
    for engine, reason in others.items():
        by_reason.setdefault(reason, []).append(engine.name)
    problems = [Problem(", ".join(names), f"{reason}.") for reason, names in by_reason.items()]
    raise_problems(
        JobError,
        f"{out}: holds records that were made otherwise; nothing was started, and nothing is changed. Choose "
        "another folder (--out), or have them replaced (--overwrite).",
        problems,
    )

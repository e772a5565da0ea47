"""compare: one job on several engines, one after the other, each in fresh processes; and what came of it."""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from hfbridge.compare import files
from hfbridge.compare.causes import Run
from hfbridge.compare.engines import Engine, parse_engines
from hfbridge.compare.job import check_script, digest_of
from hfbridge.compare.processes import Processes, last_lines
from hfbridge.compare.record import Step, merge
from hfbridge.compare.verdict import Verdict, judge
from hfbridge.errors import JobError, Problem, raise_problems

_AGREE = ("exact", "close", "same trajectory")


@dataclass(frozen=True)
class Comparison:
    """What came of a comparison; `str` of it is a table.

    Attributes:
        folder: where its files are; files.py has the table.
        engines: in the order in which they were given.
        verdicts: on each engine but the first, beside the first.
        results: what each engine that has an end tells of itself, by its name; its `done.json`.
    """

    folder: Path
    engines: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    results: dict[str, dict[str, Any]]

    @property
    def agrees(self) -> bool:
        """Whether all engines go the same way, to the bit or within the tolerance that is stated."""
        return all(verdict.grade in _AGREE for verdict in self.verdicts)

    def __str__(self) -> str:
        """Lay out speed and memory of the engines, then the verdicts."""
        width = max(len(name) for name in self.engines)
        lines = [f"{'':{width}}  steps  samples/s  seconds  peak MiB"]
        for name in self.engines:
            lines.append(f"{name:{width}}  {_measured(self.results.get(name))}")
        for verdict in self.verdicts:
            lines += ["", f"{verdict.ours} beside {verdict.theirs}: {verdict.grade}", f"  {verdict.why}"]
            if verdict.cause is not None:
                lines.append(f"  Likely cause: {verdict.cause}.")
            if verdict.largest:
                shown = (f"{name} {value:.1e}" for name, value in verdict.largest.items())
                lines.append(f"  Largest relative differences: {', '.join(shown)}")
        return "\n".join(lines)


def _measured(result: dict[str, Any] | None) -> str:
    if result is None:
        return "failed"
    return (
        f"{result['steps_done']:>5}  {result['samples_per_second']:>9.1f}  "
        f"{result['seconds_training']:>7.1f}  {result['peak_memory_bytes'] / 2**20:>8.0f}"
    )


def compare(
    job: Path,
    *,
    engines: Sequence[str],
    ranks: int = 1,
    out: Path,
    steps: int | None = None,
    resume: bool = True,
    show_progress: bool = True,
) -> Comparison:
    """Train a job on several engines and compare every optimizer step.

    Args:
        job: a script whose `build()` returns a native Trainer that has not trained, or a `Job`.
        engines: "native", "accelerate", "lightning", "lightning:deepspeed_stage_2", ...; engines.py has the
            table. The first is what the others are compared with.
        ranks: processes of each engine.
        out: the folder of the comparison; a new one, or that of an earlier comparison of this job.
        steps: end each run after this optimizer step; settings and schedule stay those of the whole job.
        resume: take over what an earlier comparison has recorded of an engine, if job, versions and options
            are still the same.
        show_progress: draw a bar for each engine.

    Returns:
        The verdicts. An engine that fails has one, too, and the others go on.

    Raises:
        JobError: job, engines, ranks, steps or folder do not fit.
        MissingDependencyError: a strategy needs a package that is not installed.

    Proved by: tests/compare/test_comparison.py
    """
    job, out = Path(job), Path(out)
    parsed = parse_engines(engines)
    _check_numbers(ranks=ranks, steps=steps)
    check_script(job)
    _open_folder(out, job)
    options = {"ranks": ranks, "steps": steps}
    files.write_json(out / files.COMPARISON, _described(out, job, parsed, (), options))
    with _bars(parsed, is_shown=show_progress) as bars:
        for engine, bar in zip(parsed, bars, strict=True):
            _run(engine, job, out / engine.slug, options, bar, resume=resume)
    runs = [_read_run(engine, out / engine.slug) for engine in parsed]
    verdicts = tuple(judge(runs[0], run) for run in runs[1:])
    files.write_json(out / files.COMPARISON, _described(out, job, parsed, verdicts, options))
    found = {engine.name: _result(out / engine.slug) for engine in parsed}
    results = {name: result for name, result in found.items() if result is not None}
    return Comparison(out, tuple(engine.name for engine in parsed), verdicts, results)


def _check_numbers(**numbers: Any) -> None:
    problems = [
        Problem(f"{name} = {value!r}", "must be a whole number, 1 at least")
        for name, value in numbers.items()
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1)
    ]
    if problems:
        raise_problems(JobError, "The comparison cannot begin; nothing was started.", problems)


def _open_folder(out: Path, job: Path) -> None:
    """Make the folder, or see that it is that of an earlier comparison of the same job.

    Raises:
        JobError: something else is there.
    """
    if out.exists() and not out.is_dir():
        raise JobError(f"{out}: is a file; the results of a comparison need a folder. Choose another name.")
    found = out / files.COMPARISON
    if found.exists():
        other = files.read_json(found).get("job")
        if other != job.name:
            raise JobError(
                f"{out}: holds the comparison of another job, {other}, and not of {job.name}. Choose another "
                "folder, or delete this one."
            )
    elif out.exists() and any(out.iterdir()):
        raise JobError(f"{out}: holds other files, and no comparison. Choose a new or empty folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"{out}: cannot be made ({error.strerror}). Choose another folder.") from error


def _run(engine: Engine, job: Path, folder: Path, options: dict[str, Any], bar: Any, *, resume: bool) -> None:
    """Train one engine, unless an earlier comparison has; leaves done.json or failed.txt.

    Raises:
        JobError: the job itself is wrong, so that no other engine could train it.
    """
    if resume and _is_done(engine, job, folder, options):
        _show(bar, len(files.read_steps(folder)), None, end="recorded before")
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    began_s = time.monotonic()
    bar.set_postfix_str("starts")
    with Processes(engine, job, folder, **options) as processes:
        is_well = processes.follow(lambda done, total: _show(bar, done, total))
    shutil.rmtree(folder / "saved", ignore_errors=True)
    if (folder / "refused.txt").exists():
        refused = (folder / "refused.txt").read_text(encoding="utf-8")
        shutil.rmtree(folder)
        raise JobError(refused)
    if not is_well:
        told = last_lines(folder)
        (folder / "failed.txt").write_text(told + "\n", encoding="utf-8")
        _show(bar, bar.n, None, end=f"failed: {told.splitlines()[-1]}")
        return
    _finish(engine, job, folder, options)
    _show(bar, bar.n, None, end=f"done in {time.monotonic() - began_s:.0f} s")


def _is_done(engine: Engine, job: Path, folder: Path, options: dict[str, Any]) -> bool:
    result = _result(folder)
    if result is None or any(result.get(name) != value for name, value in options.items()):
        return False
    if result["engine"] != engine.name or result["versions"] != files.versions():
        return False
    near = job.resolve().parent
    sources: dict[str, str] = result["sources"]
    return job.name in sources and all(
        (near / name).is_file() and digest_of(near / name) == digest for name, digest in sources.items()
    )


def _result(folder: Path) -> dict[str, Any] | None:
    return files.read_json(folder / "done.json") if (folder / "done.json").exists() else None


def _finish(engine: Engine, job: Path, folder: Path, options: dict[str, Any]) -> None:
    """Put together what the ranks have left."""
    numbers = range(options["ranks"])
    of_ranks = [files.read_json(folder / f"result-{rank}.json") for rank in numbers]
    recorded = [folder / f"rank-{rank}.jsonl" for rank in numbers]
    steps = merge([[Step(**row) for row in files.read_lines(path)] for path in recorded])
    files.write_lines(folder / "steps.jsonl", (step.as_row() for step in steps))
    seconds = sum(step.seconds for step in steps)
    first = of_ranks[0]
    result = {
        "engine": engine.name,
        **options,
        "steps_done": len(steps),
        "seconds_training": max(result["seconds_training"] for result in of_ranks),
        "seconds_startup": max(result["seconds_startup"] for result in of_ranks),
        "samples_per_second": sum(step.rows for step in steps) / seconds if seconds else 0.0,
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in of_ranks),
        "settings": first["settings"],
        "notes": first["notes"],
        "first_parameters": first["first_parameters"],
        "final_parameters": steps[-1].parameters if steps else first["first_parameters"],
        "versions": files.versions(),
        "sources": first["sources"],
    }
    files.write_json(folder / "done.json", result)
    for path in (*recorded, *folder.glob("result-*.json")):
        path.unlink()


def _read_run(engine: Engine, folder: Path) -> Run:
    result = _result(folder)
    if result is None:
        return Run(engine.name, failure=(folder / "failed.txt").read_text(encoding="utf-8").strip())
    return Run(
        engine.name,
        files.read_steps(folder),
        files.read_metrics(folder),
        result["first_parameters"],
        result["settings"],
    )


def _described(
    out: Path, job: Path, engines: Sequence[Engine], verdicts: Sequence[Verdict], options: dict[str, Any]
) -> dict[str, Any]:
    """Describe a comparison, as far as its engines have run."""
    given = {engine.name: _result(out / engine.slug) or {} for engine in engines}
    settings = {name: result.get("settings", {}) for name, result in given.items()}
    names = sorted({name for of_engine in settings.values() for name in of_engine})
    done = [result["steps_done"] for result in given.values() if result]
    return {
        "schema": files.SCHEMA,
        "job": job.name,
        "digest": digest_of(job),
        "engines": [engine.name for engine in engines],
        "ranks": options["ranks"],
        "steps": max(done, default=options["steps"]),
        "environment": files.environment(),
        "date": datetime.now(UTC).date().isoformat(),
        "settings": [
            {
                "name": name,
                "values": {e: of_engine.get(name) for e, of_engine in settings.items() if of_engine},
            }
            for name in names
        ],
        "verdicts": [verdict.as_row() for verdict in verdicts],
    }


@contextmanager
def _bars(engines: Sequence[Engine], *, is_shown: bool) -> Iterator[list[Any]]:
    """Draw a line for each engine."""
    width = max(len(engine.name) for engine in engines)
    bars = [
        Tqdm(
            desc=f"{engine.name:{width}}",
            position=position,
            total=None,
            unit="step",
            disable=not is_shown,
            dynamic_ncols=True,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar}|{postfix}",
            mininterval=0.1 if sys.stderr.isatty() else 10,  # where lines cannot be drawn over
            postfix="waits",
        )
        for position, engine in enumerate(engines)
    ]
    try:
        yield bars
    finally:
        for bar in bars:
            bar.close()


def _show(bar: Any, done: int, total: int | None, *, end: str = "") -> None:
    """Move a bar on, tqdm decides when to draw; at the end say how it was."""
    if total is not None and bar.total != total:
        bar.reset(total)
        bar.set_postfix_str("trains", refresh=False)
    bar.update(done - bar.n)
    if end:
        bar.total = bar.total or done
        bar.set_postfix_str(end)

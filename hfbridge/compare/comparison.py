"""compare: one job on several engines, one after the other, each in fresh processes."""

import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hfbridge.compare import files
from hfbridge.compare.causes import Run
from hfbridge.compare.earlier import is_recorded, open_folder
from hfbridge.compare.engines import Engine, pairs_of, parse_engines
from hfbridge.compare.job import check_script, digest_of
from hfbridge.compare.outcome import Comparison
from hfbridge.compare.processes import Processes, last_lines
from hfbridge.compare.progress_lines import Progress, progress_of
from hfbridge.compare.record import Step, merge
from hfbridge.compare.report.panels import seconds_as_text
from hfbridge.compare.verdict import Verdict, judge
from hfbridge.errors import JobError, Problem, raise_problems


def compare(
    job: Path,
    *,
    engines: Sequence[str],
    ranks: int = 1,
    out: Path,
    steps: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Comparison:
    """Train a job on several engines and compare every optimizer step.

    Args:
        job: a script whose `build()` returns a transformers.Trainer that has not trained, or a `Job`.
        engines: "native", "accelerate", "lightning", "lightning:deepspeed_stage_2", ...; engines.py has the
            table. The first is what the others are compared with.
        ranks: processes of each engine.
        out: the folder of the comparison; a new one, or that of an earlier comparison of this job.
        steps: end each run after this optimizer step; settings and schedule stay those of the whole job.
        resume: reuse what an earlier comparison has recorded of an engine.
        overwrite: delete records in the folder that were made of another job, with other options or versions.
        show_progress: show how far each engine is: by bars on a terminal, elsewhere by lines.

    Returns:
        The verdicts: on each engine beside the first, and on each Lightning engine beside "native" with the
        same strategy. An engine that fails has one, too, and the others continue.

    Raises:
        JobError: job, engines, ranks, steps or folder do not fit, or records in it would be lost.
        MissingDependencyError: a strategy needs a package that is not installed.

    Proved by: tests/compare/test_comparison.py
    """
    job, out = Path(job), Path(out)
    parsed = parse_engines(engines)
    _check_numbers(ranks=ranks, steps=steps)
    check_script(job)
    options = {"ranks": ranks, "steps": steps}
    open_folder(out, job, parsed, options, overwrites=overwrite)
    files.write_json(out / files.COMPARISON, _described(out, job, parsed, (), options))
    with progress_of([engine.name for engine in parsed], is_shown=show_progress) as shown:
        for engine, progress in zip(parsed, shown, strict=True):
            _run(engine, job, out / engine.slug, options, progress, resume=resume)
    runs = {engine: _read_run(engine, out / engine.slug) for engine in parsed}
    verdicts = tuple(judge(runs[theirs], runs[ours]) for theirs, ours in pairs_of(parsed))
    files.write_json(out / files.COMPARISON, _described(out, job, parsed, verdicts, options))
    found = {engine.name: files.read_done(out / engine.slug) for engine in parsed}
    return Comparison(
        out,
        tuple(engine.name for engine in parsed),
        verdicts,
        {name: result for name, result in found.items() if result is not None},
        {run.engine: run.failure for run in runs.values() if run.failure},
    )


def _check_numbers(**numbers: Any) -> None:
    problems = [
        Problem(f"{name} = {value!r}", "must be a whole number, 1 at least")
        for name, value in numbers.items()
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1)
    ]
    if problems:
        raise_problems(JobError, "The comparison cannot begin; nothing was started.", problems)


def _run(
    engine: Engine,
    job: Path,
    folder: Path,
    options: dict[str, Any],
    progress: Progress,
    *,
    resume: bool,
) -> None:
    """Train one engine, unless an earlier comparison has; leaves done.json or failed.txt.

    Raises:
        JobError: the job itself is wrong, so that no other engine could train it.
    """
    if resume and is_recorded(engine, job, folder, options):
        steps = len(files.read_steps(folder))
        progress.show(steps, steps)
        progress.end("recorded before")
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    began_s = time.monotonic()
    progress.begin()
    with Processes(engine, job, folder, **options) as processes:
        is_well = processes.follow(progress.show)
    taken_s = time.monotonic() - began_s
    shutil.rmtree(folder / "saved", ignore_errors=True)
    if (folder / files.JOB_ERROR).exists():
        message = (folder / files.JOB_ERROR).read_text(encoding="utf-8")
        shutil.rmtree(folder)
        raise JobError(message)
    if not is_well:
        error = last_lines(folder)
        (folder / "failed.txt").write_text(error + "\n", encoding="utf-8")
        progress.end(f"failed after {seconds_as_text(taken_s)}: {error.splitlines()[-1]}")
        return
    _finish(engine, folder, options, taken_s=taken_s)
    progress.end(f"done in {seconds_as_text(taken_s)}")


def _finish(engine: Engine, folder: Path, options: dict[str, Any], *, taken_s: float) -> None:
    """Merge what the ranks have written."""
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
        "seconds_in_all": taken_s,
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
    result = files.read_done(folder)
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
    given = {engine.name: files.read_done(out / engine.slug) or {} for engine in engines}
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

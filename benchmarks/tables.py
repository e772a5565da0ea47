"""Make the tables of the README and of docs/ from the committed results, between their markers.

One of these pages at least has a place for each of them whose results are there.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "native": "`transformers.Trainer`",
    "plain_lightning": "a plain LightningModule",
    "hfbridge": "hfbridge",
    "asynchronous": "hfbridge, `asynchronous_saving=True`",
}


def overhead(results: dict[str, Any]) -> list[str]:
    lines = [
        "| µs per optimizer step above a hand-written loop | accumulation 1 | accumulation 4 |",
        "| --- | ---: | ---: |",
    ]
    for engine in ("native", "plain_lightning", "hfbridge"):
        cells = []
        for accumulation in (1, 4):
            row = results[f"accumulation_{accumulation}"][engine]
            low, high = row["overhead_us_per_step"]["quartiles"]
            above, share = row["overhead_us_per_step"]["median"], row["overhead_of_native"]
            cells.append(f"{above:.0f} ({low:.0f} to {high:.0f}); {share:.2f} of the HF Trainer")
        lines.append(f"| {NAMES[engine]} | {' | '.join(cells)} |")
    return lines


def finetune(results: dict[str, Any]) -> list[str]:
    lines = [
        "| samples per second, as a share of the HF Trainer's | fp32 | bf16 | peak memory |",
        "| --- | ---: | ---: | ---: |",
    ]
    for side in ("native", "hfbridge"):
        cells = []
        for precision in ("fp32", "bf16"):
            row = results[precision][side]
            low, high = row["of_native"]["min"], row["of_native"]["max"]
            speed = f"{row['samples_per_second']['median']:.1f}/s"
            share = f"{row['of_native']['median']:.3f} ({low:.3f} to {high:.3f}), {speed}"
            cells.append(speed if side == "native" else share)
        peak = results["fp32"][side]["peak_memory_mib"]["median"]
        lines.append(f"| {NAMES[side]} | {' | '.join(cells)} | {peak:.0f} MiB |")
    return lines


def checkpoint(results: dict[str, Any]) -> list[str]:
    lines = ["| training stands still for a save | seconds | of the HF Trainer |", "| --- | ---: | ---: |"]
    for engine in ("native", "hfbridge", "asynchronous"):
        row = results[engine]
        low, high = row["stands_still_s"]["quartiles"]
        seconds = f"{row['stands_still_s']['median']:.3f} ({low:.3f} to {high:.3f})"
        lines.append(f"| {NAMES[engine]} | {seconds} | {row['of_native']:.2f} |")
    return lines


def matrix(results: dict[str, Any]) -> list[str]:
    """One row a task, one column a strategy: the largest of all its differences on any number of ranks."""
    found = results["deviation"]
    names = list(dict.fromkeys(key.partition(",")[0] for cells in found.values() for key in cells))
    lines = [f"| | {' | '.join(f'`{name}`' for name in names)} |", f"| --- |{' ---: |' * len(names)}"]
    for task, cells in found.items():
        largest = [
            max(max(row.values()) for key, row in cells.items() if key.partition(",")[0] == name)
            for name in names
        ]
        lines.append(f"| {task} | {' | '.join(f'{value:.0e}' for value in largest)} |")
    return lines


def rows_memory(results: dict[str, Any]) -> list[str]:
    """List each number of samples; both engines in each cell."""
    sizes = sorted(int(key.removeprefix("rows_")) for key in results if key.startswith("rows_"))
    lines = [
        "| samples | memory, HF Trainer | hfbridge | first step, HF Trainer | hfbridge | later steps |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for size in sizes:
        row = results[f"rows_{size}"]
        memory, first, step = (
            [row[engine][name]["median"] for engine in ("native", "hfbridge")]
            for name in ("memory_bytes", "first_step_s", "step_s")
        )
        cells = [f"{value / 2**20:.1f} MiB" for value in memory] + [f"{value:.2f} s" for value in first]
        lines.append(f"| {size:,} | {' | '.join(cells)} | {step[1] / step[0]:.2f} |")
    return lines


def evaluation_memory(results: dict[str, Any]) -> list[str]:
    """One row a way of metrics, one column a number of rows."""
    of_rows = results["rows"]
    lines = [
        f"| rows of the evaluation set | {' | '.join(f'{int(rows):,}' for rows in of_rows)} |",
        f"| --- |{' ---: |' * len(of_rows)}",
    ]
    for way in next(iter(of_rows.values())):
        engine, _, metrics = way.partition(":")
        rises = (row[way]["rises_by_bytes"]["median"] / 2**20 for row in of_rows.values())
        lines.append(f"| {NAMES[engine]}, `{metrics}` | {' | '.join(f'{mib:.0f} MiB' for mib in rises)} |")
    return lines


def memory(results: dict[str, Any]) -> list[str]:
    counts = sorted(int(key.removeprefix("ranks_")) for key in results if key.startswith("ranks_"))
    head = " | ".join(f"{count} ranks" for count in counts)
    lines = [f"| MiB; saved, of what theory says | {head} |", f"| --- |{' ---: |' * len(counts)}"]
    for key in results[f"ranks_{counts[0]}"]:
        engine, _, strategy = key.partition(":")
        cells = []
        for count in counts:
            row = results[f"ranks_{count}"][key]
            share = f"; {row['saved_of_theory']:.2f}" if "saved_of_theory" in row else ""
            cells.append(f"{row['training_bytes'] / 2**20:.0f}{share}")
        lines.append(f"| {NAMES[engine]}, {strategy} | {' | '.join(cells)} |")
    return lines


def scaling(results: dict[str, Any]) -> list[str]:
    lines = ["| samples per second | one rank | two ranks | two of one |", "| --- | ---: | ---: | ---: |"]
    for engine in ("native", "hfbridge"):
        cells = []
        for ranks in (1, 2):
            row = results[f"ranks_{ranks}"]
            low, high = row["of_native"]["quartiles"]
            speed = f"{row[engine]['samples_per_second']['median']:.1f}"
            share = f"{speed}; {row['of_native']['median']:.3f} of the HF Trainer ({low:.3f} to {high:.3f})"
            cells.append(speed if engine == "native" else share)
        lines.append(
            f"| {NAMES[engine]} | {' | '.join(cells)} | {results[f'two_ranks_of_one_{engine}']:.2f} |"
        )
    return lines


def tasks(results: dict[str, Any]) -> list[str]:
    """One row a task: its first score by both engines, and whether all its scores are equal."""
    lines = [
        "| task | score | `transformers.Trainer` | hfbridge | all scores equal |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for name, row in results["tasks"].items():
        theirs, ours = row["native"], row["hfbridge"]
        scores = " | ".join(f"{side['scores'][row['metric']]:.4g}" for side in (theirs, ours))
        equal = "to the last bit" if theirs["scores"] == ours["scores"] else "no"
        lines.append(f"| {row['title']} (`{name}`) | {row['metric']} | {scores} | {equal} |")
    return lines


def comparison(results: dict[str, Any]) -> list[str]:
    """One row a pair: verdict, beside the first engine if no other is named, and largest differences."""
    reference = results["verdicts"][0]["theirs"]
    first = f"{results['ranks']} ranks, beside `{reference}`"
    lines = [
        f"| {first} | verdict | steps | loss | gradient norm | parameters' norm |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in results["verdicts"]:
        largest = [row["largest"][name] for name in ("loss", "grad_norm", "parameter_norm")]
        cells = " | ".join("0" if value == 0 else f"{value:.0e}" for value in largest)
        grade = row["grade"] if row["cause"] is None else f"{row['grade']}: {row['cause'].split(':')[0]}"
        beside = "" if row["theirs"] == reference else f", beside `{row['theirs']}`"
        lines.append(
            f"| `{row['ours']}`{beside} | {grade} | {results['steps'].get(row['ours'], 0)} | {cells} |"
        )
    return lines


def throughput(results: dict[str, Any]) -> list[str]:
    """List pieces of work; numbers of hfbridge are shares of the HF Trainer's in its first column."""

    def share(row: dict[str, Any]) -> str:
        low, high = row["of_native"]["quartiles"]
        return f"{row['of_native']['median']:.2f} ({low:.2f} to {high:.2f})"

    lines = [
        "| of the HF Trainer | `transformers.Trainer` | hfbridge | with it |",
        "| --- | ---: | ---: | ---: |",
    ]
    for text, row in results["packing"].items():
        native, packed = row["native"], row["packing"]
        held = f"{native['real']['median']:.0%} and {packed['real']['median']:.0%} of the tokens real"
        speed = f"{native['real_tokens_per_second']['median']:,.0f}/s"
        subject = f"real tokens per second, {text}; with packing ({held})"
        lines.append(f"| {subject} | {speed} | {share(row['hfbridge'])} | {share(packed)} |")
    for model, row in results["precision"].items():
        speed = f"{row['native']['samples_per_second']['median']:,.1f}/s"
        lines.append(f"| samples per second, {model} in float32 | {speed} | {share(row['hfbridge'])} | |")
        for variant, name in (("bf16", "`bf16=True`"), ("compile", "`torch_compile=True`")):
            theirs, ours = row[f"native, {variant}"], row[f"hfbridge, {variant}"]
            lines.append(f"| the same, {name} | {share(theirs)} | {share(ours)} | |")
    row = results["chunked_loss"]
    native, ours, chunked = (row[engine] for engine in ("native", "hfbridge", "chunked_loss"))
    seconds = f"{native['seconds_per_step']['median']:.2f} s"
    subject = "seconds per step, 32,000 words; with `chunked_loss=True`"
    lines.append(f"| {subject} | {seconds} | {share(ours)} | {share(chunked)} |")
    peaks = " | ".join(f"{one['peak_mib']['median']:.0f} MiB" for one in (native, ours, chunked))
    lines.append(f"| memory of it at its peak | {peaks} |")
    for state, row in results["start"].items():
        seconds = f"{row['native']['seconds']['median']:.2f} s"
        lines.append(
            f"| seconds to the first step, mapped by {state} | {seconds} | {share(row['hfbridge'])} | |"
        )
    return lines


def by_length(results: dict[str, Any]) -> list[str]:
    """One row a way of dealing rows, training first."""
    names = {
        ("training", "native"): f"{NAMES['native']}, training",
        ("training", "hfbridge"): "hfbridge, training",
        ("training", "regroup"): "hfbridge, `regroup=True`",
        ("training", "regroup_256"): "hfbridge, `regroup=256`",
        ("training", "regroup_128"): "hfbridge, `regroup=128`",
        ("evaluation", "native"): f"{NAMES['native']}, evaluation",
        ("evaluation", "hfbridge"): "hfbridge, evaluation",
        ("evaluation", "eval_by_length"): "hfbridge, `eval_by_length=True`",
    }
    lines = ["| | samples per second, of the HF Trainer | real tokens |", "| --- | ---: | ---: |"]
    for (stage, engine), title in names.items():
        row = results[stage][engine]
        low, high = row["of_native"]["quartiles"]
        share = f"{row['of_native']['median']:.2f} ({low:.2f} to {high:.2f})"
        speed = f"{row['samples_per_second']['median']:.1f}/s"
        cell = speed if engine == "native" else f"{share}, {speed}"
        lines.append(f"| {title} | {cell} | {row['real_tokens']:.0%} |")
    return lines


_GROWN = {
    "accumulation": "accumulation",
    "callbacks": "TrainerCallbacks",
    "lightning_callbacks": "Lightning's callbacks; TrainerCallbacks with the HF Trainer",
    "loggers": "TensorBoard loggers, a row every 5 steps",
    "length": "tokens of a row",
    "rows": "rows of the set",
    "ranks": "ranks, DDP",
}
_STARTS = {
    "from_call_s": "cached job: from `fit`, `train`",
    "from_imports_s": "from before the engine is made",
    "from_process_s": "from the start of the process",
}


def growth(results: dict[str, Any]) -> list[str]:
    """One row a size of each axis, then one for each start."""
    lines = [
        "| | | HF Trainer: µs of a step | hfbridge | of the HF Trainer | HF Trainer: memory | hfbridge |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for axis, title in _GROWN.items():
        for number, (size, row) in enumerate(results[axis]["sizes"].items()):
            cells = [f"{row[engine]['cpu_us']['median']:,.0f}" for engine in ("native", "hfbridge")]
            low, high = row["of_native"]["cpu_us"]["quartiles"]
            cells.append(f"{row['of_native']['cpu_us']['median']:.2f} ({low:.2f} to {high:.2f})")
            cells += [
                f"{row[engine]['memory_bytes']['median'] / 2**20:.1f} MiB"
                for engine in ("native", "hfbridge")
            ]
            lines.append(f"| {'' if number else title} | {int(size):,} | {' | '.join(cells)} |")
    lines += ["", "| seconds to the end of the first step | HF Trainer | hfbridge |", "| --- | ---: | ---: |"]
    for rows, row in results["resume"]["sizes"].items():
        for name, text in (("scratch_s", "from scratch"), ("resume_s", "in mid-epoch")):
            lines.append(f"| {int(rows):,} rows, {text} | {' | '.join(_seconds(row, name))} |")
    for row in results["start"]["sizes"].values():
        lines += [f"| {text} | {' | '.join(_seconds(row, name))} |" for name, text in _STARTS.items()]
    return lines


def _seconds(row: dict[str, Any], name: str) -> list[str]:
    """Median and quartiles of both engines."""
    cells = []
    for engine in ("native", "hfbridge"):
        low, high = row[engine][name]["quartiles"]
        cells.append(f"{row[engine][name]['median']:.2f} ({low:.2f} to {high:.2f})")
    return cells


def gpu(results: dict[str, Any]) -> list[str]:
    """Parity and strategies in a line each, then speed and memory of the engines."""
    lines = ["| on one GPU | |", "| --- | --- |"]
    for name, row in results.get("parity", {}).items():
        lines.append(f"| {name} | {_differs(row, 'equal')} |")
    for name, row in results.get("strategies", {}).items():
        lines.append(f"| `{name}`, resumed | {_differs(row, 'resumes_to_the_bit')} |")
    lines += [
        "",
        "| | `transformers.Trainer` | hfbridge | a hand-written loop |",
        "| --- | ---: | ---: | ---: |",
    ]
    for task, engines in results.get("summary", {}).items():
        for key, text, form, scale in _OF_A_GPU:
            cells = [
                form.format(engines[engine][key] * scale) if key in engines.get(engine, {}) else ""
                for engine in ("native", "hfbridge", "loop")
            ]
            if any(cells):
                lines.append(f"| {task}: {text} | {' | '.join(cells)} |")
    return lines


_OF_A_GPU = (
    ("samples_per_second", "samples per second", "{:,.0f}", 1.0),
    ("tokens_per_second", "tokens per second", "{:,.0f}", 1.0),
    ("mfu", "MFU", "{:.2f}", 1.0),
    ("overhead_us_per_step", "µs per step above the loop", "{:,.0f}", 1.0),
    ("peak_bytes", "peak memory", "{:,.0f} MiB", 1 / 2**20),
)


def _differs(row: dict[str, Any], key: str) -> str:
    if "error" in row:
        return f"failed: {row['error'].splitlines()[0]}"
    if row[key]:
        return "equal to the bit"
    first = row["first_difference"]
    weights = f"weights differ by at most {row['largest_difference_of_weights']:.0e}"
    if first is None:
        return f"logged numbers equal to the bit, {weights}"
    return f"differs from step {first['step']}, {first['quantity']}, by {first['relative']:.0e}; {weights}"


TABLES = {
    "gpu": gpu,
    "throughput": throughput,
    "comparison": comparison,
    "tasks": tasks,
    "matrix": matrix,
    "memory": memory,
    "scaling": scaling,
    "rows_memory": rows_memory,
    "evaluation_memory": evaluation_memory,
    "checkpoint": checkpoint,
    "overhead": overhead,
    "by_length": by_length,
    "finetune": finetune,
    "growth": growth,
}
NOT_MEASURED = "No results are committed yet.\n"


def about(results: dict[str, Any]) -> str:
    found = results["about"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    machine = found["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}"
    if "device" in results:
        where = f"{results['device']['device']}, {where}"
    return f"<sub>{found['date']}, {where}, {versions}.</sub>"


def render(text: str) -> str:
    """Fill the places that a text has."""

    def fill(match: re.Match[str]) -> str:
        name = match.group(2)
        path = RESULTS / f"{name}.json"
        if not path.exists():
            return match.group(1) + NOT_MEASURED + match.group(3)
        results = json.loads(path.read_text())
        body = "\n".join([*TABLES[name](results), "", about(results), ""])
        return match.group(1) + body + match.group(3)

    return re.sub(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", fill, text, flags=re.DOTALL)


def require_places(pages: list[Path]) -> None:
    """See that some page has a place for each table whose results are there.

    Raises:
        SystemExit: a table has none.
    """
    texts = "".join(page.read_text() for page in pages)
    for name in TABLES:
        if (RESULTS / f"{name}.json").exists() and f"<!-- results:{name} -->" not in texts:
            raise SystemExit(f"no page has a place for {name}: <!-- results:{name} --> ... <!-- /results -->")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a page is not up to date")
    arguments = parser.parse_args()
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    require_places(pages)
    is_old = False
    for page in pages:
        before = page.read_text()
        after = render(before)
        if before == after:
            continue
        is_old = True
        if arguments.check:
            name = page.relative_to(ROOT)
            print(f"{name} does not show the committed results: run python benchmarks/tables.py")
        else:
            page.write_text(after)
    return int(is_old and arguments.check)


if __name__ == "__main__":
    sys.exit(main())

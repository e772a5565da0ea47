"""What the report says in numbers: differences, speed, memory, settings; the verdict in a sentence."""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hfbridge.compare.causes import relative_difference
from hfbridge.compare.report.recorded import GRADES, Recorded, Run, is_number
from hfbridge.compare.verdict import Verdict

# What is compared step by step, and what it is called. A checksum is equal or not; a number has a distance.
QUANTITIES = {
    "samples": "samples",
    "loss": "loss",
    "grad_norm": "gradient norm",
    "random": "random states",
    "learning_rate": "learning rate",
    "parameters": "weights",
    "parameter_norm": "norm of the weights",
}
MEASURED = ("loss", "grad_norm", "learning_rate", "parameter_norm")
# Endings of an evaluation's metrics that measure its speed, not the model.
SPEEDS = ("_runtime", "_per_second", "_time")

_AGREEING = GRADES[:3]

SPEED_STEPS = 20
"""Steps below which a speed is chance: the first ones warm up, and each takes a little more or less."""


@dataclass(frozen=True)
class Agreement:
    """How one of `QUANTITIES` compares: number of steps, the first that differs, and how many do.

    `largest` is the largest relative difference; `None` for checksums.
    """

    quantity: str
    compared: int
    first_step: int | None
    differing: int
    largest: float | None


@dataclass(frozen=True)
class Cost:
    """What one engine took.

    Attributes:
        run: of which engine.
        too_few: why there are neither speeds nor ratios of them; empty if there are.
        samples_per_second: over the whole training.
        step_s: the 5th, 25th, 50th, 75th and 95th percentile of the time of a step, without the first.
        startup_s: before the first step.
        training_s: from the first step to the last.
        peak_bytes: memory at its fullest.
        throughput: samples per second as a ratio to the reference's.
        overhead: the median step's time as a ratio to the reference's.
    """

    run: Run
    too_few: str
    samples_per_second: float | None
    step_s: tuple[float, ...] | None
    startup_s: float | None
    training_s: float | None
    peak_bytes: float | None
    throughput: float | None = None
    overhead: float | None = None


def differences(reference: Run, run: Run, quantity: str) -> tuple[list[int], list[float]]:
    """Relative differences at the steps of both; a checksum's is 0 or infinity; none where both lack it."""
    theirs = dict(zip(reference.steps, reference.columns.get(quantity, ()), strict=False))
    ours = dict(zip(run.steps, run.columns.get(quantity, ()), strict=False))
    steps = [s for s in ours if s in theirs and (theirs[s], ours[s]) != (None, None)]
    if quantity in MEASURED:
        return steps, [relative_difference(theirs[step], ours[step]) for step in steps]
    return steps, [0.0 if theirs[step] == ours[step] else math.inf for step in steps]


def agreement(reference: Run, run: Run) -> list[Agreement]:
    """How each quantity that both recorded compares, in the order in which one leads to the next."""
    rows = []
    for quantity in QUANTITIES:
        steps, found = differences(reference, run, quantity)
        unequal = [step for step, value in zip(steps, found, strict=True) if value != 0]
        if steps:
            largest = max(found) if quantity in MEASURED else None
            rows.append(Agreement(quantity, len(steps), min(unequal, default=None), len(unequal), largest))
    return rows


def costs(recorded: Recorded) -> list[Cost]:
    """Measure what each engine that finished took, the reference first."""
    reference = recorded.runs[0]
    base = _cost(reference) if reference.done is not None and not too_few(len(reference.steps)) else None
    found = [_cost(run) for run in recorded.runs if run.done is not None]
    if base is None:
        return found
    return [
        replace(
            cost,
            throughput=_ratio(cost.samples_per_second, base.samples_per_second),
            overhead=None if cost.too_few else _ratio(_median(cost), _median(base)),
        )
        for cost in found
    ]


def _cost(run: Run) -> Cost:
    few = too_few(len(run.steps))
    return Cost(
        run,
        too_few=few,
        samples_per_second=None if few else run.total("samples_per_second"),
        step_s=_percentiles(run.columns.get("seconds", [])),
        startup_s=run.total("seconds_startup"),
        training_s=run.total("seconds_training"),
        peak_bytes=run.total("peak_memory_bytes"),
    )


def fastest(costs: Iterable[Cost], reference: str) -> str:
    """Name the engine with the most samples per second; empty unless two have a speed."""
    rates = [(cost.samples_per_second, cost) for cost in costs if cost.samples_per_second]
    if len(rates) < 2:
        return ""
    rate, best = max(rates, key=lambda pair: pair[0])
    is_other = best.throughput is not None and best.run.engine != reference
    ratio = f", {best.throughput:.2f} times {reference}" if is_other else ""
    return f"{best.run.engine} ({rate:,.4g} samples per second{ratio})"


def too_few(steps: int) -> str:
    """Say that this many steps are too few for a speed; empty if they are not."""
    return f"too few steps for a speed ({steps}; {SPEED_STEPS} are needed)" if steps < SPEED_STEPS else ""


def few_steps(costs: Iterable[Cost]) -> str:
    """Say why engines have no speed, of the one with the fewest steps; empty if all have one."""
    short = [cost for cost in costs if cost.too_few]
    return min(short, key=lambda cost: len(cost.run.steps)).too_few if short else ""


def _median(cost: Cost) -> float | None:
    return cost.step_s[2] if cost.step_s else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _percentiles(seconds: Sequence[Any]) -> tuple[float, ...] | None:
    """The five numbers of a box; the first step, which warms up, counts only where it is the only one."""
    known = [value for value in (seconds[1:] or seconds) if value is not None and math.isfinite(value)]
    return tuple(map(float, np.percentile(known, [5, 25, 50, 75, 95]))) if known else None


def thin(steps: Sequence[int], values: Sequence[float], most: int) -> tuple[list[int], list[float]]:
    """Keep at most `most` points: the ends, and the smallest and largest value of each stretch.

    So no spike is lost, and equal curves keep equal points. `most` is at least 4.
    """
    if len(steps) <= most:
        return list(steps), list(values)
    edges = np.linspace(1, len(steps) - 1, (most - 2) // 2 + 1).astype(int)
    kept = {0, len(steps) - 1}
    for begin, end in itertools.pairwise(edges):
        stretch = [place for place in range(begin, end) if math.isfinite(values[place])]
        if stretch:
            kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    order = sorted(kept)
    return [steps[place] for place in order], [values[place] for place in order]


def metric_names(runs: Iterable[Run]) -> list[str]:
    """Numbers that evaluations gave, the loss first."""
    entries = [entry for run in runs for entry in run.metrics]
    names = dict.fromkeys(name for entry in entries for name, value in entry.items() if is_number(value))
    chosen = [name for name in names if name not in ("step", "epoch") and not name.endswith(SPEEDS)]
    return sorted(chosen, key=lambda name: (not name.endswith("loss"), chosen.index(name)))


@dataclass(frozen=True)
class SettingRow:
    """One setting and its value on each engine, as text; `None` on an engine without it."""

    name: str
    values: list[str | None]

    @property
    def differs(self) -> bool:
        """Whether two engines have different values."""
        return len(set(self.values)) > 1

    def is_other(self, place: int) -> bool:
        """Whether the engine at this place has another value than the first one."""
        return self.values[place] != self.values[0]


def setting_rows(recorded: Recorded, engines: Sequence[str]) -> list[SettingRow]:
    """The settings of these engines, in the order in which they were recorded."""
    return [
        SettingRow(
            str(row["name"]),
            [_as_text(row["values"][engine]) if engine in row["values"] else None for engine in engines],
        )
        for row in recorded.settings
    ]


def engines_with_settings(recorded: Recorded) -> list[str]:
    """Return the engines that recorded any; one that failed early did not, which is no difference."""
    found = {engine for row in recorded.settings for engine in row["values"]}
    return [run.engine for run in recorded.runs if run.engine in found]


def _as_text(value: Any, most: int = 600) -> str:
    """A value as JSON, so that 1, 1.0, true, "1" and none stay apart."""
    if value is None:
        return "not set"
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def notes(runs: Iterable[Run]) -> list[tuple[str, list[str]]]:
    """Each note once, with the engines that gave it."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for note in (run.done or {}).get("notes") or []:
            found.setdefault(str(note), {})[run.engine] = None
    return [(note, list(engines)) for note, engines in found.items()]


def worst_grade(verdicts: Iterable[Verdict]) -> str | None:
    """The grade of the pair that agrees least; `None` without pairs."""
    return max((verdict.grade for verdict in verdicts), key=GRADES.index, default=None)


def headline(recorded: Recorded) -> str:
    """The verdict in one sentence."""
    return sentence_of(
        recorded.verdicts,
        reference=recorded.runs[0].engine,
        failed=[run.engine for run in recorded.runs if run.done is None],
        steps=recorded.steps,
    )


def sentence_of(
    verdicts: Sequence[Verdict], *, reference: str, failed: Sequence[str], steps: int | None
) -> str:
    """Say in one sentence what was found.

    What differs comes first, then what failed, then pairs of one strategy, then what agrees with the
    reference.

    Args:
        verdicts: on all pairs.
        reference: the engine that the others are compared with.
        failed: engines that did not finish.
        steps: of the engines; `None` if unknown.
    """
    if not verdicts:
        return f"Only {reference} ran, so there is nothing to compare it with."
    parts = [f"{v.ours} differs from {v.theirs}{_since(v)}" for v in verdicts if v.grade == "differs"]
    broken = list(failed) or list(dict.fromkeys(v.ours for v in verdicts if v.grade == "failed"))
    if broken:
        parts.append(f"{_several(broken)} failed")
    agreeing: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.grade in _AGREEING:
            agreeing.setdefault((verdict.theirs, verdict.grade), []).append(verdict)
    by_grade = sorted(agreeing.items(), key=lambda item: (item[0][0] == reference, GRADES.index(item[0][1])))
    parts += [
        f"{_several([v.ours for v in found])} {_agrees(grade, found, theirs)}"
        for (theirs, grade), found in by_grade
    ]
    sentence = "; ".join(parts)
    if steps and not broken and worst_grade(verdicts) in _AGREEING:
        sentence += f", over {steps:,} steps" if steps > 1 else ", over 1 step"
    return f"{sentence}."


def _since(verdict: Verdict) -> str:
    """`from step 17 on, first in the gradient norm`."""
    text = "" if verdict.first_step is None else f" from step {verdict.first_step:,} on"
    if verdict.first_step == 0:
        text = " before the first step"
    if verdict.quantity:
        name = QUANTITIES.get(verdict.quantity, verdict.quantity)
        text += f", first in the {name}" if text else f" in the {name}"
    return text


def _agrees(grade: str, verdicts: list[Verdict], theirs: str) -> str:
    verb = "s" if len(verdicts) == 1 else ""
    if grade == "exact":
        return f"equal{verb} {theirs} to the bit"
    largest = max((value for verdict in verdicts for value in verdict.largest.values()), default=None)
    within = "" if largest is None else f" (differences of at most {largest:.2g})"
    if grade == "close":
        return f"{'is' if verb else 'are'} close to {theirs}{within}"
    return f"follow{verb} {theirs}'s trajectory{within}"


def _several(names: Sequence[str]) -> str:
    """Names in a sentence; their number where there are many."""
    if len(names) > 3:
        return f"{len(names)} engines"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

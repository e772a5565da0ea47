"""explain: from settings, a file or a script to an Explanation. Loads no model, no data, no device.

source                                   is read as
Settings, TrainingArguments, a dict      the settings it holds
a .yaml, .yml or .json file              its settings; with `trainer:` in it, a config of `hfbridge fit`
a .py file                               the calls in it that make settings; explain/script.py
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from hfbridge.errors import MissingDependencyError, Problem, SettingsError
from hfbridge.explain.differences import differences
from hfbridge.explain.explanation import Explained, Explanation, Open
from hfbridge.explain.script import Call, read_script
from hfbridge.settings import Plan, Settings, SettingsSource, require_packages, translate
from hfbridge.settings.accelerate import read_accelerate_config
from hfbridge.settings.files import read_file

Normalization = Literal["exact", "native"]

_ARGUMENT = re.compile(r"Trainer\((\w+)=")


@dataclass
class _Part:
    """Settings as they were found, and what else is said about their run."""

    where: str
    values: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    normalization: str | None = None
    open: tuple[Open, ...] = ()
    notes: tuple[str, ...] = ()


def explain(
    source: SettingsSource,
    *,
    strategy: str | None = None,
    devices: int | None = None,
    num_nodes: int | None = None,
    accelerate_config: str | os.PathLike[str] | None = None,
    loss_normalization: Normalization | None = None,
) -> Explanation:
    """Say what settings become, what differs from the native Trainer, and what is refused.

    Args:
        source: settings, a `TrainingArguments`, a dict, or the path of a YAML or JSON file or a script.
        strategy: that of the Trainer; wins over what the source says.
        devices: ranks on each node; likewise.
        num_nodes: nodes; likewise.
        accelerate_config: that of the Trainer; likewise.
        loss_normalization: that of the HFModule; likewise. "exact" without one; "native" for a script that
            makes a `TrainingArguments`, which `hfbridge run` and `from_trainer` move with its numbers.

    Returns:
        The explanation. Nothing is loaded, and no script is executed.

    Raises:
        SettingsError: the source cannot be read, or holds no settings.

    Proved by: tests/unit/test_explain.py
    """
    name, parts, overridden = _read(source)
    given = {
        "strategy": strategy,
        "devices": devices,
        "num_nodes": num_nodes,
        "accelerate_config": accelerate_config,
    }
    said = {argument: value for argument, value in given.items() if value is not None}
    explained = []
    for part in parts:
        part.arguments.update(said)
        part.normalization = loss_normalization or part.normalization or "exact"
        explained.append(_explain(part))
    return Explanation(name, tuple(explained), overridden)


def _read(source: SettingsSource) -> tuple[str, list[_Part], tuple[Problem, ...]]:
    """Find the settings in a source, without judging them."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.suffix.lower() == ".py":
            script = read_script(path)
            return str(path), [_of_call(path, call) for call in script.calls], script.overridden
        values = read_file(path)
        is_config = isinstance(values.get("trainer"), Mapping)
        return str(path), [_of_config(str(path), values) if is_config else _Part(str(path), values)], ()
    name = "settings" if isinstance(source, Mapping) else type(source).__name__
    return name, [_Part(name, source)], ()


def _of_config(where: str, config: Mapping[str, Any]) -> _Part:
    """Read a config of `hfbridge fit`: settings and arguments of the Trainer."""
    arguments = dict(config["trainer"])
    settings = arguments.pop("settings", None) or {}
    # What a class_path describes is made when it runs; no setting is contradicted by these.
    described = [name for name in ("callbacks", "logger", "profiler", "plugins") if arguments.pop(name, None)]
    arguments.pop("asynchronous_saving", None)
    notes = [f"trainer.{name} is made when it runs" for name in described]
    if isinstance(arguments.get("strategy"), Mapping):
        notes.append("trainer.strategy is made when it runs")
        del arguments["strategy"]
    model = config.get("model")
    normalization = model.get("loss_normalization") if isinstance(model, Mapping) else None
    values = read_file(settings) if isinstance(settings, str) else settings
    return _Part(where, values, arguments, normalization, notes=tuple(notes))


def _of_call(path: Path, call: Call) -> _Part:
    where = f"{path}, line {call.line}: {call.name}(...)"
    arguments = dict(call.trainer_arguments)
    # A script of the native Trainer is moved by `hfbridge run` or from_trainer, which keep its numbers.
    normalization = call.loss_normalization or ("exact" if call.name.endswith("Settings") else "native")
    return _Part(where, dict(call.values), arguments, normalization, call.open, call.notes)


def _explain(part: _Part) -> Explained:
    """Judge settings, and plan their run without what is refused."""
    plan, problems = _plan(part)
    open_names = {one.name for one in part.open if one.name}
    refused = [problem for problem in problems if not _depends(problem, open_names)]
    notes = [
        f"{problem.subject}: can be judged when it runs: {problem.text}"
        for problem in problems
        if problem not in refused
    ]
    refused += _unknown(part.open)
    if plan is None:
        return Explained(part.where, None, tuple(refused), notes=(*part.notes, *notes), open=part.open)
    normalization: Normalization = "native" if part.normalization == "native" else "exact"
    told = differences(
        plan.settings, ranks=_ranks(plan), kind=plan.strategy.kind, loss_normalization=normalization
    )
    return Explained(
        part.where,
        plan,
        tuple(refused),
        tuple(told),
        (*plan.notes, *part.notes, *notes, *_lacking(plan.settings)),
        part.open,
    )


def _plan(part: _Part) -> tuple[Plan | None, list[Problem]]:
    """Plan the run of what is not refused, and list what is.

    What is refused is taken out, and the rest tried again: what is then wrong is so for want of what was
    taken out, and is taken out without a word.
    """
    values, arguments = part.values, dict(part.arguments)
    accelerate = arguments.pop("accelerate_config", None)
    told: dict[str, list[Problem]] = {"settings": [], "accelerate": [], "trainer": []}
    for _ in range(10):
        stage, said = "settings", arguments
        try:
            settings = Settings.of(values)
            if accelerate is not None:
                stage, config = "accelerate", read_accelerate_config(accelerate)
                settings, said = config.applied_to(settings, arguments, environment={})
            stage = "trainer"
            return translate(settings, said), [problem for found in told.values() for problem in found]
        except SettingsError as error:
            problems = list(error.problems) or [Problem("settings", str(error))]
        told[stage] = told[stage] or problems
        values = _values(values) if stage == "settings" else dict(Settings.of(values).given)
        if stage == "accelerate":
            accelerate = None
        elif not _take_out(problems, values, arguments):
            break
    return None, [problem for found in told.values() for problem in found]


def _values(source: Any) -> dict[str, Any]:
    """Name the values of what could not be taken as settings."""
    if isinstance(source, TrainingArguments):
        return {name: getattr(source, name) for name in source.to_dict()}
    return dict(source) if isinstance(source, Mapping) else {}


def _take_out(problems: list[Problem], values: dict[str, Any], arguments: dict[str, Any]) -> bool:
    """Take what problems are about out of values and arguments; returns whether something was."""
    before = len(values) + len(arguments)
    for problem in problems:
        if match := _ARGUMENT.match(problem.subject):
            arguments.pop(match[1], None)
        else:
            values.pop(problem.subject.partition(" = ")[0], None)
    return len(values) + len(arguments) < before


def _depends(problem: Problem, names: set[str]) -> bool:
    """Whether a problem is about values that nobody knows yet, too."""
    return any(re.search(rf"\b{re.escape(name)}\b", problem.text) for name in names)


def _unknown(open_values: tuple[Open, ...]) -> Iterator[Problem]:
    """Refuse names that no setting has, whatever their values are."""
    for one in open_values:
        if not one.name:
            continue
        try:
            Settings.of({one.name: None})
        except SettingsError as error:
            for problem in error.problems:
                if problem.text.startswith("unknown"):
                    yield Problem(f"{one.name} = {one.expression}", problem.text)


def _ranks(plan: Plan) -> int | None:
    """Count the ranks of a run; `None` if only the machine knows."""
    if plan.strategy.kind == "single":
        return 1
    devices = plan.trainer_arguments.get("devices", "auto")
    nodes = plan.trainer_arguments.get("num_nodes") or 1
    if isinstance(devices, list | tuple):
        return len(devices) * nodes
    try:
        count = int(devices)
    except (TypeError, ValueError):
        return None
    return count * nodes if count > 0 else None


def _lacking(settings: Settings) -> list[str]:
    """Say which packages this machine lacks."""
    try:
        require_packages(settings)
    except MissingDependencyError as error:
        return [f"on this machine: {problem.subject} {problem.text}" for problem in error.problems]
    return []

"""explain: from settings, or a file of them, to an Explanation. Loads no model, no data, no device.

source                                   is read as
Settings, TrainingArguments, a dict      the settings it holds
a .yaml, .yml or .json file              its settings; with `trainer:` in it, a config of `hfbridge fit`
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from transformers import TrainingArguments

from hfbridge.errors import MissingDependencyError, Problem, SettingsError
from hfbridge.explain.differences import Run, differences
from hfbridge.explain.explanation import Explained, Explanation
from hfbridge.settings import Plan, Settings, SettingsSource, require_packages, translate
from hfbridge.settings.accelerate import read_accelerate_config
from hfbridge.settings.files import read_file

Normalization = Literal["exact", "native"]

_ARGUMENT = re.compile(r"Trainer\((\w+)=")


@dataclass
class _Part:
    """Settings as they were found, and what else is passed with them.

    Attributes:
        where: the file, or what else holds them.
        values: the settings.
        arguments: of the Trainer.
        normalization: of the HFModule; `None` if it is not passed.
        notes: what one should know about them.
        makes_strategy: the strategy is an object that the config describes.
    """

    where: str
    values: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    normalization: Normalization | None = None
    notes: tuple[str, ...] = ()
    makes_strategy: bool = False


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
        source: settings, a `TrainingArguments`, a dict, or the path of a YAML or JSON file.
        strategy: that of the Trainer; wins over what the source says.
        devices: ranks on each node; likewise.
        num_nodes: nodes; likewise.
        accelerate_config: that of the Trainer; likewise.
        loss_normalization: that of the HFModule; likewise. "exact" without one.

    Returns:
        The explanation. Nothing is loaded.

    Raises:
        SettingsError: the source cannot be read, holds no settings, or is a script.

    Proved by: tests/unit/test_explain.py
    """
    name, part = _read(source)
    given = {
        "strategy": strategy,
        "devices": devices,
        "num_nodes": num_nodes,
        "accelerate_config": accelerate_config,
    }
    part.arguments.update({argument: value for argument, value in given.items() if value is not None})
    part.normalization = loss_normalization or part.normalization or "exact"
    return Explanation(name, (_explain(part),))


def _read(source: SettingsSource) -> tuple[str, _Part]:
    """Find the settings in a source, without judging them."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.suffix.lower() == ".py":
            raise SettingsError(
                f"{path} is a script: `hfbridge run --dry-run {path}` runs it up to `train()` and prints the "
                "plan."
            )
        values = read_file(path)
        is_config = isinstance(values.get("trainer"), Mapping)
        return str(path), _of_config(str(path), values) if is_config else _Part(str(path), values)
    name = "settings" if isinstance(source, Mapping) else type(source).__name__
    return name, _Part(name, source)


def _of_config(where: str, config: Mapping[str, Any]) -> _Part:
    """Read a config of `hfbridge fit`: settings and arguments of the Trainer."""
    arguments = dict(config["trainer"])
    settings = arguments.pop("settings", None) or {}
    # What a class_path describes is made when it runs; no setting is contradicted by these.
    described = [name for name in ("callbacks", "logger", "profiler", "plugins") if arguments.pop(name, None)]
    arguments.pop("asynchronous_saving", None)
    if makes_strategy := isinstance(arguments.get("strategy"), Mapping):
        described.append("strategy")
        del arguments["strategy"]
    notes = tuple(f"trainer.{name} is made when it runs" for name in described)
    model = config.get("model")
    normalization = model.get("loss_normalization") if isinstance(model, Mapping) else None
    values = read_file(settings) if isinstance(settings, str) else settings
    return _Part(
        where,
        values,
        arguments,
        "native" if normalization == "native" else None,
        notes=notes,
        makes_strategy=makes_strategy,
    )


def _explain(part: _Part) -> Explained:
    """Judge settings, and plan their run without what is refused."""
    plan, refused = _plan(part)
    if plan is None:
        return Explained(part.where, plan, tuple(refused), notes=part.notes)
    if part.makes_strategy and "strategy" not in part.arguments:
        plan = _without_strategy(plan, part)
    kind = None if "strategy" in plan.undecided else plan.strategy.kind
    return Explained(
        part.where,
        plan,
        tuple(refused),
        differences=tuple(differences(Run(plan.settings, _ranks(plan), kind, part.normalization or "exact"))),
        notes=(*plan.notes, *part.notes, *_lacking(plan.settings)),
    )


def _plan(part: _Part) -> tuple[Plan | None, list[Problem]]:
    """Plan the run of what is not refused, and list what is.

    What is refused is taken out, and the rest tried again: what is then wrong is so for want of what was
    taken out, and is taken out without a word.
    """
    values, arguments = part.values, dict(part.arguments)
    accelerate = arguments.pop("accelerate_config", None)
    told: dict[str, list[Problem]] = {}
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
        told.setdefault(stage, problems)
        values = _values(values) if stage == "settings" else dict(Settings.of(values).given)
        if stage == "accelerate":
            accelerate = None
        elif not _take_out(problems, values, arguments):
            break
    return None, [problem for found in told.values() for problem in found]


def _without_strategy(plan: Plan, part: _Part) -> Plan:
    """Take out the strategy, which is made when the config runs, and the ranks that it decides."""
    names = {"strategy", "devices"} - part.arguments.keys()
    kept = {name: value for name, value in plan.trainer_arguments.items() if name not in names}
    return replace(plan, trainer_arguments=MappingProxyType(kept), undecided=tuple(sorted(names)))


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


def _ranks(plan: Plan) -> int | None:
    """Count the ranks of a run; `None` if only the machine knows, or the strategy of a config."""
    if "devices" in plan.undecided:
        return None
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

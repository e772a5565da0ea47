"""explain: from settings, a file or a script to an Explanation. Loads no model, no data, no device.

source                                   is read as
Settings, TrainingArguments, a dict      the settings it holds
a .yaml, .yml or .json file              its settings; with `trainer:` in it, a config of `hfbridge fit`
a .py file                               the calls in it that make settings; explain/script.py

What follows from a value that is known only when a script runs is neither judged nor told as a number.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from transformers import TrainingArguments

from hfbridge.errors import MissingDependencyError, Problem, SettingsError
from hfbridge.explain.differences import Run, differences
from hfbridge.explain.explanation import Explained, Explanation, Open
from hfbridge.explain.script import Call, read_script
from hfbridge.settings import Plan, Settings, SettingsSource, require_packages, translate
from hfbridge.settings.accelerate import read_accelerate_config
from hfbridge.settings.fields import DEFAULTS, NOT_CARRIED
from hfbridge.settings.files import read_file
from hfbridge.settings.legacy import OLD_NAMES

Normalization = Literal["exact", "native"]

_ARGUMENT = re.compile(r"Trainer\((\w+)=")
# What a file of `accelerate config` may say, where the settings do not.
_BY_ACCELERATE = {
    *("bf16", "use_cpu", "fsdp", "fsdp_config", "deepspeed", "gradient_accumulation_steps", "max_grad_norm"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
}


@dataclass
class _Part:
    """Settings as they were found, and what else is said about their run."""

    where: str
    values: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    normalization: str | None = None
    open: tuple[Open, ...] = ()
    notes: tuple[str, ...] = ()
    is_by_command_line: bool = False
    made_later: frozenset[str] = frozenset()

    @property
    def open_arguments(self) -> frozenset[str]:
        """The arguments of the Trainer whose values nobody knows yet."""
        found = {match[1] for one in self.open if (match := _ARGUMENT.match(one.name))}
        return (self.made_later | found) - self.arguments.keys()

    @property
    def undecided(self) -> frozenset[str]:
        """The settings whose values nobody knows yet, by their names in transformers 5."""
        known = {_new_name(name) for name in self.values} if isinstance(self.values, Mapping) else set()
        found = {_new_name(one.name) for one in self.open} & DEFAULTS.keys()
        if self.is_by_command_line or any(not one.name for one in self.open):
            found |= DEFAULTS.keys() - known
        if "accelerate_config" in self.open_arguments:
            found |= _BY_ACCELERATE - known
        return frozenset(found)


def explain(
    source: SettingsSource,
    *,
    strategy: str | None = None,
    devices: int | None = None,
    num_nodes: int | None = None,
    accelerate_config: str | os.PathLike[str] | None = None,
    loss_normalization: Normalization | None = None,
    arguments: Sequence[str] | None = None,
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
        arguments: the command line of a script that reads its settings there. Without them such settings are
            known when it runs.

    Returns:
        The explanation. Nothing is loaded, and no script is executed.

    Raises:
        SettingsError: the source cannot be read, or holds no settings, or the arguments do not fit it.

    Proved by: tests/unit/test_explain.py
    """
    name, parts, overridden = _read(source, arguments)
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
        if loss_normalization is not None or part.normalization is None:
            part.normalization = loss_normalization or "exact"
        explained.append(_explain(part))
    return Explanation(name, tuple(explained), overridden)


def _read(
    source: SettingsSource, arguments: Sequence[str] | None
) -> tuple[str, list[_Part], tuple[Problem, ...]]:
    """Find the settings in a source, without judging them."""
    is_script = isinstance(source, str | os.PathLike) and Path(source).suffix.lower() == ".py"
    if arguments is not None and not is_script:
        raise SettingsError(
            f"Arguments are for a script that reads them, and the source is {source!r}. Leave them out, or "
            "name the script."
        )
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if is_script:
            script = read_script(path, arguments)
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
    made_later = frozenset({"strategy"} if isinstance(arguments.get("strategy"), Mapping) else ())
    for name in made_later:
        notes.append(f"trainer.{name} is made when it runs")
        del arguments[name]
    model = config.get("model")
    normalization = model.get("loss_normalization") if isinstance(model, Mapping) else None
    values = read_file(settings) if isinstance(settings, str) else settings
    return _Part(where, values, arguments, normalization, notes=tuple(notes), made_later=made_later)


def _of_call(path: Path, call: Call) -> _Part:
    where = f"{path}, line {call.line}: {call.name}(...)"
    arguments = dict(call.trainer_arguments)
    # A script of the native Trainer is moved by `hfbridge run` or from_trainer, which keep its numbers.
    usual = "exact" if call.name.endswith("Settings") else "native"
    normalization = usual if call.loss_normalization is None else call.loss_normalization
    return _Part(
        where, dict(call.values), arguments, normalization, call.open, call.notes, call.is_by_command_line
    )


def _explain(part: _Part) -> Explained:
    """Judge settings, and plan their run without what is refused."""
    plan, refused = _plan(part)
    notes = list(_on_defaults(part, refused)) if part.open else []
    refused = [*refused, *_unknown(part.open)]
    found = Explained(
        part.where,
        plan,
        tuple(refused),
        notes=(*part.notes, *notes),
        open=part.open,
        is_by_command_line=part.is_by_command_line,
    )
    if plan is None:
        return found
    plan = _without_open_arguments(plan, part)
    normalization: Normalization | None = "native" if part.normalization == "native" else "exact"
    if part.normalization == "":
        normalization = None
    kind = None if "strategy" in plan.undecided else plan.strategy.kind
    told = differences(Run(plan.settings, _ranks(plan), kind, normalization))
    return replace(
        found,
        plan=plan,
        differences=tuple(told),
        notes=(*plan.notes, *found.notes, *_lacking(plan.settings)),
    )


def _plan(part: _Part) -> tuple[Plan | None, list[Problem]]:
    """Plan the run of what is not refused, and list what is.

    What is refused is taken out, and the rest tried again: what is then wrong is so for want of what was
    taken out, and is taken out without a word. What depends on a value that nobody knows yet is not judged.
    """
    values, arguments = part.values, dict(part.arguments)
    accelerate = arguments.pop("accelerate_config", None)
    told: dict[str, list[Problem]] = {}
    undecided = part.undecided
    for _ in range(10):
        stage, said = "settings", arguments
        try:
            settings = Settings.of(values, undecided=undecided)
            if accelerate is not None:
                stage, config = "accelerate", read_accelerate_config(accelerate)
                settings, said = config.applied_to(settings, arguments, environment={})
            stage = "trainer"
            return translate(settings, said), [problem for found in told.values() for problem in found]
        except SettingsError as error:
            problems = list(error.problems) or [Problem("settings", str(error))]
        if stage == "settings":
            told.setdefault(stage, problems)
            values = _values(values)
        else:
            told.setdefault(stage, [one for one in problems if not _waits_for(one, undecided)])
            values = dict(Settings.of(values, undecided=undecided).given)
        if stage == "accelerate":
            accelerate = None
        elif not _take_out(problems, values, arguments):
            break
    return None, [problem for found in told.values() for problem in found]


def _on_defaults(part: _Part, refused: Collection[Problem]) -> Iterator[str]:
    """Tell of defaults of the command line that would be refused, alone or beside the other values."""
    defaults = {
        one.name: one.default[0] for one in part.open if one.default and _new_name(one.name) in DEFAULTS
    }
    if not defaults:
        return
    left = tuple(one for one in part.open if one.name not in defaults)
    for problem in _plan(replace(part, values={**part.values, **defaults}, open=left))[1]:
        if problem not in refused:
            yield f"with the command line's defaults {problem.subject} is refused: {problem.text}"


def _without_open_arguments(plan: Plan, part: _Part) -> Plan:
    """Take out what follows from arguments of the Trainer that nobody knows yet."""
    names = set(part.open_arguments)
    if "accelerate_config" in names:
        names = (names | {"devices", "num_nodes", "strategy"}) - {"accelerate_config"} - part.arguments.keys()
    if "strategy" in names:
        names |= {"devices"} - part.arguments.keys()
    elif names:  # without a name the number of ranks decides
        names |= {"strategy"} - part.arguments.keys()
    kept = {name: value for name, value in plan.trainer_arguments.items() if name not in names}
    undecided = {**dict.fromkeys(sorted(names), ()), **plan.undecided}
    return replace(plan, trainer_arguments=MappingProxyType(kept), undecided=MappingProxyType(undecided))


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


def _waits_for(problem: Problem, undecided: Collection[str]) -> bool:
    """Whether a problem with an argument of the Trainer, or of a strategy, is about undecided settings."""
    if problem.text.startswith(("unknown", "is unknown", "refused", NOT_CARRIED)):
        return False
    return any(re.search(rf"\b{re.escape(name)}\b", problem.text) for name in undecided)


def _new_name(name: str) -> str:
    """The name of a setting in transformers 5."""
    return OLD_NAMES[name].new or name if name in OLD_NAMES else name


def _unknown(open_values: tuple[Open, ...]) -> Iterator[Problem]:
    """Refuse names that no setting has, whatever their values are."""
    for one in open_values:
        if not one.name or _ARGUMENT.match(one.name):
            continue
        try:
            Settings.of({one.name: None})
        except SettingsError as error:
            for problem in error.problems:
                if problem.text.startswith("unknown"):
                    yield Problem(f"{one.name} = {one.expression}", problem.text)


def _ranks(plan: Plan) -> int | None:
    """Count the ranks of a run; `None` if only the machine knows, or what is known when it runs."""
    if not {"devices", "num_nodes"}.isdisjoint(plan.undecided):
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

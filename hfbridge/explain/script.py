"""Settings in a script, read from its source: nothing is executed or imported.

    found                                               read
    TrainingArguments(...), Seq2SeqTrainingArguments    transformers', and subclasses of them in the script
    Settings(...), Trainer({...})                       hfbridge's
    arguments.learning_rate = ..., afterwards           known when it runs
    Trainer(strategy=..., devices=...), from_trainer    hfbridge's; arguments beside the settings
    HFModule(loss_normalization=...)                    hfbridge's
    HfArgumentParser(TrainingArguments)                 the command line says them; explain/command_line.py
    add_argument("--lr", default=3e-4), args.lr         known when it runs, with its default
    class ...(Trainer): def compute_loss                a method that Lightning would not call
    trainer.compute_loss = ...                          likewise

Values are read where they are literal, a name that is bound once to one, here or in a file beside the script,
arithmetic of numbers, dict(...), or a member of one of transformers' enumerations; and, if the arguments of
the script are given, what they say. Others are known when the script runs.
"""

import ast
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hfbridge.errors import Problem, SettingsError
from hfbridge.explain.command_line import CommandLine, read_settings
from hfbridge.explain.explanation import Open
from hfbridge.explain.literals import Names, dotted
from hfbridge.replaced import CALLED_BY_USERS, INSTEAD, OTHERWISE
from hfbridge.settings.fields import DEFAULTS

_ARGUMENTS = {"TrainingArguments": TrainingArguments, "Seq2SeqTrainingArguments": Seq2SeqTrainingArguments}
_NATIVE_TRAINERS = ("Trainer", "Seq2SeqTrainer")
# What is given to a Trainer beside Lightning's arguments.
_OF_RANKS = ("strategy", "devices", "num_nodes", "accelerate_config")
_NO_ARGUMENTS = {"settings", "callbacks", "asynchronous_saving", "loss_normalization", "logger", "plugins"}


@dataclass
class Call:
    """A call in a script that makes settings.

    Attributes:
        name: of what is called.
        line: where.
        values: the settings whose values are known.
        open: those whose values are not, and arguments of hfbridge's Trainer whose values are not.
        trainer_arguments: what is given to hfbridge's Trainer in the same script.
        loss_normalization: what is given to HFModule there; empty if its value is not known.
        is_by_command_line: whether the command line says all the settings, and was not given.
        notes: what else there is to know.
    """

    name: str
    line: int
    values: dict[str, Any] = field(default_factory=dict)
    open: tuple[Open, ...] = ()
    trainer_arguments: Mapping[str, Any] = field(default_factory=dict)
    loss_normalization: str | None = None
    is_by_command_line: bool = False
    notes: tuple[str, ...] = ()


@dataclass
class Script:
    """What was found in a script.

    Attributes:
        calls: those that make settings, in their order.
        overridden: methods of transformers' Trainer that it replaces.
    """

    calls: list[Call]
    overridden: tuple[Problem, ...]


def read_script(path: Path, arguments: Sequence[str] | None = None) -> Script:
    """Find the settings in a script.

    Args:
        path: of its source.
        arguments: of its command line; `None` if nobody knows them.

    Raises:
        SettingsError: it cannot be read, is no Python, or makes no settings and replaces no method; or the
            arguments do not fit it.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        tree = ast.parse(text, str(path))
    except OSError as error:
        raise SettingsError(
            f"The script {str(path)!r} cannot be read (seen from {Path.cwd()}): {error.strerror}."
        ) from error
    except (SyntaxError, ValueError) as error:
        place = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else str(error)
        raise SettingsError(f"The script {str(path)!r} is no Python: {place}.") from error
    return _Reader(tree, path, text, arguments).read()


class _Reader:
    """Reads one script.

    Args:
        tree: its source, parsed.
        path: of it, for messages.
        text: its source.
        arguments: of its command line; `None` if nobody knows them.
    """

    def __init__(self, tree: ast.Module, path: Path, text: str, arguments: Sequence[str] | None) -> None:
        self._tree, self._path, self._names = tree, path, Names(tree, path)
        self._classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        self._kinds = dict(self._subclasses(tuple(_ARGUMENTS)))
        self._trainers = dict(self._subclasses(_NATIVE_TRAINERS))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        self._parsers = [node for node in calls if self._parsed_kind(node)]
        # Where an HfArgumentParser reads the command line, no other parser does.
        others = None if self._parsers else arguments
        self._given, self._line = arguments, CommandLine(tree, self._names, text, others)
        self._names.outside, self._names.unpacked = self._line.value, self._line.entries

    def read(self) -> Script:
        """Find calls and replaced methods.

        Raises:
            SettingsError: there are none.
        """
        nodes = list(ast.walk(self._tree))
        found = [node for node in nodes if isinstance(node, ast.Call) and self._makes(node) is not None]
        calls = [self._read(node) for node in sorted(found, key=lambda node: node.lineno)]
        overridden = (*self._overridden(), *self._patched(nodes))
        calls += [self._parse(node) for node in self._parsers]
        if not calls and not overridden:
            raise SettingsError(
                f"The script {str(self._path)!r} makes no settings: there is no TrainingArguments(...), "
                "Seq2SeqTrainingArguments(...), hfbridge.Settings(...) or hfbridge.Trainer({...}) in it. "
                "Name the file that does."
            )
        if self._given is not None and not self._parsers and not self._line.is_read:
            raise SettingsError(
                f"The script {str(self._path)!r} reads no arguments that can be followed: neither "
                "HfArgumentParser(TrainingArguments) nor argparse's add_argument and parse_args. Leave out "
                "what stands after --."
            )
        arguments, unknown, loss_normalization = self._beside(nodes)
        for call in calls:
            call.trainer_arguments, call.loss_normalization = arguments, loss_normalization
            call.open += unknown
        return Script(calls, overridden)

    def _subclasses(self, natives: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """Name the classes in the script that descend from some of transformers', each with its ancestor."""
        known: dict[str, str] = {}
        for node in self._classes.values():
            for base in node.bases:
                native = self._native(base, natives) or known.get(dotted(base))
                if native:
                    known[node.name] = native
        yield from known.items()

    def _native(self, node: ast.expr, natives: tuple[str, ...]) -> str | None:
        """Name the class of transformers that an expression stands for."""
        root, _, last = self._names.origin(node).rpartition(".")
        return last if last in natives and root.split(".")[0] in ("transformers", "") else None

    def _makes(self, node: ast.Call) -> str | None:
        """Name what a call makes if that is settings."""
        origin = self._names.origin(node.func)
        if origin.startswith("hfbridge.") and origin.endswith(".Settings"):
            return "Settings"
        if origin.startswith("hfbridge.") and origin.endswith(".Trainer"):
            return "Trainer" if self._names.entries(_settings_of(node)) is not None else None
        return self._native(node.func, tuple(_ARGUMENTS)) or self._kinds.get(dotted(node.func))

    def _parsed_kind(self, node: ast.Call) -> str:
        """Name the class of settings that an HfArgumentParser reads, as the script does; empty if none."""
        if self._names.origin(node.func).rpartition(".")[2] != "HfArgumentParser":
            return ""
        kinds = (name for name in self._parsed_classes(node) if self._kind_of(name))
        return next(kinds, "")

    def _parsed_classes(self, node: ast.Call) -> list[str]:
        """Name the classes that an HfArgumentParser reads, in their order."""
        given = [argument for argument in (*node.args, *(keyword.value for keyword in node.keywords))]
        parts = [
            part for one in given for part in (one.elts if isinstance(one, ast.Tuple | ast.List) else [one])
        ]
        return [name for part in parts if (name := dotted(part))]

    def _kind_of(self, name: str) -> str | None:
        """Name the class of transformers that a class of settings is, or descends from."""
        return self._native(ast.parse(name, mode="eval").body, tuple(_ARGUMENTS)) or self._kinds.get(name)

    def _parse(self, node: ast.Call) -> Call:
        """Read the settings that an HfArgumentParser makes of the command line."""
        name = self._parsed_kind(node)
        call = Call("HfArgumentParser", node.lineno)
        if self._given is None:
            call.is_by_command_line = True
            return call
        kind = _ARGUMENTS[self._kind_of(name) or ""]
        others = [other for other in self._parsed_classes(node) if other != name]
        own = {*self._line.names, *(field for one in (*others, name) for field, _ in self._fields(one))}
        values, call.notes = read_settings(
            kind, self._given, own=own - DEFAULTS.keys(), is_whole=self._classes.keys() >= set(others)
        )
        unknown = self._class_defaults(name, call)
        call.values |= values
        changed = {one.name: one for one in self._changes(self._names_of_settings(node, name))}
        for one in changed:
            call.values.pop(one, None)
        left = {setting: one for setting, one in unknown.items() if setting not in values}
        call.open = tuple((left | changed).values())
        return call

    def _read(self, node: ast.Call) -> Call:
        """Read the arguments of a call, and what is done to its result."""
        kind = self._makes(node) or ""
        call = Call(dotted(node.func), node.lineno)
        unknown = self._class_defaults(dotted(node.func), call)
        for name, value in self._arguments(node, kind):
            is_known, read = self._names.read(value) if name else (False, None)
            # The last of several counts, known or not.
            call.values.pop(name, None)
            unknown.pop(name, None)
            if is_known:
                call.values[name] = read
            else:
                expression, default = ast.unparse(value), self._line.default(value)
                unknown[name or expression] = Open(name, expression, value.lineno, default)
        for one in self._changes(self._names.bound_to(node)):
            call.values.pop(one.name, None)
            unknown[one.name or one.expression] = one
        call.open = tuple(unknown.values())
        return call

    def _fields(self, name: str) -> Iterator[tuple[str, ast.AnnAssign]]:
        """Name the fields of a dataclass in the script, those of its ancestors there first."""
        node = self._classes.get(name)
        if node is None:
            return
        for base in node.bases:
            yield from self._fields(dotted(base)) if dotted(base) != name else ()
        for member in node.body:
            if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                yield member.target.id, member

    def _class_defaults(self, name: str, call: Call) -> dict[str, Open]:
        """Read the defaults that a subclass of transformers' settings has; returns those not known."""
        unknown: dict[str, Open] = {}
        for setting, member in self._fields(name):
            if setting not in DEFAULTS or member.value is None:
                continue
            value = member.value
            if isinstance(value, ast.Call) and dotted(value.func).rpartition(".")[2] == "field":
                named = {keyword.arg: keyword.value for keyword in value.keywords}
                value = named.get("default", value)
            is_known, read = self._names.read(value)
            if is_known:
                call.values[setting] = read
            else:
                unknown[setting] = Open(setting, ast.unparse(value), value.lineno)
        return unknown

    def _arguments(self, node: ast.Call, kind: str) -> Iterator[tuple[str, ast.expr]]:
        """Name the arguments of a call: by position, by name, and from dicts that are unpacked."""
        if kind == "Trainer":
            yield from _surely(self._names.entries(_settings_of(node)) or [])
            return
        positions = list(getattr(_ARGUMENTS.get(kind), "__dataclass_fields__", {}))
        yield from zip(positions, node.args, strict=False)
        for keyword in node.keywords:
            if keyword.arg is not None:
                yield keyword.arg, keyword.value
                continue
            entries = self._names.entries(keyword.value)
            yield from [("", keyword.value)] if entries is None else _surely(entries)

    def _changes(self, names: Collection[str]) -> Iterator[Open]:
        """Name what is set on settings of these names later on; whether it is, nobody knows."""
        for node in self._names.assignments:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Attribute) and dotted(target.value) in names:
                    yield Open(target.attr, ast.unparse(node), node.lineno)

    def _names_of_settings(self, parser: ast.Call, kind: str) -> set[str]:
        """Name what the settings are bound to that an HfArgumentParser has made."""
        at = self._parsed_classes(parser).index(kind)
        parts = [
            target.elts[at]
            for node in self._names.assignments
            if isinstance(node, ast.Assign) and _is_parsed(node.value)
            for target in node.targets
            if isinstance(target, ast.Tuple | ast.List) and at < len(target.elts)
        ]
        return {dotted(part) for part in parts} - {""}

    def _beside(self, nodes: list[ast.AST]) -> tuple[dict[str, Any], tuple[Open, ...], str | None]:
        """Find what hfbridge's Trainer and HFModule are given in the script, known or not."""
        arguments: dict[str, Any] = {}
        unknown: list[Open] = []
        loss_normalization: str | None = None
        for node in nodes:
            if not isinstance(node, ast.Call):
                continue
            origin = self._names.origin(node.func)
            if not origin.startswith("hfbridge."):
                continue
            last = origin.rpartition(".")[2]
            for keyword in node.keywords:
                is_known, value = self._names.read(keyword.value)
                if keyword.arg == "loss_normalization" and last in ("HFModule", "from_trainer"):
                    loss_normalization = value if is_known else ""
                elif last not in ("Trainer", "from_trainer") or keyword.arg in _NO_ARGUMENTS:
                    continue
                elif is_known and keyword.arg is not None:
                    arguments[keyword.arg] = value
                elif keyword.arg in _OF_RANKS:
                    default = self._line.default(keyword.value)
                    name, text = f"Trainer({keyword.arg}=)", ast.unparse(keyword.value)
                    unknown.append(Open(name, text, keyword.value.lineno, default))
            if last in ("from_trainer", "HFModule") and loss_normalization is None:
                loss_normalization = "native" if last == "from_trainer" else "exact"
        return arguments, tuple(unknown), loss_normalization

    def _overridden(self) -> Iterator[Problem]:
        """Name methods that subclasses in the script replace."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.ClassDef) and node.name in self._trainers:
                named = [(name, member.lineno) for member in node.body for name in _names_in(member)]
                for name, line in named:
                    yield from _replaced(f"{node.name}.{name}", name, line)

    def _patched(self, nodes: list[ast.AST]) -> Iterator[Problem]:
        """Name methods that are put on a Trainer of the script."""
        made = [node for node in nodes if isinstance(node, ast.Call)]
        trainers = {
            name
            for node in made
            if self._native(node.func, _NATIVE_TRAINERS) or dotted(node.func) in self._trainers
            for name in self._names.bound_to(node)
        }
        for node in self._names.assignments:
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if isinstance(target, ast.Attribute) and dotted(target.value) in trainers:
                    yield from _replaced(ast.unparse(target), target.attr, node.lineno)


def _settings_of(node: ast.Call) -> ast.expr:
    """Find what hfbridge's Trainer is given as settings."""
    named = (keyword.value for keyword in node.keywords if keyword.arg == "settings")
    return node.args[0] if node.args else next(named, ast.Constant(None))


def _surely(entries: list[tuple[str, ast.expr]]) -> Iterator[tuple[str, ast.expr]]:
    """Mark the entries of a dict that a later one may replace, whose name nobody knows."""
    unnamed = [(index, value) for index, (name, value) in enumerate(entries) if not name]
    for index, (name, value) in enumerate(entries):
        later = next((other for at, other in unnamed if at > index), None)
        if name and later is not None:
            text = f"{ast.unparse(value)}, unless {ast.unparse(later)} says otherwise"
            yield name, ast.copy_location(ast.Name(text), value)
        else:
            yield name, value


def _names_in(member: ast.stmt) -> list[str]:
    """The names that a statement in the body of a class binds."""
    if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
        return [member.name]
    if isinstance(member, ast.Assign):
        return [target.id for target in member.targets if isinstance(target, ast.Name)]
    return []


def _replaced(subject: str, name: str, line: int) -> Iterator[Problem]:
    if name not in CALLED_BY_USERS and name in _methods():
        instead = INSTEAD.get(name, OTHERWISE)
        yield Problem(f"{subject} (line {line})", f"Lightning would not call it; {instead}")


@functools.cache
def _methods() -> frozenset[str]:
    """The methods of transformers' Trainers, whose module is imported only where a script replaces one."""
    kinds = (transformers.Trainer, transformers.Seq2SeqTrainer)
    ancestors = {ancestor for kind in kinds for ancestor in kind.__mro__ if ancestor is not object}
    return frozenset(name for kind in ancestors for name in vars(kind) if "__" not in name)


def _is_parsed(node: ast.expr) -> bool:
    """Whether an expression is what an HfArgumentParser has read."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return node.func.attr.startswith("parse_")

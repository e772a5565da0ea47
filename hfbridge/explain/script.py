"""Settings in a script, read from its source: nothing is executed or imported.

    found                                               read
    TrainingArguments(...), Seq2SeqTrainingArguments    transformers', and subclasses of them in the script
    Settings(...), Trainer({...})                       hfbridge's
    arguments.learning_rate = ..., afterwards           known when it runs
    Trainer(strategy=..., devices=...), from_trainer    hfbridge's; arguments beside the settings
    HFModule(loss_normalization=...)                    hfbridge's
    HfArgumentParser(TrainingArguments)                 told: the command line says them
    class ...(Trainer): def compute_loss                a method that Lightning would not call
    trainer.compute_loss = ...                          likewise

Values are read where they are literal, a name that is bound once to one, here or in a file beside the script,
arithmetic of numbers, dict(...), or a member of one of transformers' enumerations. Others are known when the
script runs.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from transformers import Trainer as NativeTrainer

from hfbridge.errors import Problem, SettingsError
from hfbridge.explain.explanation import Open
from hfbridge.explain.literals import Names, dotted
from hfbridge.migrate.methods import CALLED_BY_USERS, INSTEAD

_ARGUMENTS = {"TrainingArguments": TrainingArguments, "Seq2SeqTrainingArguments": Seq2SeqTrainingArguments}
_NATIVE_TRAINERS = ("Trainer", "Seq2SeqTrainer")
_METHODS = {name for kind in (NativeTrainer, Seq2SeqTrainer) for name in vars(kind) if "__" not in name}
_OTHERWISE = "use the arguments of the native Trainer, its settings, or callbacks="
# What is given to a Trainer beside Lightning's arguments.
_NO_ARGUMENTS = {"settings", "callbacks", "asynchronous_saving", "loss_normalization", "logger", "plugins"}


@dataclass
class Call:
    """A call in a script that makes settings.

    Attributes:
        name: of what is called.
        line: where.
        values: the settings whose values are known.
        open: those whose values are not.
        trainer_arguments: what is given to hfbridge's Trainer in the same script.
        loss_normalization: what is given to HFModule there.
        notes: what else there is to know.
    """

    name: str
    line: int
    values: dict[str, Any] = field(default_factory=dict)
    open: tuple[Open, ...] = ()
    trainer_arguments: Mapping[str, Any] = field(default_factory=dict)
    loss_normalization: str | None = None
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


def read_script(path: Path) -> Script:
    """Find the settings in a script.

    Args:
        path: of its source.

    Raises:
        SettingsError: it cannot be read, is no Python, or makes no settings and replaces no method.
    """
    try:
        tree = ast.parse(path.expanduser().read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise SettingsError(
            f"The script {str(path)!r} cannot be read (seen from {Path.cwd()}): {error.strerror}."
        ) from error
    except (SyntaxError, ValueError) as error:
        place = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else str(error)
        raise SettingsError(f"The script {str(path)!r} is no Python: {place}.") from error
    return _Reader(tree, path).read()


class _Reader:
    """Reads one script.

    Args:
        tree: its source, parsed.
        path: of it, for messages.
    """

    def __init__(self, tree: ast.Module, path: Path) -> None:
        self._tree, self._path, self._names = tree, path, Names(tree, path)
        self._kinds = dict(self._subclasses(tuple(_ARGUMENTS)))
        self._trainers = dict(self._subclasses(_NATIVE_TRAINERS))

    def read(self) -> Script:
        """Find calls and replaced methods.

        Raises:
            SettingsError: there are none.
        """
        nodes = list(ast.walk(self._tree))
        found = [node for node in nodes if isinstance(node, ast.Call) and self._makes(node) is not None]
        calls = [self._read(node) for node in sorted(found, key=lambda node: node.lineno)]
        overridden = (*self._overridden(), *self._patched(nodes))
        parsed = [node for node in nodes if isinstance(node, ast.Call) and self._parses(node)]
        calls += [
            Call("HfArgumentParser", node.lineno, notes=("the command line says the settings",))
            for node in parsed
        ]
        if not calls and not overridden:
            raise SettingsError(
                f"The script {str(self._path)!r} makes no settings: there is no TrainingArguments(...), "
                "Seq2SeqTrainingArguments(...), hfbridge.Settings(...) or hfbridge.Trainer({...}) in it. "
                "Name the file that does."
            )
        arguments, loss_normalization = self._beside(nodes)
        for call in calls:
            call.trainer_arguments, call.loss_normalization = arguments, loss_normalization
        return Script(calls, overridden)

    def _subclasses(self, natives: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """Name the classes in the script that descend from some of transformers', each with its ancestor."""
        known: dict[str, str] = {}
        for node in [node for node in ast.walk(self._tree) if isinstance(node, ast.ClassDef)]:
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

    def _parses(self, node: ast.Call) -> bool:
        is_parser = self._names.origin(node.func).rpartition(".")[2] == "HfArgumentParser"
        given = [
            inner for argument in node.args for inner in ast.walk(argument) if isinstance(inner, ast.expr)
        ]
        return is_parser and any(
            self._native(inner, tuple(_ARGUMENTS)) or dotted(inner) in self._kinds for inner in given
        )

    def _read(self, node: ast.Call) -> Call:
        """Read the arguments of a call, and what is done to its result."""
        kind = self._makes(node) or ""
        call, unknown = Call(dotted(node.func), node.lineno), dict[str, Open]()
        for name, value in self._arguments(node, kind):
            is_known, read = self._names.read(value) if name else (False, None)
            # The last of several counts, known or not.
            call.values.pop(name, None)
            unknown.pop(name, None)
            if is_known:
                call.values[name] = read
            else:
                unknown[name or ast.unparse(value)] = Open(name, ast.unparse(value), value.lineno)
        for one in self._changes(node):
            call.values.pop(one.name, None)
            unknown[one.name] = one
        call.open = tuple(unknown.values())
        return call

    def _arguments(self, node: ast.Call, kind: str) -> Iterator[tuple[str, ast.expr]]:
        """Name the arguments of a call: by position, by name, and from dicts that are unpacked."""
        if kind == "Trainer":
            yield from self._names.entries(_settings_of(node)) or ()
            return
        positions = list(getattr(_ARGUMENTS.get(kind), "__dataclass_fields__", {}))
        yield from zip(positions, node.args, strict=False)
        for keyword in node.keywords:
            if keyword.arg is not None:
                yield keyword.arg, keyword.value
                continue
            entries = self._names.entries(keyword.value)
            yield from [("", keyword.value)] if entries is None else entries

    def _changes(self, call: ast.Call) -> Iterator[Open]:
        """Name the settings that are set on the result of a call later on; whether they are, nobody knows."""
        names = self._names.bound_to(call)
        for node in self._names.assignments:
            for target in node.targets:
                if isinstance(target, ast.Attribute) and dotted(target.value) in names:
                    yield Open(target.attr, ast.unparse(node), node.lineno)

    def _beside(self, nodes: list[ast.AST]) -> tuple[dict[str, Any], str | None]:
        """Find what hfbridge's Trainer and HFModule are given in the script."""
        arguments: dict[str, Any] = {}
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
                if not is_known or keyword.arg is None:
                    continue
                if keyword.arg == "loss_normalization" and last in ("HFModule", "from_trainer"):
                    loss_normalization = value
                elif last in ("Trainer", "from_trainer") and keyword.arg not in _NO_ARGUMENTS:
                    arguments[keyword.arg] = value
            if last in ("from_trainer", "HFModule") and loss_normalization is None:
                loss_normalization = "native" if last == "from_trainer" else "exact"
        return arguments, loss_normalization

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
            for target in node.targets:
                if isinstance(target, ast.Attribute) and dotted(target.value) in trainers:
                    yield from _replaced(ast.unparse(target), target.attr, node.lineno)


def _settings_of(node: ast.Call) -> ast.expr:
    """Find what hfbridge's Trainer is given as settings."""
    named = (keyword.value for keyword in node.keywords if keyword.arg == "settings")
    return node.args[0] if node.args else next(named, ast.Constant(None))


def _names_in(member: ast.stmt) -> list[str]:
    """The names that a statement in the body of a class binds."""
    if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
        return [member.name]
    if isinstance(member, ast.Assign):
        return [target.id for target in member.targets if isinstance(target, ast.Name)]
    return []


def _replaced(subject: str, name: str, line: int) -> Iterator[Problem]:
    if name in _METHODS and name not in CALLED_BY_USERS:
        instead = INSTEAD.get(name, _OTHERWISE)
        yield Problem(f"{subject} (line {line})", f"Lightning would not call it; {instead}")

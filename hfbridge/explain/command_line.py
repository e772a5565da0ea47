"""What a script reads of its command line, found in its source: defaults, and the values of arguments given.

    in the script                                  read
    parser.add_argument("--lr", default=3e-4)      the default of args.lr
    args = parser.parse_args()                     args: by name, returned by a function, handed to a function
    args, rest = parser.parse_known_args()         likewise
    vars(args), args.__dict__                      every option, by its name
    HfArgumentParser((A, TrainingArguments))       the arguments that are settings; others are the script's

Nothing of the script is executed: its options are rebuilt from what is literal in it.
"""

import argparse
import ast
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import transformers

from hfbridge.errors import Problem, SettingsError, raise_problems
from hfbridge.explain.literals import ENUMS, Names, dotted
from hfbridge.explain.scopes import Scopes
from hfbridge.settings.checks import suggest
from hfbridge.settings.fields import DEFAULTS
from hfbridge.settings.files import read_file
from hfbridge.settings.legacy import OLD_NAMES

_TYPES: Mapping[str, type] = {"int": int, "float": float, "str": str, "bool": bool, **ENUMS}
_UNSAID = object()
_FILES = (".json", ".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a script.

    Attributes:
        flags: as they are written: "-l", "--lr".
        keywords: what `add_argument` is given, as far as it can be read.
        default: the value without it, and how that is written; `None` if it cannot be read, or must be given.
        unread: what else `add_argument` is given.
    """

    flags: tuple[str, ...]
    keywords: Mapping[str, Any]
    default: tuple[Any, str] | None
    unread: frozenset[str]

    @property
    def name(self) -> str:
        """The attribute that its value has."""
        if "dest" in self.keywords:
            return str(self.keywords["dest"])
        long = [flag for flag in self.flags if flag.startswith("--")]
        return (long or list(self.flags))[0].lstrip("-").replace("-", "_")

    @property
    def can_be_made(self) -> bool:
        """Whether it takes of a command line what the script's own takes."""
        is_usual = self.keywords.get("action", "store") not in (
            "version",
            "help",
            "append",
            "extend",
            "count",
        )
        return is_usual and self.unread.isdisjoint({"action", "nargs", "dest", "flags", "**"})


class CommandLine:
    """The command line of a script that reads it with argparse.

    Args:
        tree: the script.
        names: what its names stand for.
        text: its source.
        given: the arguments it is to be explained for; `None` if nobody knows them.

    Raises:
        SettingsError: the arguments do not fit the options.
    """

    def __init__(self, tree: ast.Module, names: Names, text: str, given: Sequence[str] | None) -> None:
        self._names, self._text, self._scopes = names, text, Scopes(tree)
        nodes = list(ast.walk(tree))
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        self._reads = any(_is_parse(call, "parse_args", "parse_known_args") for call in calls)
        self._options: dict[str, Option | None] = {}
        for call in calls:
            if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument" and call.args:
                option = self._option(call)
                # Options of several subcommands may share a name: which of them counts, nobody knows.
                self._options[option.name] = None if option.name in self._options else option
        self._changed = {name for node in nodes for name in self._set_names(node)}
        self._values = None if given is None or not self.is_read else self._parse(given)

    @property
    def names(self) -> frozenset[str]:
        """The names of the script's options."""
        return frozenset(self._options)

    @property
    def is_read(self) -> bool:
        """Whether the script has options, and reads them."""
        return self._reads and bool(self._options)

    def value(self, node: ast.expr) -> tuple[bool, Any]:
        """Read what the arguments given make of an expression such as `args.lr`.

        Returns:
            Whether it is known, and the value.
        """
        if self._values is None or not isinstance(node, ast.Attribute) or self._option_at(node) is None:
            return False, None
        found = self._values.get(node.attr, _UNSAID)
        return found is not _UNSAID, found

    def default(self, node: ast.expr) -> tuple[Any, str] | None:
        """Read the default of an expression such as `args.lr`, and how the script writes it."""
        option = self._option_at(node) if isinstance(node, ast.Attribute) else None
        return option.default if option is not None else None

    def entries(self, node: ast.expr) -> list[tuple[str, ast.expr]] | None:
        """Name the options in `vars(args)`; `None` for anything else."""
        if isinstance(node, ast.Call) and dotted(node.func) == "vars" and len(node.args) == 1:
            inner = node.args[0]
        elif isinstance(node, ast.Attribute) and node.attr == "__dict__":
            inner = node.value
        else:
            return None
        if not self._options or not self._is_namespace(inner, frozenset()):
            return None
        return [
            (name, ast.copy_location(ast.Attribute(inner, name, ast.Load()), node)) for name in self._options
        ]

    def _option_at(self, node: ast.Attribute) -> Option | None:
        option = self._options.get(node.attr)
        is_read = option is not None and node.attr not in self._changed
        return option if is_read and self._is_namespace(node.value, frozenset()) else None

    def _set_names(self, node: ast.AST) -> Iterator[str]:
        """Name what the script sets itself, on what was read or as another default."""
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            if self._is_namespace(node.value, frozenset()):
                yield node.attr
        elif _is_parse(node, "set_defaults"):
            yield from (keyword.arg for keyword in node.keywords if keyword.arg)
        elif isinstance(node, ast.Call) and dotted(node.func) == "setattr" and len(node.args) == 3:
            is_known, name = self._names.read(node.args[1])
            yield from [str(name)] if is_known else self._options

    def _option(self, call: ast.Call) -> Option:
        """Read a call of add_argument."""
        flags = [self._names.read(argument) for argument in call.args]
        keywords: dict[str, Any] = {}
        unread = set() if all(is_known for is_known, _ in flags) else {"flags"}
        for keyword in call.keywords:
            name, (is_known, value) = keyword.arg or "**", self._names.read(keyword.value)
            kind = dotted(keyword.value).rpartition(".")[2]
            if name == "type" and kind in _TYPES:
                is_known, value = True, _TYPES[kind]
            if name == "action" and dotted(keyword.value).endswith("BooleanOptionalAction"):
                is_known, value = True, argparse.BooleanOptionalAction
            if name in ("help", "metavar"):
                continue
            if is_known:
                keywords[name] = value
            else:
                unread.add(name)
        names = tuple(str(flag) for is_known, flag in flags if is_known) or (ast.unparse(call.args[0]),)
        default = self._default(call, keywords, names)
        return Option(names, keywords, default, frozenset(unread))

    def _default(
        self, call: ast.Call, keywords: Mapping[str, Any], flags: Sequence[str]
    ) -> tuple[Any, str] | None:
        """Find what an option is if nobody says it."""
        nodes = {keyword.arg: keyword.value for keyword in call.keywords}
        if keywords.get("required") or "required" in nodes.keys() - keywords.keys() or None in nodes:
            return None
        if not flags[0].startswith("-") and keywords.get("nargs") not in ("?", "*"):
            return None
        if "default" not in nodes:
            value = {"store_true": False, "store_false": True}.get(keywords.get("action", ""))
            return value, repr(value)
        if "default" not in keywords:
            return None
        value, kind = keywords["default"], keywords.get("type")
        if isinstance(value, str) and "type" in nodes:
            # argparse reads a default that is text as it reads the command line.
            if kind is None:
                return None
            try:
                read = kind(value)
            except ValueError:
                return None
            return (read.value if isinstance(read, Enum) else read), value
        is_short = isinstance(nodes["default"], ast.Constant | ast.UnaryOp)
        return value, (is_short and ast.get_source_segment(self._text, nodes["default"])) or repr(value)

    def _parse(self, given: Sequence[str]) -> dict[str, Any]:
        """Read arguments with the options of the script, and keep what is surely what the script reads."""
        parser = _Parser(prog="", add_help=False)
        made = {name: one for name, one in self._options.items() if one is not None and one.can_be_made}
        for name, option in made.items():
            keywords = {key: value for key, value in option.keywords.items() if key != "required"}
            if option.default is None:
                keywords["default"] = _UNSAID
            try:
                parser.add_argument(*option.flags, **keywords)
            except (TypeError, ValueError, argparse.ArgumentError) as error:
                raise SettingsError(f"The script's option {name} cannot be made: {error}.") from error
        found, rest = parser.parse_known_args(given)
        _refuse_rest(rest, self._options, is_whole=len(made) == len(self._options))
        return {
            name: value
            for name, value in vars(found).items()
            if value is not _UNSAID and made[name].unread <= {"default", "required", "const"}
        }

    def _is_namespace(self, node: ast.expr, seen: frozenset[ast.AST]) -> bool:
        """Whether an expression is what `parse_args` returns."""
        if node in seen:
            return False
        seen |= {node}
        if _is_parse(node, "parse_args"):
            return True
        if isinstance(node, ast.Subscript) and _is_parse(node.value, "parse_known_args"):
            return isinstance(node.slice, ast.Constant) and node.slice.value == 0
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            returned = self._scopes.returned_by(node.func.id)
            return bool(returned) and all(self._is_namespace(value, seen) for value in returned)
        if not isinstance(node, ast.Name):
            return False
        bound = self._scopes.bound_to(node)
        return bool(bound) and all(
            value is not None
            and (_is_parse(value, "parse_known_args") if is_first else self._is_namespace(value, seen))
            for value, is_first in bound
        )


class _Parser(argparse.ArgumentParser):
    """A parser that raises what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Raise, and leave the process alone."""
        raise SettingsError(f"What stands after -- does not fit the script: {message}.")


class _SettingsParser(transformers.HfArgumentParser):  # type: ignore[misc, unused-ignore]
    """transformers' parser of settings, which raises what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Raise, and leave the process alone."""
        raise SettingsError(f"What stands after -- is no settings: {message}.")


def read_settings(
    kind: Any, given: Sequence[str], *, own: Collection[str], is_whole: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read the settings among the arguments of a script that uses HfArgumentParser.

    Args:
        kind: transformers' class of settings that the script reads.
        given: the arguments, or the one path of a JSON or YAML file.
        own: the names that other classes of the script take.
        is_whole: whether these are all.

    Returns:
        The values that were given, and notes on what is left to the script.

    Raises:
        SettingsError: the arguments cannot be read, or nobody takes one of them.

    Mirrors: transformers.HfArgumentParser.parse_args_into_dataclasses
    """
    if len(given) == 1 and Path(given[0]).suffix.lower() in _FILES:
        values = read_file(given[0])
        mine = {name: value for name, value in values.items() if name in DEFAULTS or name in OLD_NAMES}
        left = [name for name in values if name not in mine]
        _refuse_rest([f"--{name}" for name in left], {*own, *DEFAULTS}, is_whole=is_whole)
    else:
        parser = _SettingsParser(kind, prog="", add_help=False, allow_abbrev=False)
        unsaid = {field.name: _UNSAID for field in dataclasses.fields(kind)}
        found, rest = parser.parse_known_args(given, argparse.Namespace(**unsaid))
        mine = {name: value for name, value in vars(found).items() if value is not _UNSAID}
        _refuse_rest(rest, {*own, *DEFAULTS}, is_whole=is_whole)
        left = [_field_of(word) for word in rest if word.startswith("--")]
    listed = ", ".join(dict.fromkeys(left))
    return mine, (f"left to the script, which is not run: {listed}",) if left else ()


def _refuse_rest(rest: Sequence[str], known: Collection[str], *, is_whole: bool) -> None:
    """Refuse arguments that nobody takes, unless somebody unknown may take them.

    Raises:
        SettingsError: with all of them.
    """
    wrong = [
        word for word in rest if word.startswith("--") and {_name_of(word), _field_of(word)}.isdisjoint(known)
    ]
    if not wrong or not is_whole:
        return
    problems = [Problem(word.partition("=")[0], _wrong_name(_name_of(word), known)) for word in wrong]
    raise_problems(
        SettingsError, "What stands after -- does not fit the script; nothing was loaded.", problems
    )


def _wrong_name(name: str, known: Collection[str]) -> str:
    """Say of an argument that nobody takes what it may have been meant for."""
    if name not in OLD_NAMES or DEFAULTS.keys().isdisjoint(known):
        return f"is not taken by the script{suggest(name, known)}"
    new = OLD_NAMES[name].new
    return f"is a name of transformers 4; {f'write --{new}' if new else 'leave it out'}"


def _name_of(word: str) -> str:
    """Name what an option sets, as it is written."""
    return word.partition("=")[0].lstrip("-").replace("-", "_")


def _field_of(word: str) -> str:
    """Name the field that an option of HfArgumentParser sets; --no_... sets one to False."""
    return _name_of(word).removeprefix("no_")


def _is_parse(node: ast.AST, *methods: str) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in methods

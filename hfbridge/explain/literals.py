"""The names and literal values of a script, read from its source."""

import ast
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import SchedulerType
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

ENUMS: Mapping[str, type[Enum]] = {
    kind.__name__: kind
    for kind in (IntervalStrategy, SaveStrategy, HubStrategy, SchedulerType, OptimizerNames)
}
"""transformers' enumerations, by name."""

_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_CHANGING = {"update", "pop", "setdefault", "clear", "popitem"}


class Names:
    """What the names of a script stand for.

    A name counts as known if it is bound once in the whole script, and nothing changes what it is bound to.
    So does one that is imported from a file beside it, and is known there.

    Args:
        tree: the script.
        path: of it.
        outer: the files from which this one is imported, whose own imports are not followed again.

    Attributes:
        assignments: all of the script.
        outside: reads what an attribute has from outside of the script, such as its command line; returns
            whether that is known, and the value.
        unpacked: names the entries of such a thing taken as a dict; `None` if it is none.
    """

    def __init__(self, tree: ast.Module, path: Path, outer: frozenset[Path] = frozenset()) -> None:
        self._tree, self._folder = tree, path.parent
        self._opened = outer | {path.resolve()}
        self.outside: Callable[[ast.expr], tuple[bool, Any]] = lambda node: (False, None)
        self.unpacked: Callable[[ast.expr], list[tuple[str, ast.expr]] | None] = lambda node: None
        self._beside: dict[str, Names | None] = {}
        self._imported: dict[str, str] = {}
        self._values: dict[str, ast.expr] = {}
        nodes = list(ast.walk(tree))
        self.assignments = [
            node for node in nodes if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)
        ]
        for node in nodes:
            self._note_import(node)
            for name, value in _bindings(node):
                self._values[name] = value
        bound = Counter(name for node in nodes for name in _bound(node))
        changed = {name for node in nodes for name in _changed(node)}
        self._values = {
            name: value for name, value in self._values.items() if bound[name] == 1 and name not in changed
        }

    def origin(self, node: ast.expr) -> str:
        """Give the dotted name under which an expression was imported, or its own."""
        name = dotted(node)
        first, _, rest = name.partition(".")
        origin = self._imported.get(first, first)
        return f"{origin}.{rest}" if rest else origin

    def bound_to(self, value: ast.expr) -> set[str]:
        """Name what an expression is bound to, once or not."""
        return {name for node in ast.walk(self._tree) for name, bound in _bindings(node) if bound is value}

    def read(self, node: ast.expr, seen: frozenset[str] = frozenset()) -> tuple[bool, Any]:
        """Read the value of an expression.

        Args:
            node: the expression.
            seen: names that its value goes back to.

        Returns:
            Whether it is known, and the value.
        """
        if _is_literal(node):
            return True, ast.literal_eval(node)
        if isinstance(node, ast.Name) and node.id in self._values and node.id not in seen:
            return self.read(self._values[node.id], seen | {node.id})
        if isinstance(node, ast.Name) and (place := self._imported_from(node.id)):
            return place[0].read(ast.Name(place[1]))
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return self._calculate(node, seen)
        if isinstance(node, ast.List | ast.Tuple):
            found = [self.read(entry, seen) for entry in node.elts]
            return all(is_known for is_known, _ in found), [value for _, value in found]
        if isinstance(node, ast.Attribute):
            outside = self.outside(node)
            return outside if outside[0] else _member(node)
        entries = self.entries(node, seen)
        if entries is None:
            return False, None
        read = {name: self.read(value, seen) for name, value in entries}
        is_known = all(is_known for is_known, _ in read.values()) and "" not in read
        return is_known, {name: value for name, (_, value) in read.items()}

    def entries(
        self, node: ast.expr, seen: frozenset[str] = frozenset()
    ) -> list[tuple[str, ast.expr]] | None:
        """Name the entries of a dict that the script writes out; a name that is not known is empty.

        Args:
            node: the expression.
            seen: names that its value goes back to.

        Returns:
            `None` if it is no such dict.
        """
        if isinstance(node, ast.Name) and node.id in self._values and node.id not in seen:
            return self.entries(self._values[node.id], seen | {node.id})
        if isinstance(node, ast.Name) and (place := self._imported_from(node.id)):
            inner = place[0].entries(ast.Name(place[1]))
            return None if inner is None else [place[0].settle(entry, at=node) for entry in inner]
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            return [entry for key, value in pairs for entry in self._entry(key, value, seen)]
        if isinstance(node, ast.Call) and dotted(node.func) == "dict" and not node.args:
            named = [(ast.Constant(k.arg) if k.arg else None, k.value) for k in node.keywords]
            return [entry for key, value in named for entry in self._entry(key, value, seen)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            parts = [self.entries(side, seen) for side in (node.left, node.right)]
            return None if None in parts else [entry for part in parts for entry in part or ()]
        return self.unpacked(node)

    def settle(self, entry: tuple[str, ast.expr], *, at: ast.expr) -> tuple[str, ast.expr]:
        """Make an entry of a dict mean in another script what it means here.

        Args:
            entry: its name and value.
            at: where it is used.
        """
        name, value = entry
        is_known, read = self.read(value)
        settled = ast.Constant(read) if is_known else ast.Name(f"({ast.unparse(value)})")
        return name, ast.copy_location(settled, at)

    def _imported_from(self, name: str) -> "tuple[Names, str] | None":
        """Find the file beside the script from which a name is imported, and its name there."""
        module, _, inner = self._imported.get(name, "").rpartition(".")
        path = self._folder / f"{module.replace('.', '/')}.py"
        if not module or not path.is_file() or path.resolve() in self._opened:
            return None
        if module not in self._beside:
            self._beside[module] = _parsed(path, self._opened)
        other = self._beside[module]
        return None if other is None else (other, inner)

    def _entry(
        self, key: ast.expr | None, value: ast.expr, seen: frozenset[str]
    ) -> list[tuple[str, ast.expr]]:
        if key is None:
            inner = self.entries(value, seen)
            return [("", value)] if inner is None else inner
        is_known, name = self.read(key, seen)
        return [(name if is_known and isinstance(name, str) else "", value)]

    def _calculate(self, node: ast.BinOp, seen: frozenset[str]) -> tuple[bool, Any]:
        sides = [self.read(side, seen) for side in (node.left, node.right)]
        numbers = [value for is_known, value in sides if is_known and isinstance(value, int | float)]
        if len(numbers) < 2:
            return False, None
        try:
            return True, _OPERATORS[type(node.op)](*numbers)
        except (ArithmeticError, ValueError):
            return False, None

    def _note_import(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                self._imported[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                self._imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"


def dotted(node: ast.expr) -> str:
    """Write a name with its dots; empty if it is something else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (inner := dotted(node.value)):
        return f"{inner}.{node.attr}"
    return ""


def _parsed(path: Path, outer: frozenset[Path]) -> Names | None:
    """Read another file; one that is no Python is left to the run."""
    try:
        return Names(ast.parse(path.read_text(encoding="utf-8")), path, outer)
    except (OSError, SyntaxError, ValueError):
        return None


def _is_literal(node: ast.expr) -> bool:
    """Whether an expression is a literal, down to its last part."""
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return False
    return True


def _member(node: ast.Attribute) -> tuple[bool, Any]:
    """Read a member of one of transformers' enumerations."""
    kind = ENUMS.get(dotted(node.value).rpartition(".")[2])
    return (True, kind[node.attr].value) if kind and node.attr in kind.__members__ else (False, None)


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """The names that a statement binds to an expression."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
        targets = [node.target]
    value = getattr(node, "value", None)
    if value is not None:
        yield from ((target.id, value) for target in targets if isinstance(target, ast.Name))


def _bound(node: ast.AST) -> Iterator[str]:
    """The names that a node binds in whatever way."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
        yield node.id
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Global | ast.Nonlocal):
        yield from node.names


def _changed(node: ast.AST) -> Iterator[str]:
    """The names whose values a node changes."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        yield dotted(node.value)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGING:
        yield dotted(node.func.value)

"""Which expressions the names of a script are bound to, scope by scope."""

import ast
from collections import defaultdict
from collections.abc import Iterator

_Function = ast.FunctionDef | ast.AsyncFunctionDef

Binding = tuple[ast.expr | None, bool]
"""An expression that a name is bound to, `None` if that cannot be told; and whether to its first part."""


class Scopes:
    """The bindings of a script.

    Args:
        tree: the script.
    """

    def __init__(self, tree: ast.Module) -> None:
        self._tree = tree
        self._scopes: dict[ast.AST, ast.AST] = {}
        self._outer: dict[ast.AST, ast.AST] = {}
        self._bindings: dict[tuple[ast.AST, str], list[Binding]] = defaultdict(list)
        self._calls: dict[str, list[ast.Call]] = defaultdict(list)
        self._functions: dict[str, list[_Function]] = defaultdict(list)
        self._place(tree, tree)
        for node, scope in self._scopes.items():
            for name, binding in _bindings(node):
                self._bindings[scope, name].append(binding)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                self._calls[node.func.id].append(node)
            elif isinstance(node, _Function):
                self._functions[node.name].append(node)

    def bound_to(self, name: ast.Name) -> list[Binding]:
        """List what a name is bound to where it is used; nothing if it is bound nowhere."""
        scope = self._scopes.get(name, self._tree)
        while not (found := self._found(scope, name.id)) and scope is not self._tree:
            scope = self._outer[scope]
        return found

    def returned_by(self, function: str) -> list[ast.expr]:
        """List what a function of the script returns; nothing if there are several of that name."""
        functions = self._functions[function]
        if len(functions) != 1:
            return []
        inside = [node for node, scope in self._scopes.items() if scope is functions[0]]
        return [node.value for node in inside if isinstance(node, ast.Return) and node.value is not None]

    def _place(self, node: ast.AST, scope: ast.AST) -> None:
        """Note the scope of everything below a node."""
        for child in ast.iter_child_nodes(node):
            self._scopes[child] = scope
            inner = child if isinstance(child, _Function | ast.Lambda | ast.ClassDef) else scope
            if inner is not scope:
                self._outer[inner] = scope
            self._place(child, inner)

    def _found(self, scope: ast.AST, name: str) -> list[Binding]:
        """List the bindings of a name in one scope, and what its callers hand to a function for it."""
        found = list(self._bindings[scope, name])
        if isinstance(scope, _Function) and name in (names := [one.arg for one in _taken(scope)]):
            calls = self._calls[scope.name]
            if len(self._functions[scope.name]) != 1 or not calls:
                return [(None, False)]
            found += [(_handed(call, name, names.index(name)), False) for call in calls]
        elif isinstance(scope, _Function | ast.Lambda) and name in _arguments(scope):
            return [(None, False)]
        return found


def _bindings(node: ast.AST) -> Iterator[tuple[str, Binding]]:
    """The names that a node binds, and what to."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _assigned(target, node.value)
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
        if isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, (node.value, False)
    elif isinstance(node, ast.alias):
        yield (node.asname or node.name).partition(".")[0], (None, False)
    else:
        place = getattr(node, "target", None) or getattr(node, "optional_vars", None)
        inside = ast.walk(place) if isinstance(place, ast.expr) else ()
        yield from ((inner.id, (None, False)) for inner in inside if isinstance(inner, ast.Name))


def _assigned(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, Binding]]:
    """The names that an assignment binds: to the value, or to parts of it."""
    if isinstance(target, ast.Name):
        yield target.id, (value, False)
    elif isinstance(target, ast.Tuple | ast.List):
        for index, part in enumerate(target.elts):
            if isinstance(part, ast.Name):
                yield part.id, (value if index == 0 else None, True)


def _taken(function: _Function) -> list[ast.arg]:
    """The arguments that a function takes by position or name."""
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def _arguments(function: ast.AST) -> set[str]:
    """All names that a function's arguments bind."""
    arguments = getattr(function, "args", None)
    return {node.arg for node in ast.walk(arguments) if isinstance(node, ast.arg)} if arguments else set()


def _handed(call: ast.Call, name: str, index: int) -> ast.expr | None:
    """Find what a call hands to an argument."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    plain = index < len(call.args) and not any(isinstance(one, ast.Starred) for one in call.args[: index + 1])
    return call.args[index] if plain else None

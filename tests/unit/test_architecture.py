"""The house rules that can be read from the source: layers, worlds, sizes, late imports, references.

Each rule is a function from a package folder to a list of offences; it is asked about hfbridge, and then
about tiny packages that break it.
"""

import ast
import importlib
import importlib.util
import re
import tomllib
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hfbridge"

# Path in the package, without .py -> layer. The longest prefix counts; "" is the package's own __init__.
LAYERS = {
    "": 8,
    "__main__": 8,
    "errors": 0,
    "types": 3,
    "utilities": 0,
    "distributed": 0,
    "settings": 1,
    "models/signature": 1,
    "utilities/instantiate": 1,
    "data": 2,
    "models": 2,
    "evaluation": 2,
    "metrics": 2,
    "strategies": 2,
    "checkpoints": 2,
    "losses": 3,
    "checkpoints/checkpoint_io": 3,
    "checkpoints/convert": 3,
    "checkpoints/resume": 3,
    "data/factory": 3,
    "models/model_run": 3,
    "callbacks": 3,
    "loops": 3,
    "module": 3,
    "datamodule": 3,
    "migration/to_trainer": 3,
    "trainer": 4,
    "migration": 5,
    "dropin": 6,
    "explain": 6,
    "compare": 6,
    "cli": 7,
}
# Rooms whose files have to be named one by one, since they lie in two layers.
CLOSED_ROOMS = {
    "checkpoints": {
        "",
        "layout",
        "manifest",
        "reader",
        "weights",
        "atomic_write",
        "writer",
        "resume",
        "lightning_format",
        "checkpoint_io",
        "convert",
    }
}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
HUGGING_FACE = {"transformers", "datasets", "evaluate", "peft", "tokenizers"}
# (path in the package, top-level package): required dependencies that may be imported inside a function.
LATE_IMPORTS: set[tuple[str, str]] = set()
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_METHODS = 800, 50, 40

Function = ast.FunctionDef | ast.AsyncFunctionDef
DOTTED = r"[A-Za-z_]\w*(?:\.\w+)+"
MIRRORS = re.compile(rf"\bMirrors:\s*({DOTTED}(?:(?:,\s*and|,|\s+and)\s+{DOTTED})*)?")
PROVED_BY = re.compile(r"\bProved by:((?:.|\n(?!\s*\n))*)")
PROOF = re.compile(r"([\w-]+(?:/[\w.-]+)+/?)((?:::\w+)*)")


class Import(NamedTuple):
    """One imported module, with the line it stands on and whether that is inside a function."""

    name: str
    line: int
    is_late: bool


class Source(NamedTuple):
    """One file of the package."""

    path: str
    tree: ast.Module
    lines: int
    is_package: bool

    @property
    def key(self) -> str:
        """`data/order` for data/order.py, `data` for data/__init__.py."""
        parts = self.path.removesuffix(".py").split("/")
        return "/".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(package: Path) -> list[Source]:
    """All files of a package, parsed."""
    found = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(package).as_posix()
        found.append(Source(name, ast.parse(text), len(text.splitlines()), path.name == "__init__.py"))
    return found


def layer_of(key: str) -> int | None:
    """Layer of a file; None if no rule names it."""
    room, _, rest = key.partition("/")
    if room in CLOSED_ROOMS and rest not in CLOSED_ROOMS[room]:
        return None
    return LAYERS.get(key, LAYERS.get(room))


def walk(node: ast.AST, is_late: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below `node`, each with whether it is inside a function."""
    for child in ast.iter_child_nodes(node):
        yield child, is_late
        yield from walk(child, is_late or isinstance(child, Function | ast.Lambda))


def imports(source: Source, keys: set[str], package: str) -> list[Import]:
    """Every module a file imports; a relative import and a submodule by its full name."""
    found = []
    own = [package, *source.key.split("/")] if source.key else [package]
    home = own if source.is_package else own[:-1]
    for node, is_late in walk(source.tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, is_late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{module}.{alias.name}"
                is_submodule = key_of(full, package) in keys
                found.append(Import(full if is_submodule else module, node.lineno, is_late))
    return found


def key_of(module: str, package: str) -> str | None:
    """`data/order` for hfbridge.data.samplers; None for other packages."""
    if module != package and not module.startswith(f"{package}."):
        return None
    return module.removeprefix(package).removeprefix(".").replace(".", "/")


def all_imports(package: Path) -> Iterator[tuple[Source, Import, str | None]]:
    """Each import of each file, with the key of the file it names if that is one of ours."""
    files = sources(package)
    keys = {source.key for source in files}
    for source in files:
        for imported in imports(source, keys, package.name):
            yield source, imported, key_of(imported.name, package.name)


def misplaced_files(package: Path) -> list[str]:
    """Files that no layer names."""
    return [
        f"{source.path}: belongs to no layer; put it into a room, or add it to LAYERS"
        for source in sources(package)
        if layer_of(source.key) is None
    ]


def upward_imports(package: Path) -> list[str]:
    """Imports of a higher layer, or from one room of layer 2 into another."""
    wrong = []
    for source, imported, key in all_imports(package):
        if key is None:
            continue
        here, there = layer_of(source.key), layer_of(key)
        if here is None or there is None:
            continue
        where = f"{source.path}:{imported.line}: imports {imported.name}"
        if there > here:
            wrong.append(f"{where}, layer {there}, from layer {here}")
        elif here == there == 2 and source.key.split("/")[0] != key.split("/")[0]:
            wrong.append(f"{where}, another room of layer 2")
    return wrong


def import_circles(package: Path) -> list[str]:
    """Files that import each other, directly or through others."""
    graph: dict[str, set[str]] = {source.key: set() for source in sources(package)}
    for source, _, key in all_imports(package):
        if key in graph and key != source.key:
            graph[source.key].add(key)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" <- ".join(key or "__init__" for key in error.args[1])]
    return []


def mixed_worlds(package: Path) -> list[str]:
    """Files below layer 3 that import the world they should not know."""
    worlds: dict[str, set[str]] = {}
    wrong = []
    for source, imported, _ in all_imports(package):
        top, layer = imported.name.split(".")[0], layer_of(source.key)
        if layer is None or layer > 2 or top not in LIGHTNING | HUGGING_FACE:
            continue
        is_lightning = top in LIGHTNING
        room = source.key.split("/")[0]
        worlds.setdefault(source.path, set()).add("lightning" if is_lightning else "hugging face")
        if layer == 2 and is_lightning != (room == "strategies"):
            wrong.append(f"{source.path}:{imported.line}: imports {top}, which {room}/ must not know")
    wrong += [f"{path}: imports both worlds below layer 3" for path, seen in worlds.items() if len(seen) == 2]
    return wrong


def long_files(package: Path) -> list[str]:
    """Files with more lines than one subject needs."""
    return [
        f"{source.path}: {source.lines} lines, at most {MAX_FILE_LINES}; split by subject"
        for source in sources(package)
        if source.lines > MAX_FILE_LINES
    ]


def body_lines(function: Function) -> int:
    """Lines of a function's body, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def long_functions(package: Path) -> list[str]:
    """Functions that do not fit one screen."""
    return [
        f"{source.path}:{node.lineno}: {node.name} has {body_lines(node)} lines, at most {MAX_FUNCTION_LINES}"
        for source in sources(package)
        for node in ast.walk(source.tree)
        if isinstance(node, Function) and body_lines(node) > MAX_FUNCTION_LINES
    ]


def repeated_names(package: Path) -> list[str]:
    """Files of one name in several rooms; the file of a command is named like the command."""
    places: dict[str, list[str]] = {}
    for source in sources(package):
        name = source.path.rpartition("/")[2]
        if name != "__init__.py" and not source.path.startswith("cli/"):
            places.setdefault(name, []).append(source.path)
    return [f"{', '.join(found)}: one name, several files" for found in places.values() if len(found) > 1]


def crowded_classes(package: Path) -> list[str]:
    """Classes with too many methods."""
    wrong = []
    for source in sources(package):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(member, Function) for member in node.body)
                if methods > MAX_METHODS:
                    wrong.append(
                        f"{source.path}:{node.lineno}: {node.name} has {methods} methods, limit {MAX_METHODS}"
                    )
    return wrong


def optional_packages() -> set[str]:
    """Top-level names of what the extras bring, the development tools aside."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    texts = [text for extra, found in extras.items() if extra != "dev" for text in found]
    return {re.split(r"[^\w.-]", text)[0].replace("-", "_") for text in texts}


def late_imports(package: Path) -> list[str]:
    """Imports inside a function of something other than an optional dependency."""
    allowed = optional_packages()
    return [
        f"{source.path}:{imported.line}: imports {imported.name}, no optional dependency, inside a function"
        for source, imported, _ in all_imports(package)
        if imported.is_late
        and source.key  # the package's __init__ may be lazy
        and imported.name.split(".")[0] not in allowed
        and (source.path, imported.name.split(".")[0]) not in LATE_IMPORTS
    ]


def docstrings(package: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of every docstring."""
    for source in sources(package):
        for node in ast.walk(source.tree):
            if isinstance(node, Function | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node)
                if text:
                    yield f"{source.path}:{getattr(node, 'lineno', 1)}", text


def resolves(name: str) -> bool:
    """Whether a dotted name can be reached by import and getattr; a dataclass field is an attribute."""
    parts = name.split(".")
    if parts[0] in optional_packages() and importlib.util.find_spec(parts[0]) is None:
        return True
    try:
        value: Any = importlib.import_module(parts[0])
    except ImportError:
        return False
    path = parts[0]
    for part in parts[1:]:
        path = f"{path}.{part}"
        if part in getattr(value, "__dataclass_fields__", {}):
            value = value.__dataclass_fields__[part]
            continue
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(path)
            except ImportError:
                return False
    return True


def broken_mirrors(package: Path) -> list[str]:
    """`Mirrors:` lines whose upstream name is gone."""
    wrong = []
    for place, text in docstrings(package):
        for match in MIRRORS.finditer(text):
            names = re.findall(DOTTED, match[1] or "")
            if not names:
                wrong.append(f"{place}: `Mirrors:` is followed by no dotted name")
            wrong += [
                f"{place}: Mirrors: {name} does not exist upstream" for name in names if not resolves(name)
            ]
    return wrong


def broken_proofs(package: Path) -> list[str]:
    """`Proved by:` lines whose file, or test in it, does not exist."""
    wrong = []
    for place, text in docstrings(package):
        for match in PROVED_BY.finditer(text):
            proofs = PROOF.findall(match[1])
            if not proofs:
                wrong.append(f"{place}: `Proved by:` is followed by no path")
            for name, members in proofs:
                path = package.parent / name.rstrip(".")
                if not path.exists():
                    wrong.append(f"{place}: Proved by: {name.rstrip('.')} does not exist")
                    continue
                for member in filter(None, members.split("::")):
                    if not re.search(rf"\b(?:def|class) {member}\b", path.read_text(encoding="utf-8")):
                        wrong.append(f"{place}: Proved by: {name} has no {member}")
    return wrong


RULES = [
    misplaced_files,
    upward_imports,
    import_circles,
    mixed_worlds,
    long_files,
    long_functions,
    repeated_names,
    crowded_classes,
    late_imports,
    broken_mirrors,
    broken_proofs,
]
Rule = Callable[[Path], list[str]]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_hfbridge_keeps(rule: Rule) -> None:
    wrong = rule(PACKAGE)
    assert not wrong, f"{rule.__doc__}\n  " + "\n  ".join(wrong)


def test_there_is_something_to_check() -> None:
    assert len(sources(PACKAGE)) > 1


def build(root: Path, files: dict[str, str]) -> Path:
    """A package named hfbridge below `root`."""
    package = root / "hfbridge"
    for name, text in {"__init__.py": "", **files}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


LONG_BODY = "\n".join(f"    x{n} = {n}" for n in range(51))
METHODS = "\n".join(f"    def m{n}(self): ..." for n in range(41))
TYPE_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hfbridge.trainer import Trainer\n"

BROKEN = [
    (misplaced_files, {"utils.py": ""}, "utils.py"),
    (misplaced_files, {"checkpoints/misc.py": ""}, "checkpoints/misc.py"),
    (upward_imports, {"errors.py": "from hfbridge.settings import Settings"}, "errors.py:1"),
    (upward_imports, {"settings/rules.py": "import hfbridge.data.samplers"}, "layer 2, from layer 1"),
    (upward_imports, {"data/order.py": "from hfbridge import Trainer"}, "layer 8"),
    (upward_imports, {"data/order.py": "from ..trainer import Trainer", "trainer.py": ""}, "layer 4"),
    (upward_imports, {"data/order.py": "def f():\n    from hfbridge import cli", "cli.py": ""}, "layer 7"),
    (upward_imports, {"module.py": TYPE_ONLY}, "layer 4, from layer 3"),
    (
        upward_imports,
        {
            "checkpoints/lightning_format.py": "from . import checkpoint_io",
            "checkpoints/checkpoint_io.py": "",
        },
        "layer 3, from layer 2",
    ),
    (upward_imports, {"data/order.py": "from hfbridge.models.loading import mean"}, "another room"),
    (
        upward_imports,
        {"strategies/ddp.py": "from ..data import accumulation", "data/accumulation.py": ""},
        "another room",
    ),
    (repeated_names, {"data/io.py": "", "settings/io.py": ""}, "data/io.py, settings/io.py"),
    (import_circles, {"data/a.py": "from .b import x", "data/b.py": "import hfbridge.data.a"}, "data/a"),
    (
        import_circles,
        {"settings/__init__.py": "from .rules import F", "settings/rules.py": "from . import S"},
        "rules",
    ),
    (mixed_worlds, {"data/order.py": "import lightning.pytorch"}, "data/ must not know"),
    (mixed_worlds, {"strategies/ddp.py": "from transformers import Trainer"}, "strategies/ must not know"),
    (mixed_worlds, {"checkpoints/layout.py": "import pytorch_lightning"}, "checkpoints/ must not know"),
    (mixed_worlds, {"settings/to_lightning.py": "import lightning\nimport transformers"}, "both worlds"),
    (long_files, {"errors.py": "\n" * 801}, "801 lines"),
    (long_functions, {"errors.py": f"def f():\n{LONG_BODY}\n"}, "f has 51 lines"),
    (long_functions, {"errors.py": f"class C:\n  async def f(self):\n{LONG_BODY}\n"}, "f has 51 lines"),
    (crowded_classes, {"errors.py": f"class C:\n{METHODS}\n"}, "41 methods"),
    (late_imports, {"module.py": "def f():\n    import transformers"}, "imports transformers, no optional"),
    (
        late_imports,
        {"module.py": "class C:\n    def f(self):\n        from hfbridge import errors"},
        "inside a function",
    ),
    (broken_mirrors, {"errors.py": '"""Mirrors: pathlib.Path.no_such"""'}, "pathlib.Path.no_such"),
    (
        broken_mirrors,
        {"errors.py": '"""Mirrors: pathlib.Path.name and\nno_such_package.x"""'},
        "no_such_package.x",
    ),
    (
        broken_mirrors,
        {"errors.py": 'def f():\n    """F.\n\n    Mirrors: the trainer.\n    """'},
        "no dotted name",
    ),
    (broken_proofs, {"errors.py": '"""Proved by: tests/no_such.py"""'}, "tests/no_such.py"),
    (broken_proofs, {"errors.py": '"""Proved by: hfbridge/errors.py, tests/gone.py."""'}, "tests/gone.py"),
    (broken_proofs, {"errors.py": '"""Proved by: hfbridge/errors.py::test_x"""'}, "has no test_x"),
    (broken_proofs, {"errors.py": '"""Proved by: a test."""'}, "no path"),
]


@pytest.mark.parametrize(
    ("rule", "files", "offence"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_rule_is_noticed(rule: Rule, files: dict[str, str], offence: str, tmp_path: Path) -> None:
    wrong = rule(build(tmp_path, files))
    assert len(wrong) == 1
    assert offence in wrong[0]


KEPT = {
    "__init__.py": "def __getattr__(name):\n    from hfbridge.trainer import Trainer\n    return Trainer\n",
    "errors.py": '"""Mirrors: pathlib.Path.open, pathlib.Path.name and\njson.decoder."""',
    "utilities/imports.py": '"""Proved by: hfbridge/cli.py::main."""',
    "settings/__init__.py": "from .settings import Settings",
    "settings/settings.py": "import transformers\nfrom hfbridge.errors import E\nfrom .rules import F",
    "settings/rules.py": "",
    "data/order.py": "import transformers\nfrom . import accumulation",
    "data/accumulation.py": "from ..settings import Settings",
    "strategies/deepspeed.py": "import lightning\ndef f():\n    import deepspeed",
    "checkpoints/lightning_format.py": "from .layout import TABLE",
    "checkpoints/layout.py": "",
    "checkpoints/checkpoint_io.py": "import lightning, transformers\nfrom hfbridge.checkpoints import read",
    "module.py": "import lightning, transformers\nfrom . import callbacks\nimport hfbridge.data.accumulation",
    "callbacks.py": f"def f():\n    '''Doc.\n\n    More.\n    '''\n{LONG_BODY.split(chr(10), 1)[1]}\n",
    "trainer.py": "from hfbridge.module import HFModule",
    "migration/carry.py": "from hfbridge.trainer import Trainer",
    "compare/job.py": "import lightning, transformers, hfbridge.migration",
    "cli.py": "from hfbridge.compare.job import Job\ndef main():\n    import rich.table",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_what_is_allowed_is_no_offence(rule: Rule, tmp_path: Path) -> None:
    assert rule(build(tmp_path, KEPT)) == []

"""Make objects from names, as in YAML and on command lines.

passed                                           becomes
model, "package.module.function"                 the function, called when the run begins
processing_class, a name or folder               what AutoProcessor.from_pretrained makes of it
processing_class, a function or its name         what it returns
a dataset, a function or class, or its name      what it returns
a dataset, {"class_path": its name,              what it returns for these arguments, as LightningCLI
  "init_args": {...}}                              makes objects: datasets.load_dataset, say
a dataset, another dict                          each of its values by itself
a dataset, another text                          an error that says what can be written
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import datasets
import torch.utils.data
from transformers import AutoProcessor

from hfbridge.errors import BridgeError, DataError, ModelError, suggest


class Samples(Protocol):
    """Anything with a length and indexed samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


# The order in which LightningCLI tries them: what text and mappings mean is found out here, so that it can
# write them into its config.yaml as they were.
SetSource = (
    str
    | Mapping[str, Any]
    | Callable[..., Any]
    | torch.utils.data.Dataset[Any]
    | datasets.IterableDataset
    | Samples
)
"""A set of samples, several by name, a function that returns one, or the name of such a function."""

ProcessorSource = str | Path | Callable[..., Any]
"""A tokenizer or processor, a function that returns one, or the name or folder of one."""

_DESCRIBES = {"class_path", "init_args", "dict_kwargs"}
_SETS = (
    "It must be a datasets.Dataset, or anything with a length and rows; or in YAML package.module.function, "
    "of a function without arguments that returns one, or class_path: datasets.load_dataset with its "
    "arguments as init_args."
)


def make_set(source: Any, name: str) -> Any:
    """Call the function that returns a set, or those of a dict; anything else is returned as it is.

    Raises:
        DataError: a text that names nothing, the function needs arguments, or it returns nothing.
    """
    if type(source) is dict:
        if "class_path" not in source:
            return {key: make_set(value, f"{name}[{key!r}]") for key, value in source.items()}
        source = _described(source, name)
    if isinstance(source, str):
        source = _import_set(source, name)
    if not _is_function(source):
        return source
    made = _call(source, name, DataError)
    if made is None:
        raise DataError(f"{_shown(source)}, given as {name}, returns nothing; return the set.")
    return made


def make_processor(source: Any) -> Any:
    """Load the tokenizer or processor that is named, or call the function that returns one.

    Raises:
        ModelError: the folder does not exist, the function needs arguments, or it returns nothing.
    """
    if isinstance(source, str) and not Path(source).exists():
        found = _import(source, "processing_class", ModelError)
        source = source if found is None else found
    if isinstance(source, str | Path):
        looks_local = isinstance(source, Path) or source.startswith((".", "/", "~"))
        folder = Path(source).expanduser()
        if looks_local and not folder.exists():
            raise ModelError(
                f"The folder {str(source)!r}, given as processing_class, does not exist (seen from "
                f"{Path.cwd()}). Give a folder with a tokenizer or processor, or the name of one on the hub."
            )
        return AutoProcessor.from_pretrained(str(folder) if looks_local else source)
    if not _is_function(source):
        return source
    made = _call(source, "processing_class", ModelError)
    if made is None:
        raise ModelError(
            f"{_shown(source)}, given as processing_class, returns nothing; return the tokenizer or "
            "processor."
        )
    return made


def find_factory(model: Any, auto_class: object) -> Any:
    """Import the function that `model` names; a model's name or folder is returned as it is.

    Raises:
        ModelError: there is such a module, and it has nothing of this name.
    """
    if not isinstance(model, str) or auto_class is not None or Path(model).exists():
        return model
    found = _import(model, "model", ModelError)
    return model if found is None else found


def _described(source: Mapping[str, Any], name: str) -> Callable[[], Any]:
    """Read a function and its arguments from a mapping as LightningCLI writes them."""
    function = _import_set(source["class_path"], name)
    # On a command line, --data.train_dataset.init_args.path=... puts the argument beside class_path.
    arguments = {key: value for key, value in source.items() if key not in _DESCRIBES}
    arguments |= {**dict(source.get("init_args") or {}), **dict(source.get("dict_kwargs") or {})}
    if not callable(function):
        raise DataError(f"{name} has class_path: {source['class_path']}, which cannot be called. {_SETS}")
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise DataError(f"{name}: init_args do not fit {source['class_path']}: {error}.") from None
    return partial(function, **arguments)


def _import_set(text: object, name: str) -> Any:
    found = _import(text, name, DataError) if isinstance(text, str) else None
    if found is None:
        raise DataError(f"{name} is the text {text!r}, and names nothing that can be imported. {_SETS}")
    return found


def _import(text: str, name: str, error: type[BridgeError]) -> Any:
    """Import what a dotted text names; `None` if there is no such module."""
    parts = text.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return None
    value, depth = _deepest_module(parts)
    if value is None:
        return None
    for number, part in enumerate(parts[depth:], depth):
        if not hasattr(value, part):
            inside = ".".join(parts[:number])
            raise error(f"{name} is {text!r}, and {inside} has no {part}{suggest(part, dir(value))}.")
        value = getattr(value, part)
    return value


def _deepest_module(parts: list[str]) -> tuple[Any, int]:
    """Import as much of a dotted name as is modules; an error inside of one is raised as it is."""
    module, depth = None, 0
    for number in range(1, len(parts) + 1):
        path = ".".join(parts[:number])
        try:
            module, depth = importlib.import_module(path), number
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            break
    return module, depth


def _is_function(source: object) -> bool:
    """Whether to call something: tokenizers and collators can be called, too, and are no functions."""
    return inspect.isroutine(source) or isinstance(source, partial | type)


def _call(function: Callable[..., Any], name: str, error: type[BridgeError]) -> Any:
    """Call a function without arguments; raise before the call if it needs some."""
    try:
        needed = [
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
    except ValueError:  # functions written in C may have no signature
        needed = []
    if needed:
        raise error(
            f"{_shown(function)}, given as {name}, needs the arguments {', '.join(needed)}, and is called "
            "with none. Give them by functools.partial, or in YAML by class_path and init_args."
        )
    return function()


def _shown(function: Any) -> str:
    inner = function.func if isinstance(function, partial) else function
    return str(getattr(inner, "__qualname__", inner))

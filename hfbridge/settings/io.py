"""Settings as files: YAML or JSON with the names of `transformers.TrainingArguments`.

    suffix          read                                           written
    .yaml, .yml     2e-5 is a number, as in YAML 1.2               in the order given
    .json           as by json, NaN and Infinity included          indented

A name that stands in a file twice is an error in both. Nothing is written where writing fails: the text goes
to a file beside the old one, which it then replaces.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hfbridge.errors import SettingsError

_YAML, _JSON = (".yaml", ".yml"), (".json",)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # pyyaml has no annotations
    """Safe YAML, in which 2e-5 is a number and a name may stand but once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping of names that differ."""
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"{name} stands there twice", problem_mark=key.start_mark)
            seen.add(name)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read settings from a file, unchecked.

    Args:
        path: a file whose suffix is .yaml, .yml or .json.

    Returns:
        The values by name; an empty YAML file has none.

    Raises:
        SettingsError: the suffix is another, the file cannot be read, or holds something else.
    """
    file = Path(path).expanduser()
    is_yaml = _is_yaml(file)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no UTF-8 text ({error.reason})"
        raise SettingsError(
            f"The settings file {str(path)!r} cannot be read (seen from {Path.cwd()}): {reason}."
        ) from error
    try:
        content = yaml.load(text, _Loader) if is_yaml else json.loads(text, object_pairs_hook=_without_twins)
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"The settings file {str(path)!r} {_place_of(error)}.") from error
    if content is None and is_yaml:
        return {}
    if not isinstance(content, dict):
        example = "learning_rate: 5e-5" if is_yaml else '{"learning_rate": 5e-5}'
        raise SettingsError(
            f"The settings file {str(path)!r} holds a {type(content).__name__}; it must be a mapping of "
            f"names to values, such as {example}."
        )
    return {str(name): value for name, value in content.items()}


def write_file(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Write settings to a file, all or nothing; tokens are left out.

    Args:
        path: a file whose suffix is .yaml, .yml or .json; one that exists is replaced.
        values: plain values by name.

    Raises:
        SettingsError: the suffix is another, a value cannot be written, or the file cannot.
    """
    file = Path(path).expanduser()
    is_yaml = _is_yaml(file)
    kept = {
        name: value for name, value in values.items() if not (name.endswith("_token") and value is not None)
    }
    parts = [_dump(name, value, is_yaml=is_yaml) for name, value in kept.items()]
    text = "".join(parts) if is_yaml else json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_text(text or "{}\n", encoding="utf-8")
        beside.replace(file)
    except (OSError, UnicodeEncodeError) as error:
        beside.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SettingsError(
            f"The settings cannot be written to {str(path)!r}: {reason}. Nothing was written."
        ) from error


def _is_yaml(path: Path) -> bool:
    """Tell by the suffix how a file is written.

    Raises:
        SettingsError: it says neither.
    """
    if path.suffix.lower() not in _YAML + _JSON:
        raise SettingsError(
            f"The settings file {str(path)!r} has the suffix {path.suffix!r}; it may be .yaml, .yml or .json."
        )
    return path.suffix.lower() in _YAML


def _dump(name: str, value: object, *, is_yaml: bool) -> str:
    """Write one setting.

    Raises:
        SettingsError: it holds something that neither YAML nor JSON has.
    """
    try:
        if is_yaml:
            return str(yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True))
        return json.dumps(value)
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise SettingsError(
            f"{name} = {value!r} cannot be written to a file, which holds numbers, strings, lists and "
            "dictionaries only. Give it in Python: Settings.load(path).replace(...)."
        ) from error


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object of names that differ.

    Raises:
        ValueError: a name stands there twice.
    """
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} stands there twice")
    return dict(pairs)


def _place_of(error: Exception) -> str:
    """Say what is wrong in a text, and in which line if that is known."""
    if isinstance(error, json.JSONDecodeError):
        return f"is no JSON: line {error.lineno}, column {error.colno}: {error.msg}"
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.MarkedYAMLError) and mark is not None:
        return f"is no YAML: line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return f"cannot be understood: {error}"

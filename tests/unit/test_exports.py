"""The public surface: what stands in `hfbridge.__all__`, and nothing else."""

import gc
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import hfbridge


def public_names(module: ModuleType) -> set[str]:
    """Names without underscore that are in the module, other than its submodules and its lazy machinery."""
    submodules = {
        name.removeprefix(f"{module.__name__}.")
        for name in sys.modules
        if name.startswith(f"{module.__name__}.")
    }
    machinery = {"Any", "TYPE_CHECKING", "gc", "importlib"}
    return {name for name in vars(module) if not name.startswith("_")} - submodules - machinery


def test_all_is_sorted_and_without_duplicates() -> None:
    names = list(hfbridge.__all__)
    assert all(isinstance(name, str) for name in names)
    assert names == sorted(set(names))


def test_every_name_of_all_resolves() -> None:
    missing = [name for name in hfbridge.__all__ if not hasattr(hfbridge, name)]
    assert not missing, f"in hfbridge.__all__ but not in hfbridge: {missing}"


def test_all_is_what_is_public() -> None:
    for name in hfbridge.__all__:  # a lazy module holds its names only once they have been asked for
        getattr(hfbridge, name, None)
    undeclared = public_names(hfbridge) - set(hfbridge.__all__)
    assert not undeclared, f"public in hfbridge but not in hfbridge.__all__: {sorted(undeclared)}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(hfbridge, "no_such_name")


def test_public_names_say_where_they_come_from() -> None:
    for name in hfbridge.__all__:
        value = getattr(hfbridge, name)
        home = getattr(value, "__module__", None)
        if home is not None and home.startswith("hfbridge"):
            assert hasattr(importlib.import_module(home), name), (
                f"hfbridge.{name} is not in its module {home}"
            )


IMPORT_CHANGES_NOTHING = """
import logging, os, signal, sys, warnings
import accelerate, datasets, evaluate, lightning, torch, transformers
def state():
    switches = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    loggers = logging.root.level, list(logging.root.handlers)
    return dict(os.environ), list(warnings.filters), loggers, signal.getsignal(signal.SIGTERM), switches
before = state()
libraries = {"sklearn", "sacrebleu", "seqeval", "rouge_score"} - set(sys.modules)
import hfbridge
[getattr(hfbridge, name) for name in hfbridge.__all__]
changed = [(a, b) for a, b in zip(before, state()) if a != b]
changed += sorted(libraries & set(sys.modules))
sys.exit(repr(changed) if changed else 0)
"""


def test_import_has_no_side_effects() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CHANGES_NOTHING],
        cwd=Path(hfbridge.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


IMPORTS_NOTHING = """
import sys
import hfbridge
heavy = {"accelerate", "datasets", "lightning", "peft", "torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
assert hfbridge.strategies.FSDP2Strategy and {"Trainer", "strategies"} <= set(dir(hfbridge))
"""


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_waits_while_a_name_is_imported(monkeypatch: pytest.MonkeyPatch, collects: bool) -> None:
    """It takes a fifth of the time; afterwards it is looked for as before."""
    found: list[bool] = []
    home = importlib.import_module("hfbridge.module")

    def importing(name: str) -> ModuleType:
        found.append(gc.isenabled())
        return home

    monkeypatch.delattr(hfbridge, "HFModule", raising=False)
    monkeypatch.setattr(hfbridge.importlib, "import_module", importing)
    if not collects:
        gc.disable()
    try:
        assert hfbridge.HFModule is home.HFModule
        assert gc.isenabled() is collects
    finally:
        gc.enable()
    assert found == [False]


def test_importing_the_package_imports_no_library() -> None:
    subprocess.run(
        [sys.executable, "-c", IMPORTS_NOTHING], cwd=Path(hfbridge.__file__).parents[1], check=True
    )

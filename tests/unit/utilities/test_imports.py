"""Optional packages."""

import json
import sys

import pytest

from hfbridge.errors import MissingDependencyError
from hfbridge.utilities.imports import require


def test_an_installed_package_is_returned():
    assert require("json", extra="peft", for_="anything") is json


def test_a_submodule_is_returned():
    assert require("json.decoder", extra="peft", for_="anything") is sys.modules["json.decoder"]


@pytest.mark.parametrize("package", ["no_such_package", "no_such_package.inner"])
def test_a_missing_package_names_the_feature_and_the_command(package):
    with pytest.raises(MissingDependencyError) as caught:
        require(package, extra="deepspeed", for_='strategy="deepspeed"')
    assert str(caught.value) == (
        'strategy="deepspeed" needs the package no_such_package, which is not installed; '
        'run: pip install "hfbridge[deepspeed]"'
    )
    assert caught.value.name == "no_such_package"


def test_a_package_that_lacks_another_fails_with_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import absent_inner_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent_inner_package") as caught:
        require("broken_package", extra="peft", for_="peft")
    assert not isinstance(caught.value, MissingDependencyError)

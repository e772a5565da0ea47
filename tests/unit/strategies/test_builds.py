"""Locks that killed builds of extensions leave."""

import os
import time
import warnings

import pytest

from hfbridge.errors import BridgeWarning
from hfbridge.strategies import builds


def leave_lock(folder, age_s):
    """Leave what a build that was killed that long ago has left."""
    folder.mkdir(parents=True)
    for name in ("build.ninja", "lock"):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age_s,) * 2)
    return folder / "lock"


def test_an_old_lock_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = leave_lock(tmp_path / "cpu_adam", age_s=1_900)
    with pytest.warns(BridgeWarning, match=r"32 minutes: something compiles cpu_adam") as caught:
        builds.warn_of_old_locks()
    assert f"rm '{lock}'" in str(caught[0].message)


def test_the_default_folder_has_one_level_more(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(builds, "get_default_build_root", lambda: str(tmp_path))
    leave_lock(tmp_path / "py311_cpu" / "cpu_adam", age_s=1_900)
    with pytest.warns(BridgeWarning, match="cpu_adam"):
        builds.warn_of_old_locks()


def test_a_build_that_goes_on_is_left_in_peace(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    leave_lock(tmp_path / "young", age_s=20)
    leave_lock(tmp_path / "works", age_s=1_900)
    (tmp_path / "works" / "adam.o").touch()
    (tmp_path / "done").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        builds.warn_of_old_locks()


def test_no_folder_is_no_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "nowhere"))
    builds.warn_of_old_locks()

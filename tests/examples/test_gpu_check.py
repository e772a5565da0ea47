"""The GPU check in tiny form, on a CPU: all of its measurements, and what it writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "check.py"
pytestmark = [pytest.mark.slow, pytest.mark.deepspeed, pytest.mark.timeout(900)]


def test_it_runs_on_a_cpu(tmp_path):
    command = [sys.executable, str(SCRIPT), "--tiny", "--minutes", "15", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["is_tiny"]
    assert {name: row["equal"] for name, row in found["parity"].items()} == dict.fromkeys(
        ["fp32, accumulation 1", "fp32, accumulation 4", "bf16, accumulation 1", "bf16, accumulation 4"], True
    )
    assert all(row["resumes_to_the_bit"] for row in found["strategies"].values())
    assert list(found["strategies"]) == ["ddp", "fsdp2", "deepspeed_stage_2", "deepspeed_stage_3"]
    assert found["summary"]["classifier"].keys() == {"loop", "native", "hfbridge"}
    assert found["speed"]["classifier, hfbridge, regroup"]["samples_per_second"] > 0
    assert found["host"].keys() >= {"waits, native", "waits, hfbridge", "saving, asynchronous"}
    assert any("test_liger_kernels_on_a_gpu" in name for name in found["tests"]["pytest -m gpu"]["collected"])

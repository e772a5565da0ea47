"""Tables made of results: that they say what was measured."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def load(name: str = "tables") -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(share: float, **numbers: float) -> dict[str, Any]:
    found = {name: {"median": value} for name, value in numbers.items()}
    return {**found, "of_native": {"median": share, "quartiles": [share - 0.1, share + 0.1]}}


RESULTS: dict[str, Any] = {
    "packing": {
        "tinyshakespeare": {
            "native": measured(1.0, real_tokens_per_second=12345.6, real=0.5),
            "hfbridge": measured(1.01, real_tokens_per_second=12400.0, real=0.5),
            "packing": measured(1.9, real_tokens_per_second=23400.0, real=0.98),
        }
    },
    "precision": {
        "MiniLM": {
            "native": measured(1.0, samples_per_second=40.0),
            "hfbridge": measured(1.02, samples_per_second=41.0),
            "native, bf16": measured(1.5, samples_per_second=60.0),
            "hfbridge, bf16": measured(1.52, samples_per_second=61.0),
            "native, compile": measured(1.2, samples_per_second=48.0),
            "hfbridge, compile": measured(1.22, samples_per_second=49.0),
        }
    },
    "chunked_loss": {
        "native": measured(1.0, seconds_per_step=1.25, peak_mib=800.0),
        "hfbridge": measured(0.99, seconds_per_step=1.24, peak_mib=801.0),
        "chunked_loss": measured(0.7, seconds_per_step=0.9, peak_mib=99.0),
    },
    "start": {
        "1 process, cold": {"native": measured(1.0, seconds=3.0), "hfbridge": measured(0.9, seconds=2.7)}
    },
}


def test_throughput() -> None:
    assert load().throughput(RESULTS)[2:] == [
        "| real tokens per second, tinyshakespeare; with packing (50% and 98% of the tokens real) "
        "| 12,346/s | 1.01 (0.91 to 1.11) | 1.90 (1.80 to 2.00) |",
        "| samples per second, MiniLM in float32 | 40.0/s | 1.02 (0.92 to 1.12) | |",
        "| the same, `bf16=True` | 1.50 (1.40 to 1.60) | 1.52 (1.42 to 1.62) | |",
        "| the same, `torch_compile=True` | 1.20 (1.10 to 1.30) | 1.22 (1.12 to 1.32) | |",
        "| seconds per step, 32,000 words; with `chunked_loss=True` "
        "| 1.25 s | 0.99 (0.89 to 1.09) | 0.70 (0.60 to 0.80) |",
        "| memory of it at its peak | 800 MiB | 801 MiB | 99 MiB |",
        "| seconds to the first step, mapped by 1 process, cold | 3.00 s | 0.90 (0.80 to 1.00) | |",
    ]


def test_gpu() -> None:
    apart = {"step": 3, "quantity": "loss", "relative": 2e-7}
    row = {"samples_per_second": 1234.4, "mfu": 0.412, "peak_bytes": 3 * 2**30}
    results = {
        "parity": {
            "fp32": {"equal": True},
            "bf16": {"equal": False, "first_difference": apart, "largest_difference_of_weights": 1e-6},
        },
        "strategies": {"ddp": {"error": "no result within 150 s"}},
        "summary": {"language model": {"native": row, "hfbridge": {**row, "overhead_us_per_step": 99.6}}},
    }
    assert load().gpu(results) == [
        "| on one GPU | |",
        "| --- | --- |",
        "| fp32 | equal to the bit |",
        "| bf16 | differs from step 3, loss, by 2e-07; weights differ by at most 1e-06 |",
        "| `ddp`, resumed | failed: no result within 150 s |",
        "",
        "| | `transformers.Trainer` | hfbridge | a hand-written loop |",
        "| --- | ---: | ---: | ---: |",
        "| language model: samples per second | 1,234 | 1,234 |  |",
        "| language model: MFU | 0.41 | 0.41 |  |",
        "| language model: µs per step above the loop |  | 100 |  |",
        "| language model: peak memory | 3,072 MiB | 3,072 MiB |  |",
    ]


def test_results_need_a_place_on_some_page(tmp_path: Path) -> None:
    tables, page = load(), tmp_path / "page.md"
    tables.RESULTS = tmp_path
    page.write_text("nothing")
    tables.require_places([page])
    (tmp_path / "throughput.json").write_text("{}")
    with pytest.raises(SystemExit, match="no page has a place for throughput"):
        tables.require_places([page])
    page.write_text("<!-- results:throughput --> <!-- /results -->")
    tables.require_places([page])


def test_commands_of_results_can_be_repeated_anywhere() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        about = json.loads(path.read_text()).get("about", {})
        assert not re.search(r"(^|[ =])/", about.get("command", "")), path.name
    command_of = load("measure").command_of
    assert command_of(
        [str(ROOT / "benchmarks/x.py"), "--out", "/elsewhere/far/away/x.json", "--steps", "3"]
    ) == ("python benchmarks/x.py --out x.json --steps 3")
    assert command_of([str(ROOT / "benchmarks/x.py"), str(ROOT.parent / "shared")]).endswith(" ../shared")

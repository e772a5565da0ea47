"""What a step costs more with more of something: counted in calls of Python functions, beside native.

benchmarks/growth.py measures time and memory; what it makes of its measurements is tested here, too.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger
from transformers import Trainer as NativeTrainer
from transformers import TrainerCallback, TrainingArguments

from tests.unit.test_overhead import (
    LIMIT,
    Collator,
    Stub,
    StubConfig,
    calls_per_step,
    make_rows,
    run_hfbridge,
    run_loop,
    run_native,
    settings_of,
)

# Of the engines and of what is given to them: no timers, locks or finalizers of other libraries.
OWN = ("hfbridge", "lightning", "transformers", "accelerate", __file__)
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Listens(TrainerCallback):
    """Listens to what happens in a micro-batch and at both ends of a step."""

    def on_step_begin(self, *event: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def on_substep_end(self, *event: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def on_step_end(self, *event: Any, **kwargs: Any) -> None:
        """Do nothing."""


def run_native_with(collator: Collator, accumulation: int, *callbacks: TrainerCallback) -> None:
    """Train with the native Trainer."""
    arguments = TrainingArguments(**settings_of(accumulation), disable_tqdm=True)
    rows: Any = make_rows(accumulation)
    NativeTrainer(
        Stub(StubConfig()), arguments, train_dataset=rows, data_collator=collator, callbacks=list(callbacks)
    ).train()


def test_a_micro_batch_more_costs_less_than_natively() -> None:
    engines = (run_loop, run_native, run_hfbridge)
    loop, native, ours = ((calls_per_step(run, 12) - calls_per_step(run, 4)) / 8 for run in engines)
    share = (ours - loop) / (native - loop)
    assert 0 < share < LIMIT, f"{ours:.0f} calls for one more, {native:.0f} natively, {loop:.0f} by hand"


def more(run: Callable[..., None], count: int, make: Callable[[], Any]) -> float:
    """Count the calls that each callback beyond some adds to a step of three micro-batches."""
    some, twice = (calls_per_step(run, 3, *(make() for _ in range(n)), of=OWN) for n in (count, 2 * count))
    return (twice - some) / count


def test_a_trainer_callback_is_called_for_what_it_listens_to() -> None:
    # Two ends of a step and two inner micro-batches; natively two more events are told to everyone.
    native, ours = (more(run, 8, Listens) for run in (run_native_with, run_hfbridge))
    assert ours == 4 < native


def test_a_trainer_callback_that_listens_to_nothing_is_told_the_end_of_a_step_alone() -> None:
    assert more(run_hfbridge, 8, TrainerCallback) == 1


def test_a_logger_costs_nothing_between_two_rows(tmp_path: Path) -> None:
    alone = calls_per_step(run_hfbridge, 1, of=OWN)
    loggers = [CSVLogger(str(tmp_path / str(number))) for number in range(8)]
    assert calls_per_step(run_hfbridge, 1, logger=loggers, of=OWN) == alone


def test_lightnings_callbacks_cost_one_call_for_each_hook() -> None:
    class Ends(pl.Callback):
        def on_train_batch_start(self, *hook: Any) -> None:
            pass

        def on_train_batch_end(self, *hook: Any) -> None:
            pass

    alone, with_eight = (
        calls_per_step(run_hfbridge, 1, *(Ends() for _ in range(count)), of=OWN) for count in (0, 8)
    )
    assert with_eight == alone + 16


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """What imports a file of the benchmarks, which stand beside each other in no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        path = getattr(sys.modules[name], "__file__", None)
        if path is not None and Path(path).parent == BENCHMARKS:
            del sys.modules[name]


def found_of(ours: list[list[float]], native: list[list[float]]) -> Any:
    """Make measurements of three repeats with a small and a large size."""
    return {
        engine: {
            str(size): [
                {"cpu_us": value, "wall_us": value, "memory_bytes": value * 2**20} for value in values
            ]
            for size, values in zip((1, 64), of, strict=True)
        }
        for engine, of in (("native", native), ("hfbridge", ours))
    }


@pytest.mark.parametrize(
    ("ours", "is_told"),
    [
        ([[50, 52, 51], [150, 149, 151]], False),  # as much more, and a larger share
        ([[50, 52, 51], [160, 141, 150]], False),  # more in one repeat of three
        ([[50, 52, 51], [180, 181, 182]], True),
    ],
)
def test_what_grows_more_than_natively_is_told(
    benchmarks: Callable[[str], Any], ours: list[list[float]], is_told: bool
) -> None:
    growth = benchmarks("growth")
    found = growth.summed_up(found_of(ours, [[100, 101, 99], [200, 202, 199]]))
    told = growth.complaints({"accumulation": found})
    assert [line.split(" by ")[0] for line in told] == (
        [f"accumulation: from 1 to 64 {name} grows" for name in growth.ALLOWED] if is_told else []
    )
    assert found["sizes"]["64"]["of_native"]["cpu_us"]["repeats"] == 3


def seconds_of(**values: float) -> dict[str, Any]:
    """Make a measurement of one repeat."""
    return values


@pytest.mark.parametrize(("resume_s", "is_told"), [(1.9, False), (2.2, True)])
def test_a_slow_resume_is_told(benchmarks: Callable[[str], Any], resume_s: float, is_told: bool) -> None:
    growth = benchmarks("growth")
    native = [seconds_of(scratch_s=1.0, resume_s=9.0)]
    ours = [seconds_of(scratch_s=1.0, resume_s=resume_s)]
    found = growth.summed_up({"native": {"1000": native}, "hfbridge": {"1000": ours}})
    assert bool(growth.complaints({"resume": found})) == is_told


def test_a_late_start_is_told(benchmarks: Callable[[str], Any]) -> None:
    growth = benchmarks("growth")
    native = [seconds_of(from_call_s=1.0, from_imports_s=2.0, from_process_s=3.0)]
    ours = [seconds_of(from_call_s=1.5, from_imports_s=1.9, from_process_s=3.5)]
    found = growth.summed_up({"native": {"100": native}, "hfbridge": {"100": ours}})
    told = "start: from_process_s is 3.50 s, natively 3.00 s (lower quartile of the differences 0.50 s)"
    assert growth.complaints({"start": found}) == [told]


def test_the_table_has_a_row_for_each_size(benchmarks: Callable[[str], Any]) -> None:
    growth, tables = benchmarks("growth"), benchmarks("tables")
    steps = growth.summed_up(found_of([[50, 52, 51], [150, 149, 151]], [[100, 101, 99], [200, 202, 199]]))
    starts = {
        "resume": [seconds_of(scratch_s=0.1, resume_s=0.2)],
        "start": [seconds_of(from_call_s=0.1, from_imports_s=0.2, from_process_s=3.0)],
    }
    results = {axis: steps for axis in growth.SIZES if axis not in starts}
    for axis, values in starts.items():
        results[axis] = growth.summed_up({"native": {"1000": values}, "hfbridge": {"1000": values}})
    lines = tables.growth(results)
    assert "| accumulation | 1 | 100 | 51 | 0.51 (0.51 to 0.52) | 100.0 MiB | 51.0 MiB |" in lines
    assert "|  | 64 | 200 | 150 | 0.75 (0.74 to 0.75) | 200.0 MiB | 150.0 MiB |" in lines
    assert "| 1,000 rows, in mid-epoch | 0.20 (0.20 to 0.20) | 0.20 (0.20 to 0.20) |" in lines
    assert len(lines) == 2 + 2 * (len(growth.SIZES) - 2) + 3 + 2 + 3


@pytest.mark.slow
@pytest.mark.long
def test_growth_can_be_measured(tmp_path: Path) -> None:
    """On few steps and small sizes, where nothing is to be learned from the numbers."""
    command = [sys.executable, str(BENCHMARKS / "growth.py"), "--repeats", "1", "--scale", "0.05"]
    out = tmp_path / "growth.json"
    axes = {"accumulation": "1 2", "rows": "800 1600", "resume": "800", "start": "800"}
    for axis, sizes in axes.items():
        more_given = ["--axes", axis, "--sizes", *sizes.split(), "--out", str(out)]
        done = subprocess.run([*command, *more_given], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        result = json.loads(out.read_text())[axis]
        assert list(result["sizes"]) == sizes.split()
        assert all(set(row) >= {"native", "hfbridge"} for row in result["sizes"].values())
    assert set(json.loads(out.read_text())) == {"about", *axes}

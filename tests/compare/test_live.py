"""Comparisons with real processes: a script, its engines, their files and verdicts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from hfbridge.compare import compare

ROOT = Path(__file__).resolve().parents[2]
# Two passes of 12 micro-batches, 5 a step: the last window of a pass is short. With dropout, and clipped.
SCRIPT = """
import sys

from transformers import Trainer, TrainingArguments

from tests.tiny import PadRows, make_model, make_rows

IS_SPOILED = {spoiled!r} in sys.argv  # of the process of that engine


def build():
    args = TrainingArguments(
        output_dir="never",
        use_cpu=True,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=5,
        learning_rate=1e-2,
        weight_decay=0.0 if IS_SPOILED else 0.1,
        num_train_epochs=2,
        max_grad_norm=0.5,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=2,
        report_to="none",
    )
    rows = make_rows("distilbert", {rows})
    return Trainer(
        model=make_model("distilbert"),
        args=args,
        train_dataset=rows,
        eval_dataset=make_rows("distilbert", 11, seed=5),
        data_collator=PadRows(),
    )
"""
CALL = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
from pathlib import Path
from hfbridge.compare import compare
compare(Path("job.py"), engines=sys.argv[1:], ranks=2, out=Path("out"), show_progress=False)
"""


def write_script(*, rows: int, spoiled: str = "none") -> Path:
    path = Path("job.py")
    path.write_text(SCRIPT.format(rows=rows, spoiled=f"--engine={spoiled}"))
    return path


@pytest.mark.slow
@pytest.mark.distributed
def test_the_engines_are_equal_to_the_bit_in_processes_of_their_own() -> None:
    found = compare(
        write_script(rows=46),
        engines=["native", "accelerate", "lightning"],
        ranks=1,
        out=Path("out"),
        show_progress=False,
    )
    assert [verdict.grade for verdict in found.verdicts] == ["exact", "exact"], str(found)
    assert found.agrees
    steps = [json.loads(line) for line in Path("out/lightning/steps.jsonl").read_text().splitlines()]
    assert [step["rows"] for step in steps] == [20, 20, 6] * 2
    assert max(step["grad_norm"] for step in steps) > 0.5
    assert all(result["seconds_startup"] > result["seconds_training"] for result in found.results.values())
    assert all(result["sources"].keys() == {"job.py"} for result in found.results.values())
    assert not Path("out/native/saved").exists()
    assert not Path("never/checkpoint-2").exists()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
def test_two_ranks_go_on_after_an_interruption_and_a_fault_is_named() -> None:
    engines = ["native", "accelerate", "lightning", "native:deepspeed_stage_2", "lightning:deepspeed_stage_2"]
    write_script(rows=92, spoiled="accelerate")
    with started(engines) as killed:
        wait_for(lambda: Path("out/native/output.txt").exists() and len(workers()) == 3, killed)
    wait_for(lambda: not workers())  # which have seen that nobody waits for them
    with started(engines) as interrupted:
        wait_for(lambda: Path("out/accelerate/output.txt").exists() and len(workers()) == 3, interrupted)
        interrupted.send_signal(signal.SIGINT)
        assert interrupted.wait(60) != 0
        assert not workers()
    recorded = Path("out/native/done.json").stat().st_mtime_ns
    found = compare(Path("job.py"), engines=engines, ranks=2, out=Path("out"), show_progress=False)
    assert Path("out/native/done.json").stat().st_mtime_ns == recorded
    verdicts = {verdict.ours: verdict for verdict in found.verdicts if verdict.theirs == "native"}
    assert verdicts["lightning"].grade == "exact", str(found)
    sharded = [
        json.loads(Path(f"out/{name}-deepspeed_stage_2/done.json").read_text())
        for name in ("native", "lightning")
    ]
    assert sharded[0]["final_parameters"] == sharded[1]["final_parameters"]
    assert verdicts["lightning:deepspeed_stage_2"].grade in ("exact", "close"), str(found)
    fair = found.verdicts[-1]
    assert (fair.theirs, fair.ours, fair.grade) == (engines[3], engines[4], "exact"), str(found)
    spoiled = verdicts["accelerate"]
    assert (spoiled.grade, spoiled.first_step, spoiled.quantity) == ("differs", 1, "parameters")
    assert not found.agrees


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.distributed
def test_shared_weights_are_compared_whole() -> None:
    engines = ["native", "lightning:fsdp2", "lightning:fsdp", "lightning:deepspeed_stage_3"]
    found = compare(
        write_script(rows=92), engines=engines, ranks=2, out=Path("out"), steps=3, show_progress=False
    )
    assert [verdict.grade for verdict in found.verdicts if verdict.grade not in ("exact", "close")] == [], (
        str(found)
    )
    begun = {result["first_parameters"] for result in found.results.values()}
    assert len(begun) == 1
    assert all(result["steps_done"] == 3 for result in found.results.values())


@contextmanager
def started(engines: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a comparison in a process of its own, which is killed in the end if it is still there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", CALL, *engines], env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def workers() -> list[int]:
    """Processes that train for a comparison in this folder, and torchrun."""
    here = f"--folder={Path.cwd()}"
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        is_alive = process.info["status"] != psutil.STATUS_ZOMBIE
        if is_alive and any(part.startswith(here) for part in process.info["cmdline"] or ()):
            found.append(process.pid)
    return found


def wait_for(is_there: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until something is so, while a process lives."""
    end = time.monotonic() + 180
    while not is_there():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.05)

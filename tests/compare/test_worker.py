"""One rank of an engine: what it leaves in its folder, also when it fails; in this process."""

import json
import os
from pathlib import Path

import pytest
from transformers import TrainingArguments

from hfbridge import JobError
from hfbridge.compare import worker
from hfbridge.compare.training import check_world_size

SCRIPT = """
from tests.compare.planted import make_trainer

def build():
    return make_trainer({settings!r})
"""


def work(*, text: str, engine: str = "native", steps: int = 2) -> int:
    Path("job.py").write_text(text)
    Path("out").mkdir(exist_ok=True)
    arguments = ["--job=job.py", f"--engine={engine}", "--folder=out", f"--steps={steps}"]
    return worker.main([*arguments, f"--parent={os.getpid()}"])


def left() -> list[str]:
    return sorted(path.name for path in Path("out").iterdir())


@pytest.mark.parametrize("engine", ["native", "lightning"])
def test_a_rank_leaves_its_steps_and_what_it_tells_of_itself(engine: str) -> None:
    assert work(text=SCRIPT.format(settings={"eval_steps": 1}), engine=engine) == 0
    assert {"begun.json", "metrics.jsonl", "rank-0.jsonl", "result-0.json"} <= set(left())
    assert json.loads(Path("out/begun.json").read_text()) == {"steps": 2}
    steps = [json.loads(line) for line in Path("out/rank-0.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    result = json.loads(Path("out/result-0.json").read_text())
    assert set(result["sources"]) == {"job.py"}
    assert result["settings"]["gradient_accumulation_steps"] == 3
    assert result["seconds_startup"] > 0
    assert result["peak_memory_bytes"] > 2**24
    assert result["settings"]["strategy"] == "single"


def test_notes_are_for_those_who_compare() -> None:
    settings = {"resume_from_checkpoint": "out/checkpoint-2"}  # for scripts; no engine reads it
    assert work(text=SCRIPT.format(settings=settings), engine="lightning") == 0
    notes = json.loads(Path("out/result-0.json").read_text())["notes"]
    (about_loss,) = [note for note in notes if "loss_normalization" in note]
    assert about_loss.endswith('of "exact", which is the mean over all its items.')
    others = ("HFModule", "Trainer(", "ckpt_path", "disable_tqdm")
    assert not [note for note in notes for other in others if other in note]


def test_a_wrong_job_is_told_as_one() -> None:
    assert work(text="def build():\n    return 3\n") == 1
    assert left() == ["error-0.txt", "job-error.txt"]
    assert "build() returns an object of class int" in Path("out/job-error.txt").read_text()


def test_a_native_trainer_that_would_train_alone_on_each_rank_is_refused() -> None:
    """As natively, without use_cpu=True, where there is no GPU."""
    with pytest.raises(JobError, match=r"world_size is 1, on 2 ranks.*has use_cpu=False: set it"):
        check_world_size(TrainingArguments(output_dir="out"), ranks=2)


def test_an_engine_that_cannot_train_the_job_tells_its_error_alone() -> None:
    text = SCRIPT.format(settings={"neftune_noise_alpha": 5.0})
    assert work(text=text, engine="accelerate") == 1
    assert "job-error.txt" not in left()
    assert Path("out/error-0.txt").read_text().startswith("SettingsError: The accelerate loop cannot train")


def test_any_other_error_is_told_with_its_traceback() -> None:
    text = SCRIPT.format(settings={}) + "\n\ndef fail(*rows):\n    raise OSError('disk')\n"
    text = text.replace("return make_trainer({})", "t = make_trainer(); t.data_collator = fail; return t")
    assert work(text=text) == 1
    told = Path("out/error-0.txt").read_text()
    assert told.startswith("Traceback")
    assert told.strip().endswith("OSError: disk")

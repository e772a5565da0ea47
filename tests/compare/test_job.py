"""Jobs: scripts that are loaded, what is said of those that cannot be, and the Trainer that a Job makes."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainer, TrainingArguments
from transformers import Trainer as NativeTrainer

from hfbridge import JobError, Settings, SettingsError
from hfbridge.compare import Job
from hfbridge.compare.engines import Engine
from hfbridge.compare.job import build_job, check_script, folder_on_path, load_build, sources_of
from hfbridge.compare.training import made_again, make_native, silence
from tests.compare.planted import SETTINGS, make_trainer
from tests.tiny import PadRows, make_model, make_rows, make_tokenizer


@pytest.fixture(autouse=True)
def restored_modules() -> Iterator[None]:
    """Forget what scripts have imported."""
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if getattr(sys.modules[name], "__file__", None) and "tmp" in str(sys.modules[name].__file__):
            del sys.modules[name]


def script(text: str, name: str = "job.py") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def build(:\n", "is not Python: "),
        ("x = 1\n", "has no build. Add def build(): it returns a transformers.Trainer"),
        ("def biuld():\n    pass\n", "has no build"),
        ("import no_such_module\ndef build():\n    pass\n", "fails when it is loaded: ModuleNotFoundError"),
        ("import sys\nsys.exit(3)\ndef build():\n    pass\n", "fails when it is loaded: SystemExit: 3"),
        ("build = 3\n", "has no function build"),
        ("if False:\n    build = None\n", "has no function build"),
    ],
)
def test_a_script_that_cannot_be_a_job_is_told(text: str, said: str) -> None:
    with pytest.raises(JobError) as caught:
        load_build(script(text))
    assert said in str(caught.value)
    assert str(caught.value).startswith("job.py: ")


def test_a_script_that_is_not_there_is_told() -> None:
    with pytest.raises(JobError, match="no such file"):
        check_script(Path("jobb.py"))
    with pytest.raises(JobError, match="no such file"):
        check_script(Path())


def test_looking_at_a_script_does_not_run_it() -> None:
    check_script(script("raise SystemExit\ndef build():\n    pass\n"))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("None", "returns None"),
        ("3", "returns an object of class int"),
        ("transformers.Trainer", "returns the class Trainer"),
        ("transformers.TrainingArguments(use_cpu=True)", "returns an object of class TrainingArguments"),
        ("1 / 0", "build() fails: ZeroDivisionError: division by zero"),
    ],
)
def test_what_build_returns_is_told_if_it_is_something_else(returned: str, said: str) -> None:
    path = script(f"import transformers\ndef build():\n    return {returned}\n")
    with pytest.raises(JobError) as caught:
        build_job(path, load_build(path))
    assert said in str(caught.value)


def test_a_trainer_that_has_trained_or_has_no_data_is_told() -> None:
    trainer = make_trainer()
    trainer.state.global_step = 3
    with pytest.raises(JobError, match="has trained 3 steps"):
        build_job(Path("job.py"), lambda: trainer)
    trainer.state.global_step, trainer.train_dataset = 0, None
    with pytest.raises(JobError, match="without train_dataset"):
        build_job(Path("job.py"), lambda: trainer)


def test_a_script_imports_what_lies_beside_it_and_all_of_it_is_named() -> None:
    folder = Path("project")
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "__init__.py").write_text("")
    (folder / "parts" / "rows.py").write_text("ROWS = 3\n")
    (folder / "unused.py").write_text("")
    path = script("from parts.rows import ROWS\ndef build():\n    return ROWS\n", "project/job.py")
    with folder_on_path(path):
        assert load_build(path)() == 3
        found = sources_of(path)
    assert sorted(found) == ["job.py", "parts/__init__.py", "parts/rows.py"]
    assert str(folder.resolve()) not in sys.path
    before = found["parts/rows.py"]
    (folder / "parts" / "rows.py").write_text("ROWS = 4\n")
    assert sources_of(path)["parts/rows.py"] != before


# A Job.


def job(**given: Any) -> Job:
    values = {
        "model": partial(make_model, "distilbert"),
        "settings": SETTINGS,
        "train_dataset": partial(make_rows, "distilbert", 46),
        "eval_dataset": make_rows("distilbert", 11, seed=5),
        "data_collator": PadRows(),
    }
    return Job(**{**values, **given})


def test_a_job_makes_a_native_trainer_of_values_and_functions() -> None:
    made = job(processing_class=make_tokenizer()).make_trainer()
    assert type(made) is NativeTrainer
    assert len(made.train_dataset) == 46  # type: ignore[arg-type]
    assert made.args.learning_rate == 1e-2
    assert made.processing_class is not None


def test_settings_of_any_kind_are_taken() -> None:
    args = TrainingArguments(**SETTINGS)
    assert job(settings=args).make_trainer().args is args
    assert job(settings=lambda: Settings(**SETTINGS)).make_trainer().args.warmup_steps == 2
    with pytest.raises(SettingsError, match="did you mean learning_rate"):
        job(settings={"learning_rat": 1e-3}).make_trainer()


def test_a_job_that_generates_makes_a_seq2seq_trainer() -> None:
    settings = {**SETTINGS, "predict_with_generate": True}
    made = job(model=partial(make_model, "t5"), settings=settings).make_trainer()
    assert type(made) is Seq2SeqTrainer


def test_optimizers_are_made_of_the_model() -> None:
    made = job(optimizers=lambda model: (torch.optim.SGD(model.parameters(), lr=0.1), None)).make_trainer()
    assert isinstance(made.optimizer, torch.optim.SGD)


def test_a_run_of_a_comparison_reports_nowhere(tmp_path: Path) -> None:
    trainer = make_trainer({"report_to": ["tensorboard"]}) if _has_tensorboard() else make_trainer()
    silence(trainer, tmp_path / "saved")
    names = [type(cb).__name__ for cb in trainer.callback_handler.callbacks]
    assert names == ["DefaultFlowCallback"]
    assert trainer.args.output_dir == str(tmp_path / "saved")


def _has_tensorboard() -> bool:
    from importlib.util import find_spec

    return find_spec("tensorboard") is not None


def test_a_trainer_with_parts_of_its_own_cannot_be_made_again_with_deepspeed() -> None:
    class Own(NativeTrainer):
        pass

    trainer = make_trainer()
    trainer.__class__ = Own
    with pytest.raises(JobError, match="Own that cannot be made again with DeepSpeed"):
        made_again(trainer, deepspeed={})


def test_a_trainer_that_needs_nothing_is_taken_as_it_is() -> None:
    trainer = make_trainer()
    assert make_native(Engine.parse("lightning:deepspeed_stage_2"), trainer) is trainer
    assert make_native(Engine.parse("native"), trainer) is trainer

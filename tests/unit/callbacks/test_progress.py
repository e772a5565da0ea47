"""RunProgressBar as a terminal of 80 columns shows it; tqdm draws its frames into a stand-in of one."""

import io
import re
from typing import Any

import pytest
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.utils.logging import set_verbosity_error

import hfbridge
from hfbridge.callbacks.progress import RunProgressBar, fitting, has_progress_callback, is_silenced
from tests.tiny import PadRows, make_dataset, make_model

SETTINGS: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "save_strategy": "no",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "logging_steps": 2,
    "learning_rate": 2e-5,
}


class Terminal(io.StringIO):
    """What tqdm takes for a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def shown(terminal: Terminal) -> list[str]:
    """Return the lines a terminal shows at the end: cursor moved up, carriage returns, lines left blank."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]+", terminal.getvalue()):
        if token == "\x1b[A":
            row -= 1
        elif token == "\r":
            column = 0
        elif token == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    made, begin = Terminal(), Tqdm.__init__

    def begin_there(self: Tqdm, **arguments: Any) -> None:
        begin(self, **{**arguments, "file": made, "mininterval": 0})

    monkeypatch.setattr(Tqdm, "__init__", begin_there)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (80, 24))
    return made


def fit(**settings: Any) -> tuple[hfbridge.HFModule, hfbridge.Trainer]:
    module = hfbridge.HFModule(make_model("distilbert"), compute_metrics=lambda p: {"accuracy": 0.53125})
    trainer = hfbridge.Trainer({**SETTINGS, **settings}, logger=False, enable_model_summary=False)
    data = hfbridge.HFDataModule(
        train_dataset=make_dataset("distilbert", 20),
        eval_dataset=make_dataset("distilbert", 12, seed=5),
        data_collator=PadRows(),
    )
    trainer.fit(module, data)
    return module, trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
        {"eval_strategy": "epoch"},
        {"gradient_accumulation_steps": 2, "eval_strategy": "epoch", "logging_strategy": "no"},
        {"max_steps": 7},
    ],
    ids=str,
)
def test_a_run_leaves_one_line(settings: dict[str, Any], terminal: Terminal) -> None:
    module, trainer = fit(**settings)
    (line,) = shown(terminal)
    steps = trainer.global_step
    assert re.match(rf"Epoch [23]/[23]: 100%\|█+\| {steps}/{steps} \[00:0\d<00:00", line)
    assert len(line) <= 80
    assert line.endswith("]")
    rows = [row for row in module.log_history if "loss" in row]
    assert (
        (f"loss={rows[-1]['loss']:.4g}" in line) if rows else ("loss=" not in line.replace("eval_loss", ""))
    )


def test_every_frame_fits_and_values_are_whole(terminal: Terminal) -> None:
    fit(eval_strategy="steps", eval_steps=4)
    frames = re.findall(r"(?:Training|Epoch|Evaluation)[^\r\n\x1b]*", terminal.getvalue())
    assert any(frame.startswith("Evaluation") for frame in frames)
    for frame in frames:
        assert len(frame) <= 80
        assert frame.rstrip().endswith("]")
    assert any(re.search(r", loss=0\.\d+, eval_loss=0\.\d+\]", frame) for frame in frames)
    assert any(re.search(r", loss=0\.\d+, lr=\S+e-05\]", frame) for frame in frames)
    assert "/?" not in terminal.getvalue()  # lengths are known from the first


def test_a_value_that_does_not_fit_makes_room_for_one_that_does() -> None:
    class Bar:
        total = 100
        format_dict = {"n": 5, "ncols": 60, "postfix": "before"}  # noqa: RUF012

        @staticmethod
        def format_meter(**drawn: Any) -> str:
            assert (drawn["n"], drawn["postfix"], drawn["ncols"]) == (100, "", None)
            return "=" * 40

    assert fitting(["loss=0.1234", "eval_accuracy=0.5312", "lr=1"], Bar()) == ["loss=0.1234", "lr=1"]
    Bar.format_dict = {**Bar.format_dict, "ncols": None}  # no terminal
    assert fitting(["loss=0.1234", "x" * 99], Bar()) == ["loss=0.1234", "x" * 99]


def test_a_run_that_goes_on_begins_where_it_was(terminal: Terminal) -> None:
    class Trainer:
        max_steps, global_step = 45, 20

    bar = RunProgressBar()
    bar._trainer = Trainer()  # type: ignore[assignment]
    bar.on_train_start()
    bar.train_progress_bar.refresh()
    assert "20/45" in shown(terminal)[-1]
    assert bar.train_progress_bar.initial == 20
    bar.train_progress_bar.close()


def test_a_failure_closes_the_bars(terminal: Terminal) -> None:
    class Boom(TrainerCallback):
        def on_prediction_step(self, *event: Any, **parts: Any) -> None:
            raise ZeroDivisionError

    trainer = hfbridge.Trainer(
        {**SETTINGS, "eval_strategy": "steps", "eval_steps": 2},
        callbacks=[Boom()],
        logger=False,
        enable_model_summary=False,
    )
    data = hfbridge.HFDataModule(
        train_dataset=make_dataset("distilbert", 20),
        eval_dataset=make_dataset("distilbert", 12, seed=5),
        data_collator=PadRows(),
    )
    with pytest.raises(ZeroDivisionError):
        trainer.fit(hfbridge.HFModule(make_model("distilbert")), data)
    assert "2/15" in shown(terminal)[-1]
    assert terminal.getvalue().endswith("\n")


def test_a_validation_has_a_bar_of_its_own(terminal: Terminal) -> None:
    data = hfbridge.HFDataModule(eval_dataset=make_dataset("distilbert", 12, seed=5), data_collator=PadRows())
    trainer = hfbridge.Trainer({**SETTINGS, "per_device_eval_batch_size": 4}, logger=False)
    trainer.validate(hfbridge.HFModule(make_model("distilbert")), data, verbose=False)
    (line,) = shown(terminal)
    assert line.startswith("Evaluation: 100%")
    assert "3/3" in line


def test_native_bars_are_known() -> None:
    class Mine(ProgressCallback):
        """A bar of the user's."""

    assert has_progress_callback([TrainerCallback, Mine])
    assert has_progress_callback([ProgressCallback()])
    assert not has_progress_callback([TrainerCallback(), TrainerCallback])


def test_silenced() -> None:
    settings = hfbridge.Settings(**SETTINGS)
    assert not is_silenced(settings)
    set_verbosity_error()
    assert is_silenced(settings)
    assert not is_silenced(settings.replace(disable_tqdm=False))

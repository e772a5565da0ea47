"""`hfbridge run --dry-run`: a script runs up to `train()`, which prints the plan and ends it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

import hfbridge.dropin
from hfbridge.cli import main
from hfbridge.dropin import Trainer, dry_run
from hfbridge.errors import SettingsError
from hfbridge.explain import Explanation

pytestmark = pytest.mark.filterwarnings("ignore:hfbridge run. .* had imported transformers.Trainer before")

SCRIPT = """
import sys
import transformers
from tests.dropin.overriding import CASES
from tests.dropin.sides import make

print("of the script")
case, *settings = sys.argv[1:]
bases = tuple(CASES[name] for name in case.split(" + ")) if case != "plain" else ()
kind = type("Mine", (*bases, transformers.Trainer), {}) if bases else transformers.Trainer
trainer = make(kind, arguments=eval(f"dict({','.join(settings)})"))
try:
    trainer.train()
except Exception:
    print("caught")
print("trained")
"""
LOOPED = """
import transformers
from tests.dropin.sides import make

class Looped(transformers.Trainer):
    def _inner_training_loop(self, *arguments, **named): ...
    def log(self, *arguments, **named): ...

make(Looped).train()
"""


def write(text: str) -> Path:
    path = Path("script.py")
    path.write_text(text)
    return path


def plan(*arguments: str, text: str = SCRIPT, **ranks: Any) -> Explanation:
    return dry_run(write(text), arguments, **ranks)


def overridden(explanation: Explanation) -> dict[str, str]:
    return {one.where: one.becomes for one in explanation.overridden}


def settings(explanation: Explanation) -> dict[str, Any]:
    (part,) = explanation.parts
    assert part.plan is not None
    return {row.field: row.value for row in part.plan.rows}


def test_no_part_of_the_package_hides_what_it_gives() -> None:
    modules = {path.stem for path in Path(hfbridge.dropin.__file__).parent.glob("*.py")}
    assert modules.isdisjoint(hfbridge.dropin.__all__)


def test_the_plan_of_a_script_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    script = write(SCRIPT)
    before = [transformers.Trainer, Trainer.strategy, Trainer.dry_run, sys.argv]
    assert main(["run", "--dry-run", str(script), "--", "plain"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("of the script\n")
    assert "\nscript.py: Trainer.train()\n\nsetting " in out
    assert "learning_rate                0.01   the optimizer\n" in out
    assert "8 optimizer steps in 2 epochs of 8 micro-batches on 1 rank." in out
    assert "In the HF Trainer, loss and gradient are G = 2" in " ".join(out.split())
    assert out.endswith("Nothing is refused. Nothing was trained.\n")
    assert "overridden" not in out
    assert [transformers.Trainer, Trainer.strategy, Trainer.dry_run, sys.argv] == before
    assert list(Path("out").iterdir()) == []  # Trainer(...) itself makes the folder


def test_as_json_nothing_else_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    case = "compute_loss: super + training_step: gradients"
    assert main(["run", "--dry-run", "--json", str(write(SCRIPT)), "--", case]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert "of the script\n" in captured.err
    assert (found["source"], found["is_refused"]) == ("script.py", False)
    assert found["parts"][0]["where"] == "script.py: Mine.train()"
    assert found["parts"][0]["trainer"]["accumulate_grad_batches"] == 2
    assert sorted(found["overridden"], key=lambda one: one["name"]) == [
        {"name": "compute_loss", "where": "ScaledLoss.compute_loss", "becomes": "called", "reason": ""},
        {"name": "training_step", "where": "Stepped.training_step", "becomes": "called", "reason": ""},
    ]


def test_overridden_methods_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan("compute_loss: super + training_step: gradients")
    assert overridden(found) == {"ScaledLoss.compute_loss": "called", "Stepped.training_step": "called"}
    assert not found.refused
    assert "overridden\n  Stepped.training_step: called\n  ScaledLoss.compute_loss: called\n" in str(found)


def test_a_loader_of_the_scripts_is_counted_and_steps_are_read_of_it() -> None:
    found = plan("get_train_dataloader")
    assert overridden(found) == {"OwnLoader.get_train_dataloader": "called"}
    assert "10 optimizer steps in 2 epochs of 10 micro-batches on 1 rank." in str(found)
    found = plan("get_train_dataloader", devices=2)
    assert "steps were not counted" in str(found)


def test_an_overridden_loop_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dry-run", str(write(LOOPED))]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "Looped._inner_training_loop: refused: Lightning runs the training loop" in out
    assert "Looped.log: called" in out
    assert out.endswith("1 refused. Nothing was trained.")
    assert settings(plan(text=LOOPED))["learning_rate"] == 0.01


def test_a_setting_is_refused_and_the_rest_is_planned() -> None:
    found = plan("plain", "optim='adalomo'")
    assert [problem.subject for problem in found.refused] == ['optim = "adalomo"']
    assert settings(found)["learning_rate"] == 0.01


def test_what_only_making_the_run_finds_is_refused() -> None:
    found = plan(
        "plain", "dataloader_drop_last=True", "per_device_eval_batch_size=99", "eval_strategy='epoch'"
    )
    assert [problem.subject for problem in found.refused] == ["train()"]
    assert "not one batch of 99" in found.refused[0].text


def test_ranks_are_planned_and_not_started() -> None:
    found = plan("plain", strategy="ddp", devices=2)
    (part,) = found.parts
    assert part.plan is not None
    assert (part.plan.strategy.kind, part.plan.trainer_arguments["devices"]) == ("ddp", 2)
    assert "4 optimizer steps in 2 epochs of 4 micro-batches on 2 ranks." in str(found)
    assert "G·W = 2·2 = 4 times too large" in " ".join(str(found).split())


def test_an_evaluation_of_the_scripts_is_called_where_the_ranks_share_the_model() -> None:
    found = plan("prediction_step", "eval_strategy='epoch'", strategy="fsdp2", devices=2)
    assert overridden(found) == {"PredictionStep.prediction_step": "called"}
    assert not found.refused


def test_parts_of_a_checkpoint_are_refused_where_the_ranks_share_the_model() -> None:
    found = plan("_save", "save_strategy='epoch'", strategy="fsdp2", devices=2)
    assert overridden(found) == {"Save._save": "refused"}
    assert [problem.subject for problem in found.refused] == ["Save._save"]


def test_a_script_that_does_not_train_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dry-run", str(write("raise SystemExit(3)"))]) == 1
    assert capsys.readouterr().err.startswith("SettingsError: script.py ended with exit code 3 and did not")


def test_exceptions_of_the_script_pass() -> None:
    with pytest.raises(KeyError, match="own"):
        plan(text="raise KeyError('own')")
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        plan(
            text="import transformers\nfrom tests.dropin.sides import make\n"
            "make(transformers.Trainer, train_dataset=None).train()"
        )


def test_an_unknown_strategy_is_refused_before_the_script_runs() -> None:
    with pytest.raises(SettingsError, match="did you mean ddp"):
        plan("plain", strategy="dpd")

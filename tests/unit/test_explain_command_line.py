"""Scripts whose settings come from the command line: said plainly, and checked if it is given."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hfbridge import SettingsError
from hfbridge.explain import Explained, Explanation, Open, explain

PARSED = """
import sys
from dataclasses import dataclass, field
from transformers import HfArgumentParser, TrainingArguments, Trainer
@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "which"})
    use_fast: bool = True
parser = HfArgumentParser((ModelArguments, TrainingArguments))
model_args, training_args = parser.parse_args_into_dataclasses()
"""
ARGPARSE = """
import argparse
from transformers import TrainingArguments
LR = 3e-4
def parse():
    parser = argparse.ArgumentParser()
    group = parser.add_argument_group("training")
    group.add_argument("--lr", "-l", type=float, default=3e-4, help=f"{LR}")
    parser.add_argument("--other-lr", type=float, default=LR)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--optim", default="adalomo", choices=["adalomo", "sgd"])
    parser.add_argument("--seed", type=int)
    parser.add_argument("--decay", type=float, default="0.1")
    parser.add_argument("--schedule", type=transformers.SchedulerType, default="cosine")
    return parser.parse_args()
def main(given):
    return TrainingArguments(
        learning_rate=given.lr, num_train_epochs=given.epochs, bf16=given.bf16, optim=given.optim,
        data_seed=given.seed, weight_decay=given.decay, adam_epsilon=given.other_lr, max_steps=given.nothing,
        lr_scheduler_type=given.schedule,
    )
if __name__ == "__main__":
    main(parse())
"""


def script(text: str, *arguments: str, **given: Any) -> Explanation:
    Path("script.py").write_text(text)
    return explain("script.py", arguments=arguments or None, **given)


def only(explanation: Explanation) -> Explained:
    (part,) = explanation.parts
    return part


def values(explanation: Explanation) -> dict[str, Any]:
    plan = only(explanation).plan
    assert plan is not None
    return {row.field: row.value for row in plan.rows}


def opened(explanation: Explanation) -> dict[str, Open]:
    return {one.name: one for one in only(explanation).open}


class TestHfArgumentParser:
    def test_nothing_can_be_checked_and_how_it_can_be(self) -> None:
        found = script(PARSED)
        lines = str(found).splitlines()
        assert lines[:4] == [
            "script.py, line 9: HfArgumentParser(...)",
            "  The settings come from the command line, so nothing could be checked. To check, give them:",
            "    hfbridge explain script.py -- --output_dir out --learning_rate 1e-4",
            "    hfbridge explain settings.yaml",
        ]
        assert lines[-1] == "No setting could be checked. Nothing was loaded."
        assert found.as_dict()["parts"][0]["is_by_command_line"] is True
        # No default is told as a fact.
        assert not any(number in str(found) for number in ("5e-05", "max_epochs", "G = 1", "max_grad_norm=1"))

    def test_the_command_that_it_shows_works(self) -> None:
        command = str(script(PARSED)).splitlines()[2].split(" -- ")[1]
        assert values(script(PARSED, *command.split())) == {"output_dir": "out", "learning_rate": 1e-4}

    def test_arguments_are_read_as_natively(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given = (
            *("--output_dir", "out", "--learning_rate", "1e-4", "--bf16", "--eval_strategy=epoch"),
            *("--no_dataloader_pin_memory", "--report_to", "none", "--label_names", "a", "b"),
            *("--lr_scheduler_kwargs", '{"last_epoch": -1}', "--do_train", "false"),
        )
        native = HfArgumentParser(TrainingArguments).parse_args(given)

        def fail(self: TrainingArguments) -> None:
            pytest.fail("settings were made, which asks for devices")

        monkeypatch.setattr(TrainingArguments, "__post_init__", fail)
        found = values(script(PARSED, "--model_name_or_path", "gpt2", *given))
        assert found["lr_scheduler_kwargs"] == json.loads(native.lr_scheduler_kwargs)
        assert found["report_to"] == "none"
        for name in ("output_dir", "learning_rate", "bf16", "label_names", "eval_strategy", "do_train"):
            assert found[name] == getattr(native, name)
        assert found["dataloader_pin_memory"] is native.dataloader_pin_memory is False
        assert found.keys() == {
            *("output_dir", "learning_rate", "bf16", "eval_strategy", "dataloader_pin_memory", "report_to"),
            *("label_names", "lr_scheduler_kwargs", "do_train"),
        }

    def test_what_is_refused_and_what_is_left_to_the_script(self) -> None:
        found = script(PARSED, "--model_name_or_path", "x", "--optim", "adalomo", "--no_use_fast")
        assert [problem.subject for problem in found.refused] == ['optim = "adalomo"']
        notes = only(found).notes
        assert "left to the script, which is not run: model_name_or_path, use_fast" in notes

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (
                ["--learning_rat", "1"],
                "--learning_rat +is not taken by the script; did you mean learning_rate?",
            ),
            (["--overwrite_output_dir"], "--overwrite_output_dir +is a name of transformers 4; leave it out"),
            (["--no_cuda"], "--no_cuda +is a name of transformers 4; write --use_cpu"),
            (["--learning_rate", "fast"], "argument --learning_rate.*: invalid float value: 'fast'"),
            (["args.json"], r"'args\.json' cannot be read"),
        ],
    )
    def test_wrong_arguments(self, arguments: list[str], says: str) -> None:
        with pytest.raises(SettingsError, match=says):
            script(PARSED, *arguments)

    def test_arguments_that_a_class_from_elsewhere_may_take(self) -> None:
        text = PARSED.replace("(ModelArguments,", "(ModelArguments, Elsewhere,")
        found = script(text, "--anything", "1", "--seed", "3")
        assert values(found) == {"seed": 3}
        assert any("left to the script" in note and "anything" in note for note in only(found).notes)

    def test_a_file_as_the_one_argument(self) -> None:
        given = {"model_name_or_path": "gpt2", "warmup_ratio": 0.1, "seed": 4}
        Path("args.json").write_text(json.dumps(given))
        Path("args.yaml").write_text(yaml.safe_dump(given))
        for path in ("args.json", "args.yaml"):
            assert values(script(PARSED, path)) == {"warmup_steps": 0.1, "seed": 4}

    def test_options_beside_the_classes(self) -> None:
        text = PARSED.replace("model_args, ", "parser.add_argument('--own', default=1)\nmodel_args, ")
        found = script(text, "--own", "2", "--seed", "3")
        assert values(found) == {"seed": 3}
        assert any("left to the script" in note and "own" in note for note in only(found).notes)

    def test_changes_afterwards_and_defaults_of_a_subclass(self) -> None:
        text = """
from transformers import HfArgumentParser, Seq2SeqTrainingArguments
class Mine(Seq2SeqTrainingArguments):
    learning_rate: float = 1e-3
    seed: int = 7
    own: str = "x"
args, = HfArgumentParser(Mine).parse_args_into_dataclasses()
args.report_to = []
"""
        found = script(text, "--seed", "8", "--report_to", "wandb", "--own", "y", "--predict_with_generate")
        assert values(found) == {"learning_rate": 1e-3, "seed": 8, "predict_with_generate": True}
        assert opened(found)["report_to"].expression == "args.report_to = []"

    def test_the_numbers_of_the_command_line(self) -> None:
        found = script(PARSED, "--gradient_accumulation_steps", "4", devices=2)
        assert any("4·2 = 8" in one.text for one in only(found).differences)
        assert str(found).endswith("Nothing is refused. Nothing was loaded.")


class TestArgparse:
    def test_defaults_are_shown_as_such(self) -> None:
        found = script(ARGPARSE)
        known = opened(found)
        line = (
            "learning_rate = given.lr (line 19), 3e-4 unless the command line says otherwise -> the optimizer"
        )
        assert line in " ".join(str(found).split())
        defaults = {name: one.default and one.default[0] for name, one in known.items()}
        assert defaults == {
            "learning_rate": 3e-4,
            "num_train_epochs": None,
            "bf16": False,
            "optim": "adalomo",
            "data_seed": None,
            "weight_decay": 0.1,
            "adam_epsilon": 3e-4,
            "max_steps": None,
            "lr_scheduler_type": "cosine",
        }
        assert known["num_train_epochs"].default is None
        assert known["data_seed"].default == (None, "None")
        assert values(found) == {}

    def test_a_default_that_would_be_refused_is_told(self) -> None:
        found = script(ARGPARSE)
        assert not found.refused
        (note,) = [note for note in only(found).notes if "defaults" in note]
        assert note.startswith('with the command line\'s defaults optim = "adalomo" is refused: ')

    def test_a_default_decides_nothing(self) -> None:
        page = " ".join(str(script(ARGPARSE)).split())
        assert "max_epochs: known when it runs (max_steps, num_train_epochs)" in page
        assert "precision" in page
        assert "full rate" not in page

    def test_with_the_command_line_everything_is_known(self) -> None:
        found = script(ARGPARSE, "-l", "1e-3", "--epochs=2", "--bf16", "--optim", "sgd")
        assert values(found) == {
            "learning_rate": 1e-3,
            "num_train_epochs": 2,
            "bf16": True,
            "optim": "sgd",
            "data_seed": None,
            "weight_decay": 0.1,
            "adam_epsilon": 3e-4,
            "lr_scheduler_type": "cosine",
        }
        assert opened(found).keys() == {"max_steps"}
        assert "num_train_epochs" not in values(script(ARGPARSE, "--bf16"))

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
            (["--optim", "lion"], "argument --optim: invalid choice: 'lion'"),
            (["--epoch_s", "1"], "--epoch_s +is not taken by the script; did you mean epochs?"),
        ],
    )
    def test_wrong_arguments(self, arguments: list[str], says: str) -> None:
        with pytest.raises(SettingsError, match=says):
            script(ARGPARSE, *arguments)

    @pytest.mark.parametrize(
        "other",
        [
            "args.lr = 5",
            "setattr(args, 'lr', 5)",
            "setattr(args, name, 5)",
            "parser.set_defaults(lr=5)",
            "other.add_argument('--lr', default=5)",
            "args = somewhere()",
            "for args in all_of_them: pass",
            "args += more",
        ],
    )
    def test_a_default_that_may_be_another(self, other: str) -> None:
        text = """
import argparse
from transformers import TrainingArguments
parser = argparse.ArgumentParser()
parser.add_argument("--lr", default=1e-3)
args, rest = parser.parse_known_args()
{}
TrainingArguments(learning_rate=args.lr)
"""
        assert opened(script(text.format("")))["learning_rate"].default == (1e-3, "1e-3")
        assert opened(script(text.format(other)))["learning_rate"].default is None

    def test_names_that_are_something_else(self) -> None:
        text = """
from transformers import TrainingArguments
parser.add_argument("--lr", default=1e-3)
args = parser.parse_args()
def make(args):
    TrainingArguments(learning_rate=args.lr)
def other(args, known):
    TrainingArguments(learning_rate=args.lr, weight_decay=known.lr)
other(config, known=args)
"""
        first, second = script(text).parts
        assert [one.default for one in first.open] == [None]
        assert [one.default for one in second.open] == [None, (1e-3, "1e-3")]

    @pytest.mark.parametrize("unpacked", ["vars(args)", "args.__dict__"])
    def test_all_options_at_once(self, unpacked: str) -> None:
        text = f"""
from transformers import TrainingArguments
parser.add_argument("--learning_rate", type=float, default=1e-3)
parser.add_argument("--seed", type=int)
parser.add_argument("--model", default="gpt2")
args = parser.parse_args()
TrainingArguments(max_steps=5, **{unpacked})
"""
        found = script(text)
        assert values(found) == {"max_steps": 5}
        assert opened(found)["learning_rate"].default == (1e-3, "1e-3")
        assert opened(found).keys() == {"learning_rate", "seed", "model"}
        assert [problem.subject for problem in found.refused] == ["model = args.model"]
        assert values(script(text, "--seed", "3")) == {"max_steps": 5, "learning_rate": 1e-3, "seed": 3}
        (one,) = script(text.replace("parser.parse_args()", "others()")).parts[0].open
        assert one.name == ""

    def test_options_that_cannot_be_made_are_left_open(self) -> None:
        text = """
import argparse
from transformers import TrainingArguments
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=number, default="1e-3")
parser.add_argument("--seed", action=Own, default=3)
parser.add_argument("--steps", type=int, default=draw())
parser.add_argument("--fast", action=argparse.BooleanOptionalAction, default=True)
args = parser.parse_args()
TrainingArguments(learning_rate=args.lr, seed=args.seed, max_steps=args.steps, bf16=args.fast)
"""
        assert {name for name, one in opened(script(text)).items() if one.default is None} == {
            "learning_rate",
            "max_steps",
        }
        found = script(text, "--no-fast", "--steps", "5", "--lr", "2")
        assert values(found) == {"max_steps": 5, "bf16": False}
        assert opened(found).keys() == {"learning_rate", "seed"}
        assert opened(script(text, "--fast")).keys() == {"learning_rate", "seed", "max_steps"}


def test_arguments_for_what_reads_none() -> None:
    with pytest.raises(SettingsError, match="reads no arguments that can be followed"):
        script("from transformers import TrainingArguments\nTrainingArguments(seed=1)", "--seed", "2")
    with pytest.raises(SettingsError, match="Arguments are for a script that reads them"):
        explain({"seed": 1}, arguments=["--seed", "2"])

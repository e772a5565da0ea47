"""hfbridge.dropin.run: unmodified scripts, in this process and as commands of their own."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
import transformers.trainer
import transformers.trainer_seq2seq

import hfbridge.dropin
from hfbridge.dropin import run
from hfbridge.errors import BridgeWarning, SettingsError
from tests.distributed.launch import Started
from tests.distributed.scripts import facts_in, names_in

HERE = Path(__file__).parent
SCRIPT, COMMAND = str(HERE / "user_script.py"), str(HERE / "command.py")

pytestmark = pytest.mark.filterwarnings("ignore:hfbridge run. .* had imported transformers.Trainer before")

PLACES = """
import json, sys
import transformers, transformers.trainer, transformers.trainer_seq2seq
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer import Trainer as Third
from transformers.trainer_seq2seq import Seq2SeqTrainer as Fourth

class Mine(Seq2SeqTrainer):
    pass

kinds = [Trainer, Seq2SeqTrainer, Third, Fourth, transformers.trainer.Trainer, Mine.__mro__[1]]
found = [[kind.__module__, kind.__name__, kind.strategy] for kind in kinds]
print(json.dumps([found, __name__, __file__, sys.argv, sys.path[0], sys.modules["__main__"].Mine is Mine]))
"""


def write(text: str, name: str = "script.py") -> Path:
    path = Path("scripts") / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def state_of_python() -> list[Any]:
    return [
        transformers.Trainer,
        transformers.Seq2SeqTrainer,
        transformers.trainer.Trainer,
        transformers.trainer_seq2seq.Seq2SeqTrainer,
        hfbridge.dropin.Trainer.strategy,
        hfbridge.dropin.Seq2SeqTrainer.strategy,
        sys.argv,
        sys.path,
        sys.modules["__main__"],
    ]


def test_a_script_finds_the_classes_wherever_it_looks(capsys: pytest.CaptureFixture[str]) -> None:
    before, script = state_of_python(), write(PLACES)
    assert run(script, ["--a", "b c"], strategy="ddp") == 0
    found, name, file, argv, folder, is_main = json.loads(capsys.readouterr().out)
    home = "hfbridge.dropin.trainers"
    one, several = [home, "Trainer", "ddp"], [home, "Seq2SeqTrainer", "ddp"]
    assert found == [one, several, one, several, one, several]
    assert (name, file, argv) == ("__main__", str(script), [str(script), "--a", "b c"])
    assert folder == str(script.resolve().parent)
    assert is_main
    assert state_of_python() == before


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("", 0, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(5)", 5, ""),
        ("raise SystemExit('no data')", 1, "no data\n"),
    ],
)
def test_exit_codes_pass(text: str, code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write(text)) == code
    assert capsys.readouterr().err == told


def test_exceptions_pass_and_all_is_put_back() -> None:
    before = state_of_python()
    with pytest.raises(KeyError, match="own"):
        run(write("raise KeyError('own')"))
    assert state_of_python() == before


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"script": Path("no_such.py")}, r"script='no_such\.py': there is no such file"),
        ({"strategy": "fdsp2"}, r"strategy='fdsp2' is unknown; did you mean fsdp2\?.*; there are auto, ddp"),
        ({"devices": 0}, "devices=0: the number of ranks"),
        ({"devices": True}, "devices=True: the number of ranks"),
    ],
)
def test_wrong_arguments_are_named_before_anything_runs(wrong: dict[str, Any], told: str) -> None:
    script = write("raise AssertionError('it ran')")
    with pytest.raises(SettingsError, match=told):
        run(**{"script": script, **wrong})


def test_devices_beside_those_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(SettingsError, match="devices=2, and a launcher has started 3 on this machine"):
        run(write("raise AssertionError('it ran')"), devices=2)


@pytest.mark.filterwarnings("default")
def test_earlier_imports_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(transformers.Trainer):
        """Of some library."""

    module = type(sys)("some_library.trainers")
    vars(module)["Theirs"] = Theirs
    monkeypatch.setitem(sys.modules, "some_library.trainers", module)
    with pytest.warns(BridgeWarning, match=r"some_library.* had imported transformers\.Trainer before"):
        run(write(""))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_script_does_what_it_does_natively(tmp_path: Path) -> None:
    theirs = Started([SCRIPT, "--out", "theirs", "--code", "3"], tmp_path, {})
    ours = Started([COMMAND, "-", "-", SCRIPT, "--out", "ours", "--code", "3"], tmp_path, {})
    for started in (theirs, ours):
        assert started.wait() == 3, started.output[-3000:]
    their, our = facts_in(Path("theirs")), facts_in(Path("ours"))
    assert their.pop("trainer") == ["transformers.trainer", "transformers.trainer_seq2seq"]
    assert our.pop("trainer") == ["hfbridge.dropin.trainers"] * 2
    assert their.pop("argv")[2:] == our.pop("argv")[2:]
    assert their == our
    assert names_in(Path("theirs")) == names_in(Path("ours"))
    assert {row["world"] for row in our["rows"]} == {1}
    assert len(our["rows"]) == 9

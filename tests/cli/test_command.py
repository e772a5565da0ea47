"""What `hfbridge` reads of a command line, and how it ends; commands that train are in test_fit.py."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hfbridge import CheckpointError, JobError, SettingsError
from hfbridge.cli import main
from tests.cli.conftest import SETTINGS, write

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the functions behind compare, report and run are called with; none of them does anything."""
    found: list[Any] = []

    class Comparison:
        agrees = True

        def __str__(self) -> str:
            return "the verdicts"

    def compare(job: Path, **options: Any) -> Comparison:
        found.append(("compare", job, options))
        Comparison.agrees = "wrong" not in options["engines"]
        return Comparison()

    def write_report(folder: Path) -> Path:
        found.append(("report", folder))
        return folder / "index.html"

    def run(script: Path, arguments: list[str], **options: Any) -> int:
        found.append(("run", script, arguments, options))
        return 7

    def dry_run(script: Path, arguments: list[str], **options: Any) -> SimpleNamespace:
        found.append(("dry run", script, arguments, options))
        return SimpleNamespace(refused=["--fp16"], as_dict=lambda: {"refused": ["--fp16"]})

    for name, functions in {
        "hfbridge.compare": {"compare": compare},
        "hfbridge.compare.report": {"write_report": write_report},
        "hfbridge.dropin": {"run": run, "dry_run": dry_run},
    }.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("compare", "run"):  # they keep what they have imported
        monkeypatch.delitem(sys.modules, f"hfbridge.cli.{name}", raising=False)
    yield found
    for name in ("compare", "run"):
        sys.modules.pop(f"hfbridge.cli.{name}", None)


def python_of(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_versions_and_help_import_no_library() -> None:
    code = (
        "import sys\nfrom hfbridge.cli import main\n"
        "for arguments in (['--version'], ['--help'], ['explain', '--help'], ['fitt'], ['convert', 'one']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "libraries = {'torch', 'transformers', 'lightning', 'datasets', 'numpy', 'jsonargparse'}\n"
        "heavy = libraries & set(sys.modules)\n"
        "sys.exit(repr(sorted(heavy)) if heavy else 0)\n"
    )
    done = python_of("-c", code)
    assert done.returncode == 0, done.stderr


def test_versions_of_the_stack() -> None:
    done = python_of("-m", "hfbridge", "--version")
    assert done.returncode == 0, done.stderr
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    packages = ("hfbridge", "torch", "lightning", "transformers", "accelerate", "datasets")
    assert told == {**{name: version(name) for name in packages}, "python": platform.python_version()}


def test_a_package_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from hfbridge.cli import command

    monkeypatch.setattr(command, "STACK", ("hfbridge", "no-such-package"))
    assert command.stack()[1] == ("no-such-package", "not installed")


def test_help_lists_the_commands(hfbridge: Command) -> None:
    code, out, _ = hfbridge("--help")
    assert code == 0
    for command in ("fit", "validate", "test", "predict", "explain", "compare", "convert", "run"):
        assert f"\n    {command} " in out
    assert "exit codes: 0 done; 1 failed" in out


@pytest.mark.parametrize("command", ["explain", "compare", "convert", "run"])
def test_every_option_of_a_command_is_explained(command: str) -> None:
    from hfbridge.cli.command import make_parser

    commands: Any = make_parser()._subparsers
    parser = commands._group_actions[0].choices[command]
    assert parser.description
    assert [action.dest for action in parser._actions if not action.help] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: COMMAND"),
        (["fitt"], "invalid choice: 'fitt'"),
        (["fit"], "fit needs a configuration: hfbridge fit --config config.yaml"),
        (["explain"], "required: source"),
        (["explain", "a.yaml", "--devices", "0"], "'0' is no number from 1 on"),
        (["explain", "a.yaml", "--devices", "two"], "'two' is no number from 1 on"),
        (["explain", "a.yaml", "--", "b"], "explain takes nothing after --"),
        (["convert", "a", "b", "--", "c"], "convert takes nothing after --"),
        (["convert", "a"], "required: target"),
        (["compare", "job.py", "--engines", ","], "names no engine"),
        (["compare", "job.py", "--ranks", "-1"], "'-1' is no number from 1 on"),
        (["run", "script.py", "--lr", "1"], "stands after --: -- --lr 1"),
        (["run", "script.py", "--json"], "run takes --json with --dry-run only"),
        (["convert", "a", "b", "--lr"], "convert does not know --lr"),
    ],
)
def test_a_wrong_command_line_ends_with_2(hfbridge: Command, arguments: list[str], says: str) -> None:
    code, out, err = hfbridge(*arguments)
    assert code == 2
    assert says in err
    assert out == ""


def test_explain_ends_with_1_if_something_is_refused(hfbridge: Command) -> None:
    write("right.yaml", SETTINGS)
    code, out, err = hfbridge("explain", "right.yaml", "--devices", "2", "--strategy", "ddp")
    assert (code, err) == (0, "")
    assert "G·W = 2·2 = 4 times too large" in " ".join(out.split())
    assert out.endswith("Nothing is refused. Nothing was loaded.\n")
    write("wrong.yaml", {**SETTINGS, "optim": "adalomo"})
    code, out, _ = hfbridge("explain", "wrong.yaml", "--json")
    assert code == 1
    told = json.loads(out)
    assert told["is_refused"]
    assert told["parts"][0]["refused"][0]["subject"] == 'optim = "adalomo"'


@pytest.mark.slow
def test_explain_imports_no_more_than_the_settings_need() -> None:
    """Lightning, datasets and models are not; transformers imports peft where it finds it."""
    write("run.yaml", SETTINGS)
    code = (
        "import sys, transformers.utils as utils, transformers.utils.import_utils as import_utils\n"
        "utils.is_peft_available = import_utils.is_peft_available = lambda: False\n"
        "from hfbridge.cli import main\n"
        "main(['explain', 'run.yaml'])\n"
        "libraries = {'lightning', 'datasets', 'torchmetrics', 'evaluate', 'deepspeed', 'peft'}\n"
        "of_transformers = {'transformers.trainer', 'transformers.modeling_utils'}\n"
        "heavy = (libraries | of_transformers) & set(sys.modules)\n"
        "sys.exit(repr(sorted(heavy)) if heavy else 0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("said", "codes"), [("print", {141}), ("--help", {0, 141})])
def test_a_reader_that_goes_away_is_no_error(unbuffered: str, said: str, codes: set[int]) -> None:
    """As in `hfbridge explain run.yaml | head -1`; argparse itself may swallow the error, and end with 0."""
    code = (
        "import sys\nfrom hfbridge.cli import command\n"
        "make = command._command_of\n"
        "show = lambda: print('x' * 9999) or 0\n"
        "command._command_of = lambda said: make(said) if said[0] == '--help' else show\n"
        f"sys.exit(command.main([{said!r}]))\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in codes


def test_another_pipe_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(BrokenPipeError("a worker is gone"), monkeypatch)
    with pytest.raises(BrokenPipeError, match="a worker"):
        main(["explain", "a.yaml"])


def test_explain_names_the_command_that_plans_a_script(hfbridge: Command) -> None:
    code, out, err = hfbridge("explain", "train.py")
    assert (code, out) == (1, "")
    assert err == (
        "SettingsError: train.py is a script: `hfbridge run --dry-run train.py` runs it up to `train()` and "
        "prints the plan.\n"
    )


def test_convert(hfbridge: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfbridge.cli import convert

    made: list[tuple[str, str]] = []
    monkeypatch.setattr(convert, "convert", lambda source, target: made.append((source, target)))
    code, out, _ = hfbridge("convert", "out/checkpoint-2", "run.ckpt")
    assert (code, out) == (0, "run.ckpt is written.\n")
    assert made == [("out/checkpoint-2", "run.ckpt")]


def test_convert_says_what_is_wrong(hfbridge: Command) -> None:
    code, out, err = hfbridge("convert", "nowhere", "run.ckpt")
    assert (code, out) == (1, "")
    assert err.startswith("CheckpointError: ")
    assert "nowhere" in err
    assert "Traceback" not in err


def test_compare(hfbridge: Command, calls: list[Any]) -> None:
    code, out, _ = hfbridge(
        "compare", "job.py", "--engines", "native, lightning:ddp", "--ranks=2", "--out=report", "--steps=5"
    )
    assert (code, out) == (0, "the verdicts\nreport/index.html is written.\n")
    assert calls[0] == (
        "compare",
        Path("job.py"),
        {
            "engines": ["native", "lightning:ddp"],
            "ranks": 2,
            "out": Path("report"),
            "steps": 5,
            "resume": True,
            "overwrite": False,
            "show_progress": True,
        },
    )
    assert calls[1] == ("report", Path("report"))


def test_compare_ends_with_1_if_parity_is_lost(hfbridge: Command, calls: list[Any]) -> None:
    options = ("--no-report", "--no-resume", "--no-progress", "--overwrite")
    assert hfbridge("compare", "job.py", "--engines=native,wrong", *options)[:2] == (1, "the verdicts\n")
    assert [call[0] for call in calls] == ["compare"]
    assert (
        calls[0][2] | {"resume": False, "overwrite": True, "show_progress": False, "steps": None, "ranks": 1}
        == calls[0][2]
    )


def test_run_gives_the_script_what_stands_after_the_dashes(hfbridge: Command, calls: list[Any]) -> None:
    given = (
        "run",
        "script.py",
        "--strategy",
        "fsdp2",
        "--devices=2",
        "--",
        "--debug",
        "--lr",
        "1",
        "--",
        "x",
    )
    assert hfbridge(*given)[0] == 7
    options = {"strategy": "fsdp2", "devices": 2}
    assert calls == [("run", Path("script.py"), ["--debug", "--lr", "1", "--", "x"], options)]


def test_a_plan_ends_with_1_if_something_is_refused(hfbridge: Command, calls: list[Any]) -> None:
    code, out, _ = hfbridge("run", "--dry-run", "--json", "script.py", "--", "--fp16")
    assert (code, json.loads(out)) == (1, {"refused": ["--fp16"]})
    assert calls == [("dry run", Path("script.py"), ["--fp16"], {"strategy": None, "devices": None})]


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfbridge.cli import explain

    def run(arguments: Any) -> int:
        raise error

    monkeypatch.setattr(explain, "run", run)


@pytest.mark.parametrize("flag", ["--debug", "variable"])
def test_errors_have_their_traceback_if_it_is_asked_for(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(CheckpointError("lost"), monkeypatch)
    arguments = ["explain", "a.yaml"]
    assert main(arguments) == 1
    if flag == "variable":
        monkeypatch.setenv("HFBRIDGE_DEBUG", "1")
    else:
        arguments.append(flag)
    with pytest.raises(CheckpointError, match="lost"):
        main(arguments)


def test_the_text_of_an_error_is_all_there_is(hfbridge: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(SettingsError("2 of 3 settings"), monkeypatch)
    assert hfbridge("explain", "a.yaml") == (1, "", "SettingsError: 2 of 3 settings\n")


def test_a_job_that_cannot_be_compared_is_wrong_usage(
    hfbridge: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(JobError("no build()"), monkeypatch)
    assert hfbridge("explain", "a.yaml") == (2, "", "JobError: no build()\n")


def test_a_missing_extra_is_named(hfbridge: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    code, _, err = hfbridge("fit", "--config", "run.yaml")
    assert code == 1
    assert 'pip install "hfbridge[cli]"' in err


def test_other_errors_are_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(ZeroDivisionError("a bug"), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        main(["explain", "a.yaml"])


def test_an_interrupt_ends_quietly(hfbridge: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(KeyboardInterrupt(), monkeypatch)
    assert hfbridge("explain", "a.yaml") == (130, "", "")


def test_an_interrupt_that_lightning_has_met_ends_with_the_same_code(
    hfbridge: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = SystemExit(1)
    end.__context__ = KeyboardInterrupt()
    raising(end, monkeypatch)
    assert hfbridge("explain", "a.yaml")[0] == 130

"""The command line of `hfbridge`: its arguments, which command runs, and how it ends.

    ends with   when
    0           done
    1           failed, something was refused, or parity was lost
    2           the command line is wrong, or names a job, engine or strategy that cannot be compared
    130         interrupted
    141         the output was closed by its reader, as with `| head`

This file imports neither torch nor transformers: help, versions and wrong command lines are answered at once.
Each command has a file of its own, which is imported when the command runs.

    command                   file          options are read by
    fit, validate, predict    fit.py        LightningCLI
    the others                their own     this file
"""

import argparse
import importlib
import os
import platform
import select
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hfbridge.errors import BridgeError, JobError
from hfbridge.utilities.imports import require

STACK = ("hfbridge", "torch", "lightning", "transformers", "accelerate", "datasets")
"""The packages whose versions `--version` prints, with Python's."""

_FAILED, _WRONG_USAGE, _INTERRUPTED, _NOT_READ = 1, 2, 130, 141

_OF_LIGHTNING = {
    "fit": "train a model",
    "validate": "evaluate a model",
    "test": "evaluate a model on the test set",
    "predict": "predict a set, and write what comes of it to output_dir",
}
_FILES = {
    **dict.fromkeys(_OF_LIGHTNING, "fit"),
    "explain": "explain",
    "compare": "compare",
    "convert": "convert",
    "run": "run",
}
_EPILOG = """\
fit, validate, test and predict take a YAML of Lightning's form: hfbridge fit --config config.yaml
their options, in a few seconds: hfbridge fit --help; a form to begin with: hfbridge fit --print_config

exit codes: 0 done; 1 failed, refused, or parity lost; 2 wrong command line; 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what a command line says.

    Args:
        argv: the arguments; those of the process without it.

    Returns:
        What the process is to end with.

    Raises:
        SystemExit: the command line is wrong (2), or help or versions were requested (0).
        BridgeError: with `--debug`, or where `HFBRIDGE_DEBUG=1` is set; else its text is printed.
    """
    try:
        try:
            return _do(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread():
            raise
        # Python flushes once more at its end, and would report it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NOT_READ


def _do(given: list[str]) -> int:
    """Do what a command line says, and find out what the process is to end with."""
    given, has_flag = _take_debug(given)
    is_debugging = has_flag or os.environ.get("HFBRIDGE_DEBUG", "") not in ("", "0")
    try:
        return _command_of(given)()
    except BridgeError as error:
        if is_debugging:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return _WRONG_USAGE if isinstance(error, JobError) else _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except SystemExit as end:
        # Lightning ends an interrupted run so.
        if isinstance(end.__context__, KeyboardInterrupt):
            return _INTERRUPTED
        raise


def _is_unread() -> bool:
    """Whether standard output is a pipe whose reader has closed it."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # it is no file at all
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def stack() -> list[tuple[str, str]]:
    """List the packages that a run stands on, each with its version, and Python."""
    found = []
    for package in STACK:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            found.append((package, "not installed"))
    return [*found, ("python", platform.python_version())]


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of everything but what LightningCLI reads."""
    parser = argparse.ArgumentParser(
        prog="hfbridge",
        description="Train Hugging Face models with PyTorch Lightning, with the HF Trainer's numbers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    versions = "\n".join(f"{package} {found}" for package, found in stack())
    parser.add_argument(
        "--version", action="version", version=versions, help="print the versions of the stack"
    )
    parser.add_argument("--debug", action="store_true", help="show errors with their traceback")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in _OF_LIGHTNING.items():
        commands.add_parser(name, help=text, add_help=False)
    _add_explain(commands)
    _add_compare(commands)
    _add_convert(commands)
    _add_run(commands)
    return parser


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Take `--debug` out of what stands before the arguments of a script; every command has it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    ours = [argument for argument in arguments[:end] if argument != "--debug"]
    return [*ours, *arguments[end:]], len(ours) < end


def _command_of(arguments: list[str]) -> Callable[[], int]:
    """Read a command line, and bind the function that does it to what it says."""
    name = arguments[0] if arguments else ""
    said: Any = arguments
    if name not in _OF_LIGHTNING:
        end = arguments.index("--") if "--" in arguments else len(arguments)
        parser = make_parser()
        said, unknown = parser.parse_known_args(arguments[:end])
        if unknown:
            has_script = said.command == "run"
            own = f"; what is the script's stands after --: -- {' '.join(unknown)}" if has_script else ""
            parser.error(f"{said.command} does not know {' '.join(unknown)}{own}")
        name, said.script_arguments = said.command, arguments[end + 1 :]
        if said.script_arguments and name != "run":
            parser.error(f"{name} takes nothing after --")
        if name == "run" and said.json and not said.dry_run:
            parser.error("run takes --json with --dry-run only")
    if name in _OF_LIGHTNING:
        if said == [name]:
            make_parser().error(
                f"{name} needs a configuration: hfbridge {name} --config config.yaml; hfbridge {name} "
                "--print_config prints a form to begin with"
            )
        require("jsonargparse", extra="cli", for_=f"hfbridge {name}")
    # By name, and not at the top: a command's file imports what the command stands on, which takes seconds.
    run: Callable[[Any], int] = importlib.import_module(f"hfbridge.cli.{_FILES[name]}").run
    return lambda: run(said)


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="what settings become, what differs from the HF Trainer, what is unsupported",
        description="Print what is unsupported, what differs from the HF Trainer, and what each setting "
        "becomes. Nothing is loaded. Ends with 1 if something is refused.",
        epilog="The plan of a script: hfbridge run --dry-run train.py -- --learning_rate 1e-4",
    )
    explain.add_argument("source", help="settings (YAML or JSON), or a config of `hfbridge fit`")
    explain.add_argument(
        "--strategy", help='how ranks share the work: "ddp", "fsdp2", "deepspeed_stage_2", ...'
    )
    explain.add_argument("--devices", type=_count, help="ranks on each node")
    explain.add_argument("--num-nodes", type=_count, help="nodes")
    explain.add_argument("--accelerate-config", help="a file that `accelerate config` has written")
    explain.add_argument(
        "--loss-normalization",
        choices=("exact", "native"),
        help="whose loss: exact, or native; without it that of the source",
    )
    explain.add_argument("--json", action="store_true", help="print the same as JSON")


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="one job on several engines, step by step, with a report",
        description="Run one job on several engines in fresh processes, compare every optimizer step, and "
        "write a report. Ends with 1 if one engine's trajectory is not that of the first.",
    )
    compare.add_argument(
        "job", help="a script whose build() returns a transformers.Trainer, or a hfbridge.compare.Job"
    )
    compare.add_argument(
        "--engines",
        type=_listed,
        default=["native", "lightning"],
        help="separated by commas; the first is what the others are compared with: native, accelerate, "
        "lightning, lightning:deepspeed_stage_2, ... (default: native,lightning)",
    )
    compare.add_argument("--ranks", type=_count, default=1, help="processes of each engine (default: 1)")
    compare.add_argument("--out", default="comparison", help="folder to write to (default: comparison)")
    compare.add_argument("--steps", type=_count, help="optimizer steps; as many as the job has without it")
    compare.add_argument("--no-resume", action="store_true", help="run engines again that are done already")
    compare.add_argument(
        "--overwrite",
        action="store_true",
        help="replace records in the folder that are of another job, other options or versions",
    )
    compare.add_argument("--no-progress", action="store_true", help="no progress bar")
    compare.add_argument("--no-report", action="store_true", help="write the records only, and no HTML page")


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="a checkpoint-N directory to a Lightning .ckpt, and back",
        description="Turn a checkpoint-N directory of either engine into a Lightning .ckpt, or back.",
    )
    convert.add_argument(
        "source", help="a checkpoint-N directory, or a .ckpt that a run of HFModule has written"
    )
    convert.add_argument("target", help="what to write: a name ending in .ckpt, or a directory")


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="an unmodified script of transformers.Trainer, on Lightning",
        description="Run a script with transformers.Trainer and Seq2SeqTrainer replaced by Trainers whose "
        "train() runs on Lightning.",
        usage="hfbridge run [-h] [--strategy STRATEGY] [--devices DEVICES] [--dry-run [--json]] script "
        "[-- ARGUMENTS ...]",
        epilog="What stands after -- is given to the script.",
    )
    run.add_argument("script", help="the script, as it is")
    run.add_argument("--strategy", help='how ranks share the work: "ddp", "fsdp2", "deepspeed_stage_2", ...')
    run.add_argument("--devices", type=_count, help="ranks on this node")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="run the script up to train(), print the plan, and end with 1 if something is refused",
    )
    run.add_argument(
        "--json", action="store_true", help="print the plan as JSON; the script prints to stderr"
    )


def _count(text: str) -> int:
    """Read a number that is one at least."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return number


def _listed(text: str) -> list[str]:
    """Read names that are separated by commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("names no engine")
    return names

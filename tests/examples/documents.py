"""The blocks of code of README.md and docs/: read, and tried."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
START = ROOT / "docs" / "index.md"
# The first block of the start page has the names from which all pages go on.
_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)
_OPTION = re.compile(r"(--[\w-]+)")


class Block(NamedTuple):
    """A block of a page.

    Attributes:
        page: where it stands.
        line: of its first line of code.
        language: as it is marked.
        text: its code.
        reason: why it is not run; empty for one that is.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str

    @property
    def place(self) -> str:
        """Page and line."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page, in their order."""
    text = page.read_text()
    return [
        Block(
            page,
            text[: match.start("text")].count("\n") + 1,
            match["language"],
            match["text"],
            match["reason"] or "",
        )
        for match in _FENCE.finditer(text)
    ]


def shorten(text: str) -> str:
    """Have a run save at each step and go on from the second: the data of the tests end after a few."""
    text = re.sub(r"\b(eval|save)_steps=\d+", r"\1_steps=1", text)
    return re.sub(r"checkpoint-\d{3,}", "checkpoint-2", text)


def commands_of(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, as words."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def problem_of(command: list[str]) -> str:
    """What keeps a command from being understood; empty if nothing does."""
    program, *words = command
    if program == "make":
        targets = set(_TARGET.findall((ROOT / "Makefile").read_text()))
        return "" if words[0] in targets else f"the Makefile has no {words[0]}"
    if program == "pip":
        return _problem_of_pip(words)
    if program in ("python", "sh"):
        return _problem_of_script(words)
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        return _problem_of_launcher(get_args_parser(), words)
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        return _problem_of_launcher(launch_command_parser(), words[1:])
    if program == "hfbridge":
        return _problem_of_hfbridge(words)
    return f"nobody knows {program}"


def _problem_of_hfbridge(words: list[str]) -> str:
    """See that the parser takes the words; fit and its like, which LightningCLI parses, take a config."""
    from hfbridge.cli.command import make_parser

    if words[0] in ("fit", "validate", "predict"):
        return "" if words[1:] == ["--config", "config.yaml"] else f"{words[0]} is told more than a config"
    ended = words.index("--") if "--" in words else len(words)
    try:
        make_parser().parse_args(words[:ended])
    except SystemExit as end:  # with 0 after --version
        return f"hfbridge does not take {' '.join(words)}" if end.code else ""
    return ""


def _problem_of_pip(words: list[str]) -> str:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = {extra for found in re.findall(r"\[([\w,]+)\]", " ".join(words)) for extra in found.split(",")}
    unknown = sorted(extras - declared.keys())
    return f"no extra {', '.join(unknown)}" if unknown or words[0] != "install" else ""


def _problem_of_launcher(parser: object, words: list[str]) -> str:
    try:
        given = parser.parse_args(words)  # type: ignore[attr-defined]
    except SystemExit:
        return "the launcher does not take its options"
    return _problem_of_script([given.training_script, *given.training_script_args])


def _problem_of_script(words: list[str]) -> str:
    """See that a script is there, and that it, or what it imports from beside it, names each option."""
    script = ROOT / words[0]
    if not script.is_file():
        return f"there is no {words[0]}"
    beside = [script, *script.parent.glob("*.py"), ROOT / "examples" / "command.py"]
    known = " ".join(path.read_text() for path in beside if path.is_file())
    if "LightningCLI(" in script.read_text():
        return "" if words[1:] and words[1] == "fit" else f"{words[0]} is not told to fit"
    for option in _OPTION.findall(" ".join(words[1:])):
        name = option.removeprefix("--")
        if f'"{option}"' not in known and f'"{name}"' not in known:
            return f"{words[0]} does not know {option}"
    return ""

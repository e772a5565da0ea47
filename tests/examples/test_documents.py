"""README.md and docs/: every block runs, every command is understood, the site is built without a warning.

The Python blocks of a page run in their order, in one namespace and one folder, which has a tiny model under
the name that the pages use. All pages go on from the first block of docs/index.md.
"""

import csv
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers.pre_tokenizers import WhitespaceSplit

from tests.examples.documents import (
    PAGES,
    ROOT,
    START,
    Block,
    blocks_of,
    commands_of,
    problem_of,
    shorten,
)
from tests.tiny import make_model, make_tokenizer

MODEL = "distilbert-base-uncased"
MOST_NOT_RUN = 0
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages take for granted: a model with its tokenizer, and tables of texts with labels."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make_model("distilbert").save_pretrained(tmp_path / MODEL)
    tokenizer: Any = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save_pretrained(tmp_path / MODEL)
    for split, count in (("train", 48), ("validation", 16)):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "label"])
            for row in range(count):
                words = " ".join(f"w{3 + (row * 7 + place) % 47}" for place in range(3 + row % 8))
                table.writerow([words, row % 2])
    return tmp_path


def run(block: Block, names: dict[str, Any]) -> None:
    code = "\n" * (block.line - 1) + shorten(block.text)  # so that tracebacks tell the line of the page
    exec(compile(code, str(block.page), "exec"), names)


@pytest.mark.slow
# torch's on a machine without a GPU, natively, too.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_every_python_block_runs(page: Path, folder: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    if page != START:
        run(blocks_of(START)[1], names)
    for block in blocks_of(page):
        if block.language == "python" and not block.reason:
            run(block, names)
    assert names["compute_metrics"] is not None  # of the first block


def test_readme_and_contributing_are_short_and_name_the_compared_versions() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 90
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 150
    start = next(n for n, line in enumerate(lines) if line.startswith("| transformers | lightning |"))
    names, versions = ([word.strip() for word in lines[n].strip("|").split("|")] for n in (start, start + 2))
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert {f"{name}=={version}" for name, version in zip(names, versions, strict=True)} <= set(pinned)


def test_the_first_python_block_of_the_start_page_has_the_names_of_all() -> None:
    first = blocks_of(START)[1]
    assert first.language == "python"
    for name in ("tokenizer =", "dataset =", "def tokenize(", "def compute_metrics("):
        assert name in first.text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page: Path) -> None:
    for block in blocks_of(page):
        if block.language == "bash" and not block.reason:
            for command in commands_of(block):
                assert problem_of(command) == "", f"{block.place}: {' '.join(command)}"


@pytest.mark.slow
# lightning 2.6 calls jsonargparse's instantiate_classes, which 4.49 has renamed.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_the_config_of_the_command_line_trains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfbridge.cli import main

    page = ROOT / "docs" / "command-line.md"
    (config,) = (block.text for block in blocks_of(page) if block.language == "yaml")
    Path("config.yaml").write_text(config)
    names = blocks_of(START)[1].text.replace("compute_metrics", "accuracy")
    Path("parts.py").write_text(names)
    monkeypatch.syspath_prepend(str(folder))
    try:
        assert main(["fit", "--config", "config.yaml"]) == 0
    finally:
        sys.modules.pop("parts", None)
    assert list(Path("out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("make tea", "no tea"),
        ("pip install .[moon]", "no extra moon"),
        ("python examples/nowhere.py", "there is no examples/nowhere.py"),
        ("python examples/sst2/bridge.py --little", "does not know --little"),
        ("torchrun --nproc 2 --moon 3 examples/sst2/bridge.py", "the launcher does not take"),
        ("hfbridge compare job.py --moon", "does not take compare job.py --moon"),
        ("rm -rf out", "nobody knows rm"),
    ],
)
def test_a_wrong_command_is_told(command: str, told: str) -> None:
    assert told in problem_of(command.split())


def test_the_weighted_loss_of_the_pages_is_that_of_torch() -> None:
    page = ROOT / "docs" / "extending.md"
    (block,) = (block.text for block in blocks_of(page) if "def weighted_loss" in block.text)
    names: dict[str, Any] = {}
    exec(block[: block.index("module =")], names)
    logits, labels = torch.tensor([[0.2, 0.7], [1.0, -1.0], [0.0, 0.3]]), torch.tensor([0, 1, 1])
    expected = torch.nn.functional.cross_entropy(logits, labels, weight=torch.tensor([1.0, 2.0]))
    assert names["weighted_loss"]({"logits": logits}, labels, num_items_in_batch=torch.tensor(3)) == expected


def test_blocks_that_are_not_run_say_why_and_are_few() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page)]
    assert {block.language for block in blocks} <= {"python", "bash", "yaml"}, (
        "a block needs a language that is tried"
    )
    assert all(len(block.reason) > 10 for block in blocks if block.reason)
    assert sum(bool(block.reason) for block in blocks) <= MOST_NOT_RUN


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_a_line_of_code_fits_the_column_of_the_site(page: Path) -> None:
    for block in blocks_of(page):
        for line in block.text.splitlines():
            assert len(line) <= 100, f"{block.place}: {line}"


class Loads(HTMLParser):
    """Collect what a page loads, and its links to other pages."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in ("script", "img", "iframe"):
            self.loads.append(found.get("src") or "")
        elif tag == "link":
            self.loads.append(found.get("href") or "")


@pytest.mark.slow
def test_the_site_is_built_without_warnings_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    command = ["build", "--strict", "--config-file", str(ROOT / "docs" / "mkdocs" / "mkdocs.yml")]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *command, "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    pages = sorted((tmp_path / "site").glob("*.html"))
    assert {page.stem for page in PAGES if page.parent != ROOT} <= {page.stem for page in pages}
    for page in pages:
        text = page.read_text()
        parser = Loads()
        parser.feed(text)
        assert not [address for address in parser.loads if re.match(r"(?:https?:)?//", address)], page.name
        assert "not run:" not in text
    assert (
        "Train an HFModule, or any LightningModule, with what the settings mean."
        in (tmp_path / "site" / "api.html").read_text()
    )

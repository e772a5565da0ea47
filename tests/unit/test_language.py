"""The package and its pages speak upstream's words: none of an older dialect's."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Not here: "row" of a table, and `refused` and `windows`, which files and other programs read.
OLD_WORDS = {
    r"\bnatively\b": "as in the HF Trainer",
    r"\bnative (?:Trainer|ones?|order|runs?|callbacks?|side|sampler|numbers)\b": "the HF Trainer's",
    r"\b(?:some|no)body\b|\bwhoever\b": "the user, a rank, a callback; none",
    r"\bcarr(?:y|ies|ied)\b": "support, convert, hold",
    r"\btells?\b|\btold\b": "log, warn, print, name",
    r"\basks?\b|\basked\b|\basking\b": "read, call, request, measure",
    r"\bhears?\b|\bheard\b|\blisten\w*\b": "handle, override",
    r"\bknows (?:both|Hugging|Lightning|neither)\b": "a layer is held by test_architecture",
    r"\b[Ll]ikewise\b": "the sentence itself",
    r"\bgo(?:es|ing)? on\b|\bwent on\b": "resume, continue",
    r"\bin hand\b": "prefetched",
    r"\b(?:the|a|each|first|last|next|every) pass\b|\bpasses (?:that|over|of)\b": "epoch",
    r"\bdeal[st]?\b|\bdealt\b": "assign, shard",
    r"\bbehind\b": "completed, after",
    r"\bcures?\b": "hint",
    r"for want of|not to be seen": "out of; not accessible",
}


def offences(paths: list[Path]) -> list[str]:
    """Each line with an old word, and what to write instead."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {found.group()!r}; write: {instead}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for pattern, instead in OLD_WORDS.items()
        if (found := re.search(pattern, line))
    ]


def test_the_package_and_its_pages_use_upstreams_words() -> None:
    paths = [*(ROOT / "hfbridge").rglob("*.py"), *(ROOT / "docs").glob("*.md")]
    paths += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    assert len(paths) > 100
    assert offences(sorted(paths)) == []


@pytest.mark.parametrize("sentence", ["It trains as natively.", "The next pass is dealt.", "A run goes on."])
def test_an_old_word_is_found(sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.test_language.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(sentence)
    assert offences([page])

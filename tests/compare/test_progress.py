"""How far engines are: bars on a terminal, lines elsewhere."""

import re
import sys

import pytest

from hfbridge.compare import progress_lines
from hfbridge.compare.progress_lines import progress_of

NAMES = ("native", "lightning:fsdp2")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Stand in for the time, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_lines_and_at_most_one_each_half_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_of(NAMES, is_shown=True) as told:
        first, second = told
        first.begin()
        for second_of_run in range(100):
            clock[0] += 1
            first.show(second_of_run // 10, None if second_of_run < 20 else 9)
        first.end("done in 100 s")
        second.show(9, 9)  # of what was recorded before
        second.end("recorded before")
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.splitlines() == [
        "native (1 of 2): begins",
        "native (1 of 2): step 2 of 9",
        "native (1 of 2): step 5 of 9",
        "native (1 of 2): step 8 of 9",
        "native (1 of 2): done in 100 s",
        "lightning:fsdp2 (2 of 2): recorded before",
    ]


def test_a_run_that_does_not_move_says_nothing(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_of(NAMES, is_shown=True) as told:
        told[0].begin()
        for _ in range(4):
            clock[0] += 60
            told[0].show(3, 9)
    assert capsys.readouterr().err.splitlines() == ["native (1 of 2): begins", "native (1 of 2): step 3 of 9"]


def test_a_terminal_gets_a_bar_for_each_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_of(NAMES, is_shown=True) as told:
        told[0].begin()
        told[0].show(0, 3)
        told[0].show(3, 3)
        told[0].end("done in 4.0 s")
        told[1].show(3, 3)
        told[1].end("recorded before")
    shown = capsys.readouterr().err
    assert "\x1b[" in shown  # lines are drawn over
    assert re.search(r"native +3/3 \|.*\|, done in 4\.0 s", shown)
    assert re.search(r"lightning:fsdp2 +3/3 \|.*\|, recorded before", shown)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_nothing_is_shown_where_that_is_asked(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    with progress_of(NAMES, is_shown=False) as told:
        told[0].begin()
        told[0].end("done")
    assert capsys.readouterr() == ("", "")

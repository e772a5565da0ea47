"""Agreement between ranks, as far as one process shows it; see tests/distributed/test_agreement.py."""

import pytest

from hfbridge import DataError, RankError
from hfbridge.distributed import consistency
from hfbridge.distributed.consistency import Fact, compare, differences, explain


def test_one_rank_agrees_with_itself():
    compare(lambda: pytest.fail("asked for facts"))  # type: ignore[arg-type, return-value]


def test_equal_facts_have_no_differences():
    assert differences([[Fact("a", "1", "cure")]] * 3) == ([], [])


def test_differences_name_ranks_and_values():
    facts = [[Fact("a", "1", "Cure."), Fact("b", "x", "Cure.")] for _ in range(5)]
    facts[2][0] = Fact("a", "2", "Cure.")
    facts[3] = [Fact("b", "x", "Cure.")]
    problems, differing = differences(facts)
    assert [(p.subject, p.text) for p in problems] == [
        ("a", "ranks 0, 1 and 4: 1; rank 2: 2; rank 3: not there. Cure.")
    ]
    assert differing == [2, 3]


def test_what_only_another_rank_has_is_a_difference():
    problems, differing = differences([[], [Fact("c", "1", "Cure.")], []])
    assert problems[0].text == "ranks 0 and 2: not there; rank 1: 1. Cure."
    assert differing == [1]


def test_neighbours_are_named_as_a_range():
    problems, differing = differences([[Fact("a", str(rank > 2), "Cure.")] for rank in range(9)])
    assert problems[0].text == "ranks 0 to 2: False; ranks 3 to 8: True. Cure."
    assert differing == [3, 4, 5, 6, 7, 8]


def test_no_more_differences_than_one_reads():
    problems, _ = differences([[Fact(str(i), str(rank), "Cure.") for i in range(100)] for rank in range(2)])
    assert len(problems) == 9
    assert problems[-1].text == "and 92 more."


@pytest.fixture
def one_of_two(monkeypatch):
    monkeypatch.setattr(consistency, "has_ranks", lambda: True)
    monkeypatch.setattr(consistency, "rank", lambda: 1)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1751", "has ended"),
        ("Read error [127.0.0.1]:34214: Connection reset by peer", "has ended"),
        ("Timed out waiting 5000ms for recv operation to complete", "ddp_timeout=5 s"),
        ("[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 5000 ms; wait timeout", "ddp_timeout=5 s"),
        ("size mismatch for x", None),
    ],
)
def test_a_lost_connection_is_explained(one_of_two, text, meaning):
    error = RuntimeError(text)
    explain(error, timeout_s=5)
    notes = getattr(error, "__notes__", [])
    assert (meaning is None and not notes) or (meaning in notes[0] and "rank 1" in notes[0])


def test_other_errors_are_left_alone(one_of_two):
    for error in (DataError("Connection reset by peer"), RankError("timed out"), KeyError("timed out")):
        explain(error, timeout_s=5)
        assert not hasattr(error, "__notes__")


def test_without_ranks_nothing_is_explained():
    error = RuntimeError("Connection reset by peer")
    explain(error, timeout_s=5)
    assert not hasattr(error, "__notes__")

"""Check that settings, data and models are the same on all ranks, and explain lost connections."""

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from hfbridge.distributed.collectives import count, gather, rank
from hfbridge.errors import BridgeError, Problem, RankError, raise_problems

T = TypeVar("T")

_MOST_SHOWN = 8
_NOT_THERE = "not there"
_SAID_BY_LOST = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "remote process")
_SAID_BY_LATE = ("Timed out waiting", "timed out", "Timeout(ms)", "timeout in", "wait timeout")


class Fact(NamedTuple):
    """Something that must be the same on all ranks.

    Attributes:
        subject: what it is about, as the user knows it.
        value: what this rank has, as text.
        hint: what to do if ranks differ.
    """

    subject: str
    value: str
    hint: str


def has_ranks() -> bool:
    """Whether this process is one of several ranks, whose process group is open."""
    return count() > 1


def compare(facts: Callable[[], Iterable[Fact]], *, beside: T | None = None) -> list[T | None]:
    """Check that facts are the same on all ranks, by their digests first.

    Args:
        facts: makes this rank's; not called where there is one rank.
        beside: a value of this rank that may differ.

    Returns:
        That value of each rank.

    Raises:
        RankError: on all ranks, with what differs and the ranks that differ.
    """
    if not has_ranks():
        return [beside]
    mine = list(facts())
    digest = hashlib.sha256(repr(mine).encode()).hexdigest()
    found = gather((digest, beside))
    if len({of_rank for of_rank, _ in found}) > 1:
        problems, differing = differences(gather(mine))
        verb = "differs" if len(differing) == 1 else "differ"
        headline = f"{_name(differing).capitalize()} {verb} from rank 0; training has not begun."
        raise_problems(RankError, headline, problems)
    return [other for _, other in found]


def differences(facts: list[list[Fact]]) -> tuple[list[Problem], list[int]]:
    """Return the first differences between the facts of each rank, and the ranks that differ from rank 0."""
    hints = {fact.subject: fact.hint for of_rank in facts for fact in of_rank}
    tables = [{fact.subject: fact.value for fact in of_rank} for of_rank in facts]
    problems: list[Problem] = []
    differing: set[int] = set()
    for subject, hint in hints.items():
        by_value: dict[str, list[int]] = {}
        for number, table in enumerate(tables):
            by_value.setdefault(table.get(subject, _NOT_THERE), []).append(number)
        if len(by_value) > 1:
            values = "; ".join(f"{_name(ranks)}: {value}" for value, ranks in by_value.items())
            problems.append(Problem(subject, f"{values}. {hint}"))
            own = tables[0].get(subject, _NOT_THERE)
            differing.update(rank for value, ranks in by_value.items() if value != own for rank in ranks)
    if len(problems) > _MOST_SHOWN:
        more = len(problems) - _MOST_SHOWN
        problems = [*problems[:_MOST_SHOWN], Problem("...", f"and {more} more.")]
    return problems, sorted(differing)


def explain(error: BaseException, *, timeout_s: float) -> None:
    """Add a note to an error of the process group: another rank has ended, or does not answer.

    Args:
        error: what ended the run.
        timeout_s: the timeout of a collective.
    """
    if isinstance(error, BridgeError) or not isinstance(error, RuntimeError) or not has_ranks():
        return
    text, number = str(error), rank()
    if any(part in text for part in _SAID_BY_LATE):
        error.add_note(
            f"hfbridge: rank {number} has waited for another rank for more than ddp_timeout={timeout_s:g} s. "
            "Look at the other's output, or set a larger ddp_timeout."
        )
    elif any(part in text for part in _SAID_BY_LOST):
        error.add_note(
            f"hfbridge: rank {number} stops because another rank has ended. Its output says why; without "
            'any, it was killed, possibly out of memory. trainer.fit(..., ckpt_path="last") resumes the run.'
        )


def _name(ranks: Iterable[int]) -> str:
    """Name some ranks: "rank 1", "ranks 1 and 2", "ranks 0 to 6"."""
    listed = sorted(ranks)
    if len(listed) == 1:
        return f"rank {listed[0]}"
    if len(listed) > 2 and listed[-1] - listed[0] == len(listed) - 1:
        return f"ranks {listed[0]} to {listed[-1]}"
    return f"ranks {', '.join(map(str, listed[:-1]))} and {listed[-1]}"

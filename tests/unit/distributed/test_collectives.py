"""What the ranks of a run tell each other, as far as one process shows it."""

import pytest

from hfbridge import BridgeError, CheckpointError, RankError
from hfbridge.distributed import collectives


def test_one_process_is_the_first_rank_of_one():
    assert (collectives.count(), collectives.rank(), collectives.gather("own")) == (1, 0, ["own"])


def test_alone_an_error_stays_what_it_is():
    with pytest.raises(KeyError, match="x"), collectives.raise_on_all_ranks():
        raise KeyError("x")
    with collectives.raise_on_all_ranks():
        pass


def fail(error):
    if error is not None:
        raise error


@pytest.mark.parametrize(
    ("own", "other", "kind", "text"),
    [
        (None, CheckpointError("It is damaged."), CheckpointError, "On rank 1: It is damaged."),
        (None, KeyError("column"), RankError, "On rank 1: KeyError: 'column'"),
        (ValueError("mine"), KeyError("column"), ValueError, "mine"),
        (ValueError("mine"), CheckpointError("It is damaged."), CheckpointError, "On rank 1: It is damaged."),
        (CheckpointError("mine"), KeyError("column"), CheckpointError, "mine"),
        (CheckpointError("mine"), RankError("other"), CheckpointError, "mine"),
    ],
)
def test_what_is_raised_where_ranks_fail(monkeypatch, own, other, kind, text):
    told = []

    def gather(value):
        told.append(value)
        return [value, (isinstance(other, BridgeError), type(other), str(other))]

    monkeypatch.setattr(collectives, "gather", gather)
    with pytest.raises(kind) as caught, collectives.raise_on_all_ranks():
        fail(own)
    assert type(caught.value) is kind
    assert str(caught.value) == text
    assert told == [None if own is None else (isinstance(own, BridgeError), type(own), str(own))]

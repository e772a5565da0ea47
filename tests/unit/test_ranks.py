"""What the ranks of a run tell each other, as far as one process shows it."""

import pytest

from hfbridge import CheckpointError, RankError, ranks


def test_one_process_is_the_first_rank_of_one():
    assert (ranks.count(), ranks.rank(), ranks.gather("own")) == (1, 0, ["own"])


def test_alone_an_error_stays_what_it_is():
    with pytest.raises(KeyError, match="x"), ranks.together():
        raise KeyError("x")
    with ranks.together():
        pass


@pytest.mark.parametrize(
    ("failure", "kind", "text"),
    [
        (CheckpointError("It is damaged."), CheckpointError, "On rank 1: It is damaged."),
        (KeyError("column"), RankError, "On rank 1: KeyError: 'column'"),
    ],
)
def test_what_another_rank_failed_with_is_raised_here(monkeypatch, failure, kind, text):
    is_ours, told = isinstance(failure, CheckpointError), []
    others = (
        (CheckpointError, str(failure)) if is_ours else (RankError, f"{type(failure).__name__}: {failure}")
    )

    def gather(own):
        told.append(own)
        return [own, others]

    monkeypatch.setattr(ranks, "gather", gather)
    with pytest.raises(kind) as caught, ranks.together():
        pass
    assert type(caught.value) is kind
    assert str(caught.value) == text
    with pytest.raises(type(failure)), ranks.together():  # and this one tells its own
        raise failure
    assert told == [None, others]

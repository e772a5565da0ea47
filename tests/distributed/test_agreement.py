"""What ranks are given differently is found before the first step, named, and raised on all of them."""

import pytest

from tests.distributed.mapping_jobs import (
    count_collectives,
    other_weights,
    train_differing,
    train_into_folders_of_their_own,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("setting", ["the setting learning_rate", "rank 0: not there; rank 1: 0.001", "same"]),
        ("long setting", ["the setting label_names", "digest"]),
        ("order", ["contents of the train set", "shuffle(seed=...)"]),
        ("length", ["rows of the train set", "rank 0: 21; rank 1: 20"]),
        ("column", ["columns of the train set", "extra"]),
        ("model", ["the parameter model.embed_tokens.weight", "rank 1: not there", "more"]),
        ("frozen", ["the parameter lm_head.weight", "not trained"]),
    ],
)
def test_what_differs_is_named_on_all_ranks(ranks, what, named):
    found = ranks(2).run(train_differing, what)
    assert [kind for kind, _ in found] == ["RankError", "RankError"]
    assert found[0] == found[1]
    text = " ".join(found[0][1].split())
    assert text.startswith("Rank 1 differs from rank 0; training has not begun.")
    for part in named:
        assert part in text
    assert "run_name" not in text


def test_of_different_output_dirs_the_first_rank_s_is_used(ranks):
    (first, warned, folder), (second, _, other) = ranks(2).run(train_into_folders_of_their_own)
    assert [path.split("/")[0] for path in first] == ["out-0"]
    assert second == []
    assert folder == other == "out-0"
    assert len(warned) == 1


def test_what_one_rank_lacks_fails_the_others_too(ranks):
    first, second = ranks(2).run(train_differing, "no evaluation set")
    assert first[0] == second[0] == "SettingsError"
    assert first[1] == f"On rank 1: {second[1]}"
    assert second[1].startswith("eval_strategy='steps' needs an evaluation set")


def test_weights_may_differ_as_natively(ranks):
    assert ranks(2).run(other_weights) == [[True, True]] * 2


def test_nothing_is_compared_in_the_steps(ranks):
    for two, four in ranks(2).run(count_collectives):
        assert two == four <= 4

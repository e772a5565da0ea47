"""The error tree, and several problems in one message."""

import pickle

import pytest

from hfbridge import errors
from hfbridge.errors import Problem, SettingsError, describe_problems, raise_problems


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("SettingsError", ValueError),
        ("DataError", ValueError),
        ("ModelError", ValueError),
        ("MetricsError", TypeError),
        ("JobError", ValueError),
        ("MissingDependencyError", ImportError),
    ],
)
def test_every_error_is_a_bridge_error_and_a_builtin_one(name, builtin):
    kind = getattr(errors, name)
    assert issubclass(kind, errors.BridgeError)
    assert issubclass(kind, builtin)


def test_the_warning_is_a_user_warning():
    assert issubclass(errors.BridgeWarning, UserWarning)


def test_the_message_is_laid_out_in_two_columns():
    reason = (
        "refused: it updates weights during backward, which automatic optimization cannot follow; "
        'use optim="adamw_torch", or the native Trainer.'
    )
    problems = [
        Problem("gradient_acumulation_steps = 4", "unknown; did you mean gradient_accumulation_steps?"),
        Problem('optim = "adalomo"', reason),
    ]
    with pytest.raises(SettingsError) as caught:
        raise_problems(SettingsError, "2 of 31 settings cannot be carried.", problems)
    assert str(caught.value).splitlines() == [
        "2 of 31 settings cannot be carried.",
        "  gradient_acumulation_steps = 4   unknown; did you mean gradient_accumulation_steps?",
        '  optim = "adalomo"                '
        "refused: it updates weights during backward, which automatic optimization",
        '                                   cannot follow; use optim="adamw_torch", or the native Trainer.',
    ]
    assert caught.value.problems == tuple(problems)


def test_a_long_subject_has_its_own_line():
    lines = describe_problems([Problem("x" * 60, "text"), Problem("short", "other")]).splitlines()
    assert lines == ["  " + "x" * 60, "          text", "  short   other"]


def test_problems_may_come_from_a_generator():
    with pytest.raises(SettingsError, match="a   b"):
        raise_problems(SettingsError, "one", (Problem(*pair) for pair in [("a", "b")]))


def test_an_empty_text_leaves_no_trailing_blanks():
    assert describe_problems([Problem("a", "")]) == "  a"


def test_errors_keep_their_problems_when_pickled():
    with pytest.raises(SettingsError) as caught:
        raise_problems(SettingsError, "one", [Problem("a", "b")])
    assert pickle.loads(pickle.dumps(caught.value)).problems == (Problem("a", "b"),)
    assert SettingsError("plain").problems == ()

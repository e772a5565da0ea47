"""Settings of which some are not known yet: nothing that depends on them is judged."""

import copy
import pickle

import pytest

from hfbridge import SettingsError
from hfbridge.settings import Settings, translate
from hfbridge.settings.undecided import waiting

BEST = {"load_best_model_at_end": True, "save_strategy": "epoch"}


def test_what_depends_on_an_undecided_setting_is_not_checked() -> None:
    with pytest.raises(SettingsError, match="load_best_model_at_end"):
        Settings.of(BEST)
    settings = Settings.of(BEST, undecided={"eval_strategy"})
    assert settings.undecided == {"eval_strategy"}
    assert settings.given == BEST
    with pytest.raises(SettingsError, match="seed"):
        Settings.of({**BEST, "seed": "x"}, undecided={"eval_strategy"})


def test_copies_stay_undecided_and_a_change_decides() -> None:
    settings = Settings.of(BEST, undecided={"eval_strategy", "seed"})
    for other in (copy.deepcopy(settings), pickle.loads(pickle.dumps(settings)), settings.replace(bf16=True)):
        assert other.undecided == {"eval_strategy", "seed"}
    assert settings.replace(seed=3).undecided == {"eval_strategy"}
    with pytest.raises(SettingsError, match='they are "epoch" and "steps"'):
        settings.replace(eval_strategy="steps")
    assert Settings(seed=1).undecided == frozenset()


def test_notes_do_not_follow_from_what_is_undecided() -> None:
    given = {"eval_steps": 5, "generation_num_beams": 2}
    assert {note.split()[0] for note in Settings.of(given).notes} == {"eval_steps", "generation_num_beams"}
    (note,) = Settings.of(given, undecided={"eval_strategy"}).notes
    assert note.startswith("generation_num_beams has no effect")
    waits = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
    named = {**waits, "metric_for_best_model": "accuracy"}
    assert "greater is better" in " ".join(Settings.of(named).notes)
    assert Settings.of(waits, undecided={"metric_for_best_model"}).notes == ()


@pytest.mark.parametrize(
    ("given", "said", "undecided", "expected"),
    [
        ({}, {}, set(), {}),
        (
            {},
            {},
            {"max_steps", "num_train_epochs"},
            {"max_epochs": ("max_steps", "num_train_epochs"), "max_steps": ("max_steps",)},
        ),
        ({"max_steps": 3}, {}, {"num_train_epochs"}, {}),
        ({"logging_strategy": "epoch"}, {}, {"logging_steps"}, {}),
        ({}, {}, {"logging_strategy"}, {"log_every_n_steps": ("logging_strategy",)}),
        ({}, {}, {"deepspeed"}, {"strategy": ("deepspeed",), "devices": ("deepspeed",)}),
        ({}, {"devices": 2}, {"deepspeed"}, {"strategy": ("deepspeed",)}),
        ({}, {"strategy": "ddp"}, {"deepspeed"}, {}),
        ({}, {}, {"learning_rate"}, {}),
        (
            {},
            {},
            {"gradient_accumulation_steps", "max_grad_norm"},
            {
                "accumulate_grad_batches": ("gradient_accumulation_steps",),
                "gradient_clip_val": ("max_grad_norm",),
            },
        ),
    ],
)
def test_what_lightning_is_given_waits_for(given, said, undecided, expected) -> None:
    settings = Settings.of(given, undecided=undecided)
    assert waiting(settings, said) == expected
    plan = translate(settings, said)
    assert plan.undecided == expected
    assert not plan.trainer_arguments.keys() & expected.keys()
    page = str(plan)
    assert all(f"  {name}: known when it runs ({', '.join(of)})" in page for name, of in expected.items())

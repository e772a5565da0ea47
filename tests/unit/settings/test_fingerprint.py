"""What ranks compare of settings and models."""

from torch import nn

from hfbridge import Settings
from hfbridge.models.signature import facts_of_model
from hfbridge.settings.fingerprint import facts_of_settings


def values(settings: Settings) -> dict[str, str]:
    return {fact.subject.removeprefix("the setting "): fact.value for fact in facts_of_settings(settings)}


def test_settings_are_described_by_what_is_not_the_default():
    given = {"learning_rate": 5e-5, "seed": 7, "label_names": ["a"], "lr_scheduler_type": "cosine"}
    assert values(Settings(**given)) == {"seed": "7", "label_names": "['a']", "lr_scheduler_type": '"cosine"'}


def test_what_only_the_first_rank_reads_may_differ():
    assert values(Settings(run_name="a", output_dir="a", disable_tqdm=True, log_level="error")) == {}


def test_long_values_are_told_apart_by_their_ends():
    one, other = (values(Settings(label_names=["a" * 100 + end]))["label_names"] for end in "xy")
    assert one != other
    assert len(one) < 130


def test_a_model_is_described_by_its_parameters():
    model = nn.Linear(2, 3)
    model.bias.requires_grad = False
    assert [(fact.subject, fact.value) for fact in facts_of_model(model)] == [
        ("the parameter weight", "[3, 2] float32"),
        ("the parameter bias", "[3] float32, not trained"),
    ]

"""What a script's values are, is known when it runs: nothing that follows from them is told as a fact."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hfbridge.explain import Explained, Explanation, explain
from tests.unit.settings.test_fields import CARRIED

FROM = "from transformers import TrainingArguments\n"


def script(text: str, **given: Any) -> Explanation:
    Path("script.py").write_text(text)
    return explain("script.py", **given)


def only(explanation: Explanation) -> Explained:
    (part,) = explanation.parts
    return part


def flat(explanation: Explanation) -> str:
    return " ".join(str(explanation).split())


def told(explanation: Explanation, about: str) -> list[str]:
    return [found.text for found in only(explanation).differences if about in found.about]


@pytest.mark.parametrize(
    ("name", "waiting"),
    [
        ("num_train_epochs", ["max_epochs"]),
        ("max_steps", ["max_epochs", "max_steps"]),
        ("use_cpu", ["accelerator"]),
        ("output_dir", ["default_root_dir"]),
        ("disable_tqdm", ["enable_progress_bar"]),
        ("logging_steps", ["log_every_n_steps"]),
        ("fsdp", ["strategy", "devices"]),
        ("no_cuda", ["accelerator"]),
    ],
)
def test_what_lightning_is_given_waits_for_the_setting(name: str, waiting: list[str]) -> None:
    found = script(f"{FROM}TrainingArguments({name}=given())")
    plan = only(found).plan
    assert plan is not None
    assert sorted(plan.undecided) == sorted(waiting)
    assert not plan.undecided.keys() & plan.trainer_arguments.keys()
    given = flat(found).partition("lightning.Trainer is given")[2]
    for argument in waiting:
        assert f" {argument}: known when it runs" in given
        assert f" {argument} = " not in given
    data = found.as_dict()["parts"][0]
    assert sorted(data["undecided"]) == sorted(waiting)
    assert not data["undecided"].keys() & data["trainer"].keys()


def test_steps_that_are_known_decide_whatever_the_epochs_are() -> None:
    plan = only(script(f"{FROM}TrainingArguments(max_steps=5, num_train_epochs=given())")).plan
    assert plan is not None
    assert not plan.undecided
    assert plan.trainer_arguments["max_epochs"] == -1


def test_the_schedule_and_its_rate() -> None:
    (text,) = told(script(f"{FROM}TrainingArguments(warmup_steps=10, learning_rate=lr())"), "warmup_steps")
    assert text == (
        "The first step is made with learning rate 0; the full rate of learning_rate (known when it runs) "
        "comes after 10 steps."
    )
    (text,) = told(script(f"{FROM}TrainingArguments(warmup_ratio=w())"), "warmup_steps")
    assert text.startswith("With a warmup (warmup_steps: known when it runs) the first step is made with")
    assert text.endswith("the full rate of 5e-05 comes after it.")
    (text,) = told(script(f"{FROM}TrainingArguments(warmup_steps=3, lr_scheduler_type=s())"), "warmup_steps")
    assert text.startswith("With a schedule that warms up (lr_scheduler_type: known when it runs)")
    (text,) = told(script(f"{FROM}TrainingArguments(warmup_ratio=0.1, max_steps=m())"), "warmup_steps")
    assert "after 0.1 of all steps" in text
    constant = f'{FROM}TrainingArguments(warmup_steps=w(), lr_scheduler_type="constant")'
    assert told(script(constant), "warmup_steps") == []


def test_the_factor_of_the_gradient() -> None:
    accumulation = f"{FROM}TrainingArguments(gradient_accumulation_steps=g())"
    texts = told(script(accumulation), "gradient_accumulation_steps")
    assert "are G (G: gradient_accumulation_steps; known when it runs) times too large" in texts[0]
    assert "max_grad_norm=1 clips those models' gradients from a norm of 1/(G) on" in texts[1]
    assert any(
        "fewer than gradient_accumulation_steps (known when it runs) micro-batches" in t for t in texts
    )
    texts = told(script(accumulation, devices=2), "gradient_accumulation_steps")
    assert "are G·2 (G: gradient_accumulation_steps; known when it runs) times too large" in texts[0]
    texts = told(script(accumulation, strategy="ddp"), "gradient_accumulation_steps")
    assert "G·W (G: gradient_accumulation_steps; W: the number of ranks; known when it runs)" in texts[0]
    texts = told(
        script(f"{FROM}TrainingArguments(gradient_accumulation_steps=4, max_grad_norm=n())"), "max_grad_norm"
    )
    assert "max_grad_norm (known when it runs) clips" in texts[0]
    assert "from a norm of max_grad_norm/(4) on" in texts[0]


def test_ranks_that_are_averaged_or_not() -> None:
    text = f"{FROM}TrainingArguments(average_tokens_across_devices=a(), eval_strategy=e())"
    found = script(text, devices=2)
    (loss, *_) = told(found, "gradient_accumulation_steps")
    meaning = "2 with average_tokens_across_devices, 1 without it; known when it runs"
    assert f"W ({meaning})" in loss
    (evaluation,) = told(found, "eval_strategy")
    assert f"W times too large (W: {meaning})" in evaluation
    assert told(script(text), "eval_strategy") == []


def test_arguments_of_the_trainer() -> None:
    text = """
import hfbridge
trainer = hfbridge.Trainer({"gradient_accumulation_steps": 4}, devices=n())
"""
    found = script(text)
    assert "G·W = 4·W (W: the number of ranks" in told(found, "gradient_accumulation_steps")[0]
    plan = only(found).plan
    assert plan is not None
    assert set(plan.undecided) == {"devices", "strategy"}
    assert "Trainer(devices=) = n() (line 3)" in flat(found)
    assert "devices: known when it runs" in flat(found)
    assert "4·2 = 8" in told(script(text, devices=2), "gradient_accumulation_steps")[0]
    text = text.replace("devices=", "accelerate_config=").replace('"gradient_accumulation_steps": 4', "")
    found = script(text)
    assert "are G·W (G: gradient" in told(found, "gradient_accumulation_steps")[0]
    assert not found.refused


def test_the_normalisation_of_the_loss() -> None:
    found = script(
        "import hfbridge\nhfbridge.HFModule(m, loss_normalization=n())\n"
        "hfbridge.Trainer({'gradient_accumulation_steps': 2})"
    )
    (text, *_) = told(found, "gradient_accumulation_steps")
    assert 'loss_normalization is known when it runs. With "exact", here they are' in text
    assert 'With "native", here they are the same' in text
    assert not any(one.is_alike for one in only(found).differences if "of their own micro-batch" in one.text)


def test_notes_that_would_follow_from_a_default() -> None:
    """Beside eval_strategy="no", eval_steps have no effect; nobody knows whether it is that."""
    known = f"{FROM}TrainingArguments(eval_steps=10, save_steps=7, save_strategy='epoch'"
    assert "eval_steps has no effect" in flat(script(f"{known})"))
    page = flat(script(f"{known}, eval_strategy=e())"))
    assert "eval_steps has no effect" not in page
    assert "save_steps has no effect" in page


def test_what_is_wrong_whatever_the_open_values_are_is_refused() -> None:
    text = f"{FROM}TrainingArguments(fp16=True, bf16=given(), save_steps=0, save_strategy=s(), max_steps=-3)"
    found = script(text)
    assert sorted(problem.subject for problem in found.refused) == ["fp16 = True", "max_steps = -3"]
    assert "2 refused of what is known before it runs. Nothing was loaded." in str(found)


def test_what_depends_on_names_that_nobody_knows() -> None:
    found = script(f"{FROM}TrainingArguments(load_best_model_at_end=True, **more())")
    assert not found.refused
    plan = only(found).plan
    assert plan is not None
    assert {"max_epochs", "max_steps", "accelerator", "default_root_dir"} <= plan.undecided.keys()
    assert "Nothing is refused of what is known before it runs." in str(found)
    settings = re.findall(r"5e-05|max_epochs = |\bG = ", str(found))
    assert settings == []


def test_entries_that_a_later_one_may_replace() -> None:
    found = script(f"{FROM}TrainingArguments(**{{'seed': 1, **more, 'max_steps': 2}})")
    part = only(found)
    assert part.plan is not None
    assert [row.field for row in part.plan.rows] == ["max_steps"]
    assert [(one.name, one.expression) for one in part.open] == [
        ("seed", "1, unless more says otherwise"),
        ("", "more"),
    ]


def test_values_that_are_changed_in_place() -> None:
    found = script(f"{FROM}a = TrainingArguments(max_steps=8, seed=2)\na.max_steps //= 2\na.seed: int = 3")
    assert [(one.name, one.expression) for one in only(found).open] == [
        ("max_steps", "a.max_steps //= 2"),
        ("seed", "a.seed: int = 3"),
    ]


def test_defaults_of_a_subclass_in_the_script() -> None:
    text = """
from dataclasses import dataclass, field
from transformers import TrainingArguments
@dataclass
class Mine(TrainingArguments):
    learning_rate: float = 1e-3
    weight_decay: float = field(default=0.1, metadata={"help": "how much"})
    seed: int = field(default_factory=draw)
    own: int = 3
Mine(weight_decay=0.2)
"""
    part = only(script(text))
    assert part.plan is not None
    assert {row.field: row.value for row in part.plan.rows} == {"learning_rate": 1e-3, "weight_decay": 0.2}
    assert [one.name for one in part.open] == ["seed"]


def test_the_strategy_as_data() -> None:
    found = script(f"{FROM}TrainingArguments(fsdp=f(), ddp_timeout=t())")
    assert json.loads(json.dumps(found.as_dict()))["parts"][0]["strategy"] is None
    found = script(f"{FROM}TrainingArguments(ddp_timeout=t(), ddp_bucket_cap_mb=9)", devices=2)
    assert found.as_dict()["parts"][0]["strategy"] == {"kind": "ddp", "options": {"bucket_cap_mb": 9}}
    found = script(f"{FROM}TrainingArguments(fsdp_config=c())", strategy="fsdp2", devices=2)
    assert found.as_dict()["parts"][0]["strategy"] == {"kind": "fsdp2"}


def test_a_strategy_on_cpus_or_not() -> None:
    found = script(f"{FROM}TrainingArguments(use_cpu=c())", strategy="fsdp2", devices=2)
    (text,) = told(found, "use_cpu")
    assert text.startswith("With use_cpu (known when it runs), natively FSDP is not there on CPUs")


RICH = {
    "output_dir": "out",
    "gradient_accumulation_steps": 4,
    "warmup_steps": 10,
    "num_train_epochs": 2,
    "eval_strategy": "epoch",
    "eval_steps": 7,
    "save_strategy": "epoch",
    "save_steps": 9,
    "save_only_model": True,
    "logging_steps": 5,
    "train_sampling_strategy": "group_by_length",
    "data_seed": 1,
    "generation_max_length": 5,
    "optim": "sgd",
    "adam_beta1": 0.8,
    "ddp_bucket_cap_mb": 9,
    "fsdp_config": {"version": 2},
}


def facts(values: dict[str, Any], given: dict[str, Any], name: str = "") -> tuple[set[str], set[str]]:
    """What is told as a fact of a script with these values, and what is refused; `name` is open."""
    opened = f", {name}=given()" if name else ""
    part = only(script(f"{FROM}TrainingArguments(**{values!r}{opened})", **given))
    plan = part.plan
    assert plan is not None
    found = {one.text for one in part.differences} | set(part.notes) | set(plan.notes)
    found |= {note for row in plan.rows for note in row.note.split("; ")}
    found |= {f"{argument} = {value!r}" for argument, value in plan.trainer_arguments.items()}
    found |= set() if "strategy" in plan.undecided else {f"strategy {plan.strategy.kind}"}
    return found, {problem.subject for problem in part.refused}


@pytest.mark.parametrize(
    ("values", "given"),
    [({}, {}), (RICH, {"devices": 2}), (RICH, {"devices": 2, "strategy": "fsdp2"})],
    ids=["plain", "rich", "fsdp2"],
)
@pytest.mark.parametrize("name", CARRIED)
def test_no_fact_is_the_defaults(name: str, values: dict[str, Any], given: dict[str, Any]) -> None:
    """What is told of a script whose value is open would be told with another value than the default, too."""
    values = {other: value for other, value in values.items() if other != name}
    told, refused = facts(values, given, name)
    by_default, _ = facts(values, given)
    with_another, refused_with_another = facts({**values, name: CARRIED[name]}, given)
    assert refused <= refused_with_another
    if not refused_with_another:
        assert told & by_default <= with_another

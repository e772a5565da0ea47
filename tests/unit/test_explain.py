import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

from hfbridge import Settings, SettingsError
from hfbridge.explain import Explained, Explanation, explain
from hfbridge.model.items import read_traits
from hfbridge.model.normalization import Probe, native_factor
from hfbridge.settings.fields import RULES
from tests.tiny import make_model

ROOT = Path(__file__).parents[2]
VALUES: dict[str, Any] = {"output_dir": "out", "learning_rate": 2e-5, "gradient_accumulation_steps": 4}


def only(explanation: Explanation) -> Explained:
    assert len(explanation.parts) == 1
    return explanation.parts[0]


def texts(explanation: Explanation, *, alike: bool) -> str:
    return "\n".join(f.text for f in only(explanation).differences if f.is_alike == alike)


def script(text: str, name: str = "script.py") -> Explanation:
    Path(name).write_text(text)
    return explain(name)


def values(part: Explained) -> dict[str, Any]:
    assert part.plan is not None
    return {row.field: row.value for row in part.plan.rows}


def test_all_sources_say_the_same() -> None:
    Path("run.yaml").write_text(yaml.safe_dump(VALUES))
    Path("run.json").write_text(json.dumps(VALUES))
    Path("run.py").write_text(f"import transformers\ntransformers.TrainingArguments(**{VALUES!r})")
    sources = [VALUES, Settings(**VALUES), "run.yaml", Path("run.json"), "run.py"]
    found = [only(explain(source, loss_normalization="exact")) for source in sources]
    assert all(values(part) == VALUES for part in found)
    assert len({str(part.differences) for part in found}) == 1
    given = TrainingArguments("out", learning_rate=2e-5, gradient_accumulation_steps=4, use_cpu=True)
    assert values(only(explain(given))) == {**VALUES, "use_cpu": True}


def test_every_row_says_where_the_setting_goes() -> None:
    part = only(explain(VALUES))
    assert part.plan is not None
    assert {row.field: row.home for row in part.plan.rows} == {name: RULES[name].home for name in VALUES}
    page = str(explain(VALUES))
    assert "learning_rate" in page
    assert "the optimizer" in page
    assert page.endswith("Nothing is refused. Nothing was loaded.")


def test_nothing_is_loaded(no_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        pytest.fail("a device or a process group was asked for")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    monkeypatch.setattr(TrainingArguments, "__post_init__", fail)
    text = f"""
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
raise SystemExit("executed")
model = AutoModelForSequenceClassification.from_pretrained({no_model!r})
Trainer(model, TrainingArguments("out", bf16=True, fsdp=True), train_dataset=read())
"""
    part = only(script(text))
    assert values(part) == {"output_dir": "out", "bf16": True, "fsdp": True}


class TestRefused:
    def test_the_rest_is_explained(self) -> None:
        found = explain({**VALUES, "optim": "adalomo", "fp16": True, "learning_rat": 1})
        assert {problem.subject for problem in found.refused} == {
            'optim = "adalomo"',
            "fp16 = True",
            "learning_rat = 1",
        }
        assert values(only(found)) == VALUES
        assert "3 refused." in str(found)

    def test_what_is_refused_for_want_of_it_is_not_told(self) -> None:
        # Without a save_strategy that can be read, load_best_model_at_end would not fit the default.
        given = {"eval_strategy": "epoch", "save_strategy": "epochs", "load_best_model_at_end": True}
        found = explain(given)
        assert [problem.subject for problem in found.refused] == ['save_strategy = "epochs"']

    def test_arguments_of_the_trainer(self) -> None:
        found = explain(VALUES, strategy="dpp", devices=2)
        assert [problem.subject for problem in found.refused] == ['Trainer(strategy="dpp")']
        assert values(only(found)) == VALUES

    def test_a_setting_that_several_ranks_cannot_have(self) -> None:
        found = explain({**VALUES, "auto_find_batch_size": True}, devices=2)
        assert [problem.subject for problem in found.refused] == ["auto_find_batch_size = True"]
        assert not explain({**VALUES, "auto_find_batch_size": True}).refused

    def test_what_accelerate_config_says(self) -> None:
        config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "use_cpu": True}
        Path("accelerate.yaml").write_text(yaml.safe_dump({**config, "num_processes": 2}))
        found = explain(VALUES, accelerate_config="accelerate.yaml")
        assert not found.refused
        assert values(only(found)) == {**VALUES, "use_cpu": True}
        assert "4·2 = 8" in texts(found, alike=False)
        found = explain({**VALUES, "use_cpu": False}, accelerate_config="accelerate.yaml")
        assert ["conflicts with `use_cpu=False`" in problem.text for problem in found.refused] == [True]
        assert values(only(found)) == {**VALUES, "use_cpu": False}

    def test_a_token_is_hidden(self) -> None:
        found = explain({**VALUES, "hub_token": "secret-token"})
        assert found.refused
        assert "secret-token" not in str(found) + json.dumps(found.as_dict())

    @pytest.mark.parametrize(
        ("name", "text", "says"),
        [
            ("nowhere.yaml", None, "cannot be read"),
            ("nowhere.py", None, r"The script 'nowhere\.py' cannot be read"),
            ("run.toml", "a = 1", "suffix"),
            ("run.py", "x = (", r"no Python: line 1"),
            ("run.py", "x = 1", "makes no settings"),
            ("run.yaml", "- 1", "holds a list"),
        ],
    )
    def test_a_source_that_is_none(self, name: str, text: str | None, says: str) -> None:
        if text is not None:
            Path(name).write_text(text)
        with pytest.raises(SettingsError, match=says):
            explain(name)


class TestDifferences:
    @pytest.mark.parametrize(
        ("accumulation", "ranks", "says"),
        [(4, 1, "G = 4 times"), (4, 2, "G·W = 4·2 = 8 times"), (1, 2, "G·W = 1·2 = 2 times"), (1, 1, "")],
    )
    def test_the_factor_of_the_gradient(self, accumulation: int, ranks: int, says: str) -> None:
        found = explain({"gradient_accumulation_steps": accumulation}, devices=ranks)
        told = texts(found, alike=False)
        assert ("times too large" in told) == bool(says)
        assert says in told

    def test_it_is_the_factor_that_a_run_measures(self) -> None:
        rows = [{"labels": torch.tensor([0, 1, 1])} for _ in range(4)]
        traits = read_traits(make_model("distilbert"))
        measured = native_factor(Probe(divides=False, shift=False), rows, traits, world_size=2)
        assert measured == (8.0, 8.0)

    def test_ranks_that_only_the_machine_knows(self) -> None:
        told = texts(explain(VALUES, strategy="ddp"), alike=False)
        assert "G·W = 4·W (W: the number of ranks; known when it runs) times" in told
        assert "from a norm of 0.25/W on" in told
        told = texts(explain({}, strategy="ddp"), alike=False)
        assert "W (the number of ranks; known when it runs) times" in told

    def test_nodes_count(self) -> None:
        assert "4·6 = 24" in texts(explain(VALUES, devices=2, num_nodes=3), alike=False)

    def test_ranks_whose_gradients_are_averaged(self) -> None:
        given = {**VALUES, "average_tokens_across_devices": False, "eval_strategy": "epoch"}
        told = texts(explain(given, devices=2), alike=False)
        assert "G = 4 times" in told
        assert "eval_loss" not in told

    def test_clipping(self) -> None:
        assert "from a norm of 0.25 on" in texts(
            explain({**VALUES, "max_grad_norm": 2}, devices=2), alike=False
        )
        assert "clips" not in texts(explain({**VALUES, "max_grad_norm": 0}), alike=False)

    def test_evaluation(self) -> None:
        told = texts(explain({"eval_strategy": "epoch"}, devices=3), alike=False)
        assert "eval_loss of models that ignore num_items_in_batch is 3 times too large on 3 ranks" in told
        assert "eval_loss" not in texts(explain({"eval_strategy": "epoch"}), alike=False)

    def test_with_native_normalisation_they_are_alike(self) -> None:
        found = explain({**VALUES, "eval_strategy": "epoch"}, devices=2, loss_normalization="native")
        assert texts(found, alike=False) == ""
        assert "8 times too large" in texts(found, alike=True)

    def test_fsdp_on_cpus(self) -> None:
        assert "plain DDP" in texts(explain({"use_cpu": True, "fsdp": True}, devices=2), alike=False)
        assert "plain DDP" not in texts(explain({"fsdp": True}, devices=2), alike=False)

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"warmup_steps": 100}, "learning rate 0; the full rate of 5e-05 comes after 100 steps"),
            ({"warmup_ratio": 0.1, "max_steps": 33}, f"after {math.ceil(3.3)} of 33 steps"),
            ({"warmup_ratio": 0.1}, "after 0.1 of all steps"),
            (
                {
                    "warmup_steps": 5,
                    "lr_scheduler_type": "cosine_warmup_with_min_lr",
                    "lr_scheduler_kwargs": {"min_lr": 0.0},
                },
                "begins at one warmup step's share",
            ),
            ({"gradient_accumulation_steps": 3}, "fewer than 3 micro-batches, is a step of its own"),
            ({"train_sampling_strategy": "group_by_length", "data_seed": 1}, "data_seed is not read"),
            ({"save_only_model": True}, "no run goes on from them exactly"),
        ],
    )
    def test_what_is_alike_and_easily_overlooked(self, given: dict[str, Any], says: str) -> None:
        assert says in texts(explain(given), alike=True)
        assert says not in texts(explain({}), alike=True)

    def test_the_warmup_is_that_of_the_native_arguments(self) -> None:
        arguments = TrainingArguments("out", warmup_steps=0.1, max_steps=33, use_cpu=True)
        steps = arguments.get_warmup_steps(33)
        assert f"after {steps} of 33 steps" in texts(explain(arguments), alike=True)


class TestConfig:
    def test_a_config_of_fit(self) -> None:
        config = {
            "trainer": {
                "settings": VALUES,
                "strategy": "ddp",
                "devices": 2,
                "callbacks": [{"class_path": "transformers.EarlyStoppingCallback"}],
                "asynchronous_saving": True,
            },
            "model": {"model": "gpt2", "loss_normalization": "native"},
            "data": {"train_dataset": "nowhere.train"},
        }
        Path("config.yaml").write_text(yaml.safe_dump(config))
        found = explain("config.yaml")
        part = only(found)
        assert values(part) == VALUES
        assert not found.refused
        assert "trainer.callbacks is made when it runs" in part.notes
        assert "4·2 = 8 times" in texts(found, alike=True)
        assert "4·3 = 12 times" in texts(explain("config.yaml", devices=3), alike=True)

    def test_a_strategy_that_is_made_when_it_runs(self) -> None:
        config = {"settings": VALUES, "strategy": {"class_path": "hfbridge.strategies.FSDP2Strategy"}}
        Path("config.yaml").write_text(yaml.safe_dump({"trainer": config}))
        found = explain("config.yaml")
        plan = only(found).plan
        assert plan is not None
        assert plan.undecided == {"strategy": (), "devices": ()}
        assert "4·W (W: the number of ranks; known when it runs)" in texts(found, alike=False)
        assert "trainer.strategy is made when it runs" in only(found).notes
        assert "4·2 = 8" in texts(explain("config.yaml", devices=2), alike=False)

    def test_its_settings_may_be_a_file(self) -> None:
        Path("settings.json").write_text(json.dumps(VALUES))
        Path("config.yaml").write_text(
            yaml.safe_dump({"trainer": {"settings": "settings.json", "max_epoch": 2}})
        )
        found = explain("config.yaml")
        assert values(only(found)) == VALUES
        assert [problem.subject for problem in found.refused] == ["Trainer(max_epoch=...)"]


class TestScript:
    def test_what_can_be_read(self) -> None:
        text = """
import os
from transformers import IntervalStrategy, TrainingArguments as Arguments
LR = 2e-5
names = ["labels"]
common = dict(logging_steps=5, seed=3)
more = {"save_steps": 100, **common}
arguments = Arguments("out", None, learning_rate=LR * 2, label_names=names, weight_decay=0.2 - 0.1,
    eval_strategy=IntervalStrategy.EPOCH, run_name=os.environ["NAME"], max_steps=steps(), **more,
    **(common | {"seed": 4}))
arguments.warmup_steps = 10
"""
        part = only(script(text))
        assert part.where == "script.py, line 8: Arguments(...)"
        assert values(part) == {
            "output_dir": "out",
            "learning_rate": 4e-5,
            "label_names": ["labels"],
            "weight_decay": 0.1,
            "save_steps": 100,
            "logging_steps": 5,
            "seed": 4,
            "eval_strategy": "epoch",
        }
        found = {one.name: (one.expression, one.line) for one in part.open}
        assert found == {
            "run_name": ("os.environ['NAME']", 9),
            "max_steps": ("steps()", 9),
            "warmup_steps": ("arguments.warmup_steps = 10", 11),
        }
        assert part.open[1].home == "Trainer(max_steps=)"
        assert "max_steps = steps() (line 9) -> Trainer(max_steps=)" in str(script(text))

    def test_names_that_are_not_one_value(self) -> None:
        text = """
from transformers import TrainingArguments
seed = 1
if input(): seed = 2
steps: int = 3
changed = {"logging_steps": 1}
changed["logging_steps"] = 2
updated = dict(save_steps=1)
updated.update(save_steps=2)
def make(epochs):
    TrainingArguments(seed=seed, max_steps=steps, num_train_epochs=epochs, **changed, **updated, **unknown)
"""
        part = only(script(text))
        assert values(part) == {"max_steps": 3}
        assert [(one.name, one.expression) for one in part.open] == [
            ("seed", "seed"),
            ("num_train_epochs", "epochs"),
            ("", "changed"),
            ("", "updated"),
            ("", "unknown"),
        ]

    def test_values_in_a_file_beside_it(self) -> None:
        Path("common.py").write_text(
            "SEED = 5\nSETTINGS = {'seed': SEED, 'logging_steps': n, 'max_steps': 7}\nLR = 1e-3"
        )
        text = """
from common import LR, SETTINGS
from transformers import TrainingArguments
n = 1
TrainingArguments(learning_rate=LR, **SETTINGS)
"""
        part = only(script(text))
        assert values(part) == {"learning_rate": 1e-3, "seed": 5, "max_steps": 7}
        assert [(one.name, one.expression) for one in part.open] == [("logging_steps", "(n)")]

    def test_files_that_import_from_each_other(self) -> None:
        Path("common.py").write_text("from script import A\nB = A")
        found = script(
            "from common import B\nfrom transformers import TrainingArguments as T\nA = B\nT(seed=A)"
        )
        assert [one.name for one in only(found).open] == ["seed"]

    def test_several_calls_and_a_subclass(self) -> None:
        text = """
import transformers
from transformers import Seq2SeqTrainingArguments
class Mine(transformers.TrainingArguments):
    extra: int = 1
transformers.TrainingArguments(seed=1)
Seq2SeqTrainingArguments(predict_with_generate=True)
Mine(seed=2)
other.TrainingArguments(seed=3)
"""
        found = script(text)
        assert [values(part) for part in found.parts] == [
            {"seed": 1},
            {"predict_with_generate": True},
            {"seed": 2},
        ]
        assert [part.where.split(": ")[1] for part in found.parts] == [
            "transformers.TrainingArguments(...)",
            "Seq2SeqTrainingArguments(...)",
            "Mine(...)",
        ]

    def test_hfbridge_in_a_script(self) -> None:
        text = """
import hfbridge
from hfbridge import HFModule
settings = {"gradient_accumulation_steps": 4}
HFModule(model, loss_normalization="native")
hfbridge.Trainer(settings, strategy="ddp", devices=2, callbacks=[x], logger=True, precision=p())
"""
        found = script(text)
        part = only(found)
        assert part.plan is not None
        assert part.plan.strategy.kind == "ddp"
        assert "G·W = 4·2 = 8" in texts(found, alike=True)
        assert values(only(script("from hfbridge import Settings\nSettings(seed=1)"))) == {"seed": 1}

    @pytest.mark.parametrize(
        ("made_of", "is_native"),
        [
            ("transformers.TrainingArguments(gradient_accumulation_steps=4)", True),
            ("hfbridge.Settings(gradient_accumulation_steps=4)", False),
            ("transformers.TrainingArguments(gradient_accumulation_steps=4); hfbridge.HFModule(m)", False),
            ("transformers.TrainingArguments(gradient_accumulation_steps=4); hfbridge.from_trainer(t)", True),
        ],
    )
    def test_whose_numbers_a_script_has(self, made_of: str, is_native: bool) -> None:
        """`hfbridge run` and from_trainer keep those of the native Trainer."""
        found = script(f"import hfbridge, transformers\n{made_of}")
        assert ('loss_normalization="native"; "exact" has them' in texts(found, alike=True)) == is_native

    def test_what_depends_on_an_open_value_is_not_refused(self) -> None:
        text = """
from transformers import TrainingArguments
TrainingArguments(load_best_model_at_end=True, eval_strategy=given, save_strategy="epoch")
"""
        found = script(text)
        assert not found.refused
        assert values(only(found)) == {"load_best_model_at_end": True, "save_strategy": "epoch"}
        assert "known when it runs; what depends on it is judged then" in str(found)

    def test_an_open_value_of_a_name_that_is_none(self) -> None:
        found = script("from transformers import TrainingArguments\nTrainingArguments(optmi=given)")
        assert [problem.subject for problem in found.refused] == ["optmi = given"]
        assert "did you mean optim?" in found.refused[0].text

    def test_replaced_methods(self) -> None:
        text = """
import transformers
from transformers import Seq2SeqTrainer
class Loss(transformers.Trainer):
    loss_is_scaled_for_ga = True
    def __init__(self, *a): ...
    def compute_loss(self, *a): ...
    def push_to_hub(self): ...
    def my_own(self): ...
class Further(Loss):
    async def training_step(self): ...
class Other(Model):
    def compute_loss(self): ...
trainer = Seq2SeqTrainer(model)
trainer.log = print
trainer.mine = print
other.log = print
"""
        found = script(text)
        assert [problem.subject for problem in found.overridden] == [
            "Loss.loss_is_scaled_for_ga (line 5)",
            "Loss.compute_loss (line 7)",
            "Further.training_step (line 11)",
            "trainer.log (line 15)",
        ]
        assert "compute_loss_func" in found.overridden[1].text
        assert found.refused == found.overridden
        assert "overridden: from_trainer refuses it" in str(found)

    @pytest.mark.parametrize(
        "path", sorted((ROOT / "examples").glob("*/native.py")), ids=lambda p: p.parent.name
    )
    def test_the_examples(self, path: Path) -> None:
        if path.parent.name == "accelerate_loop":
            with pytest.raises(SettingsError, match=r"makes no settings"):
                explain(path)
            return
        found = explain(path)
        assert not found.refused
        # Some depend on the command line as a whole.
        for part in found.parts:
            assert part.is_by_command_line or (part.plan is not None and (part.plan.rows or part.open))


def test_the_same_as_data() -> None:
    Path("script.py").write_text(
        "from transformers import Trainer, TrainingArguments\n"
        "class T(Trainer):\n    def log(self): ...\n"
        "TrainingArguments('out', optim='lomo', gradient_accumulation_steps=2, seed=s())\n"
    )
    found = explain("script.py", strategy="deepspeed_stage_2", devices=2)
    told = json.loads(json.dumps(found.as_dict()))
    assert told["is_refused"] is True
    assert told["source"] == "script.py"
    assert [problem["subject"] for problem in told["overridden"]] == ["T.log (line 3)"]
    (part,) = told["parts"]
    assert [row["setting"] for row in part["settings"]] == ["output_dir", "gradient_accumulation_steps"]
    assert part["settings"][0] == {
        "setting": "output_dir",
        "value": "out",
        "becomes": "Trainer(default_root_dir=)",
        "note": "",
    }
    assert part["trainer"]["devices"] == 2
    assert part["strategy"]["kind"] == "deepspeed"
    assert part["open"] == [
        {"setting": "seed", "expression": "s()", "line": 4, "becomes": RULES["seed"].home}
    ]
    assert any("2·2 = 4" in one["text"] and one["alike"] for one in part["differences"])
    assert len(part["refused"]) == 1


def test_packages_that_are_missing_are_told_and_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = explain({"report_to": ["clearml"]})
    assert not found.refused
    assert any("clearml, which is not installed" in note for note in only(found).notes)

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
from hfbridge.losses.item_counts import read_traits
from hfbridge.losses.normalization import Probe, native_factor
from hfbridge.settings.rules import RULES
from tests.tiny import make_model

VALUES: dict[str, Any] = {"output_dir": "out", "learning_rate": 2e-5, "gradient_accumulation_steps": 4}


def only(explanation: Explanation) -> Explained:
    assert len(explanation.parts) == 1
    return explanation.parts[0]


def texts(explanation: Explanation, *, alike: bool) -> str:
    return "\n".join(f.text for f in only(explanation).differences if f.is_alike == alike)


def values(part: Explained) -> dict[str, Any]:
    assert part.plan is not None
    return {row.field: row.value for row in part.plan.rows}


def test_all_sources_say_the_same() -> None:
    Path("run.yaml").write_text(yaml.safe_dump(VALUES))
    Path("run.json").write_text(json.dumps(VALUES))
    sources = [VALUES, Settings(**VALUES), "run.yaml", Path("run.json")]
    found = [only(explain(source, loss_normalization="exact")) for source in sources]
    assert all(values(part) == VALUES for part in found)
    assert len({str(part.differences) for part in found}) == 1
    given = TrainingArguments("out", learning_rate=2e-5, gradient_accumulation_steps=4, use_cpu=True)
    assert values(only(explain(given))) == {**VALUES, "use_cpu": True}


def test_every_row_says_where_the_setting_goes() -> None:
    part = only(explain(VALUES))
    assert part.plan is not None
    assert {row.field: row.used_by for row in part.plan.rows} == {
        name: RULES[name].used_by for name in VALUES
    }
    page = str(explain(VALUES))
    assert "learning_rate" in page
    assert "the optimizer" in page
    assert page.endswith("Nothing is refused. Nothing was loaded.")


def test_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        pytest.fail("a device or a process group was asked for")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    monkeypatch.setattr(TrainingArguments, "__post_init__", fail)
    given = {"output_dir": "out", "bf16": True, "fsdp": True}
    assert values(only(explain(given))) == given


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
            ("run.toml", "a = 1", "suffix"),
            ("run.py", "x = 1", r"^run\.py is a script: `hfbridge run --dry-run run\.py` runs it up to"),
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
            ({"save_only_model": True}, "no run resumes from them exactly"),
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
        assert plan.undecided == ("devices", "strategy")
        assert "strategy: known when it runs" in str(found)
        assert found.as_dict()["parts"][0]["strategy"] is None
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


def test_the_same_as_data() -> None:
    given = {"output_dir": "out", "optim": "lomo", "gradient_accumulation_steps": 2}
    found = explain(given, strategy="deepspeed_stage_2", devices=2, loss_normalization="native")
    told = json.loads(json.dumps(found.as_dict()))
    assert told["is_refused"] is True
    assert told["source"] == "settings"
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
    assert any("2·2 = 4" in one["text"] and one["alike"] for one in part["differences"])
    assert len(part["refused"]) == 1


def test_packages_that_are_missing_are_told_and_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = explain({"report_to": ["clearml"]})
    assert not found.refused
    assert any("clearml, which is not installed" in note for note in only(found).notes)

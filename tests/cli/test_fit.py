"""`hfbridge fit`, `validate`, `test` and `predict` in this process."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import set_seed

from hfbridge import HFDataModule, HFModule, Trainer
from tests.cli.conftest import SETTINGS, write
from tests.tiny import make_dataset, make_model, make_tokenizer

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str, str]]

# lightning 2.6 calls jsonargparse's instantiate_classes, which 4.49 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


def rows_of(folder: str) -> list[dict[str, Any]]:
    """The rows in a checkpoint's state, without what a clock says."""
    state = json.loads(Path(folder, "trainer_state.json").read_text())
    timed = re.compile("runtime|per_second|preparation")
    return [{key: row[key] for key in row if not timed.search(key)} for row in state["log_history"]]


def shorten(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: [ids[:5] for ids in rows[name]] for name in ("input_ids", "attention_mask")}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_a_yaml_trains_as_the_same_in_python_to_the_bit(project: dict[str, Any], hfbridge: Command) -> None:
    code, out, err = hfbridge("fit", "--config", "config.yaml")
    assert code == 0, err
    assert "eval_accuracy" in out
    module = HFModule(
        lambda: make_model("distilbert"), processing_class=make_tokenizer(), compute_metrics=accuracy
    )
    data = HFDataModule(
        train_dataset=make_dataset("distilbert", 22, seed=3),
        eval_dataset=make_dataset("distilbert", 7, seed=4),
        map_function=shorten,
    )
    trainer = Trainer({**SETTINGS, "output_dir": "in_python"}, enable_model_summary=False)
    trainer.fit(module, data)
    assert len(rows_of("out/checkpoint-4")) == 6  # four of training, two of evaluation
    assert rows_of("out/checkpoint-4") == rows_of("in_python/checkpoint-4")
    ours, theirs = (load_file(f"{folder}/checkpoint-4/model.safetensors") for folder in ("out", "in_python"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_config_of_a_run_runs_again(project: dict[str, Any], hfbridge: Command) -> None:
    assert hfbridge("fit", "--config", "config.yaml")[0] == 0
    before = rows_of("out/checkpoint-4")
    saved = yaml.safe_load(Path("out/config.yaml").read_text())
    assert saved["trainer"]["settings"] == SETTINGS
    assert saved["data"]["predict_dataset"] == project["data"]["predict_dataset"]
    saved["trainer"]["settings"]["output_dir"] = "again"
    write("again.yaml", saved)
    code, _, err = hfbridge("fit", "--config", "again.yaml")
    assert code == 0, err
    assert "Unable to serialize" not in err
    assert rows_of("again/checkpoint-4") == before


def test_a_run_goes_on_and_is_evaluated_and_predicts(project: dict[str, Any], hfbridge: Command) -> None:
    assert hfbridge("fit", "--config", "config.yaml")[0] == 0
    whole = rows_of("out/checkpoint-4")
    code, _, err = hfbridge("fit", "--config", "config.yaml", "--ckpt_path", "out/checkpoint-2")
    assert code == 0, err
    assert rows_of("out/checkpoint-4") == whole
    config = Path("out/config.yaml").read_text()
    assert "ckpt_path: out/checkpoint-2" in config
    code, out, err = hfbridge("validate", "--config", "config.yaml", "--ckpt_path", "last")
    assert code == 0, err
    assert f"'eval_loss': '{whole[-1]['eval_loss']:.4g}'" in out
    tested = {**project, "data": {**project["data"], "test_dataset": project["data"]["eval_dataset"]}}
    write("test.yaml", tested)
    code, out, err = hfbridge("test", "--config", "test.yaml", "--ckpt_path", "last")
    assert code == 0, err
    assert f"'test_loss': '{whole[-1]['eval_loss']:.4g}'" in out
    code, out, err = hfbridge("predict", "--config", "config.yaml", "--ckpt_path", "out/checkpoint-4")
    assert code == 0, err
    assert out.splitlines()[-2:] == [
        "out/predictions.npz is written.",
        "out/predict_results.json is written.",
    ]
    assert Path("out/config.yaml").read_text() == config, "an evaluation has replaced the config of the run"
    arrays = np.load("out/predictions.npz")
    assert arrays["predictions"].shape == (5, 2)
    assert arrays["label_ids"].tolist() == make_dataset("distilbert", 5, seed=3)["label"]
    assert "predict_loss" in json.loads(Path("out/predict_results.json").read_text())
    weights = load_file("out/checkpoint-4/model.safetensors")
    model = make_model("distilbert").eval()
    model.load_state_dict(weights)
    row = make_dataset("distilbert", 5, seed=3)[0]["input_ids"][:5]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([row])).logits[0]
    assert torch.allclose(torch.from_numpy(arrays["predictions"][0]), expected, atol=1e-6)


def test_options_win_over_the_yaml(project: dict[str, Any], hfbridge: Command) -> None:
    options = ("--trainer.settings.max_steps=2", "--trainer.settings.eval_strategy=no")
    options += ("--trainer.settings.save_strategy=no", "--model.loss_normalization=native")
    options += ("--trainer.callbacks+=transformers.PrinterCallback", "--print_config")
    code, out, _ = hfbridge("fit", "--config", "config.yaml", *options)
    assert code == 0
    config = yaml.safe_load(out)
    assert config["trainer"]["settings"]["max_steps"] == 2
    assert config["trainer"]["settings"]["learning_rate"] == 1e-3
    assert config["trainer"]["callbacks"] == [{"class_path": "transformers.PrinterCallback"}]
    assert config["model"]["loss_normalization"] == "native"
    assert config["trainer"]["enable_model_summary"] is False
    assert "strategy" not in config["trainer"], "a default of Lightning's would be taken for what was said"


def test_settings_may_be_a_file_of_their_own(project: dict[str, Any], hfbridge: Command) -> None:
    project["trainer"]["settings"] = "settings.yaml"
    write("config.yaml", project)
    write("settings.yaml", {**SETTINGS, "max_steps": 1, "save_strategy": "no", "eval_strategy": "no"})
    code, out, err = hfbridge("fit", "--config", "config.yaml")
    assert code == 0, err
    assert out.count("'loss'") == 1
    assert yaml.safe_load(Path("out/config.yaml").read_text())["trainer"]["settings"]["save_strategy"] in (
        False,
        "no",
    )


def test_callbacks_and_metrics_of_both_worlds(project: dict[str, Any], hfbridge: Command) -> None:
    project["trainer"] |= {
        "callbacks": [
            {"class_path": "transformers.EarlyStoppingCallback", "init_args": {"early_stopping_patience": 1}},
            {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
        ],
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "csv"}},
    }
    project["trainer"]["settings"] |= {
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "max_steps": 20,
        "eval_steps": 2,
        "learning_rate": 0,
    }
    accuracy = "torchmetrics.classification.MulticlassAccuracy"
    project["model"]["metrics"] = {"exact": {"class_path": accuracy, "init_args": {"num_classes": 2}}}
    write("config.yaml", project)
    code, out, err = hfbridge("fit", "--config", "config.yaml")
    assert code == 0, err
    assert out.count("'eval_accuracy'") == 2, "weights that stay are stopped after the second evaluation"
    assert "'eval_exact'" in out
    assert Path("csv/lightning_logs/version_0/metrics.csv").is_file()
    assert Path("csv/lightning_logs/version_0/config.yaml").is_file()


def test_what_a_yaml_describes_is_made_after_the_seed_of_the_settings(
    project: dict[str, Any], hfbridge: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []

    def draw() -> None:
        drawn.append(float(torch.rand(())))

    import tests.tiny

    make = tests.tiny.make_dataset
    monkeypatch.setattr(tests.tiny, "make_dataset", lambda *a, **k: (draw(), make(*a, **k))[1])
    torch.manual_seed(99)
    assert hfbridge("fit", "--config", "config.yaml")[0] == 0
    set_seed(11)
    assert drawn[0] == float(torch.rand(()))


WRONG = [
    ({"trainer.settings.optmi": "sgd"}, "SettingsError: 1 of 16 settings", "did you mean optim?"),
    ({"seed_everything": 3}, "SettingsError: seed_everything: 3", "set seed: 3"),
    ({"trainer.strategy": "dpp"}, "SettingsError", "did you mean ddp?"),
    ({"trainer.settings": "nowhere.yaml"}, "SettingsError", "'nowhere.yaml' cannot be read"),
    ({"data.train_dataset": "cli_project.trian"}, "DataError", "did you mean train?"),
    ({"model.model": "cli_project.biuld"}, "ModelError", "did you mean build?"),
    ({"model.model": "gpt2"}, "ModelError", "auto_class is None"),
    ({"model.processing_class": "./nowhere"}, "ModelError", "does not exist"),
    ({"ckpt_path": "out/checkpoint-9"}, "CheckpointError", "There is no checkpoint 'out/checkpoint-9'"),
]


@pytest.mark.parametrize(("options", "error", "says"), WRONG, ids=[next(iter(case[0])) for case in WRONG])
def test_what_is_wrong_is_said_without_a_traceback(
    project: dict[str, Any], hfbridge: Command, options: dict[str, Any], error: str, says: str
) -> None:
    given = [f"--{name}={value}" for name, value in options.items()]
    code, _, err = hfbridge("fit", "--config", "config.yaml", *given)
    assert code == 1
    assert error in err
    assert says in err
    assert "Traceback" not in err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--trainer.loggr=true", "unrecognized arguments"),
        ("--model.compute_metrics=cli_project.nothing", "has no attribute 'nothing'"),
        ("--trainer.callbacks=transformers.NoSuchCallback", "NoSuchCallback"),
        ("--optimizer=SGD", "unrecognized arguments"),
        ("--model.loss_normalization=exat", "exat"),
        ("--config=nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_a_wrong_command_line_ends_with_2(
    project: dict[str, Any], hfbridge: Command, option: str, says: str
) -> None:
    code, _, err = hfbridge("fit", "--config", "config.yaml", option)
    assert code == 2
    assert says in err
    assert err.startswith("usage: hfbridge fit [options]")
    assert not Path("out").exists()


def test_every_option_is_explained(hfbridge: Command) -> None:
    for command in ("fit", "validate", "test", "predict"):
        code, out, _ = hfbridge(command, "--help")
        assert code == 0
        assert "known subclasses" not in out
        found = re.findall(r"^  (--[\w.]+)(?!.*\.help).*(?:\n {20,}(\S.*))*", out, re.MULTILINE)
        bare = [option for option, text in found if not text and not option.endswith(".help")]
        assert len(found) > 60
        assert bare in ([], ["--trainer", "--model", "--data"]), bare


def test_an_optimizer_of_lightning_cli_is_used(project: dict[str, Any]) -> None:
    module = HFModule(make_model("distilbert"))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    trainer = Trainer({**SETTINGS, "eval_strategy": "no"})
    data = HFDataModule(train_dataset=make_dataset("distilbert", 8), processing_class=make_tokenizer())
    trainer.fit(module, data)
    assert trainer.optimizers == [optimizer]
    assert trainer.global_step > 0


@pytest.mark.slow
def test_an_interrupted_run_ends_quietly(project: dict[str, Any]) -> None:
    project["trainer"]["settings"] |= {"max_steps": 100_000, "eval_strategy": "no", "save_strategy": "no"}
    write("config.yaml", project)
    # A shell that starts it in the background has it ignore interrupts.
    code = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from hfbridge.cli import main\nsys.exit(main(['fit', '--config', 'config.yaml']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (
        Path("err.txt").open("w") as err,
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=err, text=True
        ) as run,
    ):
        assert run.stdout is not None
        try:
            assert any("'loss'" in line for line in run.stdout), Path("err.txt").read_text()
            run.send_signal(signal.SIGINT)
            run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == 130
    assert "Traceback" not in Path("err.txt").read_text()


def test_what_print_config_prints_begins_with_a_form_that_is_understood(
    hfbridge: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = hfbridge("fit", "--print_config")
    assert code == 0, err
    form, _, options = out.partition("\n\n")
    assert {"trainer", "model", "data"} <= yaml.safe_load(options).keys()
    lines = [line.removeprefix("# ").removeprefix("#") for line in form.splitlines()[1:]]
    Path("form.yaml").write_text("\n".join(lines))
    Path("parts.py").write_text("def tokenize(rows):\n    return rows\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, err = hfbridge("fit", "--config", "form.yaml", "--print_config=skip_default")
    assert code == 0, err
    understood = yaml.safe_load(out)
    assert understood["trainer"]["settings"]["eval_strategy"] == "epoch"
    assert understood["model"]["model_kwargs"] == {"num_labels": 2}
    assert understood["data"]["map_function"] == "parts.tokenize"
    sys.modules.pop("parts")

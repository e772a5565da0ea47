"""Settings in files: YAML and JSON, read whole or not at all, written whole or not at all."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Seq2SeqTrainingArguments

import hfbridge
from hfbridge.errors import SettingsError
from hfbridge.settings import Settings

SUFFIXES = [".yaml", ".yml", ".json"]
VALUES: dict[str, Any] = {
    "output_dir": "out/é: [1]",
    "learning_rate": 2e-5,
    "max_grad_norm": float("inf"),
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 0.25},
    "label_names": ["labels", "no"],
    "report_to": ["tensorboard"],
    "eval_strategy": "no",
    "data_seed": None,
    "bf16": False,
    "save_strategy": "no",
}


def written(name: str, text: str | bytes) -> Path:
    """A file in the current folder."""
    path = Path(name)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_written_is_read_again(suffix: str) -> None:
    settings = Settings(**VALUES)
    settings.save(f"run{suffix}")
    for path in (f"run{suffix}", Path(f"run{suffix}")):
        assert Settings.load(path) == Settings.of(path) == settings
    assert os.listdir() == [f"run{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_settings_of_nothing_are_a_file_of_nothing(suffix: str) -> None:
    Settings().save(f"run{suffix}")
    assert Settings.load(f"run{suffix}") == Settings()


def test_a_trainer_takes_a_file() -> None:
    Settings(max_steps=3, use_cpu=True, save_strategy="no", disable_tqdm=True).save("run.yaml")
    assert hfbridge.Trainer("run.yaml", logger=False).settings.max_steps == 3


def test_a_file_is_written_as_a_user_would() -> None:
    Settings(learning_rate=1e-4, eval_strategy="no", label_names=["a"]).save("run.yaml")
    assert Path("run.yaml").read_text() == "learning_rate: 0.0001\neval_strategy: 'no'\nlabel_names:\n- a\n"
    Settings(learning_rate=1e-4).save("run.json")
    assert Path("run.json").read_text() == '{\n  "learning_rate": 0.0001\n}\n'


@pytest.mark.parametrize("number", ["2e-5", "2E-5", "2.e-5", ".2e-4", "+2e-5", "2.0e-5", "0.00002"])
def test_a_number_of_yaml_is_a_number(number: str) -> None:
    settings = Settings.load(written("run.yaml", f"learning_rate: {number}\nsave_strategy: 'no'\n"))
    assert settings.learning_rate == 2e-5
    assert settings.notes == ()


@pytest.mark.parametrize("text", ["e5", "1-e5", "v2e5", "2e5x"])
def test_a_word_of_yaml_is_a_word(text: str) -> None:
    assert Settings.load(written("run.yaml", f"output_dir: {text}\n")).output_dir == text


def test_no_means_no_where_yaml_reads_false() -> None:
    written("run.yaml", "eval_strategy: no\nsave_strategy: off")
    settings = Settings.load("run.yaml")
    assert settings.given == {"eval_strategy": "no", "save_strategy": "no"}
    said = 'eval_strategy=False is read as "no": to YAML a bare no is False; write eval_strategy: "no"'
    assert said in settings.notes


@pytest.mark.parametrize(
    ("line", "cure"),
    [
        ("eval_strategy: yes", 'eval_strategy: "no"'),
        ("optim: off", 'optim: "adamw_torch"'),
        ("report_to: no", 'report_to: "none"'),
        ("run_name: on", 'run_name: "on"'),
        ("run_name: 2026", 'run_name: "2026"'),
        ("output_dir: 2026-11-28", 'output_dir: "2026-11-28"'),
        ('bf16: "no"', "bf16: false"),
        ('max_steps: "100"', "max_steps: 100"),
    ],
)
def test_how_a_misread_value_is_written_in_yaml_is_told_and_works(line: str, cure: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load(written("run.yaml", line))
    (problem,) = caught.value.problems
    assert problem.text.endswith(f": {cure}")
    cured = "report_to: none" if "report_to" in cure else cure
    name = cure.partition(":")[0]
    (value,) = Settings.load(written("run.yaml", cured)).given.values()
    assert name in str(Settings.load("run.yaml"))
    assert type(value) is not type(yaml.safe_load(line)[name])


def test_values_that_no_spelling_of_yaml_mends_have_no_such_advice() -> None:
    for line in ("learning_rate: fast", "seed: on", 'label_names: "labels"', "lr_scheduler_kwargs: x"):
        with pytest.raises(SettingsError) as caught:
            Settings.load(written("run.yaml", line))
        assert "YAML" not in caught.value.problems[0].text


def test_names_of_transformers_4_are_read() -> None:
    path = written("run.yml", "warmup_ratio: 0.1\nno_cuda: true\n")
    assert Settings.load(path) == Settings(warmup_steps=0.1, use_cpu=True)


def test_an_empty_file_gives_nothing() -> None:
    assert Settings.load(written("run.yaml", "# nothing yet\n")) == Settings()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_kind_of_arguments_survives(suffix: str) -> None:
    settings = Settings.of(Seq2SeqTrainingArguments(use_cpu=True, seed=3))
    settings.save(f"run{suffix}")
    again = Settings.load(f"run{suffix}")
    assert again == settings
    assert type(again.as_training_arguments()) is Seq2SeqTrainingArguments


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tokens_are_not_written(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(seed=1)
    settings._given["hub_token"] = "hf_secret"  # no version carries it yet
    settings.save(f"run{suffix}")
    assert "secret" not in Path(f"run{suffix}").read_text()
    assert Settings.load(f"run{suffix}") == Settings(seed=1)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("run.toml", "a = 1", r"'run.toml' has the suffix '.toml'; it may be .yaml, .yml or .json"),
        ("run", "a: 1", r"has the suffix ''; it may be"),
        ("run.yaml", "a: [1\nb: 2", r"'run.yaml' is no YAML: line 2, column"),
        ("run.yaml", "seed: 1\nseed: 2", r"is no YAML: line 2, column 1: seed stands there twice"),
        ("run.yaml", "a: 1\n\tb: 2", r"line 2"),
        ("run.yaml", "a: !!python/object:os.system 1", r"line 1, column 4: could not determine"),
        ("run.json", '{"a": 1,\n}', r"'run.json' is no JSON: line 2, column 1"),
        ("run.json", '{"seed": 1, "seed": 2}', r"seed stands there twice"),
        ("run.json", "", r"is no JSON: line 1, column 1"),
        ("run.yaml", "- a\n- b", r"holds a list; it must be a mapping .*learning_rate: 5e-5\."),
        ("run.yaml", "just words", r"holds a str; it must be a mapping"),
        ("run.json", "[1]", r'holds a list; it must be a mapping .*{"learning_rate": 5e-5}'),
        ("run.json", "null", r"holds a NoneType"),
        ("run.yaml", b"\xff\xfe\x00", r"cannot be read \(seen from .*\): it is no UTF-8 text"),
        ("run.yaml", "learning_rat: 1", r"^run\.yaml: 1 of 1 setting cannot be used"),
        ("run.json", '{"learning_rate": NaN}', r"^run\.json: 1 of 1 setting(.|\n)*finite"),
    ],
)
def test_a_file_that_cannot_be_used(name: str, text: str | bytes, says: str) -> None:
    written(name, text)
    with pytest.raises(SettingsError, match=f"(?s){says}"):
        Settings.of(name)


def test_a_wrong_setting_in_a_file_is_a_problem_like_any_other() -> None:
    written("run.yaml", "learning_rat: 1\nmax_steps: 0")
    with pytest.raises(SettingsError) as caught:
        Settings.load("run.yaml")
    assert [problem.subject for problem in caught.value.problems] == ["learning_rat = 1", "max_steps = 0"]


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match=r"'nowhere\.yaml' cannot be read .*: No such file"):
        Settings.load("nowhere.yaml")
    Path("folder.yaml").mkdir()
    with pytest.raises(SettingsError, match=r"cannot be read .*: Is a directory"):
        Settings.load("folder.yaml")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_value_that_no_file_holds_leaves_the_old_file(suffix: str) -> None:
    path = written(f"run{suffix}", "old")
    kwargs = {"use_reentrant": False, "context_fn": print}
    settings = Settings(activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
    with pytest.raises(SettingsError, match=r"_kwargs = .* cannot be written to a file"):
        settings.save(path)
    assert path.read_text() == "old"
    assert os.listdir() == [path.name]


def test_a_place_that_cannot_be_written_to() -> None:
    with pytest.raises(SettingsError, match=r"cannot be written to 'no/run\.yaml': No such file"):
        Settings().save("no/run.yaml")
    with pytest.raises(SettingsError, match=r"has the suffix '\.txt'"):
        Settings().save("run.txt")
    Path("run.yaml").mkdir()
    with pytest.raises(SettingsError, match="Nothing was written"):
        Settings().save("run.yaml")
    assert os.listdir() == ["run.yaml"]


def test_a_disk_that_is_full_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = written("run.yaml", "old")

    def full(self: Path, *args: Any, **kwargs: Any) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SettingsError, match="No space left on device"):
        Settings(seed=1).save(path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir() == ["run.yaml"]

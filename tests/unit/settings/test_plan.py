"""A plan is a page that can be read."""

import pytest
from lightning.pytorch.callbacks import EarlyStopping

from hfbridge.settings import Settings, translate

MANY = {
    "output_dir": "runs/a-folder-with-a-rather-long-name/and-another-one-below-it/experiment-17",
    "num_train_epochs": 2.5,
    "warmup_ratio": 0.1,
    "learning_rate": "2e-5",
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 10.0, "cooldown": 2},
    "optim": "galore_adamw",
    "optim_target_modules": ["attention.self.query", "attention.self.key", "intermediate.dense"],
    "optim_args": "rank=64,update_proj_gap=100,scale=0.10",
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "gradient_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "eval_strategy": "epoch",
    "metric_for_best_model": "accuracy",
    "report_to": "tensorboard",
    "run_name": "seventeen",
    "do_train": True,
}


def lines_of(values, **arguments):
    return str(translate(Settings(**values), arguments)).splitlines()


def test_a_plan_is_a_table_with_lightnings_arguments_below():
    lines = lines_of({"learning_rate": 1e-3, "save_strategy": "no"}, max_steps=5)
    assert lines[:4] == [
        "setting        value  goes to",
        "max_steps      5      Trainer(max_steps=)",
        "learning_rate  0.001  the optimizer",
        'save_strategy  "no"   when to save',
    ]
    assert lines[5:8] == [
        "lightning.Trainer",
        "  max_epochs = -1 (no limit: max_steps ends the run)",
        "  max_steps = 5",
    ]
    assert "  check_val_every_n_epoch = never (eval_strategy sets when to evaluate)" in lines
    assert lines[-2:] == ["notes", "  max_steps=5 was taken over from Trainer(...)"]


def test_a_plan_without_notes_shows_none():
    assert "note" not in str(translate(Settings(save_strategy="no"), {}))


def test_a_note_stands_below_its_setting_and_nowhere_else():
    lines = lines_of({"warmup_ratio": 0.1})
    at = lines.index("warmup_steps  0.1    the learning rate's schedule")
    assert lines[at + 1] == "    note: warmup_ratio is now called warmup_steps"
    text = " ".join(" ".join(lines).split())
    assert text.count("warmup_ratio is now called") == 1
    assert "notes" not in lines


def test_many_settings_fit_the_page_and_nothing_is_lost():
    lines = lines_of(MANY, callbacks=[EarlyStopping("eval_loss")], profiler="simple")
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "  callbacks = [EarlyStopping]" in lines
    assert '  profiler = "simple"' in lines
    plan = translate(Settings(**MANY), {})
    for row in plan.rows:
        assert any(line.startswith(f"{row.field} ") for line in lines)
    joined = " ".join(text.split())
    assert all(" ".join(note.split()) in joined for note in plan.notes)
    columns = {line.index("  ") for line in lines[:1]}
    assert columns == {len("setting")}


@pytest.mark.parametrize("name", ["output_dir", "optim_args", "lr_scheduler_kwargs"])
def test_a_long_value_goes_on_in_its_column(name):
    lines = lines_of(MANY)
    at = next(index for index, line in enumerate(lines) if line.startswith(f"{name} "))
    column = lines[0].index("value")
    assert lines[at + 1][:column].isspace()
    assert lines[at + 1][column] != " "

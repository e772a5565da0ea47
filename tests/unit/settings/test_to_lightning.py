"""What Lightning is given, and what settings and arguments must not say against each other."""

import inspect
from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from hfbridge.errors import SettingsError
from hfbridge.settings import Launched, Settings, translate
from hfbridge.settings.to_lightning import ENDLESS_EPOCHS, LIGHTNING_ARGUMENTS

NEVER = 2**62

ALWAYS = {
    "max_epochs": 3,
    "max_steps": -1,
    "accelerator": "auto",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": True,
    "num_sanity_val_steps": 0,
    "inference_mode": False,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": 1.0,
    "precision": "32-true",
    "check_val_every_n_epoch": NEVER,
    "log_every_n_steps": 500,
}


def arguments_of(settings=None, **arguments):
    return dict(translate(settings or Settings(), arguments).trainer_arguments)


def refusal(settings=None, **arguments):
    """The only problem of a translation, as (subject, text)."""
    with pytest.raises(SettingsError) as caught:
        translate(settings or Settings(), arguments)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0].subject, caught.value.problems[0].text


def test_the_known_arguments_are_those_of_lightning():
    known = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}
    assert set(LIGHTNING_ARGUMENTS) == known
    assert list(LIGHTNING_ARGUMENTS) == sorted(LIGHTNING_ARGUMENTS)


def test_defaults_become_the_arguments_that_keep_lightning_out_of_the_way():
    assert arguments_of() == ALWAYS


def test_lightning_takes_the_arguments(tmp_path):
    plan = translate(Settings(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True), {})
    trainer = lightning.Trainer(**plan.trainer_arguments)
    assert trainer.max_epochs == 3
    assert trainer.callbacks is not None
    assert not any(isinstance(callback, ModelCheckpoint) for callback in trainer.callbacks)


@pytest.mark.parametrize("name", ALWAYS)
def test_an_argument_may_say_what_is_so_anyway(name):
    settings = Settings(output_dir="out")
    assert arguments_of(settings, **{name: ALWAYS[name]}) == ALWAYS | {"default_root_dir": "out"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_train_epochs": 2.5}, {"max_epochs": 3}),
        ({"num_train_epochs": 0.1}, {"max_epochs": 1}),
        ({"max_steps": 7}, {"max_steps": 7, "max_epochs": -1}),
        ({"max_steps": 7, "num_train_epochs": 2}, {"max_steps": 7, "max_epochs": -1}),
        ({"use_cpu": True}, {"accelerator": "cpu"}),
        ({"disable_tqdm": True}, {"enable_progress_bar": False}),
        ({"output_dir": "out"}, {"default_root_dir": "out"}),
        ({"bf16": True}, {}),
        (
            {"gradient_accumulation_steps": 4, "max_grad_norm": 0.5, "logging_steps": 5},
            {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5, "log_every_n_steps": 5},
        ),
        ({"max_grad_norm": 0}, {"gradient_clip_val": None}),
    ],
    ids=lambda value: str(value).split(" object at ")[0],
)
def test_settings_become_arguments(values, expected):
    assert arguments_of(Settings(**values)) == ALWAYS | expected


def test_a_home_directory_is_expanded():
    assert arguments_of(Settings(output_dir="~/out"))["default_root_dir"] == str(Path("~/out").expanduser())


@pytest.mark.parametrize(
    ("argument", "setting"),
    [
        ({"max_epochs": 5}, {"num_train_epochs": 5}),
        ({"max_steps": 5}, {"max_steps": 5}),
        ({"accumulate_grad_batches": 4}, {"gradient_accumulation_steps": 4}),
        ({"gradient_clip_val": 0.5}, {"max_grad_norm": 0.5}),
        ({"gradient_clip_val": 0}, {"max_grad_norm": 0}),
        ({"log_every_n_steps": 7}, {"logging_steps": 7}),
        ({"log_every_n_steps": 0}, {"logging_strategy": "no"}),
        ({"default_root_dir": Path("out")}, {"output_dir": "out"}),
        ({"enable_progress_bar": False}, {"disable_tqdm": True}),
        ({"enable_progress_bar": True}, {"disable_tqdm": False}),
        ({"accelerator": "cpu"}, {"use_cpu": True}),
        ({"accelerator": CPUAccelerator()}, {"use_cpu": True}),
        ({"precision": "bf16-mixed"}, {"bf16": True}),
        ({"precision": "bf16"}, {"bf16": True}),
    ],
    ids=lambda value: str(value).split(" object at ")[0],
)
def test_an_argument_that_no_setting_speaks_of_is_taken_over(argument, setting):
    plan = translate(Settings(seed=1), argument)
    assert plan.settings == Settings(seed=1, **setting)
    ((name, value),) = setting.items()
    assert plan.notes == (f"{name}={value!r} was taken over from Trainer(...)",)


@pytest.mark.parametrize(
    "argument",
    [
        {"max_epochs": None},
        {"max_steps": -1},
        {"accumulate_grad_batches": 1},
        {"accumulate_grad_batches": None},
        {"gradient_clip_val": None},
        {"gradient_clip_algorithm": "norm"},
        {"log_every_n_steps": None},
        {"enable_progress_bar": None},
        {"default_root_dir": None},
        {"accelerator": "auto"},
        {"accelerator": None},
        {"precision": None},
        {"precision": 32},
        {"precision": "32"},
        {"devices": "auto"},
        {"logger": None},
        {"enable_checkpointing": None},
        {"num_sanity_val_steps": None},
        {"val_check_interval": None},
        {"check_val_every_n_epoch": None},
    ],
    ids=lambda value: str(value).split(" object at ")[0],
)
def test_an_argument_may_say_nothing(argument):
    values = {
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 2.0,
        "output_dir": "out",
    }
    settings = Settings(**values, logging_steps=3, disable_tqdm=True)
    assert arguments_of(settings, **argument) | argument == arguments_of(settings) | argument
    assert translate(settings, argument).settings == settings


@pytest.mark.parametrize(
    ("values", "argument"),
    [
        ({"num_train_epochs": 3}, {"max_epochs": 3}),
        ({"num_train_epochs": 2.5}, {"max_epochs": 3}),
        ({"max_steps": 7}, {"max_steps": 7}),
        ({"max_steps": 7}, {"max_epochs": -1}),
        ({"gradient_accumulation_steps": 4}, {"accumulate_grad_batches": 4}),
        ({"max_grad_norm": 0.5}, {"gradient_clip_val": 0.5}),
        ({"output_dir": "~/out"}, {"default_root_dir": str(Path("~/out").expanduser())}),
        ({"disable_tqdm": True}, {"enable_progress_bar": False}),
        ({"use_cpu": True}, {"accelerator": "cpu"}),
        ({"bf16": True}, {"precision": "bf16-mixed"}),
        ({"bf16": True}, {"precision": "bf16"}),
        ({"bf16": False}, {"precision": "32-true"}),
    ],
    ids=lambda value: str(value).split(" object at ")[0],
)
def test_both_may_say_the_same(values, argument):
    settings = Settings(**values)
    plan = translate(settings, argument)
    assert dict(plan.trainer_arguments) == arguments_of(settings)
    assert plan.settings == settings


@pytest.mark.parametrize("shown", [True, False])
def test_a_setting_of_none_says_nothing(shown):
    plan = translate(Settings(disable_tqdm=None), {"enable_progress_bar": shown})
    assert plan.settings.disable_tqdm is not shown
    assert plan.trainer_arguments["enable_progress_bar"] is shown


def test_no_logging_may_be_said_twice():
    settings = Settings(logging_strategy="no")
    plan = translate(settings, {"log_every_n_steps": 0})
    assert plan.settings == settings
    assert plan.trainer_arguments["log_every_n_steps"] == 0


def test_the_logging_interval_reaches_lightnings_own_callbacks():
    assert arguments_of(Settings(logging_steps=7), log_every_n_steps=7)["log_every_n_steps"] == 7


@pytest.mark.parametrize(
    ("values", "argument", "ours"),
    [
        ({"max_steps": 100}, {"max_steps": 50}, "max_steps=100"),
        ({"max_steps": 100}, {"max_steps": 0}, "max_steps=100"),
        ({"num_train_epochs": 2.0}, {"max_epochs": 5}, "num_train_epochs=2.0"),
        ({"num_train_epochs": 2.0}, {"max_epochs": 0}, "num_train_epochs=2.0"),
        ({"gradient_accumulation_steps": 2}, {"accumulate_grad_batches": 4}, "gradient_accumulation_steps=2"),
        ({"max_grad_norm": 2.0}, {"gradient_clip_val": 0.5}, "max_grad_norm=2.0"),
        ({"logging_steps": 10}, {"log_every_n_steps": 5}, "logging_steps=10"),
        ({"logging_strategy": "epoch"}, {"log_every_n_steps": 5}, 'logging_strategy="epoch"'),
        ({"output_dir": "a"}, {"default_root_dir": "b"}, 'output_dir="a"'),
        ({"disable_tqdm": True}, {"enable_progress_bar": True}, "disable_tqdm=True"),
        ({"use_cpu": True}, {"accelerator": "gpu"}, "use_cpu=True"),
        ({"bf16": True}, {"precision": "32-true"}, "bf16=True"),
        ({"bf16": True}, {"precision": "16-mixed"}, "bf16=True"),
        ({"eval_strategy": "epoch"}, {"val_check_interval": 0.5}, 'eval_strategy="epoch"'),
        ({"eval_strategy": "epoch"}, {"check_val_every_n_epoch": 1}, 'eval_strategy="epoch"'),
    ],
    ids=lambda value: str(value).split(" object at ")[0],
)
def test_a_contradiction_names_both(values, argument, ours):
    subject, text = refusal(Settings(**values), **argument)
    ((name, value),) = argument.items()
    shown = f'"{value}"' if isinstance(value, str) else value
    assert subject == f"Trainer({name}={shown})"
    assert text == f"`{name}={shown}` conflicts with `{ours}` in the settings; set only one"


@pytest.mark.parametrize(
    ("values", "argument", "expected"),
    [
        ({"num_train_epochs": 3.0}, {"max_epochs": 5}, {"num_train_epochs": 5}),
        ({"max_steps": -1}, {"max_steps": 5}, {"max_steps": 5}),
        (
            {"gradient_accumulation_steps": 1},
            {"accumulate_grad_batches": 2},
            {"gradient_accumulation_steps": 2},
        ),
        ({"max_grad_norm": 1.0}, {"gradient_clip_val": 0.5}, {"max_grad_norm": 0.5}),
        ({"logging_steps": 500}, {"log_every_n_steps": 5}, {"logging_steps": 5}),
        ({"use_cpu": False}, {"accelerator": "cpu"}, {"use_cpu": True}),
        ({"bf16": False}, {"precision": "bf16-mixed"}, {"bf16": True}),
        ({"max_steps": 100}, {"max_epochs": 5}, {"max_steps": 100, "num_train_epochs": 5}),
        ({"eval_strategy": "no"}, {"val_check_interval": 0.5}, {"eval_strategy": "no"}),
    ],
    ids=lambda value: str(value).split(" object at ")[0],
)
def test_a_setting_with_its_default_value_says_nothing(values, argument, expected):
    assert translate(Settings(**values), argument).settings == Settings(**expected)


@pytest.mark.parametrize("name", ["max_epochs", "max_steps"])
def test_a_limit_of_0_is_lightnings(name):
    plan = translate(Settings(seed=1), {name: 0})
    assert plan.trainer_arguments[name] == 0
    assert plan.settings == Settings(seed=1)


def test_epochs_without_an_end():
    plan = translate(Settings(), {"max_epochs": -1})
    assert plan.trainer_arguments["max_epochs"] == plan.trainer_arguments["max_steps"] == -1
    assert plan.settings.num_train_epochs == ENDLESS_EPOCHS
    assert arguments_of(Settings(num_train_epochs=2), max_epochs=-1)["max_epochs"] == 2


@pytest.mark.parametrize("argument", [{"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}], ids=str)
def test_lightning_validates_when_its_arguments_say(argument):
    plan = translate(Settings(), argument)
    assert plan.validates
    assert {name: plan.trainer_arguments.get(name) for name in argument} == argument
    assert plan.trainer_arguments.get("check_val_every_n_epoch") != NEVER
    assert not translate(Settings(), {}).validates


def test_a_precision_plugin_stands_for_the_precision():
    plugin = HalfPrecision("bf16-true")
    for plugins in (plugin, [plugin, TorchCheckpointIO()]):
        expected = {name: value for name, value in ALWAYS.items() if name != "precision"}
        assert arguments_of(plugins=plugins) == expected | {"plugins": plugins}
    subject, text = refusal(Settings(bf16=True), plugins=[plugin])
    assert subject.startswith("Trainer(plugins=")
    assert text == "`plugins=[HalfPrecision(...)]` conflicts with `bf16=True` in the settings; set only one"
    mixed = [MixedPrecision("bf16-mixed", "cpu")]
    assert arguments_of(Settings(bf16=True), plugins=mixed)["plugins"] is mixed


def test_a_short_run_is_lightnings():
    values = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    plan = translate(Settings(num_train_epochs=2, **values), {"fast_dev_run": 3, "max_epochs": 7})
    assert plan.validates
    assert plan.trainer_arguments["fast_dev_run"] == 3
    assert plan.settings.max_steps == 3
    assert (plan.settings.save_strategy, plan.settings.eval_strategy) == ("no", "no")


@pytest.mark.parametrize("settings", [None, Settings()], ids=["without", "with"])
def test_nothing_that_lightning_refuses_stands_beside_barebones(settings):
    plan = translate(settings, {"barebones": True})
    assert not plan.trainer_arguments.keys() & {
        "logger",
        "enable_checkpointing",
        "enable_progress_bar",
        "log_every_n_steps",
        "num_sanity_val_steps",
    }
    assert lightning.Trainer(**plan.trainer_arguments).barebones
    said = translate(settings, {"barebones": True, "enable_progress_bar": True}).trainer_arguments
    assert said["enable_progress_bar"] is True


def test_without_settings_the_loop_has_lightnings_defaults():
    plan = translate(None, {})
    assert not plan.has_settings
    assert plan.validates
    assert dict(plan.trainer_arguments) == {
        "accelerator": "auto",
        "devices": 1,
        "enable_progress_bar": True,
        "inference_mode": False,
        "accumulate_grad_batches": 1,
        "gradient_clip_val": None,
        "precision": "32-true",
    }
    settings = plan.settings
    assert (settings.max_grad_norm, settings.logging_steps, settings.num_train_epochs) == (0, 50, 1000)
    assert (settings.save_strategy, settings.report_to) == ("no", "none")
    said = {"gradient_clip_val": 0.5, "log_every_n_steps": 7, "max_epochs": 2}
    settings = translate(None, said).settings
    assert (settings.max_grad_norm, settings.logging_steps, settings.num_train_epochs) == (0.5, 7, 2)


def test_epochs_and_steps_in_one_trainer_both_end_the_run():
    plan = translate(Settings(), {"max_epochs": 2, "max_steps": 10})
    assert (plan.settings.num_train_epochs, plan.settings.max_steps) == (2, 10)
    assert (plan.trainer_arguments["max_epochs"], plan.trainer_arguments["max_steps"]) == (2, 10)


def test_steps_in_one_trainer_without_an_end_in_epochs_are_fine():
    plan = translate(Settings(), {"max_steps": 10, "max_epochs": -1})
    assert plan.settings == Settings(max_steps=10)
    assert translate(Settings(), {"max_epochs": -1, "max_steps": 10}).settings == plan.settings
    assert (plan.trainer_arguments["max_epochs"], plan.trainer_arguments["max_steps"]) == (-1, 10)


def test_steps_override_epochs_that_were_given_as_natively():
    plan = translate(Settings(num_train_epochs=2, save_strategy="no"), {"max_steps": 10})
    assert plan.notes[-1] == "num_train_epochs has no effect: max_steps=10 decides"


@pytest.mark.parametrize(
    ("argument", "subject"),
    [
        ({"accumulate_grad_batches": 0}, "gradient_accumulation_steps = 0"),
        ({"max_steps": -2}, "max_steps = -2"),
        ({"gradient_clip_val": "high"}, 'max_grad_norm = "high"'),
        ({"log_every_n_steps": -1}, "logging_steps = -1"),
    ],
    ids=lambda value: str(value).split(" object at ")[0],
)
def test_what_is_taken_over_is_checked_as_a_setting(argument, subject):
    assert refusal(**argument)[0] == subject


@pytest.mark.parametrize("name", ["learning_rate", "optim", "fp16", "warmup_ratio"])
def test_a_setting_among_the_arguments_is_sent_where_it_belongs(name):
    assert refusal(**{name: 1}) == (
        f"Trainer({name}=...)",
        f"this is a setting: pass it to Settings({name}=...)",
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("calbacks", "unknown; did you mean callbacks?"),
        ("learning_rat", "unknown; did you mean Settings(learning_rate=...)?"),
        ("max_step", "unknown; did you mean max_steps?"),
        ("zzz", "unknown; neither lightning.Trainer nor Settings has it"),
    ],
)
def test_an_unknown_argument_has_a_suggestion(name, text):
    assert refusal(**{name: 1}) == (f"Trainer({name}=...)", text)


def test_the_names_that_lightning_takes_can_be_said():
    plan = translate(Settings(), {"brand_new": 1}, known_arguments=(*LIGHTNING_ARGUMENTS, "brand_new"))
    assert plan.trainer_arguments["brand_new"] == 1


def test_all_contradictions_come_in_one_error():
    with pytest.raises(SettingsError) as caught:
        translate(
            Settings(max_steps=100), {"max_steps": 50, "strategy": "dpp", "learning_rate": 1, "logger": True}
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 of 4 Trainer arguments cannot be used; nothing was started."
    assert lines[1].startswith("  Trainer(max_steps=50)        `max_steps=50` conflicts with `max_steps=100`")
    assert len(caught.value.problems) == 3


PASSED = {
    "callbacks": [EarlyStopping("eval_loss")],
    "logger": True,
    "profiler": "simple",
    "plugins": [TorchCheckpointIO()],
    "limit_val_batches": 1.0,
    "limit_test_batches": 2,
    "limit_predict_batches": 2,
    "limit_train_batches": 10,
    "overfit_batches": 0.1,
    "num_sanity_val_steps": 2,
    "use_distributed_sampler": True,
    "inference_mode": True,
    "gradient_clip_algorithm": "value",
    "deterministic": True,
    "reload_dataloaders_every_n_epochs": 1,
    "precision": "16-mixed",
    "max_time": "00:01:00:00",
    "min_steps": 1,
    "min_epochs": 1,
    "detect_anomaly": True,
    "enable_model_summary": False,
    "benchmark": True,
    "sync_batchnorm": False,
    "enable_autolog_hparams": False,
    "model_registry": "name",
    "enable_checkpointing": True,
    "accelerator": "gpu",
    "devices": [2],
    "strategy": SingleDeviceStrategy("cpu"),
}


@pytest.mark.parametrize("name", PASSED)
def test_other_arguments_pass_untouched(name):
    arguments = arguments_of(**{name: PASSED[name]})
    assert arguments[name] is PASSED[name]
    assert arguments == ALWAYS | {name: PASSED[name]}


@pytest.mark.parametrize("devices", [1, "1", "0,", [0], (3,)])
def test_one_device_may_be_named(devices):
    assert arguments_of(devices=devices)["devices"] == devices


class Keeper(ModelCheckpoint):
    """A user's own checkpoint callback."""


@pytest.mark.parametrize("callbacks", [ModelCheckpoint(), [EarlyStopping("x"), Keeper()]])
def test_a_checkpoint_callback_switches_checkpointing_on(callbacks):
    assert arguments_of(callbacks=callbacks)["enable_checkpointing"] is True


def test_the_users_arguments_are_left_alone():
    arguments = {"max_steps": 5, "callbacks": []}
    plan = translate(Settings(), arguments)
    assert arguments == {"max_steps": 5, "callbacks": []}
    with pytest.raises(TypeError):
        plan.trainer_arguments["max_steps"] = 6


def test_rows_show_where_each_given_setting_goes():
    plan = translate(Settings(learning_rate=1e-3, do_train=True), {"max_steps": 5})
    rows = {row.field: row for row in plan.rows}
    assert list(rows) == ["max_steps", "learning_rate", "do_train"]
    assert rows["max_steps"].value == 5
    assert rows["learning_rate"].used_by == "the optimizer"
    assert "flag for scripts" in rows["do_train"].note


# Beside a launcher.


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"devices": 3}, r"Trainer\(devices=3\) .*WORLD_SIZE=4 ranks, 2 on each of 2 nodes"),
        ({"devices": "0,1,2"}, r"Trainer\(devices=.*WORLD_SIZE=4"),
        ({"devices": [0]}, r"Trainer\(devices=.*WORLD_SIZE=4"),
        ({"num_nodes": 1}, r"Trainer\(num_nodes=1\) .*WORLD_SIZE=4"),
    ],
)
def test_ranks_that_a_launcher_has_not_started_are_refused(said: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        translate(Settings(), said, launched=Launched(4, 2))


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"devices": "auto"},
        {"devices": -1},
        {"devices": 2},
        {"devices": "2"},
        {"devices": [0, 1], "num_nodes": 2},
    ],
)
def test_ranks_that_a_launcher_has_started(said: dict[str, Any]) -> None:
    assert translate(Settings(), said, launched=Launched(4, 2)).trainer_arguments["num_nodes"] == 2

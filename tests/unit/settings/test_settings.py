"""Settings: read from any source, checked as a whole, never changed."""

import copy
import dataclasses
import logging
import pickle
from enum import Enum
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from transformers import (
    GenerationConfig,
    IntervalStrategy,
    SchedulerType,
    Seq2SeqTrainingArguments,
    TrainingArguments,
)
from transformers.debug_utils import DebugOption
from transformers.trainer_pt_utils import AcceleratorConfig

from hfbridge.errors import SettingsError
from hfbridge.settings import Settings
from hfbridge.settings.legacy_names import OLD_NAMES
from hfbridge.settings.rules import DEFAULTS


class Mode(Enum):
    """A user's own enum."""

    MIN = "min"


def problems_of(**values):
    """The problems of one construction, as subject -> texts."""
    with pytest.raises(SettingsError) as caught:
        Settings(**values)
    found = {}
    for problem in caught.value.problems:
        found.setdefault(problem.subject, []).append(problem.text)
    return found


def quiet(**values):
    """Settings without the note on checkpoints."""
    return Settings(save_strategy="no", **values)


class TestValues:
    def test_an_attribute_is_the_value_or_the_default(self):
        settings = Settings(learning_rate=1e-3)
        assert settings.learning_rate == 1e-3
        assert {name: getattr(Settings(), name) for name in DEFAULTS} == dict(DEFAULTS)

    def test_an_unknown_attribute_has_a_suggestion(self):
        with pytest.raises(AttributeError, match="did you mean learning_rate"):
            Settings().learning_rat  # noqa: B018

    def test_one_value_has_one_spelling(self):
        assert Settings(report_to="wandb") == Settings(report_to=["wandb"])
        assert Settings(report_to=["all"]) == Settings(report_to="all")
        assert Settings(report_to=[]) == Settings(report_to="none")
        assert Settings(debug=[DebugOption.UNDERFLOW_OVERFLOW]) == Settings(debug=" underflow_overflow")
        assert Settings(include_num_input_tokens_seen=True).include_num_input_tokens_seen == "all"
        assert Settings(include_num_input_tokens_seen=False).include_num_input_tokens_seen == "no"
        assert Settings(torch_compile_backend="EAGER").torch_compile_backend == "eager"

    def test_what_is_inside_a_value_is_plain_too(self):
        kwargs = {"min_lr": [np.float32(0.5), Fraction(1, 4)], "patience": np.int64(3), "mode": Mode.MIN}
        settings = Settings(
            lr_scheduler_type="greedy", eval_strategy="epoch", lr_scheduler_kwargs=kwargs | {"smooth": True}
        )
        found = settings.lr_scheduler_kwargs
        assert found == {"min_lr": [0.5, 0.25], "patience": 3, "mode": "min", "smooth": True}
        assert [type(value) for value in found.values()] == [list, int, str, bool]
        assert [type(value) for value in found["min_lr"]] == [float, float]

    def test_settings_are_frozen(self):
        settings = Settings(seed=1)
        with pytest.raises(dataclasses.FrozenInstanceError, match=r"settings.replace\(seed="):
            settings.seed = 2
        with pytest.raises(dataclasses.FrozenInstanceError):
            del settings.seed
        with pytest.raises(TypeError):
            settings.given["seed"] = 2
        assert settings.seed == 1

    def test_what_is_inside_a_value_is_frozen_too(self):
        kwargs = {"num_cycles": 2}
        settings = Settings(lr_scheduler_type="cosine", lr_scheduler_kwargs=kwargs)
        kwargs["num_cycles"] = 3
        settings.given["lr_scheduler_kwargs"]["num_cycles"] = 4
        settings.lr_scheduler_kwargs["num_cycles"] = 5
        assert settings.lr_scheduler_kwargs == {"num_cycles": 2}
        Settings().include_for_metrics.append("inputs")
        assert Settings().include_for_metrics == []

    def test_given_has_plain_values(self):
        settings = Settings(
            lr_scheduler_type=SchedulerType.COSINE,
            eval_strategy=IntervalStrategy.EPOCH,
            output_dir=Path("out"),
            seed=np.int64(3),
            learning_rate=np.float32(0.5),
            weight_decay=Fraction(1, 4),
            label_names=("labels", "more"),
            lr_scheduler_kwargs='{"num_cycles": 2}',
        )
        assert dict(settings.given) == {
            "lr_scheduler_type": "cosine",
            "eval_strategy": "epoch",
            "output_dir": "out",
            "seed": 3,
            "learning_rate": 0.5,
            "weight_decay": 0.25,
            "label_names": ["labels", "more"],
            "lr_scheduler_kwargs": {"num_cycles": 2},
        }
        assert type(settings.lr_scheduler_type) is str
        assert type(settings.seed) is int
        assert type(settings.learning_rate) is float

    def test_a_number_in_a_string_is_read_with_a_note(self):
        settings = quiet(learning_rate="2e-5")
        assert settings.learning_rate == 2e-5
        assert settings.notes == ('learning_rate="2e-5" is a string, read as the number 2e-05',)

    def test_the_repr_shows_what_was_given(self):
        assert repr(Settings()) == "Settings()"
        assert repr(Settings(seed=1, optim="adamw_torch")) == 'Settings(seed=1, optim="adamw_torch")'
        assert "TOKEN" not in repr(Settings(hub_token="<HUB_TOKEN>"))

    def test_equality_is_that_of_the_values_given(self):
        assert Settings(seed=1) == Settings(seed=1)
        assert hash(Settings(seed=1)) == hash(Settings(seed=1))
        assert Settings(seed=1) != Settings(seed=2)
        assert Settings(seed=42) != Settings()
        assert Settings() != Settings(predict_with_generate=False)
        assert Settings() != "Settings()"

    @pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
    def test_copies_are_equal(self, again):
        settings = Settings(warmup_ratio=0.1, label_names=["labels"], predict_with_generate=False)
        assert again(settings) == settings
        assert again(settings).notes == settings.notes
        assert type(again(settings).as_training_arguments(use_cpu=True)) is Seq2SeqTrainingArguments

    def test_completion_lists_the_settings(self):
        assert {"learning_rate", "replace", "given"} <= set(dir(Settings()))


class TestReplace:
    def test_new_values_win_and_the_old_settings_stay(self):
        settings = Settings(seed=1, learning_rate=1e-3)
        assert settings.replace(seed=2) == Settings(seed=2, learning_rate=1e-3)
        assert settings.seed == 1

    def test_names_of_transformers_4_replace_their_successors(self):
        assert Settings(warmup_steps=5).replace(warmup_ratio=0.1) == Settings(warmup_steps=0.1)

    def test_notes_of_replaced_values_go(self):
        settings = quiet(learning_rate="2e-5", warmup_ratio=0.1)
        assert len(settings.notes) == 2
        assert settings.replace(learning_rate=1e-3).notes == ("warmup_ratio is now called warmup_steps",)
        assert settings.replace(seed=1).notes == settings.notes

    def test_the_whole_is_checked_again(self):
        with pytest.raises(SettingsError, match="1 of 2 settings"):
            Settings(dataloader_num_workers=2, dataloader_prefetch_factor=2).replace(dataloader_num_workers=0)

    def test_the_kind_of_arguments_is_kept(self):
        settings = Settings(predict_with_generate=False).replace(seed=1)
        assert type(settings.as_training_arguments(use_cpu=True)) is Seq2SeqTrainingArguments


class TestSources:
    def test_settings_are_returned_as_they_are(self):
        settings = Settings()
        assert Settings.of(settings) is settings

    def test_a_mapping_is_read(self):
        assert Settings.of({"seed": 1, "no_cuda": True}) == Settings(seed=1, use_cpu=True)

    @pytest.mark.parametrize(
        ("source", "kind"),
        [
            (None, "NoneType"),
            (b"args.yaml", "bytes"),
            (3, "int"),
            (TrainingArguments, "the class TrainingArguments"),
        ],
    )
    def test_another_source_is_refused_with_what_is_possible(self, source, kind):
        with pytest.raises(
            SettingsError, match=f"cannot be read from {kind}; possible are hfbridge.Settings"
        ):
            Settings.of(source)

    def test_names_that_are_no_strings_are_unknown(self):
        with pytest.raises(SettingsError, match="unknown"):
            Settings.of({1: 2})

    def test_a_dump_of_transformers_is_read(self):
        arguments = TrainingArguments(output_dir="out", use_cpu=True, eval_strategy="steps")
        assert Settings.of(arguments.to_dict()).as_training_arguments().to_dict() == arguments.to_dict()


ROUND_TRIPS = [
    {},
    {"output_dir": None},
    {"report_to": "none", "debug": "", "activation_checkpointing": False},
    {"eval_strategy": "steps"},
    {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 7},
    {"eval_strategy": "steps", "eval_steps": 0, "logging_steps": 0.1},
    {"eval_strategy": "epoch", "do_eval": False},
    {"eval_steps": 500},
    {"do_eval": True, "do_train": True},
    {"disable_tqdm": True},
    {"disable_tqdm": False},
    {"dataloader_pin_memory": True},
    {"accelerator_config": {"split_batches": False}},
    {"accelerator_config": AcceleratorConfig()},
    {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": 2}'},
    {"save_strategy": "no", "save_steps": 7, "save_total_limit": 1},
    {"bf16": True, "optim": "adamw_torch", "seed": 7, "max_steps": 3},
    {"label_names": [], "fsdp": False, "fsdp_config": {}},
    {"activation_checkpointing": True},
    {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    {"torch_compile": True},
    {"torch_compile": True, "torch_compile_backend": "inductor"},
    {"torch_compile_backend": "inductor"},
    {"torch_compile_backend": "eager"},
    {"torch_compile_mode": "reduce-overhead"},
    {"report_to": "tensorboard", "run_name": "run"},
    {"report_to": ["tensorboard", "wandb"]},
    {"debug": "underflow_overflow"},
    {"include_num_input_tokens_seen": True},
    {"include_num_input_tokens_seen": "non_padding"},
    {"lr_scheduler_type": "greedy", "eval_strategy": "epoch"},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "metric_for_best_model": "f1"},
    {"metric_for_best_model": "f1", "greater_is_better": False, "eval_strategy": "epoch"},
    {"optim": "galore_adamw", "optim_target_modules": "all-linear", "optim_args": "rank=4"},
    {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5, "torch_empty_cache_steps": 2},
]


class TestTrainingArguments:
    @pytest.mark.parametrize("values", ROUND_TRIPS, ids=str)
    def test_an_instance_comes_back_equal(self, values):
        native = TrainingArguments(**{"output_dir": "out", "use_cpu": True} | values)
        before = native.to_dict()
        again = Settings.of(native).as_training_arguments()
        assert again.to_dict() == before == native.to_dict()
        assert type(again) is TrainingArguments

    @pytest.mark.parametrize("values", ROUND_TRIPS, ids=str)
    def test_settings_become_what_transformers_makes_of_the_values(self, values):
        values = {"output_dir": "out", "use_cpu": True} | values
        native = TrainingArguments(**values)
        assert Settings(**values).as_training_arguments().to_dict() == native.to_dict()

    def test_values_that_transformers_filled_in_are_not_given(self):
        native = TrainingArguments(use_cpu=True, eval_strategy="steps", seed=3)
        assert dict(Settings.of(native).given) == {"use_cpu": True, "eval_strategy": "steps", "seed": 3}

    def test_an_instance_from_a_quiet_process_keeps_its_bar_off(self):
        logger = logging.getLogger("transformers")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            hidden = TrainingArguments(use_cpu=True)
            shown = TrainingArguments(use_cpu=True, disable_tqdm=False)
            assert Settings.of(hidden).given["disable_tqdm"] is True
            assert Settings.of(shown).given["disable_tqdm"] is False
        finally:
            logger.setLevel(level)

    def test_changed_fields_are_read(self):
        native = TrainingArguments(use_cpu=True)
        native.learning_rate = 0.25
        assert Settings.of(native).learning_rate == 0.25

    @pytest.mark.parametrize(
        ("values", "name"),
        [
            (
                {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
                "accelerator_config",
            ),
            ({"hub_token": "hf_secret"}, "hub_token"),
            ({"metric_for_best_model": "accuracy"}, "metric_for_best_model"),
        ],
    )
    def test_one_refused_value_of_an_instance_is_one_problem(self, values, name):
        native = TrainingArguments(use_cpu=True, **values)
        with pytest.raises(SettingsError) as caught:
            Settings.of(native)
        assert [problem.subject.split(" ")[0] for problem in caught.value.problems] == [name]
        assert "hf_secret" not in str(caught.value)

    def test_no_property_of_an_instance_is_touched(self):
        class Untouchable(TrainingArguments):
            reading = False

            def __getattribute__(self, name):
                fields = type(self).__dataclass_fields__
                if type(self).reading and name not in fields and not name.startswith("__"):
                    raise AssertionError(f"{name} was asked for")
                return super().__getattribute__(name)

        native = Untouchable(use_cpu=True, seed=3)
        Untouchable.reading = True
        assert Settings.of(native).seed == 3

    def test_fields_that_a_subclass_adds_are_refused_unless_default(self):
        @dataclasses.dataclass
        class Wider(TrainingArguments):
            packing: bool = False
            learning_rate: float = 1e-3
            tags: list[str] = dataclasses.field(default_factory=list)

        assert Settings.of(Wider(use_cpu=True)).learning_rate == 1e-3
        with pytest.raises(SettingsError, match=r"packing = True +unknown"):
            Settings.of(Wider(use_cpu=True, packing=True))

    def test_seq2seq_arguments_come_back_as_such(self):
        native = Seq2SeqTrainingArguments(use_cpu=True)
        again = Settings.of(native).as_training_arguments()
        assert type(again) is Seq2SeqTrainingArguments
        assert again.to_dict() == native.to_dict()

    def test_a_generation_config_comes_back_as_an_equal_one(self):
        config = GenerationConfig(max_new_tokens=5, do_sample=True, top_k=7)
        native = Seq2SeqTrainingArguments(
            use_cpu=True, predict_with_generate=True, generation_config=config, generation_num_beams=3
        )
        settings = Settings.of(native)
        assert settings.generation_config == {"max_new_tokens": 5, "do_sample": True, "top_k": 7}
        again = settings.as_training_arguments()
        assert again.generation_config == config
        assert again.to_dict() == native.to_dict()
        assert Settings.of(native.to_dict()).as_training_arguments().generation_config == config

    def test_the_device_may_be_decided_late(self):
        assert Settings().as_training_arguments(use_cpu=True).use_cpu
        assert not Settings(use_cpu=True).as_training_arguments(use_cpu=False).use_cpu

    def test_the_save_strategy_stays_the_users(self):
        assert Settings().as_training_arguments(use_cpu=True).save_strategy == "steps"
        assert quiet().as_training_arguments(use_cpu=True).save_strategy == "no"


class TestChecks:
    @pytest.mark.parametrize(
        ("name", "value", "text"),
        [
            ("max_steps", 0, "1 or more, or -1"),
            ("max_steps", -2, "1 or more, or -1"),
            ("per_device_train_batch_size", 0, "1 or more"),
            ("per_device_eval_batch_size", -1, "1 or more"),
            ("gradient_accumulation_steps", 0, "1 or more"),
            ("num_train_epochs", 0, "more than 0"),
            ("num_train_epochs", -1.0, "more than 0"),
            ("learning_rate", -1e-5, "0 or more"),
            ("weight_decay", -0.1, "0 or more"),
            ("max_grad_norm", -1, "0 (no clipping) or more"),
            ("warmup_steps", -1, "never negative"),
            ("adam_beta1", 1.0, "below 1"),
            ("adam_beta2", -0.1, "below 1"),
            ("adam_epsilon", -1.0, "0 or more"),
            ("eval_delay", -1, "0 or more"),
            ("eval_accumulation_steps", 0, "1 or more"),
            ("seed", -1, "2**32"),
            ("seed", 2**32, "2**32"),
            ("data_seed", 2**64, "2**64"),
            ("dataloader_num_workers", -1, "0 or more"),
            ("logging_steps", 0, "logging_steps must be a whole number of steps"),
            ("logging_steps", -5, "logging_steps must be a whole number of steps"),
            ("logging_steps", 1.5, "logging_steps must be a whole number of steps"),
            ("learning_rate", float("nan"), "finite"),
            ("learning_rate", "nan", "finite"),
            ("max_grad_norm", float("nan"), "finite"),
            ("num_train_epochs", float("inf"), "finite"),
            ("learning_rate", "fast", "must be a number, not str"),
            ("learning_rate", None, "must be a number, not NoneType"),
            ("learning_rate", True, "must be a number, not bool"),
            ("seed", True, "must be a whole number, not bool"),
            ("seed", "1", "must be a whole number, not str"),
            ("max_steps", 10.0, "must be a whole number, not float"),
            ("data_seed", 1.5, "must be a whole number or None, not float"),
            ("bf16", 1, "must be True or False, not int"),
            ("bf16", "true", "must be True or False, not str"),
            ("output_dir", 3, "must be a string or None, not int"),
            ("label_names", "labels", "must be a list of strings or None, not str"),
            ("label_names", [1], "must be a list of strings or None, not list"),
            ("lr_scheduler_kwargs", "num_cycles=1", "must be a dictionary or None, not str"),
            ("lr_scheduler_kwargs", "{broken", "must be a dictionary or None, not str"),
            ("optim", "adamw_hf", "did you mean adamw_torch?"),
            ("lr_scheduler_type", "cosin", "did you mean cosine?"),
            ("eval_strategy", "step", 'is not one of "no", steps, epoch; did you mean steps?'),
            ("eval_strategy", True, 'is not one of "no", steps, epoch'),
            ("train_sampling_strategy", "shuffle", "is not one of random, sequential, group_by_length"),
            ("dataloader_multiprocessing_context", "thread", "is not one of fork, spawn, forkserver"),
        ],
    )
    def test_a_wrong_value_is_refused_alone(self, name, value, text):
        found = problems_of(**{name: value})
        assert len(found) == 1
        ((subject, texts),) = found.items()
        assert subject.startswith(f"{name} = ")
        assert len(texts) == 1
        assert text in texts[0]

    @pytest.mark.parametrize(
        "values",
        [
            {"max_steps": -1},
            {"max_grad_norm": float("inf")},
            {"max_grad_norm": 0},
            {"logging_steps": 0, "logging_strategy": "no"},
            {"logging_steps": 1.0},
            {"eval_strategy": "steps", "eval_steps": 0.5},
            {"eval_steps": 1.5},
            {"warmup_steps": 10},
            {"learning_rate": 0},
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"anything": 1}},
        ],
        ids=str,
    )
    def test_a_value_at_the_edge_is_carried(self, values):
        Settings(**values).as_training_arguments(use_cpu=True)

    @pytest.mark.parametrize(
        ("values", "subject", "text"),
        [
            ({"eval_strategy": "steps", "eval_steps": 1.5}, "eval_steps = 1.5", "whole number of steps"),
            ({"eval_strategy": "steps", "eval_steps": -1}, "eval_steps = -1", "whole number of steps"),
            (
                {"eval_strategy": "steps", "logging_strategy": "no", "logging_steps": 0},
                'eval_strategy = "steps"',
                "needs eval_steps or logging_steps",
            ),
            ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor = 2", "needs worker processes"),
            ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers = True", "needs worker"),
            (
                {"dataloader_multiprocessing_context": "spawn"},
                'dataloader_multiprocessing_context = "spawn"',
                "needs worker",
            ),
            (
                {"lr_scheduler_type": "cosine_with_min_lr"},
                'lr_scheduler_type = "cosine_with_min_lr"',
                "either min_lr or min_lr_rate",
            ),
            (
                {
                    "lr_scheduler_type": "cosine_warmup_with_min_lr",
                    "lr_scheduler_kwargs": {"min_lr": 1e-6, "min_lr_rate": 0.1},
                },
                "lr_scheduler_kwargs = {'min_lr': 1e-06, 'min_lr_rate': 0.1}",
                "either min_lr or min_lr_rate",
            ),
            (
                {"lr_scheduler_type": "warmup_stable_decay"},
                'lr_scheduler_type = "warmup_stable_decay"',
                'needs lr_scheduler_kwargs={"num_decay_steps": ...}',
            ),
            (
                {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 1}},
                "lr_scheduler_kwargs = {'num_cycle': 1}",
                "did you mean num_cycles?",
            ),
            (
                {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "2"}},
                "lr_scheduler_kwargs = {'num_cycles': '2'}",
                "must be a number",
            ),
            (
                {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_warmup_steps": 2}},
                "lr_scheduler_kwargs = {'num_warmup_steps': 2}",
                "no argument of cosine",
            ),
            (
                {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8},
                'lr_scheduler_type = "polynomial"',
                "lr_end=1e-07 must be below learning_rate=1e-08",
            ),
        ],
        ids=str,
    )
    def test_values_that_do_not_fit_together_are_refused(self, values, subject, text):
        found = problems_of(**values)
        assert list(found) == [subject]
        assert text in found[subject][0]

    @pytest.mark.parametrize(
        ("kind", "kwargs"),
        [
            ("cosine_with_min_lr", {"min_lr": 1e-6}),
            ("cosine_with_min_lr", {"min_lr_rate": 0.1, "min_lr": None}),
            ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.1}),
            ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "linear"}),
            ("polynomial", {"power": 2.0, "lr_end": 0.0}),
            ("cosine_with_restarts", {"num_cycles": 2}),
            ("inverse_sqrt", {"timescale": 100}),
            ("linear", {}),
        ],
    )
    def test_complete_schedules_are_carried(self, kind, kwargs):
        assert Settings(lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs).lr_scheduler_kwargs == kwargs

    def test_fp16_beside_bf16_is_a_contradiction_and_not_carried(self):
        texts = problems_of(fp16=True, bf16=True)["fp16 = True"]
        assert len(texts) == 2
        assert texts[0] == "contradicts bf16=True; at most one of the two can be True"

    def test_a_wrong_value_hides_what_depends_on_it(self):
        found = problems_of(lr_scheduler_type="cosin", lr_scheduler_kwargs={"num_cycles": 2})
        assert list(found) == ['lr_scheduler_type = "cosin"']

    def test_all_problems_come_in_one_error_in_the_users_order(self):
        with pytest.raises(SettingsError) as caught:
            Settings(gradient_acumulation_steps=4, seed=1, optim="adalomo", max_steps=0, bf16=1)
        lines = str(caught.value).splitlines()
        assert lines[0] == "4 of 5 settings cannot be used; nothing was started."
        assert lines[1] == (
            "  gradient_acumulation_steps = 4   unknown; did you mean gradient_accumulation_steps?"
        )
        assert [problem.subject for problem in caught.value.problems] == [
            "gradient_acumulation_steps = 4",
            'optim = "adalomo"',
            "max_steps = 0",
            "bf16 = 1",
        ]

    def test_an_unknown_name_without_a_likeness_says_what_names_there_are(self):
        assert problems_of(zzz=1) == {
            "zzz = 1": ["unknown; hfbridge takes the names of transformers.TrainingArguments"]
        }

    def test_suggestions_know_the_names_of_transformers_4(self):
        assert "did you mean warmup_ratio?" in problems_of(warmup_ratios=1)["warmup_ratios = 1"][0]

    def test_epochs_beside_steps_leave_a_note(self):
        notes = quiet(num_train_epochs=2, max_steps=5).notes
        assert notes == ("num_train_epochs has no effect: max_steps=5 decides",)

    def test_kwargs_of_a_constant_schedule_leave_a_note(self):
        notes = quiet(lr_scheduler_type="constant", lr_scheduler_kwargs={"a": 1}).notes
        assert notes == ("lr_scheduler_kwargs has no effect with lr_scheduler_type='constant'",)


class TestOldNames:
    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
            ({"evaluation_strategy": "epoch"}, {"eval_strategy": "epoch"}),
            ({"no_cuda": True}, {"use_cpu": True}),
            ({"no_cuda": False}, {"use_cpu": False}),
            ({"per_gpu_train_batch_size": 2}, {"per_device_train_batch_size": 2}),
            ({"per_gpu_eval_batch_size": 2}, {"per_device_eval_batch_size": 2}),
            ({"evaluation_strategy": "epoch", "eval_strategy": "epoch"}, {"eval_strategy": "epoch"}),
            ({"torchdynamo": "inductor"}, {"torch_compile_backend": "inductor"}),
            ({"gradient_checkpointing": True}, {"activation_checkpointing": True}),
        ],
        ids=str,
    )
    def test_a_renamed_setting_is_carried_with_a_note(self, old, new):
        settings = quiet(**old)
        assert settings == quiet(**new)
        assert settings.notes == (f"{next(iter(old))} is now called {next(iter(new))}",)

    @pytest.mark.parametrize(
        ("name", "new", "value"),
        [
            ("adafactor", "optim", "adafactor"),
            ("include_tokens_per_second", "include_num_input_tokens_seen", "all"),
        ],
    )
    def test_a_switch_that_became_a_value_is_carried_with_a_note(self, name, new, value):
        settings = quiet(**{name: True})
        assert settings == quiet(**{new: value})
        assert settings.notes == (f"{name} is now called {new}={value!r}",)

    def test_a_ratio_in_a_string_is_read_with_a_note(self):
        assert quiet(warmup_ratio="0.1").warmup_steps == 0.1
        assert quiet(warmup_ratio="0.1").notes == ("warmup_ratio is now called warmup_steps=0.1",)

    @pytest.mark.parametrize(
        ("old", "value", "read_as"),
        [
            ("push_to_hub_model_id", "name", 'hub_model_id = "name"'),
            ("push_to_hub_token", "hf_secret", "hub_token = <hidden>"),
            ("xpu_backend", "ccl", 'ddp_backend = "ccl"'),
            ("tpu_metrics_debug", True, 'debug = "tpu_metrics_debug"'),
        ],
    )
    def test_a_renamed_setting_is_refused_by_the_rule_of_its_new_name(self, old, value, read_as):
        ((subject, texts),) = problems_of(**{old: value}).items()
        assert subject.startswith(f"{old} = ")
        assert texts[0].startswith(f"read as {read_as}: not supported by hfbridge")
        assert "hf_secret" not in subject + texts[0]

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("use_mps_device", True),
            ("overwrite_output_dir", True),
            ("save_safetensors", True),
            ("fp16_backend", "auto"),
            ("half_precision_backend", "cuda_amp"),
            ("bf16_backend", "auto"),
            ("fp16_opt_level", "O1"),
        ],
    )
    def test_an_ignored_setting_leaves_a_note(self, name, value):
        settings = quiet(**{name: value})
        assert settings == quiet()
        assert settings.notes[0].startswith(f"{name} is ignored: ")

    @pytest.mark.parametrize(
        ("name", "value", "text"),
        [
            ("save_safetensors", False, "only True is still accepted"),
            ("fp16_backend", "apex", "removed from transformers"),
            ("fp16_opt_level", "O2", "removed from transformers"),
            ("logging_dir", "logs", "give it to a logger"),
            ("push_to_hub_organization", "org", "hub_model_id"),
            ("tokenizer", "bert", "processing_class="),
            ("torchscript", True, "without a successor"),
            ("jit_mode_eval", True, "without a successor"),
            ("use_ipex", True, "without a successor"),
            ("sharded_ddp", "simple", "without a successor"),
            ("mp_parameters", "a=1", "without a successor"),
            ("past_index", 2, "without a successor"),
            ("ray_scope", "all", "without a successor"),
            ("tpu_num_cores", 8, "without a successor"),
            ("use_legacy_prediction_loop", True, "without a successor"),
            ("warmup_ratio", 1.0, "give the number of steps as warmup_steps"),
            ("warmup_ratio", -0.1, "from 0 to below 1"),
            ("warmup_ratio", True, "from 0 to below 1"),
            ("warmup_ratio", "high", "from 0 to below 1"),
            ("group_by_length", "yes", "must be True or False"),
        ],
    )
    def test_what_has_no_successor_is_refused_with_the_reason(self, name, value, text):
        ((subject, texts),) = problems_of(**{name: value}).items()
        assert subject.startswith(f"{name} = ")
        assert text in texts[0]

    @pytest.mark.parametrize(
        ("name", "value"),
        [(name, value) for name, old in OLD_NAMES.items() for value in old.unset],
    )
    def test_a_value_that_meant_unset_says_nothing(self, name, value):
        assert Settings(**{name: value}) == Settings()
        assert Settings(**{name: value}).notes == ()

    @pytest.mark.parametrize(
        ("values", "subject", "other"),
        [
            ({"no_cuda": True, "use_cpu": False}, "no_cuda = True", "use_cpu = False"),
            ({"use_cpu": True, "no_cuda": False}, "no_cuda = False", "use_cpu = True"),
            ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio = 0.1", "warmup_steps = 5"),
            (
                {"push_to_hub_token": "hf_secret", "hub_token": "hf_other"},
                "push_to_hub_token = <hidden>",
                "hub_token = <hidden>",
            ),
        ],
        ids=str,
    )
    def test_old_and_new_name_must_agree(self, values, subject, other):
        assert problems_of(**values)[subject] == [f"contradicts {other}; give only one of the two"]

    def test_two_old_names_of_one_dictionary_are_joined(self):
        found = quiet(split_batches=True, dispatch_batches=True)
        assert found.accelerator_config == {"split_batches": True, "dispatch_batches": True}

    def test_two_old_names_of_one_setting_must_agree(self):
        found = problems_of(adafactor=True, optim="adamw_torch")
        assert found == {"adafactor = True": ['contradicts optim = "adamw_torch"; give only one of the two']}

    def test_the_old_names_that_are_settings_of_today_mirror_others(self):
        assert OLD_NAMES.keys() & DEFAULTS.keys() == {
            "gradient_checkpointing",
            "gradient_checkpointing_kwargs",
        }
        assert {old.new for old in OLD_NAMES.values() if old.new} <= DEFAULTS.keys()

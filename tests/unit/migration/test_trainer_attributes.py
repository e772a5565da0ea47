"""Every attribute of a native Trainer is carried, concluded again, read there, or refused by name."""

import ast
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import transformers
from transformers.trainer_pt_utils import LabelSmoother

import hfbridge
from hfbridge.errors import DataError, SettingsError
from hfbridge.migration.trainer_attributes import KINDS, find_changed
from tests.tiny import make_dataset, make_model
from tests.unit.migration.natives import make_arguments, make_native, make_with


def set_in(module: Any) -> set[str]:
    """Names of what the methods of a module's Trainer set on it."""
    tree = ast.parse(inspect.getsource(module))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def test_every_attribute_that_transformers_sets_has_a_row() -> None:
    named = set_in(transformers.trainer) | set_in(transformers.trainer_seq2seq)
    assert len(named) > 50
    assert named == set(KINDS)


CHANGES: dict[str, tuple[Any, str]] = {
    "is_in_train": (True, "it is training"),
    "is_model_parallel": (True, "device_map"),
    "is_distributed_loading_by_transformers": (True, "distributed_config"),
    "hp_search_backend": ("optuna", "hyperparameter search is running"),
    "model_wrapped": (make_model("distilbert"), "several ranks"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_attribute_that_no_run_can_follow_is_named(name: str) -> None:
    value, cure = CHANGES[name]
    native = make_with()
    setattr(native, name, value)
    with pytest.raises(SettingsError) as caught:
        hfbridge.from_trainer(native)
    (problem,) = caught.value.problems
    assert name in problem.subject
    assert cure in f"{problem.subject} {problem.text}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_accepts_loss_kwargs", False),
        ("can_return_loss", True),
        ("_loss_shifts_labels", True),
        ("label_smoother", LabelSmoother(epsilon=0.2)),
        ("_signature_columns", ["input_ids", "labels"]),
        ("_train_batch_size", 3),
        ("gather_function", list),
    ],
)
def test_an_attribute_that_was_changed_is_found(name: str, value: Any) -> None:
    native = make_with()
    setattr(native, name, value)
    assert list(find_changed(native)) == [name]


def test_attributes_that_the_trainer_has_filled_in_itself_are_not_changed() -> None:
    native = make_with(label_smoothing_factor=0.1)
    native.train()
    assert native._signature_columns is not None
    assert list(find_changed(native)) == []
    args = make_arguments(transformers.Seq2SeqTrainingArguments)
    seq2seq = make_native(transformers.Seq2SeqTrainer, args, eval_dataset=make_dataset("distilbert", 8))
    seq2seq.evaluate()
    assert list(find_changed(seq2seq)) == []


def test_attributes_that_have_a_setting_become_it() -> None:
    native = make_with()
    native.label_names = ["labels", "more"]
    native.neftune_noise_alpha = 2.0
    trainer, _, _ = hfbridge.from_trainer(native)
    assert trainer.settings.label_names == ["labels", "more"]
    assert trainer.settings.neftune_noise_alpha == 2.0


def test_a_setting_that_is_not_carried_is_named_with_the_rest() -> None:
    native = make_with(optim="adalomo", push_to_hub=False)
    native.is_model_parallel = True
    with pytest.raises(SettingsError) as caught:
        hfbridge.from_trainer(native)
    subjects = " ".join(problem.subject for problem in caught.value.problems)
    assert "is_model_parallel" in subjects
    assert "adalomo" in subjects


def test_steps_of_accumulation_that_the_trainer_has_moved_are_found() -> None:
    native = make_with(accelerator_config={"gradient_accumulation_kwargs": {"num_steps": 4}})
    trainer, _, _ = hfbridge.from_trainer(native)
    assert trainer.settings.gradient_accumulation_steps == 4


def test_the_native_trainers_arguments_are_left_alone() -> None:
    native = make_with(learning_rate=1e-3, report_to="tensorboard")
    before = repr(vars(native.args))
    hfbridge.from_trainer(native)
    assert repr(vars(native.args)) == before


def test_a_trainer_without_any_dataset_is_refused() -> None:
    with pytest.raises(DataError, match="no dataset"):
        hfbridge.from_trainer(make_native(train_dataset=None))


def test_model_init_of_a_trainer_that_has_trained_is_refused() -> None:
    native = make_native(model_init=lambda: make_model("distilbert"))
    native.train()
    with pytest.raises(SettingsError, match="would build the model anew"):
        hfbridge.from_trainer(native)


@dataclass
class OwnArguments(transformers.TrainingArguments):
    """With a field of the script's."""

    data_folder: str = "."


def test_what_no_native_trainer_reads_is_left_behind_and_told_of() -> None:
    args = make_arguments(OwnArguments, data_folder="rows", resume_from_checkpoint="out/checkpoint-1")
    trainer, module, _ = hfbridge.from_trainer(make_native(args=args))
    assert trainer.settings.resume_from_checkpoint is None
    assert [note.split()[0] for note in module.notes] == ["data_folder", "resume_from_checkpoint"]


def test_what_only_seq2seq_trainers_read_is_left_to_them() -> None:
    args = make_arguments(transformers.Seq2SeqTrainingArguments, predict_with_generate=True)
    trainer, _, _ = hfbridge.from_trainer(make_native(args=args))
    assert trainer.settings.predict_with_generate is False
    trainer, _, _ = hfbridge.from_trainer(make_native(transformers.Seq2SeqTrainer, args))
    assert trainer.settings.predict_with_generate is True

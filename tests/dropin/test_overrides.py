"""A subclass that overrides a method trains on Lightning as with transformers: numbers, events, files."""

from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import transformers
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments, set_seed
from transformers.trainer_pt_utils import LabelSmoother

from hfbridge.errors import SettingsError
from tests.dropin.overriding import CASES, plain_loss
from tests.dropin.sides import BASE, LOGGED, OURS, Side, compare, events_of, files_in, look, make
from tests.parity.engines import Recorder, same
from tests.tiny import PadRows, make_dataset, make_model

# Speeds are not compared; the two others have a test of their own.
NOT_SHOWN = ("get_total_train_batch_size", "_get_num_items_in_batch", "_set_signature_columns_if_needed")


@dataclass
class Mine(TrainingArguments):
    """Settings with a field, a property and a method of their own."""

    temperature: float = 2.0

    @property
    def train_batch_size(self) -> int:
        return 6

    def get_warmup_steps(self, num_training_steps: int) -> int:
        return 3


def overriding(side: Side, case: str) -> Any:
    """Make a subclass of a side's Trainer that overrides a method."""
    return type("Mine", (CASES[case], side.trainer), {})


def train(kind: Any, *, resumes: bool = False, **given: Any) -> list[Any]:
    """Train, and note all that shows; then resume from the first checkpoint with another object."""
    found, recorder = [], Recorder()
    trainer = make(kind, arguments=LOGGED, callbacks=[recorder], **given)
    found += [look(trainer, trainer.train()), events_of(recorder)]
    if resumes:
        trainer = make(kind, arguments={**LOGGED, "output_dir": "again"})
        found.append(look(trainer, trainer.train(resume_from_checkpoint="out/checkpoint-3")))
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train without overriding anything; what is found, and the files."""
    found: dict[bool, Any] = {}

    def expect(*, resumes: bool) -> Any:
        if resumes not in found:
            with chdir(tmp_path_factory.mktemp("plain")):
                set_seed(1)
                found[resumes] = train(OURS.trainer, resumes=resumes), files_in(Path())
        return found[resumes]

    return expect


@pytest.mark.parametrize("case", CASES)
def test_a_method_of_a_subclass(case: str, plain: Any) -> None:
    resumes = case.startswith(("_load", "get_train_dataloader", "training_step: g", "create_"))
    changed = compare(lambda side: train(overriding(side, case), resumes=resumes))
    if case not in NOT_SHOWN:
        with pytest.raises(AssertionError):
            same("both", (changed, files_in(Path("ours"))), plain(resumes=resumes))


def test_the_columns_that_a_model_takes() -> None:
    case = "_set_signature_columns_if_needed"

    def code(side: Side) -> Any:
        kinds = side.trainer, overriding(side, case)
        return [train(kind, data_collator=PadRows())[0]["history"] for kind in kinds]

    plain, changed = compare(code)
    assert plain != changed


def test_the_best_model_where_one_checkpoint_is_kept() -> None:
    arguments = {**LOGGED, "save_total_limit": 1}

    def code(side: Side) -> Any:
        trainer = make(overriding(side, "_load_best_model"), arguments=arguments)
        return look(trainer, trainer.train())

    compare(code)


def test_the_items_that_a_loss_is_divided_by() -> None:
    rows = {name: make_dataset("llama", 30) for name in ("train_dataset", "eval_dataset")}
    given = {**rows, "data_collator": PadRows(), "compute_metrics": None}

    def code(side: Side) -> Any:
        found = []
        for kind in (side.trainer, overriding(side, "_get_num_items_in_batch")):
            trainer = make(kind, arguments=LOGGED, model=make_model("llama"), **given)
            found.append(look(trainer, trainer.train()))
        return found

    plain, changed = compare(code)
    assert changed["history"][0]["loss"] == pytest.approx(plain["history"][0]["loss"] / 2)


@pytest.mark.filterwarnings("ignore:hfbridge. out of memory")
@pytest.mark.parametrize("fails_at", [{1}, {1, 2}, {6}])
def test_smaller_batches_where_memory_runs_out(fails_at: set[int]) -> None:
    def code(side: Side) -> Any:
        calls: list[int] = []

        class Mine(side.trainer):  # type: ignore[name-defined,misc]
            def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
                calls.append(len(inputs["labels"]))
                if len(calls) in fails_at:
                    raise RuntimeError("CUDA out of memory. Tried to allocate")
                return super().training_step(model, inputs, num_items_in_batch)

        found = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "save_strategy": "no"}
        arguments = {**LOGGED, **found, "load_best_model_at_end": False}
        trainer = make(Mine, arguments=arguments)
        return calls, look(trainer, trainer.train())

    compare(code)


def test_the_loop_itself_is_refused_by_name() -> None:
    class Looped(OURS.trainer):
        def _run_epoch(self, *arguments: Any, **named: Any) -> Any: ...

    with pytest.raises(SettingsError, match=r"cannot be trained on Lightning[\s\S]*Looped\._run_epoch"):
        make(Looped)


def test_methods_of_the_object_and_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_order(trainer: Any, train_dataset: Any = None) -> Any:
        return SequentialSampler(trainer.train_dataset)

    def code(side: Side) -> Any:
        on_object = make(side.trainer, arguments=LOGGED)
        on_object.compute_loss = MethodType(plain_loss, on_object)
        found = [look(on_object, on_object.train())]
        with monkeypatch.context() as patch:
            patch.setattr(transformers.Trainer, "_get_train_sampler", in_order)
            in_class = make(side.trainer, arguments=LOGGED)
            found.append(look(in_class, in_class.train()))
        return found

    on_object, in_class = compare(code)
    assert on_object["history"][0]["loss"] != in_class["history"][0]["loss"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_accepts_loss_kwargs", False),
        ("label_names", ["labels", "attention_mask"]),
        ("can_return_loss", True),
        ("_signature_columns", ["input_ids", "label", "labels"]),
        ("_train_batch_size", 3),
        ("label_smoother", LabelSmoother(0.3)),
        ("loss_is_scaled_for_ga", True),
    ],
)
def test_attributes_that_libraries_set(name: str, value: Any) -> None:
    rows = {name: make_dataset("llama", 30) for name in ("train_dataset", "eval_dataset")}
    given = {**rows, "data_collator": PadRows(), "compute_metrics": None}

    def code(side: Side) -> Any:
        trainer = make(side.trainer, arguments=LOGGED, model=make_model("llama"), **given)
        setattr(trainer, name, value)
        return look(trainer, trainer.train())

    compare(code)


def test_settings_with_fields_properties_and_methods_of_their_own() -> None:
    def code(side: Side) -> Any:
        class Tempered(side.trainer):
            def compute_loss(self, *arguments: Any, **named: Any) -> Any:
                found = super().compute_loss(*arguments, **named)
                return found if isinstance(found, tuple) else found / self.args.temperature

        trainer = make(Tempered, args=Mine(**{**BASE, **LOGGED, "temperature": 4.0}))
        return look(trainer, trainer.train())

    assert compare(code)["history"][0]["learning_rate"] == pytest.approx(0.0)


def test_a_search_for_hyperparameters() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def code(side: Side) -> Any:
        trainer = make(side.trainer, model_init=lambda: make_model("distilbert"), arguments=LOGGED)
        best = trainer.hyperparameter_search(
            hp_space=lambda trial: {
                "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
            },
            compute_objective=lambda metrics: metrics["eval_loss"],
            n_trials=3,
            direction="minimize",
            sampler=optuna.samplers.RandomSampler(seed=3),
        )
        return [best.run_id, best.objective, best.hyperparameters, trainer.state.best_metric]

    compare(code)

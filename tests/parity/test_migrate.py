"""A native Trainer that is moved over trains as it would have itself, to the bit."""

import contextlib
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    GenerationConfig,
    TrainerCallback,
    set_seed,
)

import hfbridge
from tests.parity.engines import (
    Job,
    Record,
    assert_identical,
    make_ours,
    make_theirs,
    record_ours,
    record_theirs,
    run_theirs,
    same,
)
from tests.tiny import make_model, make_tokenizer


def run_moved(job: Job, **arguments: Any) -> Record:
    """Make the native Trainer of a job, move it over, and train."""
    native, recorder, collator = make_theirs(job)
    trainer, module, data = hfbridge.from_trainer(native, enable_model_summary=False, **arguments)
    trainer.fit(module, data)
    return record_ours(trainer, module, recorder, collator)


def run_both(job: Job, folder: Path) -> tuple[Record, Record]:
    """Train a job natively, and moved over, each in a folder of its own, and see that both did the same."""
    for name in ("theirs", "ours"):
        (folder / name).mkdir()
    set_seed(1)
    with contextlib.chdir(folder / "theirs"):
        theirs = run_theirs(job)
    set_seed(2)
    with contextlib.chdir(folder / "ours"):
        ours = run_moved(job)
    assert_identical(theirs, ours)
    return theirs, ours


class Counting(TrainerCallback):
    """Count what it hears, and keep the count where checkpoints would."""

    def __init__(self) -> None:
        self.heard: dict[str, int] = {}

    def on_init_end(self, *arguments: Any, **named: Any) -> None:
        self.heard["on_init_end"] = self.heard.get("on_init_end", 0) + 1

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        self.heard["on_step_end"] = self.heard.get("on_step_end", 0) + 1


def give_half(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits / 2


JOBS = {
    "several evaluation sets, metrics, accumulation with a short last window": Job(
        settings={"gradient_accumulation_steps": 5, "eval_strategy": "steps", "eval_steps": 1},
        eval_keys=("a", "b"),
        preprocess_logits_for_metrics=give_half,
    ),
    "model_init": Job(
        model_init=lambda: make_model_unseeded("distilbert"),
        settings={"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
    ),
    "label smoothing, bf16, noise on embeddings": Job(
        settings={"label_smoothing_factor": 0.1, "bf16": True, "neftune_noise_alpha": 3.0},
    ),
    "no collator, a tokenizer": Job(
        collator=None,
        has_ids=False,
        processing_class=make_tokenizer(),
        settings={"remove_unused_columns": True, "max_steps": 5},
    ),
    "a collator of the user's": Job(
        collator=lambda: DataCollatorWithPadding(make_tokenizer(), pad_to_multiple_of=8),
        processing_class=make_tokenizer(),
        settings={"max_steps": 5},
    ),
    "optimizer and schedule": Job(optimizers=lambda model: make_optimizer(model)),
    "a class of optimizers": Job(
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        settings={"lr_scheduler_type": "cosine"},
    ),
    "a loss function": Job(
        kind="llama",
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: (
            outputs.logits.float().logsumexp(-1).sum() / (num_items_in_batch or 1)
        ),
        settings={"gradient_accumulation_steps": 2, "max_steps": 4},
    ),
    "stopping early": Job(
        callbacks=lambda: [EarlyStoppingCallback(2, 10.0), Counting],
        settings={
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "mean",
        },
    ),
    "Seq2SeqTrainer that does not generate": Job(
        kind="t5", settings={"predict_with_generate": False, "eval_strategy": "epoch", "max_steps": 6}
    ),
    "Seq2SeqTrainer": Job(
        kind="t5",
        settings={
            "predict_with_generate": True,
            "generation_config": GenerationConfig(
                max_length=6, num_beams=2, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
            ),
            "eval_strategy": "steps",
            "eval_steps": 4,
            "max_steps": 8,
        },
    ),
}


def make_model_unseeded(kind: str) -> Any:
    """Make a model of the random state that is there, as a user's model_init does."""
    made = make_model(kind)
    return type(made)(made.config)


def make_optimizer(model: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


@pytest.mark.parametrize("name", JOBS)
def test_a_moved_trainer_trains_as_the_native_one(name: str, tmp_path: Path) -> None:
    run_both(JOBS[name], tmp_path)


class MakeAdapters:
    """Draw the adapters of a model, as a user of PEFT does before the Trainer is made."""

    def __call__(self) -> Any:
        peft = pytest.importorskip("peft")
        set_seed(3)
        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=2, target_modules=["q_lin"], modules_to_save=["classifier"]
        )
        return peft.get_peft_model(make_model("distilbert"), config)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_model_with_adapters_is_moved(tmp_path: Path) -> None:
    run_both(Job(model=MakeAdapters(), settings={"max_steps": 4, "save_strategy": "epoch"}), tmp_path)


def test_callbacks_are_told_once_that_the_trainer_was_made(tmp_path: Path) -> None:
    mine = Counting()
    run_both(Job(callbacks=lambda: [mine], settings={"max_steps": 2}), tmp_path)
    assert mine.heard == {"on_init_end": 2, "on_step_end": 4}  # one of two Trainers, two steps of each


@pytest.mark.parametrize(
    ("settings", "optimizers"), [({}, None), ({"bf16": True, "seed": 5}, make_optimizer)], ids=["", "given"]
)
def test_a_trainer_that_has_trained_goes_on_as_its_next_train_would(settings: Any, optimizers: Any) -> None:
    job = Job(settings={"max_steps": 5, **settings}, optimizers=optimizers)
    records = []
    for is_moved in (False, True):
        native, recorder, collator = make_theirs(job)
        native.train()
        recorder.events, recorder.steps, collator.ids = [], [], []
        if not is_moved:
            native.train()
            records.append(record_theirs(native, recorder, collator))
            continue
        trainer, module, data = hfbridge.from_trainer(native, enable_model_summary=False)
        trainer.fit(module, data)
        records.append(record_ours(trainer, module, recorder, collator))
    for record in records:  # a flag of the first run, which on_train_begin takes back
        del record.state["stateful_callbacks"]["TrainerControl"]
    assert_identical(*records)


@pytest.mark.parametrize("has_own", [False, True], ids=["of the class", "of the object"])
def test_a_trainer_that_has_evaluated_is_moved_with_its_forward_as_it_was(has_own: bool) -> None:
    native, *_ = make_theirs(Job(settings={"bf16": True, "max_steps": 1}))
    if has_own:
        native.model.forward = own = MethodType(type(native.model).forward.__wrapped__, native.model)
    metrics = native.evaluate()
    native.accelerator.prepare_model(native.model)  # as train does after an evaluation: once more
    trainer, module, data = hfbridge.from_trainer(native, enable_model_summary=False)
    assert vars(native.model).get("forward") == (own if has_own else None)
    (ours,) = trainer.validate(module, data)
    assert ours["eval_loss"] == metrics["eval_loss"]
    assert ours["eval_predictions"] == metrics["eval_predictions"]


def test_a_moved_run_goes_on_from_a_native_checkpoint(tmp_path: Path) -> None:
    job = Job(
        settings={"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "output_dir": str(tmp_path)}
    )
    native, *theirs = make_theirs(job)
    native.train()
    expected = record_theirs(native, *theirs)
    trainer, module, data = hfbridge.from_trainer(make_theirs(job)[0], enable_model_summary=False)
    trainer.fit(module, data, ckpt_path=str(tmp_path / "checkpoint-4"))
    same("weights", expected.weights, dict(module.model.state_dict()))


THERE_AND_BACK = ["several evaluation sets, metrics, accumulation with a short last window", "model_init"]
THERE_AND_BACK += ["optimizer and schedule", "a class of optimizers", "stopping early", "Seq2SeqTrainer"]


@pytest.mark.parametrize("name", THERE_AND_BACK)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    job = JOBS[name]
    for folder in ("theirs", "back", "there"):
        (tmp_path / folder).mkdir()
    with contextlib.chdir(tmp_path / "theirs"):
        theirs = run_theirs(job)
    with contextlib.chdir(tmp_path / "back"):
        native, recorder, collator = make_theirs(job)
        trainer, module, data = hfbridge.from_trainer(native)
        back = module.to_native(data, trainer)
        assert type(back) is type(native)
        recorder.events.clear()  # a second Trainer was made
        back.train()
        assert_identical(replace(theirs, events=theirs.events[1:]), record_theirs(back, recorder, collator))
    with contextlib.chdir(tmp_path / "there"):
        trainer, module, data, recorder, collator = make_ours(job)
        native = module.to_native(data, trainer)
        trainer, module, data = hfbridge.from_trainer(native, enable_model_summary=False)
        trainer.fit(module, data)
        assert_identical(theirs, record_ours(trainer, module, recorder, collator))

"""A team's suite, as it would be written for transformers.Trainer alone, run unchanged on both classes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from tests.dropin.sides import OURS, THEIRS


class LineDataset(Dataset[Any]):
    """Points near y = 2 x + 3."""

    def __init__(self, length: int = 64, seed: int = 42) -> None:
        generator = np.random.RandomState(seed)
        self.x = generator.normal(size=(length,)).astype(np.float32)
        self.y = (2.0 * self.x + 3.0 + generator.normal(scale=0.1, size=(length,))).astype(np.float32)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_x": self.x[index], "labels": self.y[index]}


class LineStream(IterableDataset[Any]):
    """The same, one after the other."""

    def __iter__(self) -> Any:
        return iter([LineDataset()[index] for index in range(64)])


class Line(nn.Module):
    """y = a x + b, no PreTrainedModel."""

    def __init__(self, a: float = 0.0, b: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))
        self.b = nn.Parameter(torch.tensor(b))
        self.config = None

    def forward(self, input_x: Any, labels: Any = None) -> Any:
        y = input_x * self.a + self.b
        return (y,) if labels is None else (nn.functional.mse_loss(y, labels), y)


def metrics(prediction: Any) -> dict[str, float]:
    """Compare in the way of this suite."""
    return {"accuracy": float((np.abs(prediction.predictions - prediction.label_ids) <= 0.25).mean())}


@pytest.fixture(params=[THEIRS.trainer, OURS.trainer], ids=["native", "dropin"])
def trainer_class(request: pytest.FixtureRequest) -> Any:
    return request.param


def make_line(trainer_class: Any, a: float = 0.0, b: float = 0.0, **given: Any) -> Any:
    names = (
        "callbacks",
        "optimizers",
        "train_dataset",
        "eval_dataset",
        "model",
        "compute_metrics",
        "model_init",
    )
    parts = {name: given.pop(name) for name in names if name in given}
    arguments = {"output_dir": "out", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    arguments |= {"learning_rate": 0.1, "save_strategy": "no"}
    parts = {
        "train_dataset": LineDataset(),
        "eval_dataset": LineDataset(),
        "compute_metrics": metrics,
        **parts,
    }
    if "model_init" not in parts:
        parts.setdefault("model", Line(a, b))
    return trainer_class(args=TrainingArguments(**{**arguments, **given}), **parts)


def test_training_learns_and_is_reproducible(trainer_class: Any) -> None:
    found = []
    for seed in (7, 7, 8):
        trainer = make_line(trainer_class, seed=seed, num_train_epochs=3)
        trainer.train()
        found.append((trainer.model.a.item(), trainer.model.b.item()))
    assert found[0] == found[1] != found[2]
    a, b = found[0]
    assert abs(a - 2) + abs(b - 3) < 4


def test_number_of_steps_in_training(trainer_class: Any) -> None:
    steps = math.ceil(64 / 8)
    assert make_line(trainer_class).train().global_step == 3 * steps
    assert make_line(trainer_class, num_train_epochs=1.5).train().global_step == 12
    assert make_line(trainer_class, max_steps=10).train().global_step == 10
    output = make_line(trainer_class, gradient_accumulation_steps=3, num_train_epochs=1).train()
    assert output[0] == math.ceil(steps / 3)
    assert set(output.metrics) >= {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


def test_evaluate_and_predict_without_training(trainer_class: Any) -> None:
    trainer, data = make_line(trainer_class, a=1.5, b=2.5), LineDataset()
    expected = 1.5 * data.x + 2.5
    results = trainer.evaluate()
    assert results["eval_loss"] == pytest.approx(((expected - data.y) ** 2).mean(), rel=1e-5)
    assert "eval_accuracy" in results
    predictions, labels, _ = trainer.predict(LineDataset())
    assert np.allclose(predictions, expected)
    assert np.array_equal(labels, data.y)


def test_dataloaders(trainer_class: Any) -> None:
    trainer = make_line(trainer_class, per_device_train_batch_size=16, per_device_eval_batch_size=5)
    assert len(trainer.get_train_dataloader()) == 4
    assert len(trainer.get_eval_dataloader()) == 13
    assert trainer.get_train_dataloader().total_batch_size == 16


def test_checkpoints_are_there_and_a_run_is_resumed(trainer_class: Any) -> None:
    given = {"save_strategy": "steps", "save_steps": 5, "logging_steps": 5, "num_train_epochs": 2}
    trainer = make_line(trainer_class, **given)
    trainer.train()
    whole = (trainer.model.a.item(), trainer.model.b.item())
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "checkpoint-10",
        "checkpoint-15",
        "checkpoint-16",
        "checkpoint-5",
    ]
    assert get_last_checkpoint("out") == str(Path("out/checkpoint-16"))
    state = json.loads(Path("out/checkpoint-5/trainer_state.json").read_text())
    assert state["global_step"] == 5
    resumed = make_line(trainer_class, **given)
    resumed.train(resume_from_checkpoint="out/checkpoint-5")
    assert (resumed.model.a.item(), resumed.model.b.item()) == whole
    assert resumed.state.log_history[0] == trainer.state.log_history[0]
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        make_line(trainer_class, output_dir="other").train(resume_from_checkpoint=True)


def test_save_total_limit_keeps_the_newest(trainer_class: Any) -> None:
    make_line(trainer_class, save_strategy="steps", save_steps=2, save_total_limit=2, max_steps=8).train()
    assert sorted(path.name for path in Path("out").iterdir()) == ["checkpoint-6", "checkpoint-8"]


def test_the_best_model_is_loaded_at_the_end(trainer_class: Any) -> None:
    steps = {"eval_steps": 5, "eval_strategy": "steps", "save_steps": 5, "save_strategy": "steps"}
    trainer = make_line(trainer_class, a=1.5, b=2.5, load_best_model_at_end=True, **steps)
    trainer.train()
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert trainer.state.best_metric == losses[best]
    assert trainer.state.best_model_checkpoint == str(Path(f"out/checkpoint-{best}"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_early_stopping(trainer_class: Any) -> None:
    given = {
        "num_train_epochs": 20,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 16,
        "load_best_model_at_end": True,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "metric_for_best_model": "accuracy",
    }
    trainer = make_line(trainer_class, callbacks=[EarlyStoppingCallback(1, 0.0001)], **given)
    output = trainer.train()
    assert output.global_step < 20 * 64 / 16
    with pytest.raises(AssertionError, match=r"load_best_model_at_end|metric_for_best_model"):
        make_line(trainer_class, callbacks=[EarlyStoppingCallback()]).train()


def test_a_custom_optimizer(trainer_class: Any) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda step: 1.0)
    trainer = make_line(trainer_class, model=model, optimizers=(optimizer, schedule), max_steps=1)
    trainer.train()
    assert trainer.optimizer.state_dict()["param_groups"][0]["lr"] == 1.0
    assert trainer.lr_scheduler is schedule


def test_model_init(trainer_class: Any) -> None:
    trainer = make_line(trainer_class, model_init=lambda: Line(), num_train_epochs=1)
    trainer.train()
    first = trainer.model.a.item()
    trainer.train()
    assert trainer.model.a.item() == first
    trainer.args.seed = 314
    trainer.train()
    assert trainer.model.a.item() != first


def test_a_stream(trainer_class: Any) -> None:
    trainer = make_line(trainer_class, train_dataset=LineStream(), max_steps=10)
    assert trainer.train().global_step == 10
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        make_line(trainer_class, train_dataset=LineStream())


class Events(TrainerCallback):
    """All events, in their order."""

    def __init__(self) -> None:
        self.heard: list[str] = []


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:

    def _hear(self: Events, *args: Any, _event: str = _event, **kwargs: Any) -> None:
        self.heard.append(_event)

    setattr(Events, _event, _hear)


def test_the_flow_of_events(trainer_class: Any) -> None:
    trainer = make_line(
        trainer_class, callbacks=[Events], max_steps=2, eval_strategy="steps", eval_steps=2, logging_steps=2
    )
    trainer.train()
    events = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, Events))
    step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
    assert events.heard == [
        "on_init_end",
        "on_train_begin",
        "on_epoch_begin",
        *step,
        *step,
        "on_log",
        *["on_prediction_step"] * 8,
        "on_log",
        "on_evaluate",
        "on_epoch_end",
        "on_log",
        "on_train_end",
    ]


def test_adding_and_removing_callbacks(trainer_class: Any) -> None:
    trainer = make_line(trainer_class, disable_tqdm=False)
    kinds = [type(cb) for cb in trainer.callback_handler.callbacks]
    assert ProgressCallback in kinds
    trainer.remove_callback(ProgressCallback)
    events = Events()
    trainer.add_callback(events)
    assert trainer.pop_callback(Events) is events
    assert trainer.pop_callback(PrinterCallback) is None
    trainer.train()
    assert events.heard == []


def test_log_history_and_state_file(trainer_class: Any) -> None:
    trainer = make_line(trainer_class, logging_strategy="epoch", eval_strategy="epoch", num_train_epochs=2)
    trainer.train()
    rows = trainer.state.log_history
    assert [row["epoch"] for row in rows] == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert [row["step"] for row in rows] == [8, 8, 16, 16, 16]
    assert set(rows[0]) == {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    trainer.save_state()
    assert json.loads(Path("out/trainer_state.json").read_text())["max_steps"] == 16


def test_numbers_do_not_depend_on_what_is_drawn_elsewhere(trainer_class: Any) -> None:
    found = []
    for _ in range(2):
        trainer = make_line(trainer_class, num_train_epochs=1)
        set_seed(5)
        trainer.train()
        found.append(trainer.model.a.item())
        np.random.rand(3)
    assert found[0] == found[1]

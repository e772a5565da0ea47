"""`auto_find_batch_size`: both engines run out of memory at the same places, and go on in the same way.

Grade: exact. What is compared stands in tests/parity/engines.py.
"""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from transformers import DistilBertForSequenceClassification

import hfbridge
from hfbridge.errors import SettingsError
from tests.parity.engines import BASE, Job, make_ours, make_theirs, run_both
from tests.tiny import PadRows, make_dataset, make_model

FINDS = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "num_train_epochs": 2}


class Hungry(DistilBertForSequenceClassification):
    """A model that needs more memory for a batch than there is, now and then.

    Attributes:
        room: rows for which there is always room; `None` is any number.
        fails_at: training forward from which on there is room for no more.
        fails_in_evaluation: there is none in evaluations.
    """

    room: int | None = 5
    fails_at = 0
    fails_in_evaluation = False
    calls = 0

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        self.calls += self.training
        is_late = self.calls > self.fails_at
        if self.training and is_late and self.room is not None and len(input_ids) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if not self.training and self.fails_in_evaluation:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried it")
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def hungry(**attributes: Any) -> nn.Module:
    model = make_model("distilbert")
    model.__class__ = Hungry
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    "fails_at",
    [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 3)), 5],
    ids="after {} forwards".format,
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 2},
        {"max_steps": 7, "optim": "adafactor", "lr_scheduler_type": "cosine", "neftune_noise_alpha": 3.0},
        {"train_sampling_strategy": "group_by_length", "logging_steps": 2, "label_smoothing_factor": 0.1},
        {"dataloader_drop_last": True, "eval_on_start": True, "lr_scheduler_type": "greedy"},
    ],
    ids=["plain", "accumulated", "max_steps", "group_by_length", "greedy"],
)
@pytest.mark.filterwarnings("ignore:hfbridge. out of memory")
def test_training_begins_again_with_smaller_batches(settings: dict[str, Any], fails_at: int) -> None:
    if settings.get("lr_scheduler_type") == "greedy":
        settings = {**settings, "eval_strategy": "epoch", "metric_for_best_model": "loss"}
    job = Job("distilbert", {**FINDS, **settings}, rows=30, model=lambda: hungry(fails_at=fails_at))
    theirs, ours = run_both(job)
    assert theirs.state["train_batch_size"] == ours.engine.train_batch_size == 5
    assert ours.event_names.count("on_train_begin") == 4  # 8, 7, 6, 5
    assert ours.event_names.count("on_init_end") == ours.event_names.count("on_train_end") == 1


@pytest.mark.filterwarnings("ignore:hfbridge. out of memory")
def test_an_optimizer_and_a_schedule_of_the_users_go_on() -> None:
    def optimizers(model: nn.Module) -> tuple[Any, Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    job = Job("distilbert", FINDS, rows=30, model=lambda: hungry(fails_at=3), optimizers=optimizers)
    run_both(job)


def test_nothing_changes_where_memory_is_enough() -> None:
    theirs, ours = run_both(Job("distilbert", FINDS, rows=30, model=lambda: hungry(room=None)))
    assert theirs.state["train_batch_size"] == ours.engine.train_batch_size == 8


def test_each_new_size_is_told() -> None:
    trainer, module, data, *_ = make_ours(Job("distilbert", FINDS, rows=30, model=lambda: hungry(room=6)))
    with pytest.warns(UserWarning, match="hfbridge: out of memory") as told:
        trainer.fit(module, data)
    ours = [str(warning.message) for warning in told if "hfbridge" in str(warning.message)]
    assert [text.partition("micro-batches of ")[2] for text in ours] == [
        "8; training begins again with 7 (auto_find_batch_size).",
        "7; training begins again with 6 (auto_find_batch_size).",
    ]


@pytest.mark.filterwarnings("ignore:hfbridge. out of memory")
def test_when_one_row_is_too_much() -> None:
    job = Job("distilbert", FINDS, rows=30, model=lambda: hungry(room=0))
    with pytest.raises(RuntimeError, match="No executable batch size found"):
        make_theirs(job)[0].train()
    trainer, module, data, *_ = make_ours(job)
    with pytest.raises(SettingsError, match="out of memory with a micro-batch of one sample"):
        trainer.fit(module, data)


@pytest.mark.parametrize("when", [{"eval_on_start": True}, {"eval_strategy": "epoch"}], ids=str)
def test_an_evaluation_without_memory_says_which_size_to_reduce(when: dict[str, Any]) -> None:
    settings = {**FINDS, "eval_strategy": "epoch", **when}
    job = Job("distilbert", settings, rows=30, model=lambda: hungry(room=None, fails_in_evaluation=True))
    with pytest.raises(RuntimeError, match="reduce `per_device_eval_batch_size`"):
        make_theirs(job)[0].train()
    trainer, module, data, *_ = make_ours(job)
    with pytest.raises(SettingsError, match="Set per_device_eval_batch_size below 4"):
        trainer.fit(module, data)
    assert trainer.train_batch_size == 8


def test_another_error_is_not_taken_for_one_of_memory() -> None:
    class Broken(Hungry):
        def forward(self, *inputs: Any, **named: Any) -> Any:
            raise RuntimeError("the model is broken")

    def broken() -> nn.Module:
        model = make_model("distilbert")
        model.__class__ = Broken
        return model

    trainer, module, data, *_ = make_ours(Job("distilbert", FINDS, rows=30, model=broken))
    with pytest.raises(RuntimeError, match="the model is broken"):
        trainer.fit(module, data)


def test_without_the_setting_an_error_of_memory_is_one() -> None:
    job = Job("distilbert", {"per_device_train_batch_size": 8}, rows=30, model=hungry)
    trainer, module, data, *_ = make_ours(job)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit(module, data)


def test_a_plain_trainer_cannot_begin_again() -> None:
    module = hfbridge.HFModule(make_model("distilbert"), settings={**BASE, **FINDS})
    data = hfbridge.HFDataModule(train_dataset=make_dataset("distilbert", 8), data_collator=PadRows())
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(SettingsError, match=r"use\s+hfbridge\.Trainer"):
        trainer.fit(module, data)


def test_batch_rebalance_would_not_heed_it() -> None:
    with pytest.raises(SettingsError, match="does not reach the micro-batches of batch_rebalance"):
        hfbridge.Settings(**FINDS, train_sampling_strategy="batch_rebalance")

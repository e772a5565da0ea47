"""What Lightning is told of where a run was."""

from typing import Any

from hfbridge.checkpoints.resume import loop_counters
from tests.parity.engines import Job, make_ours


def shape_of(counters: Any) -> Any:
    """The names in nested dictionaries, without the numbers."""
    if not isinstance(counters, dict):
        return None
    return {name: shape_of(value) for name, value in counters.items()}


def test_the_counters_have_the_form_of_lightnings() -> None:
    trainer, module, data, *_ = make_ours(Job())
    trainer.fit(module, data)
    made = loop_counters(trainer, step=12, epoch=1, steps_in_epoch=0, batches=24, batches_in_epoch=0)
    own = trainer.fit_loop.state_dict()
    assert shape_of(made) == shape_of(own)


def test_they_count_as_lightning_does_at_the_end_of_an_epoch() -> None:
    trainer, module, data, *_ = make_ours(Job())
    trainer.fit(module, data)
    made = loop_counters(trainer, step=12, epoch=1, steps_in_epoch=0, batches=24, batches_in_epoch=0)
    own = trainer.fit_loop.state_dict()
    for name in ("epoch_progress", "epoch_loop.scheduler_progress"):
        assert made[name]["total"] == own[name]["total"]
    optimizer = "epoch_loop.automatic_optimization.optim_progress"
    assert made[optimizer]["optimizer"]["step"]["total"] == own[optimizer]["optimizer"]["step"]["total"]
    assert made["epoch_loop.state_dict"] == own["epoch_loop.state_dict"]


def test_the_middle_of_an_epoch() -> None:
    trainer, module, data, *_ = make_ours(Job())
    trainer.fit(module, data)
    made = loop_counters(trainer, step=17, epoch=1, steps_in_epoch=5, batches=34, batches_in_epoch=10)
    assert made["epoch_progress"]["current"] == {"ready": 2, "started": 2, "processed": 1, "completed": 1}
    batches = made["epoch_loop.batch_progress"]
    assert batches["current"] == dict.fromkeys(("ready", "started", "processed", "completed"), 10)
    assert batches["total"]["completed"] == 34
    steps = made["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    assert (steps["total"]["completed"], steps["current"]["completed"]) == (17, 5)
    assert batches["is_last_batch"] is False

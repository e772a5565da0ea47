"""SIGTERM on several ranks: all end after the same step, whoever hears it, and no step pays for it."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers import TrainerCallback

import hfbridge
from hfbridge.distributed.coordinated_stop import CoordinatedStop
from tests.distributed.conftest import PoolOf
from tests.parity.engines import Job, make_ours, make_theirs
from tests.tiny import PadRows, make_dataset, make_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

POINTS = 400


# Where all stop.


def pass_points(asked: tuple[int, ...], slow: int) -> int:
    """Pass points, between which the ranks wait for each other; returns how many this rank has passed."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    stop = CoordinatedStop()
    passed = 0
    while passed < POINTS and stop.should_continue():
        passed += 1
        if passed == 5 and dist.get_rank() in asked:
            stop.stop_requested = True
        if dist.get_rank() == slow:
            time.sleep(0.01)
        dist.all_reduce(torch.ones(1))
    stop.close()
    return passed


@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("slow", [0, 1])
def test_all_stop_at_the_same_point(ranks: PoolOf, asked: tuple[int, ...], slow: int) -> None:
    first, second = ranks(2).run(pass_points, asked, slow)
    assert 5 <= first == second < POINTS


@pytest.mark.long
def test_three_ranks_stop_at_the_same_point(ranks: PoolOf) -> None:
    found = ranks(3).run(pass_points, (1,), 2)
    assert 5 <= found[0] < POINTS
    assert found == [found[0]] * 3


def test_nobody_stops_who_is_not_asked(ranks: PoolOf) -> None:
    assert ranks(2).run(pass_points, (), 0) == [POINTS] * 2


def pass_points_twice() -> tuple[int, int]:
    return pass_points((0,), 1), pass_points((), 1)


def test_a_later_run_is_not_asked_by_an_earlier_one(ranks: PoolOf) -> None:
    for first, second in ranks(2).run(pass_points_twice):
        assert first < second == POINTS


class Gone:
    """A store that does not answer."""

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("the connection was closed")


def lose_the_store() -> list[bool]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    stop = CoordinatedStop()
    stop._store = Gone()  # type: ignore[assignment]
    time.sleep(1)
    passed = [stop.should_continue()]
    stop.stop_requested = True
    passed += [stop.should_continue(), stop.should_continue()]
    stop.close()
    return passed


def test_a_rank_that_has_lost_the_store_stops_by_itself(ranks: PoolOf) -> None:
    assert ranks(2).run(lose_the_store) == [[True, False, False]] * 2


# SIGTERM.


class Terminated(TrainerCallback):
    """Send SIGTERM to some ranks, and let time pass at each step from then on, on each of its own length."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self.numbers = numbers

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and args.process_index in self.numbers:
            os.kill(os.getpid(), signal.SIGTERM)
        if state.global_step >= 3:
            time.sleep(0.05 * (1 + args.process_index))


class Inside(pl.Callback):
    """Has a hook inside a step, for which the steps are Lightning's own."""

    def on_before_zero_grad(self, *hook: Any) -> None:
        pass


class Notes(pl.Callback):
    """Keep what a run ended by."""

    ended_by: str = ""

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.ended_by = type(exception).__name__


SETTINGS: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 50,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 5,
}


def terminate(numbers: tuple[int, ...], inside: bool) -> tuple[int, str, str]:
    notes = Notes()
    callbacks = [Terminated(numbers), notes, *([Inside()] if inside else [])]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = hfbridge.Trainer(SETTINGS, callbacks=callbacks, **quiet)
    module = hfbridge.HFModule(make_model("llama"))
    data = hfbridge.HFDataModule(train_dataset=make_dataset("llama", 21), data_collator=PadRows())
    before, raised = signal.getsignal(signal.SIGTERM), ""
    try:
        trainer.fit(module, data)
    except SIGTERMException as error:
        raised = type(error).__name__
    finally:
        signal.signal(signal.SIGTERM, before)
    dist.barrier()
    return trainer.global_step, raised, notes.ended_by


@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("inside", [False, True])
def test_a_run_ends_after_the_same_step_on_all_ranks(
    ranks: PoolOf, numbers: tuple[int, ...], inside: bool
) -> None:
    first, second = ranks(2).run(terminate, numbers, inside)
    assert first == second
    step, *ended = first
    assert ended == ["SIGTERMException"] * 2
    assert 3 <= step < 3 + 40


# What a step costs.

COLLECTIVES = (
    "all_reduce",
    "broadcast",
    "all_gather",
    "all_gather_object",
    "broadcast_object_list",
    "barrier",
)


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    plain = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return plain[name](*arguments, **named)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name in COLLECTIVES:
            setattr(dist, name, plain[name])


class Steps(TrainerCallback):
    """Keep how many collectives there were between the ends of two steps that log nothing."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts, self.first, self.between = counts, Counter[str](), Counter[str]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.first = Counter(self.counts)
        if state.global_step == 6:
            self.between = self.counts - self.first


def count(engine: str, settings: dict[str, Any]) -> dict[str, int]:
    with counted_collectives() as counts:
        steps = Steps(counts)
        given = {"max_steps": 7, "logging_strategy": "no", "save_strategy": "no", **settings}
        job = Job(settings=given, callbacks=lambda: [steps])
        if engine == "native":
            make_theirs(job)[0].train()
        else:
            trainer, module, data, *_ = make_ours(job)
            trainer.fit(module, data)
    return dict(steps.between)


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation_steps": 2}, {"enable_jit_checkpoint": True}]
)
def test_a_step_has_no_more_collectives_than_natively(ranks: PoolOf, settings: dict[str, Any]) -> None:
    native, ours = (ranks(2).run(count, engine, settings)[0] for engine in ("native", "hfbridge"))
    assert sum(ours.values()) == ours["all_reduce"] == 4  # the items of each step
    assert sum(ours.values()) <= sum(native.values()), native

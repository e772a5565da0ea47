"""Optimizer steps: every micro-batch once and in order; a run's length is the HF Trainer's, computed live."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer as NativeTrainer

from hfbridge.data.accumulation import AccumulationStep, Schedule, group_micro_batches, plan_schedule

counts = st.integers(0, 60)
sizes = st.integers(1, 12)


def micro_batches(count: int) -> list[dict[str, int]]:
    return [{"number": number} for number in range(count)]


@given(count=counts, size=sizes)
def test_every_micro_batch_once_and_in_order(count: int, size: int) -> None:
    given_ = micro_batches(count)
    steps = list(group_micro_batches(given_, size))
    assert [b for step in steps for b in step] == given_
    columns = [{"number": object()} for _ in range(count)]
    ours = (b for step in group_micro_batches(columns, size) for b in step)
    assert all(mine["number"] is theirs["number"] for mine, theirs in zip(ours, columns, strict=True))
    assert all(b.step is step and b.index == i for step in steps for i, b in enumerate(step))


@given(count=counts, size=sizes)
def test_all_steps_are_full_but_the_last(count: int, size: int) -> None:
    lengths = [len(step) for step in group_micro_batches(micro_batches(count), size)]
    assert lengths[:-1] == [size] * (len(lengths) - 1)
    assert len(lengths) == math.ceil(count / size)
    assert not lengths or lengths[-1] == (count % size or size)


@given(count=counts, size=sizes)
def test_done_counts_the_completed_micro_batches_of_each_step(count: int, size: int) -> None:
    done = 0
    for step in group_micro_batches(micro_batches(count), size):
        done += len(step)
        assert step.done_micro_batches == done
        assert step.items is None
    assert done == count


@given(count=counts, size=sizes, taken=st.integers(0, 70))
def test_one_micro_batch_is_prefetched_and_no_more(count: int, size: int, taken: int) -> None:
    """As accelerate's loader: a collator that draws random numbers would show any other order."""
    collated: list[int] = []

    def collate() -> Iterator[dict[str, int]]:
        for number in range(count):
            collated.append(number)
            yield {"number": number}

    steps = group_micro_batches(collate(), size)
    assert collated == []  # nothing is drawn before the first step is requested
    for number, _ in zip(range(taken), steps, strict=False):
        assert len(collated) == min((number + 1) * size + 1, count)


@given(count=counts, size=sizes)
def test_a_step_outlives_the_next(count: int, size: int) -> None:
    """A step's list is its own: it is not filled again for the next one."""
    steps: list[AccumulationStep] = list(group_micro_batches(micro_batches(count), size))
    assert len({id(step.micro_batches) for step in steps}) == len(steps)


class StubLoader:
    """What the native Trainer asks of a loader to count with."""

    def __init__(self, *, batches: int, rows: int) -> None:
        self.batches = batches
        self.dataset = range(rows)

    def __len__(self) -> int:
        return self.batches


def native_schedule(*, loader: StubLoader, size: int, **arguments: Any) -> Schedule:
    """Ask the native Trainer's own function, of which only the arguments and sizes are a stub."""
    stub = SimpleNamespace(
        get_sp_size=lambda: 1,
        get_tp_size=lambda: 1,
        get_cp_size=lambda: 1,
        num_examples=lambda loader: len(loader.dataset),
        _train_batch_size=size,
    )
    args = SimpleNamespace(**arguments, world_size=1, per_device_train_batch_size=size, train_batch_size=size)
    stub.args = args
    stub.get_total_train_batch_size = lambda args: NativeTrainer.get_total_train_batch_size(stub, args)
    epochs, steps_per_epoch, _, samples, total_batch_size, batches, max_steps = (
        NativeTrainer.set_initial_training_values(stub, args, loader)
    )
    assert total_batch_size == size * args.gradient_accumulation_steps
    return Schedule(batches, steps_per_epoch, max_steps, epochs, samples)


@given(
    rows=st.integers(1, 500),
    size=st.integers(1, 40),
    accumulation=sizes,
    drop_last=st.booleans(),
    max_steps=st.just(-1) | st.integers(1, 300),
    epochs=st.integers(1, 9).map(float) | st.floats(0.01, 9.0),
)
def test_schedule_is_the_native_one(
    rows: int, size: int, accumulation: int, drop_last: bool, max_steps: int, epochs: float
) -> None:
    batches = max(rows // size, 1) if drop_last else math.ceil(rows / size)
    ours = plan_schedule(
        samples_per_epoch=rows,
        micro_batches_per_epoch=batches,
        accumulation=accumulation,
        total_batch_size=size * accumulation,
        max_steps=max_steps,
        num_train_epochs=epochs,
    )
    theirs = native_schedule(
        loader=StubLoader(batches=batches, rows=rows),
        size=size,
        gradient_accumulation_steps=accumulation,
        max_steps=max_steps,
        num_train_epochs=epochs,
    )
    assert ours == theirs
    assert type(ours.epochs) is type(theirs.epochs)
    # The steps that an epoch is grouped into are those that the schedule counts.
    assert len(list(group_micro_batches(micro_batches(batches), accumulation))) == ours.steps_per_epoch


@pytest.mark.parametrize(
    ("batches", "accumulation", "max_steps", "epochs", "expected"),
    [
        (12, 5, -1, 2.0, (3, 6, 2)),
        (12, 5, -1, 1.5, (3, 5, 2)),
        (12, 5, -1, 0.1, (3, 1, 1)),
        (12, 5, 7, 1.0, (3, 7, 3)),
        (1, 5, -1, 1.0, (1, 1, 1)),
    ],
)
def test_schedules_spelled_out(
    batches: int, accumulation: int, max_steps: int, epochs: float, expected: tuple[int, int, int]
) -> None:
    schedule = plan_schedule(
        samples_per_epoch=4 * batches,
        micro_batches_per_epoch=batches,
        accumulation=accumulation,
        total_batch_size=4 * accumulation,
        max_steps=max_steps,
        num_train_epochs=epochs,
    )
    assert (schedule.steps_per_epoch, schedule.max_steps, schedule.epochs) == expected

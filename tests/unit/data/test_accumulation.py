"""Grouping micro-batches into optimizer steps, and counting the steps of a run."""

import pytest

from hfbridge.data.accumulation import AccumulationStep, MicroBatch, group_micro_batches, plan_schedule


def plan(batches=5, accumulation=2, *, max_steps=-1, epochs=2.0, rows=18):
    return plan_schedule(
        samples_per_epoch=rows,
        micro_batches_per_epoch=batches,
        accumulation=accumulation,
        total_batch_size=4 * accumulation,
        max_steps=max_steps,
        num_train_epochs=epochs,
    )


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(6, 2, [2, 2, 2]), (7, 3, [3, 3, 1]), (2, 5, [2]), (3, 1, [1, 1, 1]), (0, 2, [])],
)
def test_steps_hold_size_micro_batches_and_the_last_what_is_left(count, size, sizes):
    batches = [{"x": i} for i in range(count)]
    steps = list(group_micro_batches(batches, size))
    assert [len(step) for step in steps] == sizes
    assert [batch for step in steps for batch in step] == batches
    assert [step.done_micro_batches for step in steps] == [sum(sizes[: i + 1]) for i in range(len(sizes))]
    assert [batch.is_last for step in steps for batch in step] == [
        index + 1 == size for size in sizes for index in range(size)
    ]


def test_one_more_micro_batch_is_prefetched_when_a_step_is_handed_out():
    fetched = []

    def source():
        for i in range(5):
            fetched.append(i)
            yield {"x": i}

    steps = group_micro_batches(source(), 2)
    assert fetched == []
    next(steps)
    assert fetched == [0, 1, 2]
    next(steps)
    assert fetched == [0, 1, 2, 3, 4]
    assert len(next(steps)) == 1


def test_a_step_says_what_it_is():
    step = AccumulationStep([MicroBatch(), MicroBatch()], done_micro_batches=4)
    assert repr(step) == "AccumulationStep(2 micro-batches, 4 done)"
    assert step.items is None


def test_a_short_last_step_counts():
    schedule = plan()
    assert (schedule.steps_per_epoch, schedule.max_steps, schedule.epochs) == (3, 6, 2)
    assert schedule.samples == 36


def test_a_part_of_an_epoch_is_rounded_up_to_steps():
    schedule = plan(epochs=1.5)
    assert (schedule.max_steps, schedule.epochs, schedule.samples) == (5, 2, 27)


def test_max_steps_wins_over_epochs():
    schedule = plan(max_steps=7, epochs=1.0)
    assert (schedule.max_steps, schedule.epochs, schedule.samples) == (7, 3, 56)


def test_fewer_batches_than_a_full_step_are_one_step():
    assert plan(batches=2, accumulation=8, epochs=3.0).max_steps == 3

"""The loss between two rows, against the native formula written out."""

import math
from types import SimpleNamespace

import pytest
import torch

from hfbridge.losses import running_loss
from hfbridge.losses.running_loss import LoggedLoss

NAN, INF = math.nan, math.inf
CPU = torch.device("cpu")


def native(losses, *, filtered):
    """Mirrors: transformers.Trainer._run_epoch"""
    total, last_logged, rows = torch.zeros(()), 0, []
    for step, (loss, logs) in enumerate(losses):
        if filtered and not math.isfinite(loss):
            total += total / (1 + step - last_logged)
        else:
            total += torch.tensor(loss)
        if logs:
            rows.append(total.item() / (step + 1 - last_logged))
            total -= total
            last_logged = step + 1
    return rows


def ours(losses, *, filtered):
    tracked, rows = LoggedLoss(CPU, drop_non_finite=filtered), []
    for step, (loss, logs) in enumerate(losses):
        tracked.add(torch.tensor(loss), global_step=step)
        if logs:
            rows.append(tracked.drain(step + 1))
    return rows


RUNS = {
    "plain": [(0.1, False), (0.7, True), (0.3, True)],
    "nan in the middle": [(0.1, False), (0.7, False), (NAN, False), (0.9, True), (0.2, True)],
    "nan first": [(NAN, False), (0.7, True), (NAN, True)],
    "infinite": [(0.3, False), (INF, True), (-INF, False), (0.5, True)],
    "only nan": [(NAN, True)],
}


def same(left, right):
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("run", RUNS)
def test_rows_are_those_of_the_native_formula(run, filtered):
    assert same(ours(RUNS[run], filtered=filtered), native(RUNS[run], filtered=filtered))


class ElsewhereSum(torch.Tensor):
    """A tensor that says it lives on a GPU."""

    @property
    def device(self):
        return SimpleNamespace(type="cuda")


@pytest.mark.parametrize("run", RUNS)
def test_the_path_that_does_not_wait_gives_the_same_values(run, monkeypatch):
    expected = ours(RUNS[run], filtered=True)
    waited = []
    monkeypatch.setattr(running_loss.math, "isfinite", lambda value: waited.append(value))
    tracked, rows = LoggedLoss(CPU, drop_non_finite=True), []
    tracked.sum = tracked.sum.as_subclass(ElsewhereSum)
    for step, (loss, logs) in enumerate(RUNS[run]):
        tracked.add(torch.tensor(loss), global_step=step)
        if logs:
            rows.append(tracked.drain(step + 1))
    assert not waited
    assert rows == expected


def test_several_micro_batches_of_a_step_are_summed():
    tracked = LoggedLoss(CPU, drop_non_finite=True)
    for _ in range(4):
        tracked.add(torch.tensor(0.25), global_step=0)
    assert tracked.drain(1) == 1.0


def test_a_row_is_due_once_a_step():
    tracked = LoggedLoss(CPU, drop_non_finite=True)
    assert not tracked.is_due(0)
    tracked.add(torch.tensor(1.0), global_step=0)
    assert tracked.is_due(1)
    tracked.drain(1)
    assert not tracked.is_due(1)


def test_the_mean_of_the_run_counts_what_was_drained_and_what_was_not():
    tracked = LoggedLoss(CPU, drop_non_finite=True)
    tracked.add(torch.tensor(1.0), global_step=0)
    tracked.drain(1)
    tracked.add(torch.tensor(2.0), global_step=1)
    assert tracked.mean(2) == 1.5


def test_the_mean_of_no_steps_is_not_a_division_by_zero():
    assert LoggedLoss(CPU, drop_non_finite=True).mean(0) == 0.0

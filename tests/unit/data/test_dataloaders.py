"""The loaders Lightning iterates: thin, and silent towards the random generators until the first batch."""

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import DataLoader, RandomSampler

from hfbridge.data.dataloaders import EvalLoader, WindowLoader


class Rows(torch.utils.data.Dataset):
    epoch = None

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return {"x": index}

    def set_epoch(self, epoch):
        self.epoch = epoch


class Sampler(torch.utils.data.SequentialSampler):
    epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch


def shuffled(rows):
    return DataLoader(rows, batch_size=2, sampler=RandomSampler(rows))


def evaluated(inner):
    return EvalLoader(inner, prefix="eval", batch_size=2)


@pytest.mark.parametrize("wrap", [lambda inner: WindowLoader(inner, accumulation=2), evaluated])
def test_nothing_is_drawn_before_the_first_batch_is_asked_for(wrap):
    before = torch.get_rng_state()
    loader = wrap(shuffled(Rows()))
    iterator = iter(loader)
    len(loader)
    assert torch.equal(torch.get_rng_state(), before)
    next(iterator)
    assert not torch.equal(torch.get_rng_state(), before)


def test_it_draws_what_its_dataloader_draws():
    torch.manual_seed(1)
    theirs = [batch["x"].tolist() for batch in shuffled(Rows())]
    left = torch.get_rng_state()
    torch.manual_seed(1)
    loader = WindowLoader(shuffled(Rows()), accumulation=3)
    iter(loader)
    ours = [batch["x"].tolist() for window in loader for batch in window]
    assert ours == theirs
    assert torch.equal(torch.get_rng_state(), left)


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 4), (2, 2), (3, 2), (9, 1)])
def test_its_length_is_in_steps(accumulation, steps):
    loader = WindowLoader(DataLoader(Rows(), batch_size=2), accumulation=accumulation)
    assert len(loader) == steps == len(list(loader))


def test_set_epoch_reaches_sampler_and_dataset():
    rows = Rows()
    inner = DataLoader(rows, batch_size=2, sampler=Sampler(rows))
    loader = WindowLoader(inner, accumulation=2)
    loader.sampler.set_epoch(3)
    assert (inner.sampler.epoch, rows.epoch) == (3, 3)


def test_set_epoch_passes_by_what_does_not_know_it():
    WindowLoader(DataLoader([1, 2, 3]), accumulation=2).set_epoch(1)


def test_lightning_finds_the_sampler_by_that_name():

    rows = Rows()
    loader = WindowLoader(DataLoader(rows, batch_size=2), accumulation=2)
    _set_sampler_epoch(loader, 5)
    assert rows.epoch == 5, "lightning.fabric.utilities.data._set_sampler_epoch no longer asks `.sampler`"


def test_an_evaluation_loader_tells_its_rows_and_batches():
    loader = evaluated(DataLoader(Rows(), batch_size=2))
    assert (len(loader), loader.samples) == (4, 7)
    assert [batch["x"].tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5], [6]]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_an_evaluation_loader_fetches_one_batch_ahead_as_accelerates_do(count):
    class Noting(list):
        def __getitem__(self, index):
            events.append(f"fetch {index}")
            return super().__getitem__(index)

    def walk(loader):
        events.clear()
        for batch in loader:
            events.append(f"use {int(batch)}")
        return list(events)

    events = []
    theirs = walk(
        prepare_data_loader(DataLoader(Noting(range(count)), batch_size=1, shuffle=False), device=None)
    )
    ours = walk(evaluated(DataLoader(Noting(range(count)), batch_size=1)))
    assert ours == theirs

"""The loaders Lightning iterates: thin, and silent towards the random generators until the first batch."""

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from hfbridge.data.dataloaders import EvalLoader, TrainLoader
from hfbridge.data.factory import RecordedBatches
from hfbridge.data.samplers import _UnpaddedShard


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


@pytest.mark.parametrize("wrap", [lambda inner: TrainLoader(inner, accumulation=2), evaluated])
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
    loader = TrainLoader(shuffled(Rows()), accumulation=3)
    iter(loader)
    ours = [batch["x"].tolist() for batch in loader]
    assert ours == theirs
    assert torch.equal(torch.get_rng_state(), left)


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 4), (2, 2), (3, 2), (9, 1)])
def test_its_length_is_in_micro_batches(accumulation, steps):
    loader = TrainLoader(DataLoader(Rows(), batch_size=2), accumulation=accumulation)
    batches = list(loader)
    assert len(loader) == len(batches) == 4
    assert len({id(batch.step) for batch in batches}) == sum(batch.is_last for batch in batches) == steps


def test_set_epoch_reaches_sampler_and_dataset():
    rows = Rows()
    inner = DataLoader(rows, batch_size=2, sampler=Sampler(rows))
    loader = TrainLoader(inner, accumulation=2)
    loader.sampler.set_epoch(3)
    assert (inner.sampler.epoch, rows.epoch) == (3, 3)


def test_set_epoch_passes_by_what_does_not_know_it():
    TrainLoader(DataLoader([1, 2, 3]), accumulation=2).set_epoch(1)


def test_lightning_finds_the_sampler_by_that_name():

    rows = Rows()
    loader = TrainLoader(DataLoader(rows, batch_size=2), accumulation=2)
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


def test_lightning_finds_that_rows_in_order_are_not_shuffled():
    rows = Rows()
    loader = TrainLoader(DataLoader(rows, batch_size=2), accumulation=2)
    assert isinstance(loader.sampler, torch.utils.data.SequentialSampler)
    assert not isinstance(TrainLoader(shuffled(rows), accumulation=2).sampler, torch.utils.data.Sampler)


@pytest.mark.parametrize("completed", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_stateful_loader_continues_after_what_it_has_handed_out(accumulation, completed):
    def loader():
        return TrainLoader(DataLoader(Rows(), batch_size=2), accumulation=accumulation, is_stateful=True)

    first, whole = loader(), list(loader())
    for _, batch in zip(range(completed), first, strict=False):
        state = first.state_dict()
        assert batch["x"].tolist() == whole[state["micro_batches"] - 1]["x"].tolist()
    second = loader()
    second.load_state_dict(state)
    rest = list(second)
    assert [batch["x"].tolist() for batch in rest] == [batch["x"].tolist() for batch in whole[completed:]]
    assert [batch.is_last for batch in rest] == [batch.is_last for batch in whole[completed:]]
    assert [batch["x"].tolist() for batch in second] == [batch["x"].tolist() for batch in whole]


def test_after_an_epoch_a_stateful_loader_begins_another():
    loader = TrainLoader(DataLoader(Rows(), batch_size=2), accumulation=2, is_stateful=True)
    list(loader)
    assert loader.state_dict() == {"micro_batches": 0}
    assert TrainLoader(DataLoader(Rows(), batch_size=2), accumulation=2).state_dict() == {}


@pytest.mark.parametrize("rows", range(1, 12))
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("pads", [False, True])
def test_each_row_is_predicted_by_one_rank_and_once(rows, ranks, pads):
    seen, lengths = [], []
    for rank in range(ranks):
        whole = BatchSampler(SequentialSampler(range(rows)), 2, False)
        sampling = {"batch_sampler": _UnpaddedShard(whole, num_processes=ranks, process_index=rank)}
        if ranks == 1:
            sampling = {"sampler": SequentialSampler(range(rows)), "batch_size": 2, "drop_last": False}
        batches = RecordedBatches(sampling, rows=rows, pads=pads)
        found = list(batches)
        assert len(batches) == len(found) == len(batches.seen_batch_indices)
        for batch, recorded in zip(found, batches.seen_batch_indices, strict=True):
            assert batch
            assert recorded in (batch, [])
            assert recorded or pads
        seen += [row for recorded in batches.seen_batch_indices for row in recorded]
        lengths.append(len(found))
    assert sorted(seen) == list(range(rows))
    assert not pads or len(set(lengths)) == 1

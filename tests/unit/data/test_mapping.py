"""Mapper on one rank, and what it hands to others; tests/distributed/test_mapping.py has several ranks."""

import gc
from pathlib import Path

import datasets
import pytest

from hfbridge.data.mapping import Mapper, facts_of, pack, unpack
from tests.tiny import make_dataset


def double(rows):
    return {"twice": [ids * 2 for ids in rows["input_ids"]]}


def test_in_memory_unless_a_file_is_asked_for():
    mapped = Mapper(double, {}).map(make_dataset("llama", 5), "train")
    assert mapped.cache_files == []
    assert "twice" in mapped.column_names


@pytest.mark.parametrize("arguments", [{}, {"keep_in_memory": True}])
def test_a_file_is_there_as_long_as_its_mapper(arguments):
    mapper = Mapper(double, arguments)
    mapped = mapper.map(make_dataset("llama", 5), "train", to_file=True)
    files = [Path(file["filename"]) for file in mapped.cache_files]
    assert files
    assert unpack(pack({"train": mapped}))["train"][:] == mapped[:]
    del mapper
    gc.collect()
    assert not any(file.parent.exists() for file in files)


def test_a_file_of_the_users_is_theirs(tmp_path):
    mapper = Mapper(double, {"cache_file_name": str(tmp_path / "mine.arrow")})
    mapper.map(make_dataset("llama", 5), "train", to_file=True)
    del mapper
    gc.collect()
    assert (tmp_path / "mine.arrow").exists()


def test_what_does_not_pickle_is_not_handed_on():
    mapped = make_dataset("llama", 2).with_transform(lambda rows: rows)
    assert pack({"train": mapped}) is None
    assert unpack(None) == {}


def test_files_that_cannot_be_reached_are_not_there(tmp_path):
    mapper = Mapper(double, {"cache_file_name": str(tmp_path / "mine.arrow")})
    packed = pack({"train": mapper.map(make_dataset("llama", 5), "train", to_file=True)})
    (tmp_path / "mine.arrow").unlink()
    assert unpack(packed) == {}


def test_facts_tell_sets_apart():
    rows = make_dataset("llama", 200)
    same = facts_of(rows, "train")
    assert [fact.subject for fact in same] == [
        "rows of the train set",
        "columns of the train set",
        "contents of the train set",
    ]
    assert facts_of(make_dataset("llama", 200), "train") == same
    assert facts_of(rows.shuffle(seed=1), "train")[:2] == same[:2]
    assert facts_of(rows.shuffle(seed=1), "train") != same


def test_facts_do_not_call_transforms():
    rows = make_dataset("llama", 5)
    assert facts_of(rows.with_transform(lambda batch: pytest.fail("called")), "train") == facts_of(
        rows, "train"
    )


def test_facts_of_other_sets_are_their_lengths():
    assert [fact.value for fact in facts_of([1, 2, 3], "train")] == ["3"]


def test_facts_of_rows_without_columns():
    assert len(facts_of(datasets.Dataset.from_dict({"x": []}), "train")) == 3

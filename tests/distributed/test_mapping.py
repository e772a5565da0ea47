"""The map function runs once on a node, wherever the set is; the other ranks are given what it made."""

from pathlib import Path

import pytest

from tests.distributed.mapping_jobs import evaluate_mapped, map_with
from tests.tiny import make_dataset

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

EXPECTED = [[i + 1 if i < 40 else i for i in row["input_ids"]] for row in make_dataset("llama", 21)]
ONCE = ["0:2", "0:21"]  # two rows for trial, and all


def calls_in(folder: Path) -> list[str]:
    return sorted((folder / "calls").read_text().split(), key=len)


@pytest.mark.parametrize("kwargs", [{}, {"keep_in_memory": True}], ids=["default", "keep_in_memory"])
def test_a_set_in_memory_gets_a_file_that_goes_in_the_end(ranks, tmp_path, kwargs):
    first, second = ranks(2).run(map_with, "memory", str(tmp_path), kwargs)
    assert calls_in(tmp_path) == ONCE
    assert first["ids"] == second["ids"] == EXPECTED
    assert first["files"] == second["files"] != []
    assert first["loss"] == second["loss"] != []
    assert first["is_left"] == []
    assert not any("arrow" in path for path in first["here"] + second["here"])


def test_a_set_on_the_disk_is_mapped_into_its_cache(ranks, tmp_path):
    first, second = ranks(2).run(map_with, "disk", str(tmp_path), {})
    assert calls_in(tmp_path) == ONCE
    assert first["ids"] == second["ids"] == EXPECTED
    assert first["files"] == second["files"]
    assert all(Path(file).parent == tmp_path / "set" for file in first["files"])
    ranks(2).run(map_with, "disk", str(tmp_path), {})
    assert calls_in(tmp_path) == ["0:2", "0:2", "0:21"]  # the cache is read; two rows for trial


def test_several_processes_map(ranks, tmp_path):
    first, second = ranks(2).run(map_with, "memory", str(tmp_path), {"num_proc": 2})
    assert first["error"] == second["error"] == ("", "")
    assert sorted(calls_in(tmp_path)) == ["0:10", "0:11", "0:2"]
    assert first["ids"] == second["ids"] == EXPECTED
    assert len(second["files"]) == 2


def test_a_transform_that_does_not_pickle_lets_each_rank_map(ranks, tmp_path):
    first, second = ranks(2).run(map_with, "transform", str(tmp_path), {})
    assert calls_in(tmp_path) == ["0:2", "1:2", "0:21", "1:21"]
    assert first["ids"] == second["ids"] == EXPECTED


def test_ranks_wait_for_the_mapping_as_long_as_it_takes(ranks, tmp_path):
    first, second = ranks(2).run(map_with, "memory", str(tmp_path), {}, "add_one", {"ddp_timeout": 2}, 2)
    assert first["error"] == second["error"] == ("", "")
    assert calls_in(tmp_path) == ONCE


def test_a_map_function_that_fails_fails_every_rank(ranks, tmp_path):
    first, second = ranks(2).run(map_with, "memory", str(tmp_path), {}, "fail_late")
    assert calls_in(tmp_path) == ONCE
    for kind, text in (first["error"], second["error"]):
        assert kind == "DataError"
        assert "found no 'no column of this name'. The columns of the train set are input_ids" in text
    assert second["error"][1].startswith("On rank 0: ")
    assert first["loss"] == second["loss"] == []


@pytest.mark.long
def test_four_ranks(ranks, tmp_path):
    found = ranks(4).run(map_with, "memory", str(tmp_path), {})
    assert calls_in(tmp_path) == ONCE
    assert [one["ids"] for one in found] == [EXPECTED] * 4


def test_evaluation_and_prediction_map_their_sets(ranks, tmp_path):
    first, second = ranks(2).run(evaluate_mapped, str(tmp_path))
    assert first == second == {"after validate": ["eval"], "after predict": ["eval", "predict"]}
    assert sorted(calls_in(tmp_path)) == ["0:2", "0:2", "0:5", "0:6"]

"""The stages of which memory is measured."""

from hfbridge.evaluation.memory import MemoryTracker


def test_stages_are_reported_under_the_native_names():
    memory, metrics = MemoryTracker(False), {}
    memory.begin("init")
    memory.begin("eval")
    memory.end("eval", metrics)
    assert {"init_mem_cpu_alloc_delta", "eval_mem_cpu_peaked_delta", "before_init_mem_cpu"} <= metrics.keys()
    metrics.clear()
    memory.begin("test")
    memory.end("test", metrics)
    assert {name.partition("_mem")[0] for name in metrics} == {"test"}


def test_a_stage_within_another_is_not_measured():
    memory, within, whole = MemoryTracker(False), {}, {}
    memory.begin("init")
    memory.begin("train")
    memory.begin("eval")
    memory.end("eval", within)
    memory.end("train", whole)
    assert not within
    assert "train_mem_cpu_alloc_delta" in whole


def test_after_an_error_nothing_goes_on():
    memory = MemoryTracker(False)
    memory.begin("train")
    memory.abandon()
    assert (memory.peak_monitoring, memory.cur_stage) == (False, None)
    MemoryTracker(True).abandon()


def test_nothing_is_measured_by_default():
    memory, metrics = MemoryTracker(True), {}
    memory.begin("init")
    memory.begin("train")
    memory.end("train", metrics)
    assert metrics == {}

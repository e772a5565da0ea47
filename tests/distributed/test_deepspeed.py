"""DeepSpeed on several ranks: the same job on the native Trainer and on hfbridge, both live."""

import json

import pytest

from tests.distributed.zero import (
    bring_optimizer,
    count_engines,
    keep_files,
    load_best_on_both,
    resume_both_ways,
    resume_elsewhere,
    run_by_name,
    run_zero_job,
    save_and_generate,
    train_in_parts,
)
from tests.parity.engines import Job

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed, pytest.mark.slow]

SETTINGS = {"gradient_accumulation_steps": 4, "num_train_epochs": 2, "max_grad_norm": 0.3}
# That of the usual tutorial.
TUTORIAL = {
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu"},
        "allgather_bucket_size": 5e8,
        "reduce_bucket_size": 5e8,
    },
    "bf16": {"enabled": True},
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
}


def zero(stage, **more):
    """Make a configuration that leaves to the settings what it can."""
    return {
        "zero_optimization": {"stage": stage, **more},
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "kind", ["llama", "distilbert", "bert-qa", "gpt2", pytest.param("t5", marks=pytest.mark.long)]
)
def test_zero_equals_native(ranks, kind, stage):
    job = Job(kind, {**SETTINGS, "deepspeed": zero(stage)}, eval_rows=0)
    found = ranks(2).run(run_zero_job, job)
    assert found[0]["collated"] != found[1]["collated"]
    assert max(row.get("grad_norm", 0) for row in found[0]["rows"]) > 0.3  # clipping was at work


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.long)])
def test_evaluations_equal_native(ranks, stage, bf16):
    evaluations = {"eval_strategy": "steps", "eval_steps": 2, "bf16": bf16}
    ranks(2).run(run_zero_job, Job("llama", {**SETTINGS, **evaluations, "deepspeed": zero(stage)}))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["llama", "bert-regression"])
def test_bf16_equals_native(ranks, kind, stage):
    job = Job(kind, {**SETTINGS, "bf16": True, "deepspeed": zero(stage)}, eval_rows=0)
    ranks(2).run(run_zero_job, job)


@pytest.mark.long  # three minutes for DeepSpeed to compile that optimizer
@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_on_the_host_equals_native(ranks, stage):
    config = zero(stage, offload_optimizer={"device": "cpu"})
    ranks(2).run(run_zero_job, Job("llama", {**SETTINGS, "deepspeed": config}, eval_rows=0))


def test_values_that_depend_on_the_model_equal_native(ranks):
    auto = (
        "reduce_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_gather_16bit_weights_on_model_save",
    )
    config = zero(3, **dict.fromkeys(auto, "auto"), sub_group_size=1e9, overlap_comm=True)
    ranks(2).run(run_zero_job, Job("llama", {**SETTINGS, "deepspeed": config}, eval_rows=0))


def test_sharded_small_parameters_equal_native(ranks):
    config = zero(3, stage3_param_persistence_threshold=0)
    ranks(2).run(run_zero_job, Job("gpt2", {**SETTINGS, "deepspeed": config}, eval_rows=0))


@pytest.mark.long
@pytest.mark.parametrize("is_file", [False, True])
def test_the_tutorials_configuration_works_unchanged(ranks, is_file, tmp_path):
    given = TUTORIAL
    if is_file:
        given = str(tmp_path / "ds_config.json")
        (tmp_path / "ds_config.json").write_text(json.dumps(TUTORIAL))
    settings = {"deepspeed": given, "gradient_accumulation_steps": 8, "bf16": True, "num_train_epochs": 2}
    found = ranks(2).run(run_zero_job, Job("llama", settings, rows=70, eval_rows=0))
    assert len(found[0]["steps"]) == 2 * 2 + 1


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("sections", ["optimizer", "scheduler", "both"])
def test_sections_that_deepspeed_builds_equal_native(ranks, sections, stage):
    config = zero(stage)
    if sections != "scheduler":
        auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
        config["optimizer"] = {"type": "AdamW", "params": {**auto, "torch_adam": True}}
    if sections != "optimizer":
        names = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
        config["scheduler"] = {"type": "WarmupDecayLR", "params": dict.fromkeys(names, "auto")}
    ranks(2).run(run_zero_job, Job("distilbert", {**SETTINGS, "deepspeed": config}, eval_rows=0))


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_three_ranks_equal_native(ranks, stage):
    config = zero(stage, reduce_bucket_size=2000, allgather_bucket_size=3000)
    ranks(3).run(run_zero_job, Job("gpt2", {**SETTINGS, "deepspeed": config}, eval_rows=0, rows=70))


NAMES = {
    "deepspeed": 2,
    "deepspeed_stage_1": 1,
    "deepspeed_stage_2": 2,
    "deepspeed_stage_2_offload": 2,
    "deepspeed_stage_3": 3,
    "deepspeed_stage_3_offload": 3,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_validates_predicts_and_trains(ranks, name):
    found, other = ranks(2).run(run_by_name, name, {})
    plain = ranks(2).run(run_by_name, "ddp", {})[0]
    assert (found["strategy"], found["stage"]) == ("DeepSpeedStrategy", NAMES[name])
    assert found["weights"] == other["weights"]
    assert found["before"] == pytest.approx(plain["before"], rel=1e-6)
    assert found["after"] == other["after"] < found["before"] + 1
    assert abs(found["predicted"] - plain["predicted"]).max() < 1e-6  # another order of the same sums
    assert not found["is_live"]


@pytest.mark.parametrize("is_factory", [False, True])
def test_a_model_is_loaded_in_parts_and_trains_as_natively(ranks, is_factory):
    for found in ranks(2).run(train_in_parts, zero(3), is_factory):
        assert found["parameters"] == found["in parts"] > 0
        assert found["held"] == 0


def test_a_model_in_parts_is_saved_and_generates(ranks):
    found = ranks(2).run(save_and_generate, zero(3, stage3_param_persistence_threshold=0))
    for rank, told in enumerate(found):
        assert told["same logits"]
        assert told["again"]
        assert told["same tokens"] == [True, True]
        assert told["length"] == 4 + 3 + 4 * rank
        assert told["held"] == 0 < told["whole"]


SAVING = {"save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_either_engine_goes_on_from_either_checkpoint(ranks, stage):
    config = zero(stage)
    if stage == 3:
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    job = Job("distilbert", {**SETTINGS, **SAVING, "num_train_epochs": 3, "deepspeed": config}, eval_rows=0)
    found = ranks(2).run(resume_both_ways, job)[0]
    assert set(found["steps"].values()) == {3}
    assert found["names"]["native"] == found["names"]["bridged"]
    assert "global_step3" in found["names"]["bridged"]


@pytest.mark.parametrize(
    ("written", "resumed", "told"),
    [
        ({"deepspeed": zero(2)}, {}, "was written under DeepSpeed"),
        ({}, {"deepspeed": zero(2)}, "was written without DeepSpeed"),
    ],
)
def test_a_checkpoint_of_another_strategy_is_refused(ranks, written, resumed, told):
    for error in ranks(2).run(resume_elsewhere, written, resumed):
        assert told in error


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_the_best_weights_are_loaded_at_the_end(ranks, stage):
    for found in ranks(2).run(load_best_on_both, zero(stage)):
        assert len(found["best"]) == 1
        assert max(found["best"]) < found["last"]


def test_an_optimizer_of_the_whole_model_is_refused(ranks):
    for error in ranks(2).run(bring_optimizer, zero(2)):
        assert "optimizer_cls_and_kwargs" in error


def test_a_callback_that_writes_single_files_is_refused_before_training(ranks):
    for error, steps in ranks(2).run(keep_files, zero(2)):
        assert "ModelCheckpoint write single files" in error
        assert steps == 0


def test_an_engine_ends_with_its_trainer(ranks):
    before = ranks(2).run(count_engines)
    assert ranks(2).run(count_engines) == before

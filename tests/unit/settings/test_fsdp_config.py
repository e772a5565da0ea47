"""What `fsdp` and `fsdp_config` may say, and what it becomes."""

import json

import pytest
from transformers import TrainingArguments

from hfbridge.errors import SettingsError
from hfbridge.settings import Settings, translate


def choice(strategy=None, **settings):
    arguments = {} if strategy is None else {"strategy": strategy}
    return translate(Settings(**settings), arguments).strategy


def options(strategy=None, **settings):
    found = dict(choice(strategy, **settings).options)
    del found["timeout"]
    return found


def complaints(strategy=None, **settings):
    with pytest.raises(SettingsError) as caught:
        choice(strategy, **settings)
    return "\n".join(f"{problem.subject} {problem.text}" for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("fsdp", "config", "kind", "wanted"),
    [
        (True, None, "fsdp2", {}),
        (True, {"version": 1}, "fsdp", {}),
        (True, {"fsdp_version": "1"}, "fsdp", {}),
        ("full_shard", None, "fsdp2", {"reshard_after_forward": True}),
        ("shard_grad_op auto_wrap", {}, "fsdp2", {"reshard_after_forward": False}),
        (
            ["shard_grad_op", "offload"],
            {"version": 1},
            "fsdp",
            {"reshard_after_forward": "shard_grad_op", "cpu_offload": True},
        ),
        ("hybrid_shard", {"version": 1}, "fsdp", {"reshard_after_forward": "hybrid_shard"}),
        ("full_shard", {"reshard_after_forward": "false"}, "fsdp2", {"reshard_after_forward": False}),
        (
            True,
            {"fsdp_transformer_layer_cls_to_wrap": "Block, Other", "activation_checkpointing": "True"},
            "fsdp2",
            {"transformer_layer_cls_to_wrap": ["Block", "Other"], "activation_checkpointing": True},
        ),
        (
            True,
            {"version": 1, "backward_prefetch": "backward_pre", "limit_all_gathers": "false", "xla": False},
            "fsdp",
            {"backward_prefetch": "backward_pre", "limit_all_gathers": False},
        ),
        (
            True,
            {
                "auto_wrap_policy": "SIZE_BASED_WRAP",
                "min_num_params": 100,
                "state_dict_type": "FULL_STATE_DICT",
            },
            "fsdp2",
            {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 100},
        ),
        (True, {"cpu_ram_efficient_loading": True}, "fsdp2", {}),
    ],
)
def test_each_spelling_is_read_as_natively(fsdp, config, kind, wanted):
    settings = {"fsdp": fsdp, "fsdp_config": config}
    assert choice(**settings).kind == kind
    assert options(**settings) == wanted


@pytest.mark.parametrize(("strategy", "version"), [("fsdp", 1), ("fsdp2", 2)])
def test_a_named_strategy_reads_the_config(strategy, version):
    assert options(strategy) == {}
    assert options(strategy, fsdp_config={"cpu_offload": True}) == {"cpu_offload": True}
    assert options(strategy, fsdp=True, fsdp_config={"version": version}) == {}
    other = {"version": 3 - version}
    assert "names the other version" in complaints(strategy, fsdp_config=other)
    assert "conflicts with `fsdp=True`" in complaints(strategy, fsdp=True, fsdp_config=other)


def test_a_config_may_be_json_or_a_file(tmp_path):
    path = tmp_path / "fsdp.json"
    path.write_text(json.dumps({"fsdp_version": 1, "fsdp_forward_prefetch": True}))
    for config in (str(path), path, path.read_text()):
        assert choice(fsdp=True, fsdp_config=config).kind == "fsdp"
        assert options(fsdp=True, fsdp_config=config) == {"forward_prefetch": True}
    assert "neither a dictionary nor the path" in complaints(fsdp=True, fsdp_config="nowhere.json")


def test_training_arguments_that_were_made_with_fsdp_are_taken():
    arguments = TrainingArguments(
        use_cpu=True, fsdp="full_shard offload", fsdp_config={"fsdp_transformer_layer_cls_to_wrap": "Block"}
    )
    chosen = translate(Settings.of(arguments), {}).strategy
    assert chosen.kind == "fsdp2"
    assert chosen.options["transformer_layer_cls_to_wrap"] == ["Block"]
    assert chosen.options["cpu_offload"] is True
    assert chosen.notes == ()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"fsdp": "full_shrad"}, "did you mean full_shard?"),
        ({"fsdp": "no_shard"}, 'set fsdp_config={"version": 1}'),
        ({"fsdp": 1}, "must be"),
        ({"fsdp_config": {"version": 3}}, "it must be 1 or 2"),
        ({"fsdp_config": {"reshard": True}}, "did you mean reshard_after_forward?"),
        ({"fsdp_config": {"xla": True}}, "TPUs are not supported"),
        ({"fsdp_config": {"xla_fsdp_grad_ckpt": "true"}}, "TPUs are not supported"),
        ({"fsdp_config": {"xla_fsdp_settings": {"a": 1}}}, "TPUs are not supported"),
        ({"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}, "checkpoints hold full weights"),
        ({"fsdp_config": {"state_dict_type": "full"}}, "it must be one of FULL_STATE_DICT"),
        ({"fsdp_config": {"cpu_offload": "false"}}, "any string switches it on"),
        ({"fsdp_config": {"activation_checkpointing": 3}}, "it must be True or False"),
        ({"fsdp_config": {"auto_wrap_policy": "transformer_based_wrap"}}, "it must be one of TRANSFORMER"),
        ({"fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP"}}, "needs min_num_params"),
        ({"fsdp_config": {"min_num_params": 5}}, 'with auto_wrap_policy="SIZE_BASED_WRAP" only'),
        ({"fsdp_min_num_params": 5}, 'with auto_wrap_policy="SIZE_BASED_WRAP" only'),
        (
            {"fsdp_config": {"auto_wrap_policy": "NO_WRAP", "transformer_layer_cls_to_wrap": "A"}},
            'with auto_wrap_policy="TRANSFORMER_BASED_WRAP" only',
        ),
        ({"fsdp_config": {"transformer_layer_cls_to_wrap": 7}}, "the name of a class, or a list"),
        ({"fsdp_config": {"min_num_params": -1}}, "0 or more"),
        ({"fsdp_config": {"version": 2, "fsdp_version": 2}}, "has a key twice"),
        ({"fsdp": True, "fsdp_config": {"reshard_after_forward": "full_shard"}}, "must be True or False"),
        (
            {"fsdp": True, "fsdp_config": {"version": 1, "reshard_after_forward": True}},
            "one of full_shard, shard_grad_op",
        ),
        (
            {"fsdp": True, "fsdp_config": {"version": 1, "cpu_ram_efficient_loading": True}},
            "version 2 loads each rank's shard only",
        ),
        ({"fsdp": True, "fsdp_config": {"version": 1, "use_orig_params": "false"}}, "leave it out"),
        ({"fsdp": True, "fsdp_config": {"version": 1, "backward_prefetch": "pre"}}, "one of BACKWARD_PRE"),
        ({"fsdp": True, "torch_compile": True}, "a compiled model cannot be sharded"),
        (
            {
                "fsdp": True,
                "activation_checkpointing": True,
                "fsdp_config": {"activation_checkpointing": True},
            },
            "leave one of them out",
        ),
        (
            {
                "fsdp": True,
                "save_only_model": True,
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
            },
            "does not go with load_best_model_at_end",
        ),
    ],
)
def test_what_is_not_carried_is_refused_by_name(settings, told):
    assert told in complaints(**settings)


@pytest.mark.parametrize(
    ("strategy", "settings", "told"),
    [
        ("fsdp2", {"fsdp_config": {"reshard_after_forward": "full_shard"}}, "must be True or False"),
        ("fsdp", {"fsdp_config": {"cpu_ram_efficient_loading": True}}, "refused"),
        ("fsdp", {"torch_compile": True}, "a compiled model cannot be sharded"),
        (
            "fsdp2",
            {"activation_checkpointing": True, "fsdp_config": {"activation_checkpointing": True}},
            "leave one of them out",
        ),
    ],
)
def test_a_named_strategy_refuses_the_same(strategy, settings, told):
    assert told in complaints(strategy, **settings)


def test_what_nobody_reads_leaves_a_note():
    notes = choice(fsdp=True, fsdp_config={"forward_prefetch": True, "use_orig_params": True}).notes
    assert notes == tuple(
        f"fsdp_config: {key} has no effect in FSDP2, as in the HF Trainer"
        for key in ("forward_prefetch", "use_orig_params")
    )
    assert choice(fsdp_config={"cpu_offload": True}).notes == (
        "fsdp_config has no effect here: the strategy is not FSDP",
    )

"""By which strategy the ranks of a run share the work: what is said, and what contradicts."""

from datetime import timedelta

import pytest
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from hfbridge import Settings, SettingsError, strategies
from hfbridge.settings import Launched, translate
from hfbridge.settings.strategy_choice import NAMES, NAMES_IN_SHORT, choose_strategy

ZERO = {"deepspeed": {"zero_optimization": {"stage": 2}}}


@pytest.mark.parametrize(
    ("settings", "strategy", "has_several", "kind"),
    [
        ({}, None, False, "single"),
        ({}, "auto", True, "ddp"),
        ({}, "ddp", False, "ddp"),
        ({"fsdp": True}, None, True, "fsdp2"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, None, True, "fsdp"),
        ({"fsdp": True}, "fsdp2", True, "fsdp2"),
        ({}, "fsdp", True, "fsdp"),
        (ZERO, None, False, "deepspeed"),
        (ZERO, "deepspeed", True, "deepspeed"),
        ({}, "deepspeed_stage_3_offload", True, "deepspeed"),
        ({}, strategies.DDPStrategy(), True, "given"),
        ({}, SingleDeviceStrategy("cpu"), False, "given"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "lightning_module") else str(value),
)
def test_what_is_said_chooses(settings, strategy, has_several, kind):
    assert choose_strategy(Settings(**settings), strategy, has_several=has_several).kind == kind


@pytest.mark.parametrize(
    ("settings", "strategy", "says"),
    [
        ({}, "dpp", "is unknown; did you mean ddp"),
        ({}, "ddp_spawn", "is unknown"),
        (
            {"fsdp": True},
            "ddp",
            '`strategy="ddp"` conflicts with `fsdp=True`, which is fsdp2, in the settings',
        ),
        (ZERO, "fsdp", "conflicts with .* which is deepspeed, in the settings; set only one"),
        ({"fsdp": True, "fsdp_config": {"version": 2}}, "fsdp", "which is fsdp2, in the settings; set only"),
        ({"fsdp": True}, DDPStrategy(), r"`strategy=DDPStrategy\(\.\.\.\)` conflicts with `fsdp=True`"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "lightning_module") else str(value),
)
def test_what_contradicts_is_told(settings, strategy, says):
    with pytest.raises(ValueError, match=says):
        choose_strategy(Settings(**settings), strategy, has_several=True)


def test_the_short_list_of_names_is_true() -> None:
    with pytest.raises(ValueError, match="is unknown") as caught:
        choose_strategy(Settings(), "zero", has_several=True)
    assert len(str(caught.value)) < 170
    listed = ["ddp", "fsdp", "fsdp2"]
    listed += [f"deepspeed_stage_{stage}" for stage in (1, 2, 3)]
    listed += [f"deepspeed_stage_{stage}_offload" for stage in (2, 3)]
    assert NAMES_IN_SHORT == "ddp, fsdp, fsdp2, deepspeed_stage_1, _2 and _3 (_2 and _3 also with _offload)"
    assert NAMES_IN_SHORT in str(caught.value)
    assert NAMES.keys() - set(listed) == {
        "deepspeed",
        "ddp_find_unused_parameters_true",
        "ddp_find_unused_parameters_false",
    }


def test_ddp_is_told_what_the_settings_say():
    settings = Settings(ddp_timeout=60, ddp_backend="gloo", ddp_bucket_cap_mb=10, ddp_static_graph=True)
    assert choose_strategy(settings, "ddp", has_several=True).options == {
        "timeout": timedelta(seconds=60),
        "process_group_backend": "gloo",
        "bucket_cap_mb": 10,
        "static_graph": True,
    }
    default = choose_strategy(Settings(ddp_bucket_cap_mb=25), "ddp", has_several=True).options
    assert "bucket_cap_mb" not in default  # torch would take it for the first bucket's size, too


def test_a_name_may_say_what_no_setting_does():
    options = choose_strategy(
        Settings(ddp_find_unused_parameters=False), "ddp_find_unused_parameters_true", has_several=True
    ).options
    assert options["find_unused_parameters"] is True


def test_what_nobody_reads_leaves_a_note():
    (note,) = choose_strategy(Settings(ddp_bucket_cap_mb=10), None, has_several=False).notes
    assert note.startswith("ddp_bucket_cap_mb = 10 has no effect here")
    assert not choose_strategy(Settings(ddp_bucket_cap_mb=10), "ddp", has_several=True).notes


def test_any_strategy_of_lightnings_can_be_passed_and_nothing_else():
    assert choose_strategy(Settings(), ModelParallelStrategy(), has_several=True).kind == "given"
    with pytest.raises(ValueError, match=r"must be a strategy, got 3"):
        choose_strategy(Settings(), 3, has_several=True)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"auto_find_batch_size": True}, "cannot start again with several ranks"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches=False gives ranks different numbers"),
    ],
    ids=str,
)
def test_what_does_not_fit_several_ranks_is_refused(settings, text):
    with pytest.raises(SettingsError, match=text):
        translate(Settings(**settings), {"devices": 2})
    translate(Settings(**settings), {"devices": 1})


def test_launched_ranks_are_lightnings_devices_and_nodes():
    plan = translate(Settings(), {}, launched=Launched(world_size=8, local_world_size=4))
    assert plan.strategy.kind == "ddp"
    assert (plan.trainer_arguments["devices"], plan.trainer_arguments["num_nodes"]) == (4, 2)


@pytest.mark.parametrize("name", [*NAMES, "auto", None])
def test_every_name_makes_a_plan(name):
    assert "strategy" not in dict(translate(Settings(), {"strategy": None}).trainer_arguments)
    kind = translate(Settings(), {"strategy": name, "devices": 2}).strategy.kind
    assert kind == ("ddp" if name in (None, "auto") else NAMES[name][0])

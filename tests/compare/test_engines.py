"""Names of engines: what they stand for, and what is said of wrong ones, all at once."""

import importlib.util
from typing import Any

import pytest

from hfbridge import JobError, MissingDependencyError
from hfbridge.compare import ENGINES
from hfbridge.compare.engines import Engine, pairs_of, parse_engines


@pytest.mark.parametrize(
    ("name", "kind", "strategy", "normalization", "slug"),
    [
        ("native", "native", None, "native", "native"),
        ("native:deepspeed_stage_2", "native", "deepspeed_stage_2", "native", "native-deepspeed_stage_2"),
        ("accelerate", "accelerate", None, "native", "accelerate"),
        ("lightning:fsdp2", "lightning", "fsdp2", "native", "lightning-fsdp2"),
        ("lightning@exact", "lightning", None, "exact", "lightning-exact"),
        ("lightning:ddp@exact", "lightning", "ddp", "exact", "lightning-ddp-exact"),
    ],
)
def test_a_name_says_kind_strategy_and_normalization(
    name: str, kind: str, strategy: str | None, normalization: str, slug: str
) -> None:
    found = Engine.parse(name)
    assert (found.kind, found.strategy, found.normalization, found.slug) == (
        kind,
        strategy,
        normalization,
        slug,
    )
    assert found.kind in ENGINES


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lightening", "is unknown; did you mean lightning?; there are native, accelerate, lightning"),
        ("", "is unknown"),
        ("lightning:deepspeed_stage_4", "'deepspeed_stage_4' is unknown; did you mean deepspeed_stage_"),
        ("lightning:", "'' is unknown; there are ddp, "),
        ("lightning@exakt", "@exakt is unknown; did you mean exact?"),
        ("native@exact", "has a loss of its own"),
        ("accelerate:ddp", "takes no strategy"),
        ("native:fsdp2", "FSDP on GPUs only"),
        ("native:ddp_find_unused_parameters_true", "possible are ddp, deepspeed_stage_1"),
    ],
)
def test_a_wrong_name_is_told_with_what_is_possible(name: str, said: str) -> None:
    with pytest.raises(JobError, match="nothing was started") as caught:
        parse_engines(["native", name])
    assert said in " ".join(str(caught.value).split())


def test_all_wrong_names_are_told_at_once() -> None:
    with pytest.raises(JobError) as caught:
        parse_engines(["nativ", "lightning", "lightning", "accelerate:x"])
    assert [problem.subject for problem in caught.value.problems] == ["nativ", "lightning", "accelerate:x"]


@pytest.mark.parametrize("names", [[], ["native"]])
def test_one_engine_alone_cannot_be_compared(names: list[str]) -> None:
    with pytest.raises(JobError, match="two at least"):
        parse_engines(names)


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["native", "lightning"], [("native", "lightning")]),
        (
            ["native", "lightning:ddp", "native:ddp"],
            [("native", "lightning:ddp"), ("native", "native:ddp"), ("native:ddp", "lightning:ddp")],
        ),
        (["native:ddp", "lightning:ddp"], [("native:ddp", "lightning:ddp")]),  # once
        (
            ["accelerate", "lightning", "native"],
            [("accelerate", "lightning"), ("accelerate", "native"), ("native", "lightning")],
        ),
        (
            ["native", "native:ddp", "lightning:ddp@exact", "lightning:fsdp2"],
            [("native", "native:ddp"), ("native", "lightning:ddp@exact"), ("native", "lightning:fsdp2")],
        ),
    ],
)
def test_each_engine_is_judged_beside_the_first_and_the_native_one_of_its_strategy(
    names: list[str], pairs: list[tuple[str, str]]
) -> None:
    assert [(theirs.name, ours.name) for theirs, ours in pairs_of(parse_engines(names))] == pairs


def test_a_string_is_no_list() -> None:
    with pytest.raises(JobError, match=r"give a list of names: \['native', 'lightning'\]"):
        parse_engines("native,lightning")


def test_a_package_that_is_missing_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def find_all_but_deepspeed(name: str, *given: Any) -> Any:
        return None if name == "deepspeed" else find(name, *given)

    monkeypatch.setattr(importlib.util, "find_spec", find_all_but_deepspeed)
    with pytest.raises(MissingDependencyError, match=r'pip install "hfbridge\[deepspeed\]"'):
        parse_engines(["native", "lightning:deepspeed_stage_2"])
    parse_engines(["native", "lightning:fsdp2"])

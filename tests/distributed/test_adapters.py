"""PEFT's adapters by configuration, on several ranks."""

import pytest

from tests.distributed.adapters import run_by_strategy, run_on_both, write_llama
from tests.distributed.matrix import deviation
from tests.distributed.test_matrix import TOLERANCE
from tests.parity.test_adapters import KINDS, write_model

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    # peft asks by a name of transformers 4.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

SHORT = {"gradient_accumulation_steps": 2, "max_steps": 3, "max_grad_norm": 0.3}


def test_ddp_equals_native(ranks, tmp_path):
    model = write_model(KINDS["lora"].model, str(tmp_path / "model"))
    first, second = ranks(2).run(run_on_both, "lora", model, SHORT)
    assert first["collated"] != second["collated"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Where a model is, written before any rank reads it."""
    return write_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model):
    """The way of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("alone"))
        return run_by_strategy(model, "auto", 1)


@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp2",
        "deepspeed_stage_3",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("fsdp", "deepspeed_stage_1", "deepspeed_stage_2")
        ),
    ],
)
def test_any_strategy_goes_the_way_of_one_process(ranks, model, alone, strategy):
    expected, counts = alone
    (found, counted), _ = ranks(2).run(run_by_strategy, model, strategy, 2)
    apart = deviation(expected, found)
    assert all(value < TOLERANCE for value in apart.values()), apart
    assert counted == counts

"""Order of samples: every micro-batch of every epoch holds the rows the native Trainer takes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.parity.engines import Job, Record, run_both


def order_of(record: Record, *, epoch: int, rows: int, seed: int) -> list[int]:
    """Return the order epoch `epoch` should have, by accelerate's rule."""
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    return torch.randperm(rows, generator=generator).tolist()


@pytest.mark.parametrize(
    ("rows", "size", "accumulation", "more"),
    [
        (22, 4, 1, {}),
        (22, 4, 3, {"data_seed": 11}),
        (24, 4, 2, {"seed": 5}),
        (7, 8, 2, {}),  # fewer rows than a micro-batch
        (13, 1, 5, {"seed": 5, "data_seed": 6}),
        (22, 4, 3, {"dataloader_drop_last": True}),
        (8, 4, 3, {"dataloader_drop_last": True, "data_seed": 1}),
        (9, 2, 2, {"train_sampling_strategy": "sequential"}),
        (9, 2, 2, {"train_sampling_strategy": "sequential", "dataloader_drop_last": True}),
        (17, 3, 2, {"eval_strategy": "epoch", "eval_on_start": True}),
        (17, 3, 2, {"bf16": True}),
    ],
)
def test_three_epochs(rows: int, size: int, accumulation: int, more: dict[str, object]) -> None:
    job = Job(
        "distilbert",
        {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": 3,
            **more,
        },
        rows=rows,
    )
    _theirs, ours = run_both(job)
    per_epoch = rows // size if more.get("dataloader_drop_last") else -(-rows // size)
    assert len(ours.collated) == 3 * per_epoch
    for epoch in range(3):
        drawn = [i for batch in ours.collated[epoch * per_epoch : (epoch + 1) * per_epoch] for i in batch]
        if more.get("train_sampling_strategy") == "sequential":
            expected = list(range(rows))
        else:
            seed = more.get("data_seed", more.get("seed", 42))
            expected = order_of(ours, epoch=epoch, rows=rows, seed=int(str(seed)))
        assert drawn == expected[: len(drawn)]
        assert len(set(drawn)) == len(drawn) == min(rows, per_epoch * size)


@pytest.mark.parametrize("kind", ["llama", "bert-qa"])
@pytest.mark.parametrize("max_steps", [1, 5])
def test_cut_short(kind: str, max_steps: int) -> None:
    """A run that ends within an epoch collates no further than the native one: one micro-batch in hand."""
    settings = {"max_steps": max_steps, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    _, ours = run_both(Job(kind, settings, rows=22, eval_rows=0))
    # 8 micro-batches and 4 windows an epoch.
    assert len(ours.collated) == {1: 3, 5: 11}[max_steps]


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.integers(1, 30),
    size=st.integers(1, 9),
    accumulation=st.integers(1, 5),
    epochs=st.floats(0.1, 2.9),
    data_seed=st.none() | st.integers(0, 2**31),
    drop_last=st.booleans(),
)
def test_any_length(
    rows: int, size: int, accumulation: int, epochs: float, data_seed: int | None, drop_last: bool
) -> None:
    job = Job(
        "distilbert",
        {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": epochs,
            "data_seed": data_seed,
            "dataloader_drop_last": drop_last and rows >= size,  # otherwise there is no batch at all
        },
        rows=rows,
        eval_rows=0,
    )
    run_both(job)
